"""``hayhost run``, started, spoken to and stopped exactly as an existing Hay Core does."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hayhost.cli.run import installation_from_environment
from hayhost.installs import Auth

from .commands import environment, run_hayhost
from .conftest import LIMIT, Answer, HostProcess, all_gone, routes, seen_of, wait_until, write_plugin

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

Start = Callable[..., HostProcess]

SECRETS = ("sk_config_5ecret", "sk_auth_5ecret", "sk_host_5ecret")
CONFIG = {"org": {"id": "acme", "name": "Acme Ltd"}, "config": {"apiKey": SECRETS[0], "greeting": "Servus"}}
AUTH = {"methodId": "key", "credentials": {"apiKey": SECRETS[1]}}
GOOD_ENV = {"HAY_ORG_CONFIG": json.dumps(CONFIG), "HAY_ORG_AUTH": json.dumps(AUTH)}

PLUGIN = """
from hayhost.sdk import *
import os, sys

class Tools:
    def list_tools(self):
        return [{"name": "add", "description": "Adds", "inputSchema": {"type": "object"}}, {"name": "fail"}]

    def call_tool(self, name, arguments):
        if name == "fail":
            raise ValueError("no luck")
        return {"content": [{"type": "text", "text": str(arguments["a"] + arguments["b"])}]}

@define_hay_plugin
class Plugin:
    name = "worker"

    def on_initialize(self, ctx):
        ctx.register.config({
            "apiKey": {"type": "string", "sensitive": True},
            "greeting": {"type": "string", "default": "Hello"},
            "fromHost": {"type": "string", "env": "FROM_HOST"},
        })
        ctx.register.auth.api_key(id="key", label="API key", config_field="apiKey")
        ctx.register.route("GET", "/who", self.who)
        ctx.register.route("GET", "/process", self.process)
        ctx.register.route("POST", "/items/{id}", self.item)

    async def on_start(self, ctx):
        await ctx.mcp.start_local("calculator", lambda mcp: Tools())

    def on_validate_auth(self, ctx):
        return ctx.config.get("apiKey") == "right" and ctx.org.id == "acme"

    def on_config_update(self, ctx):
        ctx.logger.info("greeting is " + ctx.config.get("greeting"))

    def on_enable(self, ctx):
        ctx.logger.info("on_enable of " + ctx.org.id)

    def on_disable(self, ctx):
        ctx.logger.info("on_disable of " + ctx.org.id)

    def on_stop(self, ctx):
        ctx.logger.info("on_stop of " + ctx.org.id)

    def who(self, req):
        auth, config = req.ctx.auth.get(), req.ctx.config
        return {
            "id": req.ctx.org.id,
            "name": req.ctx.org.name,
            "config": {key: config.get(key) for key in config.keys()},
            "auth": auth and [auth.method_id, dict(auth.credentials)],
        }

    def process(self, req):
        return {"pid": os.getpid(), "environ": dict(os.environ), "argv": sys.argv}

    def item(self, req):
        return {"id": req.params["id"], "body": req.json()}
"""


def make(folder: Path, source: str = PLUGIN) -> Path:
    return write_plugin(folder, source, name="worker", env=("FROM_HOST",))


def arguments(folder: Path, mode: str = "test") -> list[str]:
    """What Hay Core starts a worker with."""
    return [f"--plugin-path={folder}", "--org-id=acme", "--port=0", f"--mode={mode}"]


def end(host: HostProcess, number: int = signal.SIGTERM) -> int:
    """Send the signal and wait; the exit code. The log can still be read."""
    host.process.send_signal(number)
    return host.process.wait(LIMIT)


def healthy(host: HostProcess) -> dict[str, Any]:
    """Its ``/health`` once the worker is up."""
    up = ("ready", "degraded")
    health: dict[str, Any] = wait_until(lambda: _if(host.get("/health").json(), up), "the worker is up")
    return health


def _if(health: dict[str, Any], states: tuple[str, ...]) -> dict[str, Any] | None:
    return health if health["state"] in states else None


def assert_one_line(error: str, *parts: str) -> None:
    """The command's own words are one line with these parts; what else there is are log records."""
    assert "Traceback" not in [line.strip() for line in error.splitlines()]
    [line] = [line for line in error.splitlines() if not line.startswith("{")]
    assert line.startswith("hayhost")
    assert [part for part in parts if part not in line] == []


