"""Settings from flags, environment and file: which wins, and that every wrong one is named with its source."""

import dataclasses
import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hayhost.errors import HostError, SettingsError
from hayhost.settings import FIELDS, Settings, load, parse_size


def problems(flags: dict[str, Any], file: Path | None = None, environ: dict[str, str] | None = None) -> list[str]:
    """The lines of the error that these sources lead to."""
    with pytest.raises(SettingsError) as caught:
        load(flags, file, environ or {})
    return str(caught.value).splitlines()


def problem(name: str, value: object) -> str:
    """What is said of one wrong flag, without the flag's name."""
    [line] = problems({name: value})
    prefix = f"--{name.replace('_', '-')}: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def test_nothing_given_is_the_defaults() -> None:
    assert load({}, None, {}) == Settings()
    assert load(dict.fromkeys(FIELDS), None, {"OTHER": "1", "HAYHOST_CONFIG": "x"}) == Settings()


def test_the_defaults_that_the_contract_names() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.mode) == ("127.0.0.1", 8000, "production")
    assert (settings.max_body, settings.hook_timeout, settings.idle_timeout) == (10 * 1024 * 1024, 30.0, 300.0)


def test_every_default_is_allowed_and_explained() -> None:
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith(".")
        if field.default is not None:
            text = "".join(field.default) if isinstance(field.default, tuple) else str(field.default)
            assert load({name: text}, None, {}) == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "hayhost.toml"
    file.write_text("port = 1\nspares = 1\nmax_workers = 1\nmax_queue = 1\n")
    environ = {"HAYHOST_PORT": "2", "HAYHOST_SPARES": "2", "HAYHOST_MAX_WORKERS": "2"}
    flags = {"port": "3", "spares": 3, "max_workers": None}
    settings = load(flags, file, environ, port=4, spares=4, max_workers=4, max_queue=4, max_requests=4)
    taken = (settings.port, settings.spares, settings.max_workers, settings.max_queue, settings.max_requests)
    assert taken == (3, 3, 2, 1, 4)


def test_all_problems_at_once_each_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "hayhost.toml"
    file.write_text('port = "x"\nmax_worker = 3\nmode = "staging"\n[tls]\ncert = 1\n')
    environ = {"HAYHOST_LOG_LEVEL": "loud", "HAYHOST_MAX_BODY": "huge"}
    names = ", ".join(FIELDS)
    assert problems({"hook_timeout": "soon", "host": ""}, file, environ) == [
        f"{file}: max_worker: no such setting; there are {names}",
        f"{file}: tls: no such setting; there are {names}",
        f"{file}: port: 'x' is not a number",
        f"{file}: mode: 'staging' is not one of production, test",
        "environment: HAYHOST_MAX_BODY: 'huge' is not a size such as 10MiB",
        "environment: HAYHOST_LOG_LEVEL: 'loud' is not one of debug, info, warning, error",
        "--hook-timeout: 'soon' is not a number",
        "--host: '' is not a non-empty string",
    ]


def test_a_wrong_value_is_named_although_another_source_wins() -> None:
    assert problems({"port": "1"}, None, {"HAYHOST_PORT": "x"}) == ["environment: HAYHOST_PORT: 'x' is not a number"]


