"""Orgs as a file declares them."""

import datetime as dt
import re
from pathlib import Path

import pytest

from hayhost.declared import Declared, read_declared
from hayhost.errors import SettingsError
from hayhost.installs import Auth

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


def read(file: Path, text: str = ORGS) -> Declared:
    file.write_text(text)
    return read_declared(file)


def problems(file: Path, text: str) -> list[str]:
    """The lines of the error, each without the name of the file that it begins with."""
    with pytest.raises(SettingsError) as caught:
        read(file, text)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


def test_a_file_in_full(file: Path) -> None:
    declared = read(file)
    auth = Auth("apiKey", {"apiKey": "sk_5ecret"})
    assert {org: table.name for org, table in declared.orgs.items()} == {
        "acme": "Acme Ltd",
        "beta.2_x-y": None,
        "nothing": None,
    }
    stripe = declared.orgs["acme"].plugins["stripe"]
    assert (stripe.enabled, stripe.auth) == (True, auth)
    assert stripe.config == {"toleranceSeconds": 60, "since": dt.date(2026, 1, 2)}
    assert not declared.orgs["acme"].plugins["crm"].enabled
    assert list(declared.orgs["beta.2_x-y"].plugins) == ["crm"]
    assert declared.warnings == []


@pytest.mark.parametrize("text", ["", "[orgs]\n"])
def test_a_file_without_orgs(file: Path, text: str) -> None:
    assert not read(file, text).orgs


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
        read_declared(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="gone: cannot be read: No such file or directory"):
        read_declared(tmp_path / "gone")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read_declared(tmp_path)


def test_no_secret_in_what_python_shows_of_it(file: Path) -> None:
    declared = read(file)
    shown = repr(declared) + repr(declared.orgs["acme"]) + repr(declared.orgs["acme"].plugins)
    assert "sk_5ecret" not in shown
    assert "toleranceSeconds" not in shown