# ---- starting


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plugins") / "folder")


def test_arguments_with_equals_signs_in_test_mode(start: Start, plugin: Path) -> None:
    host = start("run", *arguments(plugin)).wait_ready()
    assert host.get("/who").json() == {
        "id": "acme",
        "name": "Test Org acme",
        "config": {"apiKey": None, "greeting": "Hello", "fromHost": None},
        "auth": None,
    }
    assert healthy(host)["status"] == "healthy"


def test_arguments_apart_in_production(start: Start, plugin: Path) -> None:
    separate = ["--plugin-path", plugin, "--org-id", "acme", "--port", "0", "--mode", "production"]
    host = start("run", *separate, env={**GOOD_ENV, "FROM_HOST": SECRETS[2]}).wait_ready()
    assert host.get("/who").json() == {
        "id": "acme",
        "name": "Acme Ltd",
        "config": {"apiKey": SECRETS[0], "greeting": "Servus", "fromHost": SECRETS[2]},
        "auth": ["key", {"apiKey": SECRETS[1]}],
    }
    # Nothing of it shows anywhere
    health, metadata = healthy(host), host.get("/metadata")
    assert (health["status"], health["lastError"]) == ("healthy", None)
    process = host.get("/process").json()
    assert set(process["environ"]) == {"PATH", "LANG", "HOME", "USER", "LOGNAME", "TMPDIR"}
    places = {"health": str(health), "metadata": metadata.body.decode(), "process": str(process)}
    for pid in host.pids():
        places[f"environment of {pid}"] = seen_of(pid, "environ").decode()
    for pid in (*host.pids(), host.pid):
        places[f"command line of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text()
    assert len(places) >= 3 + 3 + 4  # a nursery, a zygote, a worker, the front
    assert end(host) == 0
    places["log"] = host.log
    assert [where for where, text in places.items() for secret in SECRETS if secret in text] == []


def test_production_is_the_default(start: Start, plugin: Path) -> None:
    host = start("run", "--plugin-path", plugin, "--org-id", "acme", "--port", "0").wait_ready()
    assert "HAY_ORG_CONFIG is not set" in host.log
    assert healthy(host)["status"] == "degraded"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"HAY_ORG_CONFIG": json.dumps(CONFIG)[:-1]}, "HAY_ORG_CONFIG is not of the form"),
        (
            {**GOOD_ENV, "HAY_ORG_CONFIG": json.dumps({**CONFIG, "org": {"id": "beta"}})},
            "HAY_ORG_CONFIG is for another org than --org-id acme; neither it nor HAY_ORG_AUTH is used",
        ),
        ({**GOOD_ENV, "HAY_ORG_AUTH": json.dumps(AUTH)[1:]}, "HAY_ORG_AUTH is not of the form"),
    ],
    ids=["malformed config", "another org's config", "malformed auth"],
)
def test_degraded_but_serving(start: Start, plugin: Path, env: dict[str, str], reason: str) -> None:
    host = start("run", *arguments(plugin, "production"), env=env).wait_ready()
    [record] = [record for record in host.records() if record["event"] == "the worker will be degraded"]
    assert record["reason"].startswith(reason)
    health = host.get("/health") if healthy(host) else None
    assert health is not None
    assert health.status == 200
    assert (health.json()["status"], health.json()["state"]) == ("degraded", "degraded")
    assert health.json()["lastError"] == record["reason"]
    who = host.get("/who").json()
    assert (who["id"], who["auth"]) == ("acme", None)
    assert who["config"]["apiKey"] == (SECRETS[0] if "auth" in reason.lower()[:12] else None)
    said = host.get("/health").body + host.get("/metadata").body + host.log.encode()
    assert [secret for secret in SECRETS if secret.encode() in said] == []
    # Hay Core mends it by sending the settings again
    assert host.post("/config-update", json_body={"config": {"greeting": "Moin"}}).json() == {"success": True}
    assert healthy(host)["status"] == "healthy"
    assert host.get("/who").json()["config"]["greeting"] == "Moin"