def test_it_ends_a_command_with_1() -> None:
    assert issubclass(SettingsError, HostError)
    assert SettingsError.exit_code == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "0", 0),
        ("port", 65535, 65535),
        ("port", 80.0, 80),
        ("port", " 80 ", 80),
        ("spares", "64", 64),
        ("request_timeout", "0.01", 0.01),
        ("request_timeout", 5, 5.0),
        ("request_timeout", "1e3", 1000.0),
        ("drain_timeout", 0, 0.0),
        ("max_body", "1MiB", 1 << 20),
        ("max_body", "4096", 4096),
        ("max_body", 4096, 4096),
        ("mode", "test", "test"),
        ("log_format", "console", "console"),
        ("host", "::1", "::1"),
        ("orgs", "orgs.toml", Path("orgs.toml")),
        ("orgs", Path("orgs.toml"), Path("orgs.toml")),
    ],
)
def test_right_values(name: str, value: object, expected: object) -> None:
    got = getattr(load({name: value}, None, {}), name)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("port", "-1", "'-1' is not from 0 to 65535"),
        ("port", 65536, "65536 is not from 0 to 65535"),
        ("port", 80.5, "80.5 is not a whole number"),
        ("port", "80.5", "'80.5' is not a number"),
        ("port", True, "True is not a number"),
        ("port", [80], "[80] is not a number"),
        ("port", float("nan"), "nan is not a number"),
        ("port", float("inf"), "inf is not a number"),
        ("port", dt.date(2026, 1, 2), "datetime.date(2026, 1, 2) is not a number"),
        ("spares", 65, "65 is not from 0 to 64"),
        ("max_workers", 0, "0 is not from 1 to 1e+09"),
        ("request_timeout", "0", "'0' is not from 0.01 to 1e+09"),
        ("request_timeout", "nan", "'nan' is not from 0.01 to 1e+09"),
        ("request_timeout", "inf", "'inf' is not from 0.01 to 1e+09"),
        ("request_timeout", 10**400, f"{10**400} is not a number"),
        ("drain_timeout", "-0.1", "'-0.1' is not from 0 to 1e+09"),
        ("max_body", "0", "'0' is not from 1 to 1e+09"),
        ("max_body", "10 parsecs", "'10 parsecs' is not a size such as 10MiB"),
        ("max_body", "9" * 5000, f"'{'9' * 5000}' is not a size such as 10MiB"),
        ("mode", "Test", "'Test' is not one of production, test"),
        ("mode", ["test"], "['test'] is not one of production, test"),
        ("host", 127, "127 is not a non-empty string"),
        ("orgs", "", "'' is not a path"),
        ("orgs", "a\0b", "'a\\x00b' is not a path"),
        ("orgs", 3, "3 is not a path"),
    ],
)
def test_wrong_values(name: str, value: object, said: str) -> None:
    assert problem(name, value) == said


_scalars = st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.times()


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(FIELDS)),
    value=_scalars | st.lists(_scalars, max_size=2) | st.dictionaries(st.text(), _scalars, max_size=2),
)
@example(name="request_timeout", value=10**400)
@example(name="max_body", value=10**5000)
def test_anything_is_a_setting_or_a_named_problem(name: str, value: object) -> None:
    said = ""
    try:
        got = getattr(load({name: value}, None, {}), name)
    except SettingsError as error:
        said = str(error)
    if said:
        assert said.startswith(f"--{name.replace('_', '-')}: ")
    else:
        assert type(got) is (type(FIELDS[name].default) if name != "orgs" else type(Path()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"port = ", "not valid TOML: Invalid value"),
        (b"port = 1\nport = 2\n", "not valid TOML: Cannot overwrite a value"),
        (b"host = '\xff'", "not valid TOML: 'utf-8' codec can't decode"),
        (b"port = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
        (b"port = " + b"[" * 100_000, "not valid TOML: "),
    ],
    ids=["value", "twice", "encoding", "number", "depth"],
)
def test_malformed_files(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "hayhost.toml"
    file.write_bytes(content)
    [line] = problems({}, file)
    assert line.startswith(f"{file}: {said}")


def test_unreadable_files(tmp_path: Path) -> None:
    assert problems({}, tmp_path / "gone") == [f"{tmp_path}/gone: cannot be read: No such file or directory"]
    assert problems({}, tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("1k", 1024),
        ("1K", 1024),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("2 MiB", 2 << 20),
        ("3G", 3 << 30),
        (" 10MiB\n", 10 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "+1", "1.5MiB", "1e3", "1TiB", "1mib", "1 0", "1iB", "0x10", "1_000"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size such as 10MiB: "):
        parse_size(text)


def test_folders_to_write_to_have_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert load({"writable": str(tmp_path)}, environ={}).writable == (str(tmp_path.resolve()),)
    for name, problem in (("file", "is no folder"), ("nothing", "does not exist")):
        with pytest.raises(SettingsError, match=f"--writable: '{tmp_path / name}' {problem}"):
            load({"writable": f"{tmp_path}:{tmp_path / name}"}, environ={})
