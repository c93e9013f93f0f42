"""Which tools an org's MCP clients may use, and who called which: kept in the store, followed by every host of it."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .commands import run_hayhost
from .conftest import wait_until, write_plugin
from .hosting import hosting, logged
from .managing import Manager, managed
from .mcping import Session, Stream, ask, call, news, tools
from .storing import BACKENDS, make_url

TOOLS = """
from hayhost.sdk import *
import asyncio

class Tools:
    def list_tools(self):
        return [{"name": name, "inputSchema": {"type": "object"}} for name in ("look", "list", "[l]", "write", "hang")]

    async def call_tool(self, name, arguments):
        if name == "hang":
            await asyncio.Event().wait()
        if name == "write":
            raise ValueError("read-only")
        return {"tool": name}

@define_hay_plugin
class Plugin:
    name = "Shop"

    async def on_start(self, ctx):
        await ctx.mcp.start_local("shop", lambda mcp: Tools())
"""
ALL = ["look", "list", "[l]", "write", "hang"]
ENDPOINT = "/plugins/shop/acme/mcp"
FOLLOWS = 30.0
"""Seconds within which all have followed, on a slow day."""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    write_plugin(tmp_path / "plugins/shop", TOOLS, capabilities=("mcp",))
    return tmp_path / "plugins"


@pytest.fixture
def manager(tmp_path: Path, plugins: Path) -> Iterator[Manager]:
    with managed(tmp_path, plugins=plugins) as manager:
        manager.put("acme", "shop")
        yield manager


def lists(*allow: str, deny: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {"allow": list(allow), "deny": list(deny)}


def calls(manager: Manager, count: int, **query: str) -> list[dict[str, Any]]:
    """The calls in the audit log, the first of them first, once there are ``count``."""
    path = "/audit?action=mcp.call" + "".join(f"&{name}={value}" for name, value in query.items())

    def found() -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = manager.get(path)["items"]
        return items[::-1] if len(items) >= count else []

    items: list[dict[str, Any]] = wait_until(found, f"{count} calls")
    assert len(items) == count
    return items


# ---- lists of tools


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_hosts_of_a_store_follow_and_clients_hear_of_it(backend: str, tmp_path: Path, plugins: Path) -> None:
    options = ("--store", make_url(backend, tmp_path), "--key-file", tmp_path / "the.key")
    with managed(tmp_path, *options, plugins=plugins) as here, managed(tmp_path, *options, plugins=plugins) as there:
        here.put("acme", "shop")
        sessions = [Session(manager.host, ENDPOINT) for manager in (here, there)]
        streams = [news(session) for session in sessions]
        for session in sessions:
            assert [tool["name"] for tool in session.ask("tools/list")["result"]["tools"]] == ALL
        here.ok("PUT", "/orgs/acme/tools", lists("shop__l*", deny=("*__list",)))
        assert tools(here.host, ENDPOINT) == ["look"], "at once"
        wait_until(lambda: tools(there.host, ENDPOINT) == ["look"], "the other host", FOLLOWS)
        for session, stream in zip(sessions, streams, strict=True):
            wait_until(partial(_told, stream), "news", FOLLOWS)
            assert session.call("list")["error"]["message"] == "Unknown tool: list"
            stream.close()
        assert there.get("/orgs/acme/tools") == lists("shop__l*", deny=("*__list",))
        assert there.get("/audit?action=tools.put")["items"][0]["details"] == lists("shop__l*", deny=("*__list",))


def _told(stream: Stream) -> bool:
    return "notifications/tools/list_changed" in stream.methods()


def test_what_is_denied_is_not_at_the_worker_s_own_urls_either(manager: Manager) -> None:
    host, base = manager.host, "/plugins/shop/acme/mcp"

    def listed() -> list[str]:
        return [tool["name"] for tool in host.get(f"{base}/list-tools").json()["tools"]]

    assert listed() == ALL
    manager.ok("PUT", "/orgs/acme/tools", lists("shop__l*", deny=("*__list",)))
    assert listed() == ["look"]
    for name, status in (("look", 200), ("list", 404), ("write", 404), ("nothing", 404)):
        answer = host.post(f"{base}/call-tool", json.dumps({"toolName": name}))
        assert answer.status == status
        if status == 404:
            assert answer.json() == {"error": f"No MCP server found for tool: {name}"}
    manager.ok("PUT", "/orgs/acme/tools", lists())
    assert listed() == ALL


def test_entries_are_patterns_of_two_signs_only(manager: Manager) -> None:
    for given, left in (
        (lists("shop__[l]"), ["[l]"]),
        (lists("shop__?oo?", deny=("*__write",)), ["look"]),
        (lists(deny=("*",)), []),
        (lists("*"), ALL),
        (lists(deny=("Shop__*",)), ALL),
    ):
        manager.ok("PUT", "/orgs/acme/tools", given)
        assert tools(manager.host, ENDPOINT) == left


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"deny": ["create_refund"]}, "deny"),  # it would deny nothing
        ({"deny": [""]}, "deny"),
        ({"deny": ["a__b\n"]}, "deny"),
        ({"allow": ["a__" + "b" * 200]}, "allow"),
        ({"allow": ["a__b"] * 501}, "allow"),
        ({"allow": "a__b"}, "allow"),
        ({"allow": None}, "allow"),
        ({"forbid": []}, "forbid"),
    ],
    ids=str,
)
def test_entries_that_cannot_be(given: dict[str, Any], field: str, refusing: Manager) -> None:
    answer = refusing.call("PUT", "/orgs/acme/tools", given)
    assert answer.status == 422
    assert answer.json()["errors"][0]["field"].startswith(field)
    assert refusing.get("/orgs/acme/tools") == lists()


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("refusing")
    with managed(folder) as manager:
        manager.ok("PUT", "/orgs/acme", {})
        yield manager


def test_nobody_s_change_is_lost(manager: Manager) -> None:
    path = "/orgs/acme/tools"
    first = manager.call("GET", path)
    tag = first.headers["ETag"]
    assert first.json() == lists()
    assert manager.call("GET", path, If_None_Match=tag).status == 304
    second = manager.ok("PUT", path, lists("shop__*"), If_Match=tag)
    assert second.json() == lists("shop__*")
    assert second.headers["ETag"] == manager.call("GET", path).headers["ETag"] != tag
    assert manager.call("PUT", path, lists(), If_Match=tag).status == 412
    assert manager.call("PUT", path, lists(), If_None_Match="*").status == 412
    assert manager.get(path) == lists("shop__*")
    assert manager.ok("PUT", path, lists("crm__*"), If_Match="*").json() == lists("crm__*")
    assert manager.call("GET", "/orgs/nobody/tools").status == 404
    assert manager.call("PUT", "/orgs/nobody/tools", lists()).status == 404


def test_an_org_may_see_its_lists_and_calls_and_change_neither(manager: Manager) -> None:
    manager.put("beta", "shop")
    admin = manager.new_token("admin")
    manager.token = admin
    ours = Manager(manager.host, manager.new_token("ours", "acme"))
    manager.ok("PUT", "/orgs/acme/tools", lists(deny=("shop__write",)))
    assert ours.get("/orgs/acme/tools") == lists(deny=("shop__write",))
    assert ours.call("PUT", "/orgs/acme/tools", lists()).status == 403
    assert ours.call("GET", "/orgs/beta/tools").status == 403
    for org in ("acme", "beta"):
        answer = call_as(manager, admin, org)
        assert answer["result"]["structuredContent"] == {"tool": "look"}
    assert {entry["org"] for entry in calls(manager, 2)} == {"acme", "beta"}
    assert [entry["org"] for entry in calls(ours, 1)] == ["acme"]
    assert ours.call("GET", "/audit?action=mcp.call&org=beta").status == 403


def call_as(manager: Manager, token: str, org: str) -> Any:
    params = {"name": "look", "arguments": {}}
    return ask(manager.host, f"/plugins/shop/{org}/mcp", "tools/call", params, Authorization=f"Bearer {token}")


def test_the_command_line(manager: Manager, tmp_path: Path) -> None:
    env = {"HAYHOST_STORE": str(tmp_path / "store.db")}

    def hay(*arguments: str) -> str:
        done = run_hayhost("org", "tools", *arguments, env=env)
        assert done.code == 0, done
        return done.out + done.err

    assert hay("acme") == "all tools may be used\n"
    assert hay("acme", "--allow", "shop__l*", "--allow", "crm__*") == "allow\tshop__l*\nallow\tcrm__*\n"
    assert json.loads(hay("acme", "--deny", "*__list", "--json")) == lists("shop__l*", "crm__*", deny=("*__list",))
    wait_until(lambda: tools(manager.host, ENDPOINT) == ["look"], "the host to follow", FOLLOWS)
    assert hay("acme", "--clear", "--deny", "shop__look") == "deny\tshop__look\n"
    assert hay("acme", "--clear") == "all tools may be used\n"
    wait_until(lambda: tools(manager.host, ENDPOINT) == ALL, "the host to follow", FOLLOWS)
    for arguments, said in ((("acme", "--deny", "look"), "not a list of tools"), (("nobody",), "there is no org")):
        done = run_hayhost("org", "tools", *arguments, env=env)
        assert (done.code, done.out) == (1, "")
        assert said in done.err


def test_the_file_of_orgs_writes_what_it_names(manager: Manager, tmp_path: Path, plugins: Path) -> None:
    env = {"HAYHOST_STORE": str(tmp_path / "store.db"), "HAYHOST_PLUGINS": str(plugins)}
    file = tmp_path / "orgs.toml"

    def apply(text: str, *options: str) -> list[str]:
        file.write_text(text)
        file.chmod(0o600)
        done = run_hayhost("org", "apply", file, *options, env=env)
        assert done.code == 0, done
        return done.out.splitlines()

    denied = '[orgs.acme.tools]\ndeny = ["shop__write"]\n'
    assert apply(denied, "--dry-run") == ["~ org acme: tools"]
    assert manager.get("/orgs/acme/tools") == lists()
    assert apply(denied + '[orgs.new.tools]\nallow = ["x__*"]') == ["~ org acme: tools", "+ org new"]
    assert manager.get("/orgs/acme/tools") == lists(deny=("shop__write",))
    assert manager.get("/orgs/new/tools") == lists("x__*")
    entries = manager.get("/audit?action=tools.put")["items"]
    assert len(entries) == 2
    assert apply(denied) == [], "nothing to do"
    assert apply("[orgs.acme]") == [], "what it does not name stays"
    assert manager.get("/orgs/acme/tools") == lists(deny=("shop__write",))
    assert len(manager.get("/audit?action=tools.put")["items"]) == 2


# ---- calls


def test_calls_are_in_the_audit_log_without_their_arguments(manager: Manager) -> None:
    host = manager.host
    assert "result" in call(host, ENDPOINT, "look", secret="hunter2")
    assert call(host, "/orgs/acme/mcp", "shop__write")["result"]["isError"]
    assert "error" in Session(host, ENDPOINT).call("gone\0")
    for name in ("look", "write", "gone"):
        host.post(f"{ENDPOINT}/call-tool", json.dumps({"toolName": name, "arguments": {"secret": "hunter2"}}))
    found = calls(manager, 6, org="acme")
    told = [(entry["details"]["tool"], entry["details"]["server"], entry["outcome"]) for entry in found]
    assert told[:2] == [("look", "shop", "ok"), ("write", "shop", "tool error")]
    assert told[2][0].startswith("gone")
    assert [entry[2] for entry in told] == ["ok", "tool error", "denied", "ok", "tool error", "denied"]
    for entry in found:
        assert (entry["actor"], entry["action"], entry["plugin"]) == ("local", "mcp.call", "shop")
        assert entry["details"]["ms"] >= 0
        assert entry["details"]["request"]
    shown = manager.call("GET", "/audit?action=mcp.call").body.decode()
    assert "hunter2" not in shown
    assert "mcp.call" not in str([entry["action"] for entry in manager.get("/audit?limit=1000")["items"]])
    assert manager.get("/audit?action=mcp.call&plugin=other")["items"] == []
    page = manager.get("/audit?action=mcp.call&limit=4")
    assert len(manager.get(f"/audit?action=mcp.call&before={page['next']}")["items"]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_host_that_stops_has_written_its_calls(backend: str, tmp_path: Path, plugins: Path) -> None:
    url, key = make_url(backend, tmp_path), tmp_path / "the.key"
    with managed(tmp_path, "--store", url, "--key-file", key, plugins=plugins) as manager:
        manager.put("acme", "shop")
        for _ in range(30):
            assert "result" in call(manager.host, ENDPOINT, "look")
        manager.host.process.terminate()
        assert manager.host.process.wait(FOLLOWS) == 0
    env = {"HAYHOST_STORE": url, "HAYHOST_KEY_FILE": str(key)}
    done = run_hayhost("audit", "--org", "acme", "--action", "mcp.call", env=env)
    assert (done.code, done.out.count("look")) == (0, 30), done
    assert "mcp.call" not in run_hayhost("audit", env=env).out


def test_without_a_store_the_log_has_the_calls(tmp_path: Path, plugins: Path) -> None:
    with hosting(plugins) as host:
        assert "result" in call(host, ENDPOINT, "look")
        host.post(f"{ENDPOINT}/call-tool", json.dumps({"toolName": "write"}))
        first, second = logged(host, event="mcp tool call", count=2)
        assert (first["tool"], first["outcome"]) == ("look", "ok")
        assert (second["tool"], second["outcome"]) == ("write", "tool error")


# ---- rates


def test_an_org_s_own_endpoint_is_within_the_rates(tmp_path: Path, plugins: Path) -> None:
    write_plugin(plugins / "crm", TOOLS, capabilities=("mcp",))
    with managed(tmp_path, "--org-rate", "6/hour", plugins=plugins) as manager:
        host = manager.host
        for name in ("shop", "crm"):
            manager.put("acme", name)
            manager.put("beta", name)
        for _ in range(3):
            assert "result" in call(host, "/plugins/shop/acme/mcp", "look")
        for _ in range(3):  # each counts for the org's endpoint, and for the plugin that it goes to
            assert "result" in call(host, "/orgs/acme/mcp", "shop__look")
        error = call(host, "/orgs/acme/mcp", "shop__look")["error"]
        assert (error["code"], "More than 6" in error["message"], error["data"]["retryAfter"] > 0) == (
            -32000,
            True,
            True,
        )
        assert host.post(ENDPOINT, "{}").status == 429
        assert "result" in call(host, "/orgs/acme/mcp", "crm__look")
        assert "result" in ask(host, "/orgs/acme/mcp", "tools/list")
        answer = host.post("/orgs/acme/mcp", "{}")
        assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
        assert "result" in call(host, "/orgs/beta/mcp", "shop__look")