def read(monkeypatch: pytest.MonkeyPatch, config: str | None, auth: str | None = None) -> Any:
    """The installation that these two variables describe; they must be gone afterwards."""
    for name, value in (("HAY_ORG_CONFIG", config), ("HAY_ORG_AUTH", auth)):
        if value is not None:
            monkeypatch.setenv(name, value)
    installation = installation_from_environment("acme")
    assert not [name for name in os.environ if name.startswith("HAY_ORG")]
    return installation


@pytest.mark.parametrize(
    ("config", "name", "values"),
    [
        ('{"org": {"id": "acme"}}', "acme", {}),
        ('{"org": {"id": "acme", "name": null}, "config": null}', "acme", {}),
        ('{"org": {"id": "acme", "name": ""}, "config": {}}', "acme", {}),
        (' {"org": {"id": "acme", "name": "Ä", "plan": "pro"}, "config": {"a": [1.5]}, "v": 2}\n', "Ä", {"a": [1.5]}),
    ],
)
@pytest.mark.parametrize("auth", [None, "", "{}", " { }\n"])
def test_well_formed_settings(
    monkeypatch: pytest.MonkeyPatch, config: str, name: str, values: dict[str, Any], auth: str | None
) -> None:
    installation = read(monkeypatch, config, auth)
    assert (installation.org_id, installation.org_name) == ("acme", name)
    assert (installation.config, installation.auth, installation.problem) == (values, None, "")


