"""The commands that manage a store, as a shell runs them, on both databases."""

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .commands import Done, environment, run_hayhost
from .conftest import LIMIT, write_plugin
from .storing import BACKENDS, PASSWORD, make_url, server, sql

pytestmark = pytest.mark.timeout(600)  # many processes, each of which loads the store

SECRETS = ("whsec_5ecret", "sk_5ecret", "sk_new5ecret")
PLUGIN = """
from hayhost.sdk import *
import os

def wrote(line):
    with open(os.path.join(%r, "hooks"), "a") as file:
        file.write(line + "\\n")

@define_hay_plugin
class Shop:
    name = "Shop"

    def on_initialize(self, ctx):
        ctx.register.config({
            "note": {"type": "string"},
            "limit": {"type": "number"},
            "on": {"type": "boolean"},
            "extra": {"type": "json"},
            "secret": {"type": "string", "sensitive": True},
            "key": {"type": "string", "sensitive": True},
        })
        ctx.register.auth.api_key(id="key", label="Key", config_field="key")
        ctx.register.route("GET", "/show", self.show)

    def show(self, req):
        return {"note": req.ctx.config.get("note"), "secret": req.ctx.config.get("secret")}

    def on_validate_auth(self, ctx):
        wrote("on_validate_auth")
        return ctx.auth.get().credentials["key"].startswith("sk_")

    def on_enable(self, ctx):
        wrote(f"on_enable {ctx.org.id} {ctx.config.get('note')}")

    def on_config_update(self, ctx):
        wrote(f"on_config_update {ctx.config.get('note')}")

    def on_disable(self, ctx):
        wrote("on_disable " + ctx.org.id)
        if ctx.org.id == "sad":
            raise ValueError("cannot say goodbye")
"""


