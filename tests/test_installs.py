"""Which org has which plugin: in test mode, in ``hayhost run``, and as a file declares it."""

import datetime as dt
import re
from pathlib import Path

import msgspec
import pytest

from hayhost.errors import SettingsError
from hayhost.installs import Auth, FileInstalls, Installation, SingleInstall, TestInstalls
from hayhost.layout import ORG_ID

ORGS = """
[orgs.acme]
name = "Acme Ltd"
[orgs.acme.plugins.stripe]
config = { toleranceSeconds = 60, since = 2026-01-02 }
auth = { methodId = "apiKey", credentials = { apiKey = "sk_5ecret" } }
[orgs.acme.plugins.crm]
enabled = false
[orgs."beta.2_x-y"]
[orgs."beta.2_x-y".plugins.crm]
[orgs.nothing]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "orgs.toml"
    file.touch(0o600)
    return file


def read(file: Path, text: str = ORGS) -> FileInstalls:
    file.write_text(text)
    return FileInstalls(file, ORG_ID.fullmatch)


def problems(file: Path, text: str) -> list[str]:
    """The lines of the error, each without the name of the file that it begins with."""
    with pytest.raises(SettingsError) as caught:
        read(file, text)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


def test_test_mode_knows_every_org() -> None:
    installs = TestInstalls()
    assert installs.find("any", "acme") == Installation("acme", "Test Org acme", {}, None, True, "")
    changed = Installation("acme", "Test Org acme", {"a": 1})
    installs.save("any", changed)
    assert installs.find("any", "acme") == changed
    for plugin, org in (("other", "acme"), ("any", "beta")):
        found = installs.find(plugin, org)
        assert found is not None
        assert found.config == {}


def test_what_is_disabled_in_test_mode_is_there_anew_when_it_is_used() -> None:
    installs = TestInstalls()
    installs.save("any", Installation("acme", "x", {"a": 1}))
    installs.save("any", Installation("acme", "x", {"a": 1}, enabled=False))
    assert installs.find("any", "acme") == Installation("acme", "Test Org acme")
    installs.save("any", Installation("acme", "x", enabled=False))  # and once more does nothing


def test_a_single_install_knows_no_other_org() -> None:
    installs = SingleInstall(Installation("acme", "Acme", problem="odd"))
    found = installs.find("any", "acme")
    assert found is not None
    assert found.problem == "odd"
    assert installs.find("any", "beta") is None
    installs.save("any", msgspec.structs.replace(found, enabled=False))
    assert installs.find("any", "acme") == Installation("acme", "Acme", enabled=False, problem="odd")


def test_a_file_in_full(file: Path) -> None:
    installs = read(file)
    auth = Auth("apiKey", {"apiKey": "sk_5ecret"})
    config = {"toleranceSeconds": 60, "since": dt.date(2026, 1, 2)}
    assert dict(installs.all()) == {
        ("stripe", "acme"): Installation("acme", "Acme Ltd", config, auth),
        ("crm", "acme"): Installation("acme", "Acme Ltd", enabled=False),
        ("crm", "beta.2_x-y"): Installation("beta.2_x-y", "beta.2_x-y"),
    }
    assert installs.warnings == []
    assert installs.find("stripe", "acme") == installs.all()["stripe", "acme"]
    for plugin, org in (("stripe", "beta.2_x-y"), ("crm", "nothing"), ("crm", "gone"), ("gone", "acme")):
        assert installs.find(plugin, org) is None


def test_changes_are_kept_in_memory_only(file: Path) -> None:
    installs = read(file)
    installs.save("stripe", Installation("acme", "Acme Ltd", {"toleranceSeconds": 5}))
    found = installs.find("stripe", "acme")
    assert found is not None
    assert found.config == {"toleranceSeconds": 5}
    assert file.read_text() == ORGS


@pytest.mark.parametrize("text", ["", "[orgs]\n"])
def test_a_file_without_orgs(file: Path, text: str) -> None:
    assert dict(read(file, text).all()) == {}


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o700, 0), (0o640, 1), (0o604, 1), (0o644, 1), (0o620, 0)])
def test_a_file_that_others_can_read_is_a_warning(file: Path, mode: int, warned: int) -> None:
    file.chmod(mode)
    warnings = read(file).warnings
    assert warnings == [f"{file} may hold credentials and is readable by others; use `chmod 600 {file}`"] * warned


def test_every_problem_at_once(file: Path) -> None:
    text = """
        org = 1
        [orgs."../x"]
        [orgs.a]
        nmae = "A"
        [orgs.b.plugins.p]
        conf = {}
        [orgs.c.plugins.p]
        auth = { methodId = "k" }
        [orgs.d.plugins.p]
        auth = { methodId = "", credentials = {} }
        [orgs.e.plugins.p]
        enabled = "yes"
        [orgs.good.plugins.p]
        [orgs.more]
        f = 3
    """
    found = dict(line.split(": ", 1) for line in problems(file, text))
    assert list(found) == ["org", "orgs.../x", "orgs.a", "orgs.b", "orgs.c", "orgs.d", "orgs.e", "orgs.more"]
    assert found["org"] == "no such key; there is `orgs`"
    assert found["orgs.../x"] == "not an org id: letters, digits and _ . - only, at most 128"
    for org, part in {"a": "nmae", "b": "conf", "c": "credentials", "d": "length", "e": "bool", "more": "`f`"}.items():
        assert part in found[f"orgs.{org}"]


@pytest.mark.parametrize("org", ["a/b", "a b", "-a", ".a", "", "ä", "a" * 129, "a%2e"])
def test_wrong_org_ids(file: Path, org: str) -> None:
    assert problems(file, f'[orgs."{org}"]') == [
        f"orgs.{org}: not an org id: letters, digits and _ . - only, at most 128"
    ]


@pytest.mark.parametrize("value", ["3", "[]", '"acme"'])
def test_orgs_that_are_no_table(file: Path, value: str) -> None:
    assert problems(file, f"orgs = {value}") == ["orgs: must be a table of orgs, [orgs.ID]"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[orgs", "not valid TOML: "),
        (b"a = '\xff'", "not valid TOML: 'utf-8' codec can't decode"),
        (b"a = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
        (b"a = " + b"[" * 100_000, "not valid TOML: "),
    ],
    ids=["table", "encoding", "number", "depth"],
)
def test_malformed_files(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape(f"{file}: {said}")):
        FileInstalls(file, ORG_ID.fullmatch)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="gone: cannot be read: No such file or directory"):
        FileInstalls(tmp_path / "gone", ORG_ID.fullmatch)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        FileInstalls(tmp_path, ORG_ID.fullmatch)


def test_no_secret_in_what_python_shows_of_them(file: Path) -> None:
    installs = read(file)
    shown = repr(installs.all()) + repr(installs.find("stripe", "acme")) + str(Auth("k", {"apiKey": "sk_5ecret"}))
    assert "acme" in shown
    assert "sk_5ecret" not in shown
    assert "toleranceSeconds" not in shown


@pytest.mark.parametrize(
    "given",
    [
        {"methodId": "k"},
        {"credentials": {}},
        {"methodId": "", "credentials": {}},
        {"methodId": 3, "credentials": {}},
        {"methodId": "k", "credentials": []},
        {"methodId": "k", "credentials": {}, "password": "sk_5ecret"},
    ],
)
def test_what_is_no_auth(given: object) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, Auth)
    assert "sk_5ecret" not in str(caught.value)
