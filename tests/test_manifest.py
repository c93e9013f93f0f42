"""The manifest: what is read from it, and that everything wrong with it becomes a clear problem and nothing else."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hayhost.errors import ManifestError
from hayhost.manifest import CAPABILITIES, CATEGORIES, Manifest, Permissions, is_plugin_folder, read_manifest
from hayhost.sdk.types import Capability

TABLE: dict[str, Any] = {
    "entry": "./main.py",
    "displayName": "Stripe",
    "category": "integration",
    "capabilities": ["routes", "config"],
}
TOML = """
[project]
name = "Stripe"
version = "1.2.3"

[tool.hay-plugin]
entry = "./main.py:plugin"
displayName = "Stripe ✨"
category = "integration"
capabilities = ["routes", "mcp"]
env = ["STRIPE_API_KEY"]

[tool.hay-plugin.permissions]
network = ["API.stripe.com:443", "*.zendesk.com:8443"]
subprocess = ["npx", "./bin/tool"]
memory = "256MiB"
cpu_seconds = 5
processes = 2
files = 64
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plugin's folder with some code, a neighbour with more, and no manifest."""
    plugin, outside = tmp_path / "stripe", tmp_path / "outside"
    for name in ("main.py", "sub/mod.py", "pkg/__init__.py", "pkg/inner/__init__.py", "pkg/inner.py", "notes.txt"):
        file = plugin / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    outside.mkdir()
    (outside / "evil.py").touch()
    (plugin / "evil.py").symlink_to(outside / "evil.py")
    (plugin / "out").symlink_to(outside)
    (plugin / "link.py").symlink_to("sub/mod.py")
    (plugin / "text.py").symlink_to("notes.txt")
    (plugin / "loop.py").symlink_to("loop.py")
    (plugin / "dir.py").mkdir()
    os.mkfifo(plugin / "fifo.py")
    return plugin