class Shop:
    """A folder with a plugin and a store, and the command line in it."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "out").mkdir()
        self._hooks = folder / "out/hooks"
        self._hooks.touch()
        self._hooks.chmod(0o666)  # whichever user a worker is
        write_plugin(folder / "plugins/shop", PLUGIN % str(folder / "out"))
        self.env = {"HAYHOST_STORE": store, "HAYHOST_WRITABLE": str(folder / "out")}
        self.key_file = folder / ("hayhost.key" if "postgresql" in store else "store.key")

    def hay(self, *arguments: object, stdin: str | None = None, **env: str) -> Done:
        """Run a command."""
        done = run_hayhost(*arguments, env={**self.env, **env}, cwd=self.folder, stdin=stdin)
        assert "\nTraceback" not in f"\n{done.err}", done.err  # that of a plugin is in the log, with an indent
        return done

    def did(self, *arguments: object, **options: Any) -> str:
        """Run a command that succeeds and says nothing to people; what it prints."""
        done = self.hay(*arguments, **options)
        assert (done.code, done.err) == (0, ""), done
        return done.out

    def refused(self, *arguments: object, **options: Any) -> list[str]:
        """Run a command that does not succeed; what it says, line by line."""
        done = self.hay(*arguments, **options)
        assert (done.code, done.out) == (1, ""), done
        return [line.removeprefix("hayhost: ") for line in done.err.splitlines()]

    def hooks(self) -> list[str]:
        """The hooks that ran since the last time."""
        lines = self._hooks.read_text().splitlines()
        os.truncate(self._hooks, 0)
        return lines


@pytest.fixture(params=BACKENDS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop", make_url(request.param, tmp_path / "shop"))


@pytest.fixture
def small(tmp_path: Path) -> Shop:
    """With an SQLite file that is not there yet."""
    return Shop(tmp_path / "shop", "store.db")


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_the_life_of_an_installation(shop: Shop) -> None:
    assert shop.did("org", "add", "acme", "--name", "Acme Ltd") == "acme was added\n"
    (shop.folder / "secret").write_text("whsec_5ecret\n")
    credentials = json.dumps({"methodId": "key", "credentials": {"key": "sk_5ecret"}})
    given = ("note=hello", "limit=1.5", "on=yes", 'extra={"a": [1]}', "secret=@secret", "--auth", "-")
    assert shop.did("install", "shop", "acme", *given, stdin=credentials) == "shop was installed for acme\n"
    assert shop.hooks() == ["on_validate_auth", "on_enable acme hello", "on_config_update hello"]
    shown = [
        ["config.extra", '{"a":[1]}'],
        ["config.limit", "1.5"],
        ["config.note", "hello"],
        ["config.on", "true"],
        ["config.secret", "********"],
        ["auth", "key (valid)"],
        ["status", "enabled"],
    ]
    assert rows(shop.did("config", "get", "shop", "acme")) == shown
    whole = json.loads(shop.did("config", "get", "shop", "acme", "--json"))
    assert whole["config"] == {"note": "hello", "limit": 1.5, "on": True, "extra": {"a": [1]}, "secret": "********"}
    assert whole["auth"] == {"methodId": "key", "credentials": {"key": "********"}}

    changed = shop.did("config", "set", "shop", "acme", "note=@@you", "--unset", "limit", "--unset", "extra")
    assert changed == "shop was changed for acme\n"
    assert shop.hooks() == ["on_config_update @you"]
    config = json.loads(shop.did("config", "get", "shop", "acme", "--json"))["config"]
    assert config == {"note": "@you", "on": True, "secret": "********"}
    assert shop.did("config", "get", "shop", "acme", "note") == "@you\n"

    assert shop.did("install", "shop", "acme", "--disabled") == "shop was changed for acme, and is disabled\n"
    assert shop.hooks() == ["on_disable acme"]
    assert rows(shop.hay("org", "show", "acme").out)[0][:3] == ["shop", "disabled", "valid"]
    assert json.loads(shop.did("org", "show", "acme", "--json"))["plugins"][0]["enabled"] is False
    assert shop.did("install", "shop", "acme") == "shop was changed for acme\n"
    assert shop.hooks() == ["on_enable acme @you"], "what is not given stays"
    assert shop.refused("uninstall", "shop", "acme") == ["this cannot be undone: give --yes"]
    assert shop.did("uninstall", "shop", "acme", "--yes") == "shop was uninstalled for acme\n"
    assert shop.hooks() == ["on_disable acme"]
    assert shop.refused("config", "get", "shop", "acme") == ["shop is not installed for acme"]

    log = json.loads(shop.did("audit", "--json"))
    actions = [entry["action"] for entry in reversed(log) if entry["actor"].startswith("cli:")]
    assert actions == ["org.create", *["install.put"] * 4, "install.delete"]
    everything = json.dumps(log) + "".join(str(row) for row in asyncio.run(dump(shop)))
    assert not [secret for secret in SECRETS if secret in everything]


async def dump(shop: Shop) -> list[tuple[Any, ...]]:
    found = []
    for table in ("orgs", "installations", "audit", "tokens"):
        found += await sql(shop.env["HAYHOST_STORE"], f"SELECT * FROM {table}")
    return found


def test_orgs(small: Shop) -> None:
    assert small.did("org", "add", "b") == "b was added\n"
    assert json.loads(small.did("org", "add", "a", "--name", "A", "--json"))["name"] == "A"
    assert small.did("org", "rename", "a", "Ä b") == "a is called Ä b\n"
    assert [row[:2] for row in rows(small.did("org", "list"))] == [["a", "Ä b"], ["b", "b"]]
    assert [org["id"] for org in json.loads(small.did("org", "list", "--json"))] == ["a", "b"]
    assert small.refused("org", "add", "a") == ["there is an org a already"]
    assert small.refused("org", "rename", "c", "C") == ["there is no org c"]
    assert small.refused("org", "add", "../x")[0].startswith("not an org id")
    assert small.refused("org", "rename", "a", "a\nb")[0].startswith("not a name")
    assert small.did("org", "remove", "b", "--yes", HAYHOST_PLUGINS=str(small.folder)) == "b was removed\n"
    assert small.refused("org", "show", "b") == ["there is no org b"]


def test_removing_an_org_tells_its_plugins(small: Shop) -> None:
    done = small.hay("install", "shop", "sad", "--json")
    assert (done.code, done.err) == (0, "there is no org sad yet: it is made\n")
    assert done.json()["enabled"] is True
    write_plugin(
        small.folder / "plugins/other", "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n name = 'p'\n"
    )
    assert small.did("install", "other", "sad") == "other was installed for sad\n"
    (small.folder / "plugins/other").rename(small.folder / "gone")
    small.hooks()
    assert small.refused("org", "remove", "sad") == ["this cannot be undone: give --yes"]
    done = small.hay("org", "remove", "sad", "--yes")
    assert (done.code, done.out) == (0, "sad was removed\n")
    assert small.hooks() == ["on_disable sad"]
    warned = "warning: other is not in the folder of plugins: it is uninstalled without its on_disable"
    assert warned in done.err.splitlines()
    assert "cannot say goodbye" in done.err
    assert small.did("org", "list") == ""


def test_credentials_that_are_not_accepted_are_kept_and_said(small: Shop) -> None:
    small.did("org", "add", "acme")
    auth = json.dumps({"methodId": "key", "credentials": {"key": "wrong"}})
    done = small.hay("install", "shop", "acme", "--auth", "-", stdin=auth)
    assert (done.code, done.out) == (0, "shop was installed for acme\n")
    assert done.err == "warning: shop does not accept the credentials; they are kept all the same\n"
    assert ["auth", "key (invalid)"] in rows(small.did("config", "get", "shop", "acme"))


def test_everything_wrong_at_once_and_nothing_changed(small: Shop) -> None:
    small.did("org", "add", "acme")
    wrong = small.refused("install", "shop", "acme", "limit=many", "on=maybe", "nope=1")
    known = "note, limit, on, extra, secret, key"
    assert wrong == [
        "config.limit: must be a finite number, not a string",
        "config.on: must be true or false, not a string",
        f"config.nope: there is no such field; there are: {known}",
    ]
    assert small.refused("install", "shop", "acme", "extra={")[0].startswith("config.extra: is not valid JSON: ")
    assert small.hooks() == []
    assert small.refused("config", "set", "shop", "acme", "note=x") == ["shop is not installed for acme"]
    auth = json.dumps({"methodId": "none", "credentials": {"k": "sk_5ecret"}})
    assert small.refused("install", "shop", "acme", "--auth", "-", stdin=auth) == [
        "auth.methodId: there is no such auth method; there are: key"
    ]
    assert rows(small.hay("org", "show", "acme").out) == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["note"], "", "'note' is not KEY=VALUE, KEY=@FILE or KEY=-"),
        (["note=1", "note=2"], "", "note is given twice"),
        (["note=-", "secret=-"], "x", "standard input is for note already, and secret wants it, too"),
        (["note=@gone"], "", "note: gone: cannot be read: No such file or directory"),
        (["note=@."], "", "note: .: cannot be read: Is a directory"),
        (["--values", "-"], "[1]", "--values: must be a JSON object, of fields and their values"),
        (["--values", "-"], '{"a": 1, "a": 2}', "--values: - is not valid JSON: the key 'a' is there twice"),
        (["--values", "-"], "[" * 5000, "--values: - is nested deeper than 64 levels"),
        (["--auth", "-"], '{"methodId": "k"}', "--auth: is not of the form "),
        (["--auth", "-"], '{"methodId": "key", "credentials": "sk_5ecret"}', "--auth: is not of the form "),
        (["note=x", "--values", "gone"], "", "--values: gone: cannot be read: No such file or directory"),
    ],
)
def test_values_that_are_none(small: Shop, arguments: list[str], stdin: str, said: str) -> None:
    [line] = small.refused("install", "shop", "acme", *arguments, stdin=stdin)
    assert line.startswith(said)
    assert "5ecret" not in line
    assert not (small.folder / "store.db").exists(), "nothing was begun"


def test_a_secret_on_the_command_line_is_a_warning(small: Shop) -> None:
    small.did("org", "add", "acme")
    done = small.hay("install", "shop", "acme", "secret=whsec_5ecret", "note=hi")
    assert done.code == 0
    assert done.err == (
        "warning: secret is a secret, and others can see what is on a command line; secret=@FILE and secret=- hide it\n"
    )
    assert small.did("config", "set", "shop", "acme", "secret=-", stdin="x\n") == "shop was changed for acme\n"


def on_a_terminal(shop: Shop, *arguments: str, typed: bytes = b"") -> tuple[int, str]:
    """Run a command with a terminal for everything; its exit code and what is to be seen there."""
    front, back = os.openpty()
    command = [sys.executable, "-P", "-m", "hayhost", *arguments]
    env = environment({**shop.env, "COLUMNS": "120", "TERM": "xterm"})
    env.pop("NO_COLOR", None)
    streams: dict[str, Any] = {"stdin": back, "stdout": back, "stderr": back}
    process = subprocess.Popen(command, cwd=shop.folder, env=env, start_new_session=True, **streams)
    os.close(back)
    seen = b""
    try:
        while True:
            try:
                part = os.read(front, 4096)
            except OSError:  # EIO: it has ended
                break
            if not part:
                break
            seen += part
            if typed and b": " in seen:
                os.write(front, typed)
                typed = b""
        return process.wait(LIMIT), seen.decode()
    finally:
        process.kill()
        process.wait()
        os.close(front)


def test_a_terminal_has_tables_colours_and_questions(small: Shop) -> None:
    small.did("org", "add", "acme", "--name", "Acme Ltd")
    code, seen = on_a_terminal(small, "install", "shop", "acme", "secret=-", typed=b"whsec_5ecret\n")
    assert (code, "secret (is not shown)" in seen, "whsec_5ecret" in seen) == (0, True, False)
    code, seen = on_a_terminal(small, "org", "list")
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in seen.splitlines()]
    assert (code, lines[0].split(), "\x1b[1mORG" in seen) == (0, ["ORG", "NAME", "SINCE"], True)
    assert lines[1].startswith("acme  Acme Ltd  20")
    code, seen = on_a_terminal(small, "uninstall", "shop", "acme", typed=b"n\n")
    assert (code, "nothing was changed" in seen) == (1, True)
    code, seen = on_a_terminal(small, "uninstall", "shop", "acme", typed=b"y\n")
    assert (code, "shop was uninstalled for acme" in seen) == (0, True)


# ---- files


def test_a_file_is_applied(shop: Shop) -> None:
    file = shop.folder / "orgs.toml"
    file.write_text(
        '[orgs.acme]\nname = "Acme Ltd"\n[orgs.acme.plugins.shop]\nconfig = { note = "hi", secret = "whsec_5ecret" }\n'
        'auth = { methodId = "key", credentials = { key = "sk_5ecret" } }\n[orgs.beta]\n'
    )
    file.chmod(0o600)
    shop.did("org", "add", "beta")
    changes = "+ org acme\n+ acme/shop\n"
    assert shop.did("org", "apply", "orgs.toml", "--dry-run") == changes
    assert (shop.did("org", "list").count("\n"), shop.hooks()) == (1, []), "nothing was done"
    assert shop.did("org", "apply", "orgs.toml") == changes
    assert "on_enable acme hi" in shop.hooks()
    done = shop.hay("org", "apply", "orgs.toml")
    assert (done.code, done.out, done.err, shop.hooks()) == (0, "", "nothing to change\n", [])
    file.write_text(file.read_text().replace('"hi"', "3") + "[orgs.beta.plugins.gone]\n[orgs.beta.plugins.shop]\n")
    done = shop.hay("org", "apply", "orgs.toml", "--json")
    assert (done.code, done.json()["changes"]) == (1, ["+ beta/shop"])
    assert [line.removeprefix("hayhost: ") for line in done.err.splitlines()] == [
        "acme/shop: config.note: must be a string, not a number",
        "beta/gone: there is no plugin of this name",
    ]
    assert "5ecret" not in done.out + done.err


# ---- tokens, keys, audit log


def test_tokens(shop: Shop) -> None:
    shop.did("org", "add", "acme")
    first = shop.hay("token", "create", "ci", "--expires", "90d")
    assert first.code == 0
    assert re.fullmatch(r"hay_[0-9a-f]{16}_[\w-]{43}\n", first.out)
    assert first.err.splitlines()[0].startswith("this is the first token")
    second = shop.hay("token", "create", "acme admin", "--org", "acme", "--json")
    assert second.json()["token"]["org"] == "acme"
    assert second.json()["secret"] not in second.err
    assert len(second.err.splitlines()) == 1
    listed = {row[1]: row for row in rows(shop.did("token", "list"))}
    assert (listed["ci"][2:4], listed["acme admin"][2:4]) == (["-", "good"], ["acme", "good"])
    assert [token["name"] for token in json.loads(shop.did("token", "list", "--org", "acme", "--json"))] == [
        "acme admin"
    ]
    identifier = listed["ci"][0]
    assert shop.did("token", "revoke", identifier) == f"{identifier} was revoked\n"
    assert {row[0]: row[3] for row in rows(shop.did("token", "list"))}[identifier] == "revoked"
    assert shop.refused("token", "revoke", "nothing") == ["there is no such token"]
    assert shop.refused("token", "create", "x", "--org", "gone") == ["there is no org gone"]
    for age in ("soon", "1999-01-01", "9" * 7 + "d", "0d", "999999w"):
        assert shop.refused("token", "create", "x", "--expires", age)[0].startswith("--expires: ")


def test_keys_are_exchanged(shop: Shop) -> None:
    (shop.folder / "secret").write_text("whsec_5ecret")
    shop.did("org", "add", "acme")
    shop.did("install", "shop", "acme", "secret=@secret")
    old = shop.key_file.read_text().strip()
    [[before, use, count, _]] = rows(shop.did("keys", "list"))
    assert (use, count) == ("encrypts", "1")
    new = shop.did("keys", "new").strip()
    shop.key_file.write_text(f"{new}\n{old}\n")
    assert [row[1:3] for row in rows(shop.did("keys", "list"))] == [["encrypts", "0"], ["decrypts", "1"]]
    done = shop.hay("keys", "rotate")
    assert done.code == 0
    assert done.out.endswith("(1 rows rewritten)\n")
    assert done.err == f"not needed any more, once no backup is either: {before}\n"
    assert [row[1] for row in rows(shop.did("keys", "list"))] == ["encrypts", "not needed"]
    shop.key_file.write_text(f"{old}\n")
    [said] = shop.refused("org", "list")
    assert "which is not among the given keys" in said
    shop.key_file.write_text(f"{new}\n")
    assert shop.did("config", "get", "shop", "acme", "secret") == "********\n"
    again = shop.hay("keys", "rotate", "--json")
    assert (again.json()["rewritten"], again.json()["retired"]) == (0, [])
    assert "keys.rotate" in shop.did("audit", "--limit", "5")
    everything = shop.did("audit", "--json")
    assert (old in everything, new in everything) == (False, False)


def test_the_audit_log_by_what_and_whom(small: Shop) -> None:
    for org in ("a", "b", "c"):
        small.did("org", "add", org)
    log = rows(small.did("audit"))
    assert [(row[2], row[3]) for row in log] == [
        *(("org.create", org) for org in "cba"),
        ("keys.use", "-"),
    ]
    who = log[0][1]
    assert who.startswith("cli:")
    assert [row[3] for row in rows(small.did("audit", "--limit", "2", "--actor", who))] == ["c", "b"]
    assert [row[3] for row in rows(small.did("audit", "--org", "b"))] == ["b"]
    assert small.did("audit", "--plugin", "shop") == ""
    [entry] = json.loads(small.did("audit", "--actor", "host", "--json"))
    assert (entry["actor"], entry["outcome"]) == ("host", "ok")


# ---- what goes wrong


READING = (["org", "list"], ["token", "list"], ["keys", "list"], ["audit"], ["config", "get", "shop", "acme"])


@pytest.mark.parametrize(
    "command", [*READING, ["keys", "rotate"], ["uninstall", "shop", "acme", "--yes"]], ids=" ".join
)
def test_no_store(small: Shop, command: list[str]) -> None:
    assert small.refused(*command) == ["store.db: there is no store here; --store says where it is"]
    assert sorted(path.name for path in small.folder.iterdir()) == ["out", "plugins"], "and none was made"


def test_no_key_file(small: Shop) -> None:
    small.did("org", "add", "acme")
    small.key_file.rename(small.folder / "elsewhere")
    for command in (["org", "list"], ["org", "add", "b"], ["serve", "plugins", "--port=0"]):
        said = "store.key: the store's key is not there; put the file back, or say where it is with --key-file"
        assert small.refused(*command) == [said]
        assert not small.key_file.exists(), "a new one would open nothing"
    assert small.did("org", "list", "--key-file", "elsewhere").startswith("acme\t")


def test_wrong_keys(small: Shop) -> None:
    small.did("org", "add", "acme")
    [said] = small.refused("org", "list", HAYHOST_SECRET_KEY="ab" * 32)
    assert "which is not among the given keys" in said
    assert small.refused("org", "list", HAYHOST_SECRET_KEY="5ecret") == [
        "HAYHOST_SECRET_KEY: key 1 is not 32 bytes as 64 hex digits or as base64"
    ]
    small.key_file.chmod(0o644)
    assert small.refused("org", "list") == ["store.key: can be read or changed by others; use `chmod 600 store.key`"]


def test_files_that_are_no_store(small: Shop) -> None:
    (small.folder / "store.db").write_text("x" * 5000)
    small.key_file.write_text("ab" * 32)
    small.key_file.chmod(0o600)
    assert small.refused("org", "list") == ["store.db: is not a database"]
    assert small.refused("org", "list", "--store", "plugins") == ["plugins: is not a file"]
    assert small.refused("org", "list", "--store", "mysql://hay:5ecret@x/y") == [
        "the store's URL begins with 'mysql'; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    ]


@pytest.fixture
def locked(small: Shop) -> Iterator[Shop]:
    small.did("org", "add", "acme")
    other = sqlite3.connect(small.folder / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield small
    other.close()


def test_a_store_that_another_process_keeps_locked(locked: Shop) -> None:
    assert locked.did("org", "list").startswith("acme\t"), "reading goes on"
    assert locked.refused("org", "add", "b") == ["store.db: another process keeps it locked"]


def test_a_store_that_may_only_be_read(small: Shop) -> None:
    small.did("org", "add", "acme")
    (small.folder / "store.db").chmod(0o444)
    small.folder.chmod(0o555)
    # Root may write everywhere, unless it gives that up.
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    try:
        for command in (["org", "add", "b"], ["org", "list"], ["org", "add", "b", "--store", "new.db"]):
            done = subprocess.run(
                [*prefix, sys.executable, "-P", "-m", "hayhost", *command],
                cwd=small.folder,
                env=environment(small.env),
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
            assert (done.returncode, done.stdout) == (1, ""), done
            assert re.fullmatch(r"hayhost: (store.db|new.key): .*\n", done.stderr), done.stderr
    finally:
        small.folder.chmod(0o755)


def test_a_database_server_that_is_not_there(tmp_path: Path) -> None:
    url = server().new()
    lost = Shop(tmp_path / "shop", re.sub(r":\d+/", ":1/", url))
    [said] = lost.refused("org", "add", "acme")
    assert said.startswith("PostgreSQL ")
    assert "127.0.0.1" in said
    [said] = lost.refused("org", "list", "--store", url.replace("hay:", "hay:wrong"))
    assert said.endswith("wrong password, or no such user")
    [said] = lost.refused("org", "list", "--store", server().url("nothing"))
    assert said.endswith("there is no such database")
    assert PASSWORD not in said


def test_plugins_that_are_not_there(small: Shop) -> None:
    small.did("org", "add", "acme")
    write_plugin(small.folder / "plugins/broken", "raise ValueError('at import')")
    (small.folder / "plugins/bad").mkdir()
    (small.folder / "plugins/bad/pyproject.toml").write_text("[tool.hay-plugin]\n")
    first, bad = small.refused("install", "gone", "acme")
    assert first == f"there is no plugin gone in {small.folder}/plugins"
    assert bad.startswith("plugins/bad: ")
    [said] = small.refused("install", "broken", "acme")
    assert said.startswith("broken does not load: ")
    assert said.endswith("/plugins/broken` shows more")
    assert small.refused("install", "shop", "acme", "--plugins", "out")[0].startswith("there is no plugin shop")
    (small.folder / "plugins").rename(small.folder / "elsewhere")
    [said] = small.refused("install", "shop", "acme")
    assert said.endswith("give --plugins DIR, or set HAYHOST_PLUGINS")
    assert small.did("install", "shop", "acme", HAYHOST_PLUGINS="elsewhere") == "shop was installed for acme\n"


# ---- completion


def completed(shop: Shop, *words: str, **env: str) -> list[str]:
    """What bash would offer for the last word."""
    env |= {"_HAYHOST_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = shop.hay(**env)
    assert done.err == ""
    return [line.partition(",")[2] for line in done.out.splitlines() if line]


def test_completion_of_orgs_plugins_and_tokens(shop: Shop) -> None:
    assert completed(shop, "hayhost", "org", "show", "") == [], "there is no store"
    for org in ("acme", "acme2", "b_1", "bx1"):
        shop.did("org", "add", org)
    shop.hay("token", "create", "ci")
    [[token, *_]] = rows(shop.did("token", "list"))
    assert completed(shop, "hayhost", "org", "show", "") == ["acme", "acme2", "b_1", "bx1"]
    assert completed(shop, "hayhost", "install", "shop", "acme") == ["acme", "acme2"]
    assert completed(shop, "hayhost", "org", "remove", "b_") == ["b_1"]
    assert completed(shop, "hayhost", "config", "get", "s") == ["shop"]
    assert completed(shop, "hayhost", "token", "revoke", token[:3]) == [token]
    assert completed(shop, "hayhost", "uninstall", "--store", "/gone/x.db", "shop", "") == []
    assert completed(shop, "hayhost", "uninstall", "shop", "", HAYHOST_STORE="mysql://x") == []
    assert completed(shop, "hayhost", "install", "", HAYHOST_PLUGINS="/gone") in ([], ["shop"])