@pytest.mark.parametrize(
    "config",
    [
        *("", "null", "[]", '"sk_5"', "{", "{}", '{"org": null}', '{"org": "acme"}', '{"org": {}}', "sk_5", "\udcff"),
        *('{"org": {"id": 5}}', '{"org": {"id": "acme", "name": 5}}', '{"org": {"id": "acme"}, "config": []}'),
        *('{"org": {"id": "acme"}, "config": "sk_5"}', '{"org": {"id": "acme"}} {"sk_5": 1}', '{"org": {"id": null}}'),
        *(
            '{"org": {"id": "acme"}, "config": {"sk_5": NaN}}',
            "{'org': {'id': 'acme'}}",
            '\ufeff{"org": {"id": "acme"}}',
        ),
        '{"org": {"id": "acme"}, "config": {"sk_5": ' + "[" * 50_000 + "]" * 50_000 + "}}",
    ],
)
def test_malformed_config(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    installation = read(monkeypatch, config, json.dumps(AUTH))
    assert installation.problem == (
        'HAY_ORG_CONFIG is not of the form {"org": {"id": "...", "name": "..."}, "config": {}}'
    )
    assert (installation.org_id, installation.org_name, installation.config) == ("acme", "acme", {})
    assert installation.auth == Auth("key", AUTH["credentials"])  # type: ignore[arg-type]  # a dict, see above


@pytest.mark.parametrize("org", ["beta", "ACME", "acme ", "", "acme\0"])
def test_nothing_of_another_org_is_used(monkeypatch: pytest.MonkeyPatch, org: str) -> None:
    config = {"org": {"id": org, "name": "Other"}, "config": {"apiKey": "theirs"}}
    installation = read(monkeypatch, json.dumps(config), json.dumps(AUTH))
    assert "another org" in installation.problem
    assert (installation.org_id, installation.org_name) == ("acme", "acme")
    assert (installation.config, installation.auth) == ({}, None)


@pytest.mark.parametrize(
    "auth",
    [
        *(
            " ",
            "null",
            "[]",
            '"sk_5"',
            "{",
            "sk_5",
            "0",
            "false",
            '{"methodId": "key"}',
            '{"credentials": {"k": "sk_5"}}',
        ),
        *('{"methodId": 5, "credentials": {}}', '{"methodId": "", "credentials": {}}', "\udcff"),
        *('{"methodId": "key", "credentials": []}', '{"methodId": "key", "credentials": "sk_5"}'),
        '{"methodId": "key", "credentials": {"sk_5": ' + "[" * 50_000 + "]" * 50_000 + "}}",
    ],
)
def test_malformed_auth(monkeypatch: pytest.MonkeyPatch, auth: str) -> None:
    installation = read(monkeypatch, json.dumps(CONFIG), auth)
    assert installation.problem == 'HAY_ORG_AUTH is not of the form {"methodId": "...", "credentials": {}}'
    assert (installation.config, installation.auth) == (CONFIG["config"], None)


def test_both_malformed_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = read(monkeypatch, None, "sk_5").problem
    assert re.fullmatch(r"HAY_ORG_CONFIG is not set; HAY_ORG_AUTH is not of the form [^;]*", problem)


# ---- what it answers


@pytest.fixture(scope="module")
def running(plugin: Path) -> Iterator[HostProcess]:
    """One in production, shared by tests that leave it as it is."""
    host = HostProcess(["run", *arguments(plugin, "production")], GOOD_ENV)
    yield host.wait_ready()
    host.kill()


def test_metadata_at_the_root(running: HostProcess) -> None:
    healthy(running)
    assert running.get("/metadata").json() == {
        "configSchema": {
            "apiKey": {"type": "string", "sensitive": True},
            "greeting": {"type": "string", "default": "Hello"},
            "fromHost": {"type": "string", "env": "FROM_HOST"},
        },
        "authMethods": [{"type": "apiKey", "id": "key", "label": "API key", "configField": "apiKey"}],
        "uiExtensions": [],
        "pages": [],
        "routes": [
            {"method": "GET", "path": "/who"},
            {"method": "GET", "path": "/process"},
            {"method": "POST", "path": "/items/{id}"},
        ],
        "mcp": {"local": [{"id": "calculator"}], "external": []},
    }


def test_health_at_the_root(running: HostProcess) -> None:
    health = healthy(running)
    pid = running.get("/process").json()["pid"]
    uptime, memory, timestamp = health.pop("uptime"), health.pop("memory"), health.pop("timestamp")
    assert health == {
        "status": "healthy",
        "state": "ready",
        "pid": pid,
        "orgId": "acme",
        "plugin": "worker",
        "version": "1.2.3",
        "mcpServers": {"count": 1, "servers": health["mcpServers"]["servers"]},
        "isolation": health["isolation"],
        "sharing": "fork",
        "lastError": None,
    }
    assert "calculator" in str(health["mcpServers"]["servers"])
    assert 0 <= uptime < 3600
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", timestamp)
    assert memory["rss"] > 1 << 20
    assert memory["rss"] >= memory["pss"] > 0


NO_AUTH = {"valid": False, "error": "Invalid auth state format"}
NO_AUTH_BODIES: list[Any] = [{}, [], {"authState": None}, {"authState": {"methodId": "key"}}]
NO_AUTH_BODIES += [{"authState": {"methodId": "", "credentials": {}}}, {"authState": AUTH, "config": 1}]
NO_CONFIG = {"success": False, "error": "Config object required"}
NO_CONFIG_BODIES: list[Any] = [{}, [], {"config": None}, {"config": []}, {"config": "x"}]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "answer"),
    [
        ("POST", "/validate-auth", {"authState": {**AUTH, "credentials": {"apiKey": "right"}}}, 200, {"valid": True}),
        ("POST", "/validate-auth", {"authState": AUTH}, 200, {"valid": False}),
        (
            *("POST", "/validate-auth", {"authState": {"methodId": "key", "credentials": {}}}),
            *(200, {"valid": False}),
        ),
        (
            *("POST", "/validate-auth", {"authState": {**AUTH, "credentials": {}}, "config": {"apiKey": "right"}}),
            *(200, {"valid": True}),
        ),
        *(("POST", "/validate-auth", body, 400, NO_AUTH) for body in NO_AUTH_BODIES),
        *(("POST", "/config-update", body, 400, NO_CONFIG) for body in NO_CONFIG_BODIES),
        (
            *("GET", "/mcp/list-tools", None, 200),
            {
                "tools": [
                    {"name": "add", "description": "Adds", "inputSchema": {"type": "object"}, "serverId": "calculator"},
                    {"name": "fail", "serverId": "calculator"},
                ]
            },
        ),
        (
            *("POST", "/mcp/call-tool", {"toolName": "add", "arguments": {"a": 1, "b": 2}}, 200),
            {"content": [{"type": "text", "text": "3"}]},
        ),
        ("POST", "/mcp/call-tool", {"toolName": "gone"}, 404, {"error": "No MCP server found for tool: gone"}),
        ("POST", "/mcp/call-tool", {"toolName": "fail"}, 500, {"error": "Tool execution failed: no luck"}),
        ("POST", "/items/a%2Fb", {"n": 1}, 200, {"id": "a/b", "body": {"n": 1}}),
    ],
)
def test_endpoints_at_the_root(
    running: HostProcess, method: str, path: str, body: Any, status: int, answer: dict[str, Any]
) -> None:
    healthy(running)
    got = running.request(method, path, json_body=body)
    assert got.json() == answer
    assert got.status == status


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/gone", None, 404),
        ("GET", "/plugins/worker/acme/who", None, 404),
        ("GET", "/healthz", None, 404),
        ("POST", "/who", "{}", 405),
        ("GET", "/items/3", None, 405),
        ("GET", "/disable", None, 405),
        ("POST", "/health", "{}", 405),
        ("POST", "/mcp/call-tool", "{}", 400),
        ("POST", "/mcp/call-tool", "{", 400),
        ("POST", "/items/3", "{", 400),
    ],
)
def test_errors_are_json(running: HostProcess, method: str, path: str, body: str | None, status: int) -> None:
    answer = running.request(method, path, body)
    assert answer.status == status
    assert list(answer.json()) == ["error"]
    assert ("Allow" in answer.headers) is (status == 405)