def package(folder: Path, *, name: object = "stripe", version: object = "1.0", **changes: object) -> None:
    """Write a package.json with ``TABLE`` as changed; ``None`` leaves a key out."""
    table = {key: value for key, value in {**TABLE, **changes}.items() if value is not None}
    document = {"name": name, "version": version, "hay-plugin": table}
    (folder / "package.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def problems(folder: Path) -> list[str]:
    """The problems of the manifest in ``folder``, each of which must be one line that says what is allowed."""
    assert is_plugin_folder(folder)
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert problem.isprintable()
        assert len(problem) < 600
        assert problem.startswith("stripe/")
        assert "; allowed: " in problem
    return caught.value.problems


def problem(folder: Path, key: str) -> str:
    """The only problem, which must be that of ``key``."""
    [text] = problems(folder)
    assert text.startswith(f"stripe/package.json: {key}: found ")
    return text


def test_pyproject_in_full(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(TOML)
    assert is_plugin_folder(folder)
    assert read_manifest(folder) == Manifest(
        folder=folder.resolve(),
        file=folder.resolve() / "pyproject.toml",
        name="stripe",
        version="1.2.3",
        entry="main.py",
        attribute="plugin",
        display_name="Stripe ✨",
        category="integration",
        capabilities=("routes", "mcp"),
        env=("STRIPE_API_KEY",),
        permissions=Permissions(
            network=("api.stripe.com:443", "*.zendesk.com:8443"),
            subprocess=("npx", "./bin/tool"),
            memory=256 << 20,
            cpu_seconds=5,
            processes=2,
            files=64,
        ),
        sharing="fork",
        warnings=(),
    )


def test_package_json_denies_by_default(folder: Path) -> None:
    package(folder)
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.version, manifest.entry, manifest.attribute) == ("stripe", "1.0", "main.py", None)
    assert manifest.permissions == Permissions(False, (), None, None, None, None)
    assert manifest.env == manifest.warnings == ()


def test_both_files_have_the_same_rules(folder: Path) -> None:
    wrong = TOML.replace('"integration"', '"x"').replace("= 5", "= 0").replace("displayName", "displayname")
    (folder / "pyproject.toml").write_text(wrong)
    toml = problems(folder)
    (folder / "pyproject.toml").unlink()
    package(
        folder,
        category="x",
        displayName=None,
        displayname="Stripe ✨",
        permissions={"cpu_seconds": 0},
    )
    renamed = [text.replace("pyproject.toml: tool.", "package.json: ") for text in toml]
    assert sorted(renamed) == sorted(problems(folder))
    assert len(toml) == 4


def test_constants_agree_with_the_sdk() -> None:
    assert get_args(Capability) == CAPABILITIES
    assert CATEGORIES == ("integration", "channel", "tool", "analytics")


def test_every_problem_at_once(folder: Path) -> None:
    package(
        folder,
        name="@hay/stripe",
        version=1,
        entry="../x.py",
        displayName="",
        category=None,
        capabilities=["routes", "teleport"],
        env=["HAYHOST_TOKEN"],
        permissions={"network": "all", "memory": "1", "gpu": True},
        colour="red",
    )
    keys = [text.split(": ")[1] for text in problems(folder)]
    below = ("entry", "displayName", "category", "capabilities[1]", "env[0]", "permissions.network")
    expected = ["name", "version"] + [f"hay-plugin.{key}" for key in (*below, "permissions.memory", "colour")]
    assert sorted(keys) == sorted([*expected, "hay-plugin.permissions.gpu"])


# --- which folder, and which file ---


def test_pyproject_wins_with_a_warning(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(TOML)
    package(folder, name="other", category="nonsense")
    manifest = read_manifest(folder)
    assert manifest.name == "stripe"
    assert manifest.file.name == "pyproject.toml"
    assert manifest.warnings == (
        "stripe/package.json: hay-plugin: ignored, because pyproject.toml has [tool.hay-plugin]",
    )
    (folder / "package.json").write_text("{")
    [warning] = read_manifest(folder).warnings
    assert warning.startswith("stripe/package.json: found ")
    assert "ignored" in warning


def test_a_file_without_the_table_is_passed_over(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[project]\nname = "other"\n[tool.ruff]\n')
    package(folder)
    assert read_manifest(folder).name == "stripe"
    (folder / "package.json").write_text('{"name": "stripe"}')
    assert not is_plugin_folder(folder)
    with pytest.raises(ManifestError, match=r"stripe: found neither .*tool\.hay-plugin.*package\.json"):
        read_manifest(folder)


def test_a_malformed_pyproject_is_not_passed_over(folder: Path) -> None:
    package(folder)
    (folder / "pyproject.toml").write_text("[")
    assert problems(folder)[0].startswith("stripe/pyproject.toml: found ")


@pytest.mark.parametrize("name", [".hidden", "_private", "plain.txt", "empty", "absent"])
def test_not_a_plugin_folder(tmp_path: Path, name: str) -> None:
    if name.startswith((".", "_", "empty")):
        (tmp_path / name).mkdir()
    if name.startswith((".", "_")):
        package(tmp_path / name)
    if name == "plain.txt":
        (tmp_path / name).touch()
    assert not is_plugin_folder(tmp_path / name)


@pytest.mark.parametrize("name", ["absent", "main.py", "nul\0byte"])
def test_no_folder_is_an_error(folder: Path, name: str) -> None:
    assert not is_plugin_folder(folder / name)
    with pytest.raises(ManifestError, match="found no folder"):
        read_manifest(folder / name)


def test_the_folder_may_be_a_symlink(folder: Path, tmp_path: Path) -> None:
    package(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert is_plugin_folder(link)
    assert read_manifest(link).folder == folder.resolve()
    package(folder, category="x")
    with pytest.raises(ManifestError, match=r"^link/package\.json: hay-plugin.category"):
        read_manifest(link)


def test_a_hostile_folder_name_cannot_forge_a_log_line(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\nERROR \xff\x1b[2J")
    folder.mkdir()
    package(folder, category="x")
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    assert all(text.isprintable() and text.startswith("a\\nERROR ") for text in caught.value.problems)


# --- the files themselves ---


def deep_toml_keys() -> str:
    return ".".join("a" * 100_000) + " = 1"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("pyproject.toml", b"[tool.hay-plugin\n", "valid TOML"),
        ("pyproject.toml", b"a = 1\na = 2\n", "Cannot overwrite"),
        ("pyproject.toml", b"\xff\xfe", "utf-8"),
        ("pyproject.toml", b"a = " + b"[" * 100_000, "too deeply"),
        ("pyproject.toml", b"a = " + b"9" * 100_000, "valid TOML"),
        ("pyproject.toml", deep_toml_keys().encode(), "dots"),
        ("pyproject.toml", b"[" + b"a." * 1_000 + b"a]\n" + b"".join(b"k%d=1\n" % i for i in range(20_000)), "dots"),
        ("pyproject.toml", b"tool = 3\n", "tool: found 3"),
        ("pyproject.toml", b"[tool]\nhay-plugin = []\n", "tool.hay-plugin: found []"),
        ("pyproject.toml", b"project = 3\n" + TOML.split("\n\n")[1].encode(), "project: found 3"),
        ("pyproject.toml", b"#" * (256 << 10) + b"\n", "larger than 256 KiB"),
        ("package.json", b"", "Expecting value"),
        ("package.json", b"{\0}", "valid JSON"),
        ("package.json", b"[]", "top level: found []"),
        ("package.json", b"null", "top level: found None"),
        ("package.json", b'{"hay-plugin": null}', "hay-plugin: found None"),
        ("package.json", b'{"hay-plugin": "x"}', "hay-plugin: found 'x'"),
        ("package.json", b'{"a": {"b": 1, "b": 2}}', "twice"),
        ("package.json", b'{"a": NaN}', "NaN"),
        ("package.json", b'{"a": ' + b"9" * 10_000 + b"}", "valid JSON"),
        ("package.json", b"[" * 200_000, "too deeply"),
        ("package.json", b'{"a":' * 40_000, "too deeply"),
        ("package.json", b"\xc3\x28", "utf-8"),
        ("package.json", b" " * (256 << 10) + b"{", "larger than 256 KiB"),
    ],
)
def test_malformed_files(folder: Path, name: str, content: bytes, found: str) -> None:
    (folder / name).write_bytes(content)
    started = time.monotonic()
    [text] = problems(folder)
    assert text.startswith(f"stripe/{name}: ")
    assert found in text
    assert time.monotonic() - started < 5


def test_an_endless_file_is_read_no_further_than_allowed(folder: Path) -> None:
    with (folder / "package.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in problems(folder)[0]


def test_a_byte_order_mark_is_harmless(folder: Path) -> None:
    package(folder)
    file = folder / "package.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_manifest(folder).name == "stripe"


def _outside(file: Path) -> None:
    target = file.parents[1] / "outside" / file.name
    target.write_text("{}")
    file.symlink_to(target)


def _chain(file: Path) -> None:
    for number in range(1_500):
        (file.parent / f"link{number}").symlink_to(f"link{number + 1}")
    file.symlink_to("link0")


def _socket_like(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        _outside,
        _chain,
        _socket_like,
        lambda file: file.symlink_to("gone"),
        lambda file: file.symlink_to(file.name),
        lambda file: file.symlink_to("fifo.py"),
        lambda file: file.symlink_to("."),
    ],
    ids=["fifo", "folder", "outside", "chain", "device", "dangling", "loop", "link to fifo", "link to folder"],
)
@pytest.mark.parametrize("name", ["pyproject.toml", "package.json"])
def test_no_regular_file(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    make(folder / name)
    [text] = problems(folder)
    assert text.startswith(f"stripe/{name}: cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(folder: Path) -> None:
    package(folder)
    (folder / "package.json").chmod(0)
    assert "Permission denied" in problems(folder)[0]


def test_a_manifest_may_be_a_symlink_inside_the_folder(folder: Path) -> None:
    package(folder)
    (folder / "package.json").rename(folder / "sub" / "real.json")
    (folder / "package.json").symlink_to("sub/real.json")
    assert read_manifest(folder).file == folder.resolve() / "package.json"


# --- the keys ---


@pytest.mark.parametrize(("name", "expected"), [("Stripe-2", "stripe-2"), ("0", "0"), ("a" * 64, "a" * 64)])
def test_names(folder: Path, name: str, expected: str) -> None:
    package(folder, name=name)
    assert read_manifest(folder).name == expected


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a_b", "a.b", "a b", "a/b", "@hay/stripe", "a" * 65, "a\n", "stripe\0", "\u017ftripe", "\u212a", 3, []],
)
def test_wrong_names(folder: Path, name: object) -> None:
    package(folder, name=name)
    assert "no npm scope" in problem(folder, "name")


def test_the_name_is_required(folder: Path) -> None:
    package(folder, name=None)
    assert "found nothing; allowed" in problem(folder, "name")


@pytest.mark.parametrize("version", ["", " ", "1" * 65, 1, 1.0, True, ["1"], "1\0"])
def test_wrong_versions(folder: Path, version: object) -> None:
    package(folder, version=version)
    problem(folder, "version")


def test_a_missing_version_is_a_warning(folder: Path) -> None:
    package(folder, version=None)
    manifest = read_manifest(folder)
    assert manifest.version == "0.0.0"
    assert "package.json: version" in manifest.warnings[0]
    (folder / "pyproject.toml").write_text(TOML.replace("version", "#"))
    assert any("pyproject.toml: project.version" in warning for warning in read_manifest(folder).warnings)


@pytest.mark.parametrize(
    ("entry", "expected", "attribute"),
    [
        ("./main.py", "main.py", None),
        ("./main.py:plugin", "main.py", "plugin"),
        (".//sub/./mod.py", "sub/mod.py", None),
        ("./sub/../main.py", "main.py", None),
        ("./link.py", "sub/mod.py", None),
        ("pkg:plugin", "pkg", "plugin"),
        ("main:plugin", "main", "plugin"),
        ("sub.mod:plugin", "sub.mod", "plugin"),
        ("pkg.inner:_x1", "pkg.inner", "_x1"),
        ("link:plugin", "link", "plugin"),
    ],
)
def test_entries(folder: Path, entry: str, expected: str, attribute: str | None) -> None:
    package(folder, entry=entry)
    manifest = read_manifest(folder)
    assert (manifest.entry, manifest.attribute) == (expected, attribute)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("main.py", "none of these"),
        ("main.py:plugin", "begins with ./"),
        ("main", "none of these"),
        ("./main.py:", "none of these"),
        ("./main.py:a.b", "none of these"),
        ("./main.py:class", "none of these"),
        ("./main.py:a:b", "none of these"),
        ("/etc/passwd", "none of these"),
        ("../outside/evil.py", "none of these"),
        ("..outside.evil:x", "none of these"),
        ("sub..mod:x", "none of these"),
        ("sub/mod:x", "none of these"),
        ("import:x", "none of these"),
        ("./../outside/evil.py", "outside"),
        ("./sub/../../outside/evil.py", "outside"),
        ("./evil.py", "outside"),
        ("./out/evil.py", "outside"),
        ("evil:plugin", "outside"),
        ("out.evil:plugin", "outside"),
        ("./..", "outside"),
        ("./absent.py", "No such file"),
        ("absent.mod:plugin", "no absent/mod.py"),
        ("./dir.py", "not a regular file"),
        ("./fifo.py", "not a regular file"),
        ("fifo:plugin", "not a regular file"),
        ("./loop.py", "symbolic links"),
        ("loop:plugin", "symbolic links"),
        ("./notes.txt", "not a .py file"),
        ("./text.py", "not a .py file"),
        ("./main.py\0", "control character"),
        ("./\ud800.py", "control character"),
        ("./" + "a/" * 500 + "x.py", "No such file"),
        ("./" + "a" * 300 + ".py", "File name too long"),
        ("./" + "a" * 2_000 + ".py", "longer than"),
        ("", "not a non-empty string"),
        (3, "not a non-empty string"),
        (["./main.py"], "not a non-empty string"),
    ],
)
def test_wrong_entries(folder: Path, entry: object, why: str) -> None:
    package(folder, entry=entry)
    text = problem(folder, "hay-plugin.entry")
    assert why in text
    assert "package.module:attribute" in text


@pytest.mark.parametrize("key", ["entry", "displayName", "category", "capabilities"])
def test_required_keys(folder: Path, key: str) -> None:
    package(folder, **{key: None})
    assert "found nothing; allowed" in problem(folder, f"hay-plugin.{key}")


@pytest.mark.parametrize(
    ("key", "value", "at"),
    [
        ("displayName", " ", ""),
        ("displayName", "a\x1b[2J", ""),
        ("displayName", "x" * 5_000, ""),
        ("displayName", 1, ""),
        ("category", "Tool", ""),
        ("category", ["tool"], ""),
        ("capabilities", "routes", ""),
        ("capabilities", {"routes": True}, ""),
        ("capabilities", ["routes", "routes"], "[1]"),
        ("capabilities", ["Routes"], "[0]"),
        ("capabilities", [None], "[0]"),
        ("capabilities", ["routes"] * 1_000, ""),
        ("env", "A", ""),
        ("env", ["A", "B", "A"], "[2]"),
        ("env", ["1A"], "[0]"),
        ("env", ["A-B"], "[0]"),
        ("env", ["A\n"], "[0]"),
        ("env", ["É"], "[0]"),
        ("env", [""], "[0]"),
        ("env", ["HAY_TOKEN"], "[0]"),
        ("env", ["HAYHOST_TOKEN"], "[0]"),
        ("permissions", [], ""),
        ("permissions", True, ""),
    ],
)
def test_wrong_values(folder: Path, key: str, value: object, at: str) -> None:
    package(folder, **{key: value})
    problem(folder, f"hay-plugin.{key}{at}")


def test_the_hosts_own_variables_are_refused_by_name(folder: Path) -> None:
    package(folder, env=["HAY", "HAYSTACK", "_", "HAY_X"])
    assert "host's own secrets" in problem(folder, "hay-plugin.env[3]")


@pytest.mark.parametrize(
    ("table", "key", "hint"),
    [
        ({"capabilites": []}, "capabilites", "did you mean capabilities?"),
        ({"permissions": {"netwrok": True}}, "permissions.netwrok", "did you mean network?"),
        ({"permissions": {"cpu": 1, "memory": "1GiB"}}, "permissions.cpu", "unknown key"),
        ({"qqq\n": 1}, "qqq\\n", "unknown key)"),
        ({"x" * 10_000: 1}, "xxx", "unknown key)"),
    ],
)
def test_unknown_keys(folder: Path, table: dict[str, object], key: str, hint: str) -> None:
    package(folder, **table)
    [text] = problems(folder)
    assert text.startswith(f"stripe/package.json: hay-plugin.{key}")
    assert hint in text
    assert "allowed: the keys " in text


def test_thousands_of_unknown_keys_are_counted(folder: Path) -> None:
    package(folder, **{f"x{number}": 1 for number in range(10_000)})
    assert len(problems(folder)) == 21
    assert "9980 more" in problems(folder)[-1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (False, False),
        (True, True),
        ([], False),
        (["a.b:1", "A.B:65535"], ("a.b:1", "a.b:65535")),
        (["*.example.com:443"], ("*.example.com:443",)),
        (["xn--bcher-kva.example:80", "my_host:80"], ("xn--bcher-kva.example:80", "my_host:80")),
        (["1password.com:443", "face.cafe:443"], ("1password.com:443", "face.cafe:443")),
    ],
)
def test_network(folder: Path, value: object, expected: object) -> None:
    package(folder, permissions={"network": value})
    assert read_manifest(folder).permissions.network == expected


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("127.0.0.1:80", "IP address"),
        ("127.1:80", "IP address"),
        ("2130706433:80", "IP address"),
        ("0x7F000001:80", "IP address"),
        ("*.0.0.1:80", "IP address"),
        ("1.2.3.4.:80", "IP address"),
        ("[::1]:80", "IP address"),
        ("::1:80", "IP address"),
        ("fe80::1%eth0:80", "IP address"),
        ("::1", "IP address"),
        ("1.2.3.4", "IP address"),
        ("a.com", "no port"),
        ("a.com:", "no port"),
        ("a.com:0", "no port"),
        ("a.com:65536", "no port"),
        ("a.com:0443", "no port"),
        ("a.com:+1", "no port"),
        ("a.com:٣", "no port"),
        ("*.com:443", "two labels"),
        ("*:443", "not a DNS name"),
        ("a.*.com:443", "not a DNS name"),
        ("**.a.com:443", "not a DNS name"),
        ("*.:443", "not a DNS name"),
        ("https://a.com:443", "not a DNS name"),
        ("a.com/x:443", "not a DNS name"),
        ("u@a.com:443", "not a DNS name"),
        ("a b.com:443", "not a DNS name"),
        ("-a.com:443", "not a DNS name"),
        ("a..com:443", "not a DNS name"),
        ("a.com.:443", "not a DNS name"),
        ("bücher.example:443", "not a DNS name"),
        ("\u212a.com:443", "not a DNS name"),
        ("a" * 64 + ".com:443", "not a DNS name"),
        ("a." * 127 + "com:443", "not a DNS name"),
        (":443", "not a DNS name"),
        ("", "non-empty"),
        (443, "non-empty"),
    ],
)
def test_wrong_hosts(folder: Path, host: object, why: str) -> None:
    package(folder, permissions={"network": ["ok.example:443", host]})
    assert why in problem(folder, "hay-plugin.permissions.network[1]")


def test_hosts_that_differ_in_case_are_the_same(folder: Path) -> None:
    package(folder, permissions={"network": ["a.com:1", "A.com:1"]})
    assert "listed twice" in problem(folder, "hay-plugin.permissions.network[1]")


@pytest.mark.parametrize("value", [0, 1, "true", {}, 1.0])
def test_wrong_network(folder: Path, value: object) -> None:
    package(folder, permissions={"network": value})
    assert "false, true or a list" in problem(folder, "hay-plugin.permissions.network")


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("16MiB", 16 << 20),
        ("1GiB", 1 << 30),
        ("20480KiB", 20 << 20),
        ("100MB", 100_000_000),
        ("17000 kB", 17_000_000),
        (16 << 20, 16 << 20),
        ("1024GiB", 1 << 40),
    ],
)
def test_memory(folder: Path, value: object, size: int) -> None:
    package(folder, permissions={"memory": value})
    assert read_manifest(folder).permissions.memory == size


@pytest.mark.parametrize(
    "value",
    [0, -1, 1 << 20, 1 << 41, True, 1e9, "", "1", "512KiB", "16 mib", "1.5GiB", "-1GiB", "1GiB ", "٣GiB", "9" * 5_000],
)
def test_wrong_memory(folder: Path, value: object) -> None:
    package(folder, permissions={"memory": value})
    assert "256MiB" in problem(folder, "hay-plugin.permissions.memory")