def test_head_and_options(running: HostProcess) -> None:
    head = running.request("HEAD", "/who")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) == len(running.get("/who").body)
    options = running.request("OPTIONS", "/items/3")
    assert set(options.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}


def test_config_update(start: Start, plugin: Path) -> None:
    host = start("run", *arguments(plugin, "production"), env=GOOD_ENV).wait_ready()
    before = healthy(host)["pid"]
    assert host.post("/config-update", json_body={"config": {"greeting": "Hola"}}).json() == {"success": True}
    assert "greeting is Hola" in host.log
    who = host.get("/who").json()
    assert who["config"] == {"apiKey": None, "greeting": "Hola", "fromHost": None}
    assert who["auth"] == ["key", {"apiKey": SECRETS[1]}]
    assert healthy(host)["pid"] != before
    assert "on_enable" not in host.log
    wait_until(lambda: all_gone([before]), "the worker with the old config is gone")


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_disables_once_and_exits_with_0(start: Start, plugin: Path, number: int) -> None:
    host = start("run", *arguments(plugin)).wait_ready()
    healthy(host)
    pids = host.pids()
    assert end(host, number) == 0
    assert all_gone(pids)
    assert host.log.count("on_disable of acme") == 1
    assert "on_stop" not in host.log
    assert not [record for record in host.records() if record["level"] in ("warning", "error")]