@pytest.mark.parametrize("key", ["cpu_seconds", "processes", "files"])
@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", [], 2**31, 10**1_000])
def test_wrong_numbers(folder: Path, key: str, value: object) -> None:
    package(folder, permissions={key: value})
    assert "a whole number from 1" in problem(folder, f"hay-plugin.permissions.{key}")


@pytest.mark.parametrize("value", ["npx", [""], [" "], [1], ["npx", "npx"], ["a\0b"]])
def test_wrong_commands(folder: Path, value: object) -> None:
    package(folder, permissions={"subprocess": value})
    assert problems(folder)[0].startswith("stripe/package.json: hay-plugin.permissions.subprocess")


@pytest.mark.parametrize("value", ["1979-05-27T07:32:00Z", "inf", "0x" + "f" * 10_000, "a.b".join(("{", " = 1}"))])
def test_values_that_only_toml_has(folder: Path, value: str) -> None:
    lines = [line for line in TOML.splitlines() if not line.startswith(("memory", "category"))]
    (folder / "pyproject.toml").write_text("\n".join([*lines, f"memory = {value}"]))
    assert [text.split(": ")[1].rpartition(".")[2] for text in problems(folder)] == ["category", "memory"]


# --- anything at all ---

texts = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["./main.py", "pkg:x", "./../x.py:a", "tool", "routes", "A", "a.b:1", "*.a.b:1", "1GiB", "network", "memory", "\0"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def as_toml(value: object) -> str:
    """``value`` as an inline TOML value; ``null``, which TOML has not, becomes false."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value or False)


def attempt(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest or its problems: never neither, and any exception of another kind fails the test."""
    try:
        return read_manifest(folder), []
    except ManifestError as error:
        return None, error.problems or ["\0 nothing said"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*TABLE, "env", "permissions", "name", "version", "hay-plugin", "project"]), values, max_size=6
    ),
    st.dictionaries(
        st.sampled_from(["network", "subprocess", "memory", "cpu_seconds", "processes", "files", "x"]), values
    ),
    st.booleans(),
)
def test_anything_is_a_manifest_or_a_manifest_error(
    folder: Path, changes: dict[str, object], permissions: dict[str, object], toml: bool
) -> None:
    table: dict[str, object] = {**TABLE, "permissions": permissions, **changes}
    project = {"name": table.pop("name", "stripe"), "version": table.pop("version", "1")}
    whole, given_project = table.pop("hay-plugin", table), table.pop("project", project)
    for name in ("pyproject.toml", "package.json"):
        (folder / name).unlink(missing_ok=True)
    if toml:
        text = f"project = {as_toml(given_project)}\ntool.hay-plugin = {as_toml(whole)}\n"
        (folder / "pyproject.toml").write_text(text, newline="")
    else:
        (folder / "package.json").write_text(json.dumps({**project, "hay-plugin": whole}))
    manifest, found = attempt(folder)
    assert all(text.isprintable() for text in found)
    assert manifest is None or (manifest.folder / manifest.entry).is_file() or manifest.attribute
    assert is_plugin_folder(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), st.integers(0, 600), st.booleans())
def test_a_damaged_file_is_a_manifest_or_a_manifest_error(folder: Path, noise: bytes, at: int, toml: bool) -> None:
    (folder / "pyproject.toml").unlink(missing_ok=True)
    package(folder)
    file = folder / "package.json"
    if toml:
        file.unlink()
        file = folder / "pyproject.toml"
        file.write_text(TOML)
    content = file.read_bytes()
    file.write_bytes(content[:at] + noise + content[at + len(noise) :])
    assert is_plugin_folder(folder) in (True, False)
    assert all(text.isprintable() for text in attempt(folder)[1])