def test_disable_and_then_a_signal(start: Start, plugin: Path) -> None:
    host = start("run", *arguments(plugin)).wait_ready()
    assert host.post("/disable").json() == {"success": True}
    assert host.log.count("on_disable of acme") == 1
    assert host.get("/who").status == 404
    assert host.get("/health").json()["state"] == "stopped"
    assert host.post("/disable").json() == {"success": True}
    assert end(host) == 0
    assert host.log.count("on_disable of acme") == 1
    assert "on_stop" not in host.log


SLOW_DISABLE = """
from hayhost.sdk import *
import asyncio, os

@define_hay_plugin
class Plugin:
    name = "slow"

    async def on_disable(self, ctx):
        ctx.logger.info("disabling")
        while not os.path.exists("go"):
            await asyncio.sleep(0.01)
        ctx.logger.info("disabled")
"""


def test_a_signal_while_disable_is_under_way(start: Start, tmp_path: Path) -> None:
    folder = make(tmp_path / "p", SLOW_DISABLE)
    host = start("run", *arguments(folder), "--drain-timeout=0.1").wait_ready()
    answers: list[Answer] = []
    disabling = threading.Thread(target=lambda: answers.append(host.post("/disable")))
    disabling.start()
    host.wait_for_log('"disabling"')
    host.process.send_signal(signal.SIGTERM)
    host.wait_for_log("requests are broken off")
    (folder / "go").touch()
    assert host.process.wait(LIMIT) == 0
    disabling.join(LIMIT)
    assert answers[0].json() == {"success": True}
    assert (host.log.count('"disabling"'), host.log.count('"disabled"')) == (1, 1)


def test_a_second_signal_is_ignored_with_a_warning(start: Start, tmp_path: Path) -> None:
    folder = make(tmp_path / "p", SLOW_DISABLE)
    host = start("run", *arguments(folder)).wait_ready()
    healthy(host)
    host.process.send_signal(signal.SIGTERM)
    host.wait_for_log('"disabling"')
    for number in (signal.SIGTERM, signal.SIGINT):
        host.process.send_signal(number)
        host.wait_for_log(f"{number.name} ignored: already stopping")
    (folder / "go").touch()
    assert host.process.wait(LIMIT) == 0
    assert [record["level"] for record in host.records() if "ignored" in record["event"]] == ["warning", "warning"]
    assert (host.log.count('"disabling"'), host.log.count('"disabled"')) == (1, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_without_end(start: Start, plugin: Path, number: int) -> None:
    host = start("run", *arguments(plugin)).wait_ready()
    healthy(host)

    def once_more() -> bool:
        host.process.send_signal(number)
        return host.process.poll() is not None

    wait_until(once_more, "it has exited")
    assert host.process.returncode == 0
    assert host.log.count("on_disable of acme") == 1
    assert "Traceback" not in host.log


@pytest.mark.parametrize(
    ("body", "logged"),
    [
        ("raise ValueError('not now')", "on_disable failed: ValueError: not now"),
        ("await forever()", "on_disable did not finish within 0.2 s"),
    ],
)
def test_on_disable_cannot_keep_it(start: Start, tmp_path: Path, body: str, logged: str) -> None:
    source = "from hayhost.sdk import *\nimport asyncio\nforever = asyncio.Event().wait\n@define_hay_plugin\nclass P:\n"
    folder = make(tmp_path / "p", source + f"    name = 'x'\n    async def on_disable(self, ctx):\n        {body}\n")
    host = start("run", *arguments(folder), "--hook-timeout=0.2").wait_ready()
    healthy(host)
    assert end(host) == 0
    [record] = [record for record in host.records() if record["level"] in ("warning", "error")]
    assert logged in record["event"]


def test_a_request_in_flight_is_finished(start: Start, tmp_path: Path) -> None:
    wait = "async def:\n print('waiting')\n while not os.path.exists('go'): await asyncio.sleep(0.01)\n return 'done'"
    folder = write_plugin(tmp_path / "p", routes("", wait=wait))
    host = start("run", *arguments(folder)).wait_ready()
    answers: list[Answer] = []
    request = threading.Thread(target=lambda: answers.append(host.get("/wait")))
    request.start()
    host.wait_for_log('"waiting"')
    host.process.send_signal(signal.SIGTERM)
    host.wait_for_log("SIGTERM received: stopping")
    wait_until(lambda: _refused(host.port), "new connections are refused")
    (folder / "go").touch()
    request.join(LIMIT)
    assert answers[0].body == b"done"
    assert host.process.wait(LIMIT) == 0


def _refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


ENDLESS = "print('begun', flush=True)\n{indent}import time\n{indent}while True: time.sleep(0.01)\n"


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS.format(indent=""),
        "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'x'\n    def on_initialize(self, ctx):\n"
        "        " + ENDLESS.format(indent=" " * 8),
        "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'x'\n    def on_start(self, ctx):\n"
        "        " + ENDLESS.format(indent=" " * 8),
    ],
    ids=["import", "on_initialize", "on_start"],
)
def test_a_signal_while_it_starts(start: Start, tmp_path: Path, source: str) -> None:
    host = start("run", *arguments(make(tmp_path / "p", source)))
    host.wait_for_log('"begun"')
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(10) == 0  # and not after the 30 s that a hook may take
    assert not [record for record in host.records() if record["level"] in ("warning", "error")]
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_host_itself_is_still_importing(
    start: Start, plugin: Path, tmp_path: Path, number: int
) -> None:
    endless = "print('begun', flush=True)\nimport time\nwhile True: time.sleep(0.01)\n"
    (tmp_path / "msgspec.py").write_text(endless)
    host = start("run", *arguments(plugin), env={"PYTHONPATH": str(tmp_path)})
    host.wait_for_log("begun")
    assert end(host, number) == 0
    assert host.log == "begun\n"


def test_nothing_is_left_2_seconds_after_sigkill(start: Start, tmp_path: Path) -> None:
    spawn = "def:\n import subprocess\n return str(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)"
    folder = write_plugin(
        tmp_path / "p", routes("", spin="async def:\n print('spins')\n while True: pass", spawn=spawn)
    )
    host = start("run", *arguments(folder), "--isolation", "limited").wait_ready()
    child = int(host.get("/spawn").body)
    busy = threading.Thread(target=_broken_off, args=(host,))
    busy.start()
    host.wait_for_log('"spins"')
    pids = host.pids()
    assert child in pids
    assert len(pids) >= 4
    os.kill(host.pid, signal.SIGKILL)
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)
    busy.join(LIMIT)


def _broken_off(host: HostProcess) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        host.get("/spin")


# ---- exit codes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--plugin-path="], "--plugin-path: '' is not a folder"),
        (["--plugin-path=/gone"], "/gone: found no folder"),
        (["--org-id="], "--org-id: '' is not an org id"),
        (["--org-id=../beta"], "--org-id: '../beta' is not an org id: letters, digits"),
        ([f"--org-id={'a' * 129}"], "is not an org id"),
        (["--port="], "--port: '' is not a number"),
        (["--port=http"], "--port: 'http' is not a number"),
        (["--port=65536"], "--port: '65536' is not from 0 to 65535"),
        (["--port=-1"], "--port: '-1' is not from 0 to 65535"),
        (["--mode=staging"], "'--mode': 'staging' is not one of 'production', 'test'"),
        (["--org"], "No such option '--org'"),
        (["--spares=1"], "No such option '--spares'"),
        (["more"], "unexpected extra argument (more)"),
        (["--org-id"], "'--org-id' requires an argument"),
        (["--hook-timeout=soon"], "--hook-timeout: 'soon' is not a number"),
        (["--config=/gone.toml"], "'--config': File '/gone.toml' does not exist"),
    ],
)
def test_bad_arguments(plugin: Path, changed: list[str], said: str) -> None:
    done = run_hayhost("run", *arguments(plugin), *changed)
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, said)


@pytest.mark.parametrize("option", ["--plugin-path", "--org-id", "--port"])
def test_missing_arguments(plugin: Path, option: str) -> None:
    done = run_hayhost("run", *(each for each in arguments(plugin) if not each.startswith(option)))
    assert done.code == 1
    assert_one_line(done.err, f"Missing option '{option}'", "see `hayhost run --help`")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("import", "importing the plugin did not finish within 0.5 s"),
        ("init", "on_initialize did not finish within 0.5 s"),
    ],
)
def test_loading_without_end(tmp_path: Path, where: str, said: str) -> None:
    source = (
        "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'x'\n    def on_initialize(self, ctx):\n"
    )
    source += "        " + ENDLESS.format(indent=" " * 8)
    folder = make(tmp_path / "p", ENDLESS.format(indent="") if where == "import" else source)
    done = run_hayhost("run", *arguments(folder), "--hook-timeout=0.5")
    assert done.code == 1
    assert_one_line(done.err, said)


def test_on_initialize_that_raises(tmp_path: Path) -> None:
    source = "import os\nopen('pid', 'w').write(str(os.getpid()))\nfrom hayhost.sdk import *\n@define_hay_plugin\n"
    source += "class P:\n    name = 'x'\n    def on_initialize(self, ctx): raise RuntimeError('no luck')\n"
    folder = make(tmp_path / "p", source)
    done = run_hayhost("run", *arguments(folder), "--log-format=json", "--isolation=limited")
    assert done.code == 1
    assert_one_line(done.err, "worker: RuntimeError: no luck")
    records = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    [record] = [record for record in records if record["event"] != "isolation"]
    assert (record["level"], record["reason"]) == ("error", "RuntimeError: no luck")
    assert f'File "{folder}/plugin.py", line 7, in on_initialize' in record["traceback"]
    assert all_gone([int((folder / "pid").read_text())])


def test_a_taken_port_exits_with_2(tmp_path: Path) -> None:
    folder = make(tmp_path / "p", f"import os\nopen('pid', 'w').write(str(os.getpid()))\n{PLUGIN}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_hayhost("run", *arguments(folder), f"--port={port}", "--isolation=limited")
    assert done.code == 2
    assert_one_line(done.err, f"cannot listen on 127.0.0.1:{port}: Address already in use")
    assert all_gone([int((folder / "pid").read_text())])


# ---- its standard streams


@pytest.fixture
def spawn(plugin: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """``spawn(shell)``: ``hayhost run`` on ``port``, started by a line of shell in which it is ``"$@"``."""
    started = []

    def begin(shell: str, port: int, **options: Any) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "hayhost", "run", *arguments(plugin), f"--port={port}"]
        process = subprocess.Popen(["sh", "-c", shell, "sh", *command], env=environment(), **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request("GET", "/who")
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(spawn: Callable[..., "subprocess.Popen[bytes]"], closed: str) -> None:
    port = free_port()
    process = spawn(f'exec "$@" {closed}', port)
    wait_until(lambda: answers(port) or process.poll() is not None, "it answers")
    process.terminate()
    assert process.wait(LIMIT) == 0


def test_a_log_that_nobody_reads_any_more(spawn: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    port = free_port()
    process = spawn('exec "$@"', port, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert b'"isolation"' in process.stdout.readline()
    assert b'"listening"' in process.stdout.readline()
    process.stdout.close()
    wait_until(lambda: answers(port) or process.poll() is not None, "it answers")
    process.terminate()
    assert process.wait(LIMIT) == 0
