"""Every hook: when it runs, what follows when it fails or hangs, and the requests that the host answers with it."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import LIMIT, Answer, HostProcess, Serve, all_gone, wait_until, write_plugin
from .hosting import PREAMBLE, hosting, logged, stored

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

HOOKS = ("on_initialize", "on_start", "on_validate_auth", "on_config_update", "on_disable", "on_stop", "on_enable")

# What goes wrong in a hook is said by the org's config (or by the config or credentials under validation).
LIFE = (
    PREAMBLE
    + """
FAULTS = {}

async def hang_async():
    await asyncio.Event().wait()

def hang_sync():
    threading.Event().wait()

@ASYNC def act(ctx, hook, fault=None, **meta):
    ctx.logger.info(hook, {"pid": os.getpid(), **meta})
    if fault == "raise":
        raise RuntimeError("no luck")
    if fault == "exit":
        os._exit(7)
    if fault == "sysexit":
        sys.exit(3)
    if fault == "spin":
        while True:
            pass
    if fault == "hang":
        @AWAIT hang_@KIND()

@route("GET", "/pid")
def pid(req):
    return {"pid": os.getpid()}

@route("GET", "/value")
async def value(req):
    return {"value": req.ctx.config.get("value"), "pid": os.getpid()}

@route("GET", "/gated")
async def gated(req):
    req.ctx.logger.info("inside")
    while not os.path.exists(req.query["gate"][0]):
        await asyncio.sleep(0.01)
    return {"pid": os.getpid()}

@define_hay_plugin
class Life:
    name = "Life"

    @ASYNC def on_initialize(self, ctx):
        names = ("value", "stored", "overlaid", "answer", *FAULT_FIELDS)
        ctx.register.config({name: {"type": "string"} for name in names})
        register(ctx)
        ctx.logger.info("on_initialize", {"pid": os.getpid()})

    @ASYNC def on_start(self, ctx):
        FAULTS.update({name: ctx.config.get(name) for name in FAULT_FIELDS})
        @AWAIT act(ctx, "on_start", FAULTS["on_start"], value=ctx.config.get("value"))

    @ASYNC def on_validate_auth(self, ctx):
        auth = ctx.auth.get()
        config = {name: ctx.config.get(name) for name in ("value", "stored", "overlaid", "answer")}
        seen = dict(config=config, method=auth.method_id, credentials=dict(auth.credentials), shown=repr(auth))
        @AWAIT act(ctx, "on_validate_auth", ctx.config.get("answer"), org_id=ctx.org.id, **seen)
        return {"true": True, "false": False, "one": 1, "text": "yes", "none": None}[ctx.config.get("answer")]

    @ASYNC def on_config_update(self, ctx):
        @AWAIT act(ctx, "on_config_update", ctx.config.get("on_config_update"), value=ctx.config.get("value"))

    @ASYNC def on_disable(self, ctx):
        @AWAIT act(ctx, "on_disable", FAULTS.get("on_disable"), org_name=ctx.org.name)

    @ASYNC def on_stop(self, ctx):
        @AWAIT act(ctx, "on_stop", FAULTS.get("on_stop"))

    @ASYNC def on_enable(self, ctx):
        @AWAIT act(ctx, "on_enable")
""".replace("FAULT_FIELDS", repr(("on_start", "on_config_update", "on_disable", "on_stop")))
)


def coloured(source: str, kind: str) -> str:
    """``source`` with all its functions sync, or all of them async."""
    words = ("async ", "await ") if kind == "async" else ("", "")
    return source.replace("@ASYNC ", words[0]).replace("@AWAIT ", words[1]).replace("@KIND", kind)


BROKEN_INITIALIZE = {
    "raises": ("", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "raises-async": ("async ", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "hangs": ("", "time.sleep(60)", "on_initialize did not finish within 1 s"),
    "hangs-async": ("async ", "await asyncio.sleep(60)", "on_initialize did not finish within 1 s"),
    "spins": ("", "while True: pass", "on_initialize did not finish within 1 s"),
    "dies": ("", "os._exit(4)", "its process exited with code 4 while it was loading"),
    "exits": ("", "sys.exit(4)", "sys.exit(4)"),
    "knows-no-org": ("", "ctx.org", "HayGlobalContext has no 'org'"),
    "has-no-state": ("", "ctx.state", "on_start (HayStartContext)"),
}

FAULTS = ("raise", "hang", "sysexit", "exit")
ORGS: dict[str, dict[str, str]] = {
    **{f"start-{fault}": {"on_start": fault} for fault in FAULTS},
    **{f"update-{fault}": {} for fault in FAULTS},
    **{f"disable-{fault}": {"on_disable": fault} for fault in FAULTS},
    **{org: {} for org in ("shared", "asleep", "malformed", "load", "drain", "valid", "unknown", "update", "disable")},
    "overlay": {"value": "stored", "stored": "stored", "overlaid": "stored"},
}
KINDS = ("sync", "async")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("hooks")
    for kind in KINDS:
        write_plugin(folder / "plugins" / kind, coloured(LIFE, kind))
    write_plugin(folder / "plugins" / "bare", PREAMBLE + "@define_hay_plugin\nclass Bare:\n    name = 'Bare'\n")
    for name, (word, body, _) in BROKEN_INITIALIZE.items():
        head = "@define_hay_plugin\nclass Broken:\n    name = 'x'\n"
        source = f"{head}    {word}def on_initialize(self, ctx):\n        {body}\n"
        write_plugin(folder / "plugins" / name, PREAMBLE + source)
    installs: dict[str, dict[str, Any]] = {kind: {} for kind in ("bare", *BROKEN_INITIALIZE)}
    orgs = {org: {kind: {"config": config} for kind in KINDS} | installs for org, config in ORGS.items()}
    file = stored(folder / "store.db", orgs)
    with hosting(folder / "plugins", "--store", file, "--hook-timeout", "1") as host:
        yield host


def ran(host: HostProcess, plugin: str, org: str) -> list[str]:
    """The hooks that have run for an org's plugin, in order."""
    mine = [record for record in host.records() if (record.get("plugin"), record.get("org")) == (plugin, org)]
    return [record["event"] for record in mine if record["event"] in HOOKS]


def wait_for_hooks(host: HostProcess, plugin: str, org: str, *hooks: str) -> None:
    """Wait until exactly these hooks have run, in this order."""
    wait_until(lambda: ran(host, plugin, org) == list(hooks), f"{hooks}, not {ran(host, plugin, org)}", 15)


def pid(host: HostProcess, plugin: str, org: str) -> int:
    answer = host.get(f"/plugins/{plugin}/{org}/pid")
    assert answer.status == 200, answer.body
    number: int = answer.json()["pid"]
    return number


def update(host: HostProcess, plugin: str, org: str, **config: str) -> None:
    answer = host.post(f"/plugins/{plugin}/{org}/config-update", json_body={"config": config})
    assert (answer.status, answer.json()) == (200, {"success": True})


# ---- on_initialize


@pytest.mark.parametrize("kind", KINDS)
def test_on_initialize_runs_once_before_anything_is_served_and_knows_no_org(host: HostProcess, kind: str) -> None:
    worker = pid(host, kind, "shared")
    records = host.records()
    [initialized] = [record for record in records if (record["event"], record.get("plugin")) == ("on_initialize", kind)]
    assert "org" not in initialized
    assert initialized["meta"]["pid"] != worker
    events = [record["event"] for record in records]
    assert records.index(initialized) < events.index("ready")


@pytest.mark.parametrize("plugin", BROKEN_INITIALIZE)
def test_a_plugin_whose_on_initialize_fails_is_an_error_and_the_others_serve(host: HostProcess, plugin: str) -> None:
    answer = host.get(f"/plugins/{plugin}/shared/anything")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    health = host.get(f"/plugins/{plugin}/shared/health")
    assert health.status == 503
    assert (health.json()["status"], health.json()["state"]) == ("unhealthy", "error")
    assert BROKEN_INITIALIZE[plugin][2] in health.json()["lastError"]
    [record] = [r for r in host.records() if (r["event"], r.get("plugin")) == ("the plugin did not load", plugin)]
    assert BROKEN_INITIALIZE[plugin][2] in record["reason"]
    if plugin not in ("dies", "hangs-async"):  # a coroutine that waits is at no line
        line = len(PREAMBLE.splitlines()) + 5
        assert f'plugin.py", line {line}, in on_initialize' in record["traceback"]


def test_credentials_of_a_plugin_that_did_not_load_are_not_called_valid(host: HostProcess) -> None:
    body = {"authState": {"methodId": "m", "credentials": {}}}
    answer = host.post("/plugins/raises/shared/validate-auth", json_body=body)
    assert (answer.status, list(answer.json())) == (503, ["error"])


# ---- on_start


@pytest.mark.parametrize("kind", KINDS)
def test_concurrent_first_requests_share_one_on_start(host: HostProcess, kind: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        pids = set(pool.map(lambda _: pid(host, kind, "load"), range(8)))
    assert len(pids) == 1
    [record] = logged(host, event="on_start", plugin=kind, org="load")
    assert record["meta"]["pid"] == pids.pop()
    assert host.health(kind, "load")["lastError"] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raise", "RuntimeError: no luck"), ("hang", "did not finish within 1 s"), ("sysexit", "SystemExit: 3")],
)
def test_a_worker_whose_on_start_fails_is_degraded_and_serves(
    host: HostProcess, kind: str, fault: str, reason: str
) -> None:
    org = f"start-{fault}"
    worker = pid(host, kind, org)
    answer = host.get(f"/plugins/{kind}/{org}/health")
    health = answer.json()
    assert (answer.status, health["status"], health["state"]) == (200, "degraded", "degraded")
    assert "on_start failed" in health["lastError"]
    assert reason in health["lastError"]
    assert health["pid"] == worker == pid(host, kind, org)
    [record] = logged(host, level="error", plugin=kind, org=org)
    assert record["event"].startswith("on_start failed: ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_dies_in_on_start_is_503(host: HostProcess, kind: str) -> None:
    answer = host.get(f"/plugins/{kind}/start-exit/pid")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    health = host.get(f"/plugins/{kind}/start-exit/health")
    assert (health.status, health.json()["status"]) == (503, "unhealthy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_degraded_worker_is_mended_by_a_new_config(host: HostProcess, kind: str) -> None:
    pid(host, kind, "start-raise")
    update(host, kind, "start-raise", value="good")
    health = host.health(kind, "start-raise")
    assert (health["status"], health["state"]) == ("healthy", "ready")


# ---- on_validate_auth


def validate(host: HostProcess, plugin: str, org: str, answer: str, **more: Any) -> Answer:
    auth = {"methodId": "key", "credentials": {"answer": answer}}
    return host.post(f"/plugins/{plugin}/{org}/validate-auth", json_body={"authState": auth, **more})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "valid", "logs"),
    [
        ("true", True, ""),
        ("false", False, ""),
        ("one", False, "TypeCheckError"),
        ("text", False, "TypeCheckError"),
        ("none", False, "TypeCheckError"),
        ("raise", False, "RuntimeError: no luck"),
        ("hang", False, "did not finish within 1 s"),
        ("sysexit", False, "SystemExit"),
        ("exit", False, "credentials could not be checked"),
    ],
)
def test_validation_says_what_the_hook_says_and_touches_no_serving_worker(
    host: HostProcess, kind: str, given: str, valid: bool, logs: str
) -> None:
    worker = pid(host, kind, "valid")
    before = len(host.records())
    answer = validate(host, kind, "valid", given)
    assert (answer.status, answer.json()) == (200, {"valid": valid})
    assert pid(host, kind, "valid") == worker
    errors = [r["event"] for r in host.records()[before:] if (r["level"], r.get("plugin")) == ("error", kind)]
    assert [logs in error for error in errors] == ([True] if logs else [])
    assert host.health(kind, "valid")["status"] == "healthy"
    records = logged(host, event="on_validate_auth", plugin=kind, org="valid")
    assert worker not in {record["meta"]["pid"] for record in records}


def test_a_hook_that_blocks_its_whole_process_is_invalid_too(host: HostProcess) -> None:
    worker = pid(host, "async", "valid")
    answer = validate(host, "async", "valid", "spin")
    assert (answer.status, answer.json()) == (200, {"valid": False})
    assert pid(host, "async", "valid") == worker


def test_without_the_hook_all_credentials_are_valid_and_no_worker_is_started(host: HostProcess) -> None:
    before = host.pids()
    assert validate(host, "bare", "valid", "false").json() == {"valid": True}
    assert host.pids() == before


@pytest.mark.parametrize("kind", KINDS)
def test_validation_sees_the_stored_config_under_the_given_one_under_the_credentials(
    host: HostProcess, kind: str
) -> None:
    config = {"value": "given", "overlaid": "given"}
    credentials = {"overlaid": "cred", "answer": "true", "secret": "s3c3t"}  # longer ones are masked in the log
    auth = {"methodId": "key", "credentials": credentials}
    answer = host.post(f"/plugins/{kind}/overlay/validate-auth", json_body={"authState": auth, "config": config})
    assert answer.json() == {"valid": True}
    [record] = logged(host, event="on_validate_auth", plugin=kind, org="overlay")
    seen = record["meta"]
    assert seen["config"] == {"stored": "stored", "value": "given", "overlaid": "cred", "answer": "true"}
    assert (seen["method"], seen["credentials"], seen["org_id"]) == ("key", credentials, "overlay")
    assert "s3c3t" not in seen["shown"]
    assert ran(host, kind, "overlay") == ["on_validate_auth"]  # in a worker that was never started for serving
    assert host.health(kind, "overlay")["state"] == "stopped"
    assert host.get(f"/plugins/{kind}/overlay/value").json()["value"] == "stored"  # nothing was kept


def test_a_config_of_null_is_none(host: HostProcess) -> None:
    assert validate(host, "sync", "valid", "true", config=None).json() == {"valid": True}


def short(body: object) -> str:
    return str(body)[:60]


GOOD_AUTH = {"methodId": "key", "credentials": {}}
MALFORMED = [b"", b"{", b"\xff", b"[]", b"null", b'"x"', b"1", b"[" * 50_000, b"NaN", b"{'a': 1}"]


@pytest.mark.parametrize(
    "body",
    [
        *MALFORMED,
        {},
        {"authState": None},
        {"authState": "key"},
        {"authState": []},
        {"authState": {}},
        {"authState": {"methodId": "key"}},
        {"authState": {"credentials": {}}},
        {"authState": {"methodId": "", "credentials": {}}},
        {"authState": {"methodId": 1, "credentials": {}}},
        {"authState": {"methodId": None, "credentials": {}}},
        {"authState": {"methodId": "key", "credentials": None}},
        {"authState": {"methodId": "key", "credentials": []}},
        {"authState": {"methodId": "key", "credentials": "secret"}},
        {"authState": GOOD_AUTH, "config": []},
        {"authState": GOOD_AUTH, "config": "x"},
        {"AuthState": GOOD_AUTH},
    ],
    ids=short,
)
@pytest.mark.parametrize("plugin", ["sync", "bare"])
def test_a_malformed_auth_state_is_400(host: HostProcess, plugin: str, body: Any) -> None:
    path = f"/plugins/{plugin}/malformed/validate-auth"
    answer = host.post(path, body) if isinstance(body, bytes) else host.post(path, json_body=body)
    assert (answer.status, answer.json()) == (400, {"valid": False, "error": "Invalid auth state format"})
    assert ran(host, plugin, "malformed") == []


# ---- on_config_update


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_config_is_told_to_the_worker_and_served_by_a_new_one(host: HostProcess, kind: str) -> None:
    old = pid(host, kind, "update")
    update(host, kind, "update", value="new")
    served = host.get(f"/plugins/{kind}/update/value").json()
    assert served["value"] == "new"
    assert served["pid"] != old
    wait_for_hooks(host, kind, "update", "on_start", "on_config_update", "on_start", "on_stop")
    records = [r for r in host.records() if (r.get("plugin"), r.get("org")) == (kind, "update") and r["event"] in HOOKS]
    assert [record["meta"]["pid"] for record in records] == [old, old, served["pid"], old]
    assert [record["meta"].get("value") for record in records] == [None, "new", "new", None]
    wait_until(lambda: all_gone([old]), "the old worker has gone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_config_of_an_org_that_does_not_run_starts_nothing_that_stays(host: HostProcess, kind: str) -> None:
    update(host, kind, "asleep", value="kept")
    wait_for_hooks(host, kind, "asleep", "on_config_update")
    assert host.health(kind, "asleep")["state"] == "stopped"
    assert host.get(f"/plugins/{kind}/asleep/value").json()["value"] == "kept"


FAULTS_BY_KIND = [(kind, fault) for kind in KINDS for fault in FAULTS if (kind, fault) != ("sync", "hang")]


@pytest.mark.parametrize(("kind", "fault"), FAULTS_BY_KIND)
def test_an_update_whose_hook_fails_still_succeeds(host: HostProcess, kind: str, fault: str) -> None:
    org = f"update-{fault}"
    old = pid(host, kind, org)
    update(host, kind, org, value="new", on_config_update=fault)
    served = host.get(f"/plugins/{kind}/{org}/value").json()
    assert served["value"] == "new"
    assert served["pid"] != old
    errors = logged(host, level="error", plugin=kind, org=org)
    assert [record for record in errors if "on_config_update failed" in record["event"]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_while_the_config_changes(host: HostProcess, kind: str) -> None:
    stop = threading.Event()
    update(host, kind, "load", value="0")

    def hammer(_: int) -> list[tuple[int, str]]:
        seen = []
        connection = host.connect()
        while not stop.is_set():
            connection.request("GET", f"/plugins/{kind}/load/value")
            response = connection.getresponse()
            seen.append((response.status, response.read().decode()))
        connection.close()
        return seen

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(hammer, number) for number in range(4)]
        try:
            for number in range(1, 6):
                update(host, kind, "load", value=str(number))
                assert host.get(f"/plugins/{kind}/load/value").json()["value"] == str(number)
        finally:
            stop.set()
        answers = [answer for client in clients for answer in client.result(LIMIT)]
    assert {status for status, _ in answers} == {200}
    assert len({text for _, text in answers}) > 1  # workers did change under the load


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_in_flight_is_finished_by_the_old_worker(host: HostProcess, kind: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    old = pid(host, kind, "drain")
    with ThreadPoolExecutor(1) as pool:
        flying = pool.submit(host.get, f"/plugins/{kind}/drain/gated?gate={gate}")
        logged(host, event="inside", plugin=kind, org="drain")
        update(host, kind, "drain", value="new")
        assert pid(host, kind, "drain") != old
        assert not flying.done()
        gate.touch()
        assert flying.result(LIMIT).json() == {"pid": old}


@pytest.mark.parametrize(
    "body",
    [*MALFORMED, {}, {"config": None}, {"config": []}, {"config": "x"}, {"config": 1}, {"Config": {}}],
    ids=short,
)
def test_a_malformed_config_is_400(host: HostProcess, body: Any) -> None:
    path = "/plugins/sync/malformed/config-update"
    answer = host.post(path, body) if isinstance(body, bytes) else host.post(path, json_body=body)
    assert (answer.status, answer.json()) == (400, {"success": False, "error": "Config object required"})
    assert ran(host, "sync", "malformed") == []


def test_a_config_that_no_worker_could_be_told_is_413_and_not_kept(host: HostProcess) -> None:
    huge = {"config": {"value": "x" * (2 << 20)}}
    answer = host.post("/plugins/sync/malformed/config-update", json_body=huge)
    assert (answer.status, list(answer.json())) == (413, ["error"])
    assert host.get("/plugins/sync/malformed/value").json()["value"] is None


# ---- on_disable and on_stop


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_runs_on_disable_once_in_the_serving_worker(host: HostProcess, kind: str) -> None:
    worker = pid(host, kind, "disable")
    answer = host.post(f"/plugins/{kind}/disable/disable")
    assert (answer.status, answer.json()) == (200, {"success": True})
    assert ran(host, kind, "disable") == ["on_start", "on_disable"]
    [record] = logged(host, event="on_disable", plugin=kind, org="disable")
    assert record["meta"] == {"pid": worker, "org_name": "disable"}
    assert wait_until(lambda: all_gone([worker]))
    for again in (host.get(f"/plugins/{kind}/disable/pid"), host.post(f"/plugins/{kind}/disable/disable")):
        assert (again.status, list(again.json())) == (404, ["error"])
    assert ran(host, kind, "disable") == ["on_start", "on_disable"]


@pytest.mark.parametrize(("kind", "fault"), FAULTS_BY_KIND)
def test_disabling_goes_on_whatever_the_hook_does(host: HostProcess, kind: str, fault: str) -> None:
    org = f"disable-{fault}"
    worker = pid(host, kind, org)
    answer = host.post(f"/plugins/{kind}/{org}/disable")
    assert (answer.status, answer.json()) == (200, {"success": True})
    assert ran(host, kind, org) == ["on_start", "on_disable"]
    assert wait_until(lambda: all_gone([worker]))
    assert host.get(f"/plugins/{kind}/{org}/pid").status == 404
    if fault != "exit":
        [record] = logged(host, level="error", plugin=kind, org=org)
        assert record["event"].startswith("on_disable failed: ")


def test_disabling_what_does_not_run_runs_on_disable_all_the_same(host: HostProcess) -> None:
    assert host.post("/plugins/sync/unknown/disable").json() == {"success": True}
    assert ran(host, "sync", "unknown")[-1] == "on_disable"
    assert ran(host, "sync", "unknown").count("on_disable") == 1
    assert host.get("/plugins/sync/unknown/pid").status == 404


@pytest.mark.parametrize("request_line", ["GET /disable", "GET /validate-auth", "GET /config-update", "POST /health"])
def test_only_the_right_method_reaches_a_hook(host: HostProcess, request_line: str) -> None:
    method, path = request_line.split()
    assert host.request(method, f"/plugins/sync/malformed{path}").status == 405
    assert host.request("OPTIONS", f"/plugins/sync/malformed{path}").status == 204
    assert "on_disable" not in ran(host, "sync", "malformed")


@pytest.mark.parametrize("path", ["disable", "config-update", "validate-auth"])
@pytest.mark.parametrize("where", ["sync/no-such-org", "no-such-plugin/shared"])
def test_hooks_of_what_is_not_installed_are_404(host: HostProcess, path: str, where: str) -> None:
    answer = host.post(f"/plugins/{where}/{path}", json_body={"config": {}, "authState": GOOD_AUTH})
    assert (answer.status, list(answer.json())) == (404, ["error"])


def test_an_idle_worker_is_stopped_with_on_stop_and_comes_back(serve: Serve, tmp_path: Path) -> None:
    for kind in KINDS:
        write_plugin(tmp_path / kind, coloured(LIFE, kind))
    host = serve(None, "--idle-timeout", "1")
    first = {kind: pid(host, kind, "acme") for kind in KINDS}
    for kind in KINDS:
        wait_for_hooks(host, kind, "acme", "on_start", "on_stop")
        [record] = logged(host, event="on_stop", plugin=kind, org="acme")
        assert record["meta"]["pid"] == first[kind]
        health = host.health(kind, "acme")
        assert (health["status"], health["state"]) == ("healthy", "stopped")
        assert pid(host, kind, "acme") != first[kind]
        assert ran(host, kind, "acme")[:3] == ["on_start", "on_stop", "on_start"]


def test_the_host_stops_with_on_stop_for_each_worker_and_never_a_second_hook(serve: Serve, tmp_path: Path) -> None:
    for kind in KINDS:
        write_plugin(tmp_path / kind, coloured(LIFE, kind))
    host = serve(None, "--hook-timeout", "1")
    for kind in KINDS:
        for org in ("plain", "raise", "hang"):
            if org != "plain":
                update(host, kind, org, on_stop=org)
            pid(host, kind, org)
        pid(host, kind, "disabled")
        assert host.post(f"/plugins/{kind}/disabled/disable").json() == {"success": True}
        validate(host, kind, "plain", "true")
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(LIMIT) == 0
    assert wait_until(lambda: all_gone(pids))
    for kind in KINDS:
        assert ran(host, kind, "plain") == ["on_start", "on_validate_auth", "on_stop"]
        assert ran(host, kind, "raise") == ["on_config_update", "on_start", "on_stop"]
        assert ran(host, kind, "hang") == ["on_config_update", "on_start", "on_stop"]
        assert ran(host, kind, "disabled") == ["on_start", "on_disable"]  # and no on_stop at the signal
    events = [record["event"] for record in host.records()]
    assert sum(event.startswith("on_stop failed: ") for event in events) == 4
    assert "on_enable" not in events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_plugin_is_disabled_runs_no_hook_twice(
    serve: Serve, tmp_path: Path, number: signal.Signals
) -> None:
    gate = tmp_path / "gate"
    source = f"""
@define_hay_plugin
class Slow:
    name = "Slow"

    def on_initialize(self, ctx):
        register(ctx)

    async def on_disable(self, ctx):
        ctx.logger.info("on_disable")
        while not os.path.exists({str(gate)!r}):
            await asyncio.sleep(0.01)

    def on_stop(self, ctx):
        ctx.logger.info("on_stop")

@route("GET", "/pid")
def pid(req):
    return {{"pid": os.getpid()}}
"""
    write_plugin(tmp_path / "plugins" / "slow", PREAMBLE + source)
    host = serve(tmp_path / "plugins")
    pid(host, "slow", "acme")
    with ThreadPoolExecutor(1) as pool:
        disabling = pool.submit(host.post, "/plugins/slow/acme/disable")
        logged(host, event="on_disable")
        host.process.send_signal(number)
        host.wait_for_log("received: stopping")
        os.kill(host.pid, number)  # a second signal while stopping is only warned about
        host.wait_for_log("ignored: already stopping")
        gate.touch()
        assert disabling.result(LIMIT).json() == {"success": True}
    assert host.process.wait(LIMIT) == 0
    assert ran(host, "slow", "acme") == ["on_disable"]


def test_requests_that_wait_when_a_plugin_is_disabled_are_told(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    write_plugin(tmp_path / "plugins" / "sync", coloured(LIFE, "sync"))
    file = stored(tmp_path / "store.db", {"acme": {"sync": {}}})
    with (
        hosting(tmp_path / "plugins", "--store", file, "--max-requests", "1") as host,
        ThreadPoolExecutor(3) as pool,
    ):
        flying = pool.submit(host.get, f"/plugins/sync/acme/gated?gate={gate}")
        logged(host, event="inside")
        waiting = host.connect(10)  # which is less than the request's own limit
        waiting.request("GET", "/plugins/sync/acme/pid")
        assert host.health("sync", "acme")["state"] == "ready"  # sent later, so the other one is in the queue now
        disabling = pool.submit(host.post, "/plugins/sync/acme/disable")
        wait_until(lambda: host.get("/plugins/sync/acme/health").status == 404, "disabled")
        gate.touch()
        assert flying.result(LIMIT).status == 200
        assert disabling.result(LIMIT).json() == {"success": True}
        assert waiting.getresponse().status == 404
        waiting.close()


def test_a_config_that_comes_while_a_plugin_is_disabled_does_not_enable_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    write_plugin(tmp_path / "plugins" / "sync", coloured(LIFE, "sync"))
    file = stored(tmp_path / "store.db", {"acme": {"sync": {}}})
    with hosting(tmp_path / "plugins", "--store", file) as host, ThreadPoolExecutor(2) as pool:
        flying = pool.submit(host.get, f"/plugins/sync/acme/gated?gate={gate}")
        logged(host, event="inside")
        updating = host.connect()
        updating.putrequest("POST", "/plugins/sync/acme/config-update")
        updating.putheader("Content-Length", "14")
        updating.endheaders(b'{"config"')  # it is for an enabled plugin when it begins
        assert host.health("sync", "acme")["state"] == "ready"
        disabling = pool.submit(host.post, "/plugins/sync/acme/disable")
        wait_until(lambda: host.get("/plugins/sync/acme/health").status == 404, "disabled")
        updating.send(b": {}")
        updating.send(b"}")
        gate.touch()
        assert flying.result(LIMIT).status == 200
        assert disabling.result(LIMIT).json() == {"success": True}
        assert updating.getresponse().status == 404
        updating.close()
        assert host.get("/plugins/sync/acme/pid").status == 404


# ---- MCP servers that on_start starts

TOOLS = (
    PREAMBLE
    + """
class Calculator:
    def __init__(self, logger):
        self.logger = logger

    @ASYNC def list_tools(self):
        return [
            {
                "name": "add",
                "description": "Adds",
                "inputSchema": {"type": "object"},
                "annotations": {"readOnlyHint": True},
                "x-extra": [1, None],
                "serverId": "somebody-else",
            },
            *({"name": name} for name in ("echo", "nothing", "fail", "silent", "exit", "odd", "wait")),
        ]

    @ASYNC def call_tool(self, name, arguments):
        if name == "add":
            return {"sum": arguments["a"] + arguments["b"]}
        if name == "echo":
            return arguments
        if name == "fail":
            raise ValueError("division by cucumber")
        if name == "silent":
            raise KeyError
        if name == "exit":
            sys.exit(1)
        if name == "odd":
            return object()
        if name == "wait":
            @AWAIT wait_@KIND()

    @ASYNC def stop(self):
        self.logger.info("calculator stopped", {"pid": os.getpid()})

async def wait_async():
    await asyncio.Event().wait()

def wait_sync():
    threading.Event().wait(10)

@ASYNC def calculator(mcp):
    mcp.logger.info("initializer", {"value": mcp.config.get("value"), "auth": mcp.auth.get() is None})
    return Calculator(mcp.logger)

def listed():
    return {"tools": [{"name": "who", "serverId": "x"}, {"name": "add"}]}

MAPPING = {"list_tools": listed, "call_tool": lambda name, arguments: f"{name} of mapping"}

@route("GET", "/pid")
def pid(req):
    return {"pid": os.getpid()}

@define_hay_plugin
class Tools:
    name = "Tools"

    def on_initialize(self, ctx):
        ctx.register.config({"value": {"type": "string"}, "fault": {"type": "string"}})
        register(ctx)

    @ASYNC def on_start(self, ctx):
        @AWAIT ctx.mcp.start_local("calc", calculator)
        @AWAIT ctx.mcp.start_local("mapping", lambda mcp: MAPPING)
        ctx.logger.info("all started")
        fault = ctx.config.get("fault")
        if fault == "twice":
            @AWAIT ctx.mcp.start_local("calc", calculator)
        if fault == "empty":
            @AWAIT ctx.mcp.start_local("", calculator)
        if fault == "nothing":
            @AWAIT ctx.mcp.start_local("nothing", lambda mcp: object())
        if fault == "type":
            @AWAIT ctx.mcp.start_local(7, calculator)
        if fault == "raises":
            @AWAIT ctx.mcp.start_local("raises", lambda mcp: 1 / 0)
        if fault == "exits":
            @AWAIT ctx.mcp.start_local("exits", lambda mcp: sys.exit(5))
"""
)

FAULTY_TOOLS = (
    PREAMBLE
    + """
class Server:
    def list_tools(self):
        return [{"name": "good"}]

    def call_tool(self, name, arguments):
        return name

class Raises(Server):
    def list_tools(self):
        raise RuntimeError("no tools today")

class Exits(Server):
    async def list_tools(self):
        sys.exit(1)

class HangsOnThread(Server):
    def list_tools(self):
        threading.Event().wait()

class HangsOnLoop(Server):
    async def list_tools(self):
        await asyncio.Event().wait()

class Odd(Server):
    def list_tools(self):
        odd = ["text", {"description": "nameless"}, {"name": 1}, {"name": "x", "inputSchema": object()}]
        return [*odd, {"name": "ok"}]

class NoList:
    def call_tool(self, name, arguments):
        return name

class Number(Server):
    def list_tools(self):
        return 5

@route("GET", "/pid")
def pid(req):
    return {"pid": os.getpid()}

@define_hay_plugin
class Faulty:
    name = "Faulty"

    def on_initialize(self, ctx):
        register(ctx)

    async def on_start(self, ctx):
        servers = (Raises, Exits, HangsOnThread, HangsOnLoop, Odd, NoList, Number, Server)
        for kind in servers:
            await ctx.mcp.start_local(kind.__name__, lambda mcp, kind=kind: kind())
"""
)

NO_MCP = (
    PREAMBLE
    + """
@define_hay_plugin
class NoMcp:
    name = "NoMcp"

    async def on_start(self, ctx):
        await ctx.mcp.start_local("x", lambda mcp: object())
"""
)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("tools")
    for kind in KINDS:
        write_plugin(folder / kind, coloured(TOOLS, kind))
    write_plugin(folder / "faulty", FAULTY_TOOLS)
    write_plugin(folder / "no-mcp", NO_MCP, capabilities=("routes",))
    with hosting(folder, "--hook-timeout", "2", "--request-timeout", "8") as host:
        yield host


def call(host: HostProcess, plugin: str, body: Any, org: str = "acme") -> Answer:
    path = f"/plugins/{plugin}/{org}/mcp/call-tool"
    return host.post(path, body) if isinstance(body, bytes) else host.post(path, json_body=body)


def names(answer: Answer) -> list[str]:
    assert answer.status == 200
    return [tool["name"] for tool in answer.json()["tools"]]


@pytest.mark.parametrize("kind", KINDS)
def test_tools_are_listed_with_all_that_their_servers_say(tools: HostProcess, kind: str) -> None:
    answer = tools.get(f"/plugins/{kind}/acme/mcp/list-tools")  # which starts the worker
    assert answer.status == 200
    listed = answer.json()["tools"]
    assert listed[0] == {
        "name": "add",
        "description": "Adds",
        "inputSchema": {"type": "object"},
        "annotations": {"readOnlyHint": True},
        "x-extra": [1, None],
        "serverId": "calc",
    }
    assert {(tool["name"], tool["serverId"]) for tool in listed} >= {("echo", "calc"), ("who", "mapping")}
    [record] = logged(tools, event="initializer", plugin=kind, org="acme")
    assert record["meta"] == {"value": None, "auth": True}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tools_result_is_passed_on(tools: HostProcess, kind: str) -> None:
    org = "uncalled"  # a tool can be called without having been listed
    assert call(tools, kind, {"toolName": "add", "arguments": {"a": 1, "b": 2}}, org).json() == {"sum": 3}
    assert call(tools, kind, {"toolName": "echo", "arguments": {"x": [None, "é"]}}).json() == {"x": [None, "é"]}
    assert call(tools, kind, {"toolName": "echo"}).json() == {}
    assert call(tools, kind, {"toolName": "echo", "arguments": None}).json() == {}
    nothing = call(tools, kind, {"toolName": "nothing"})
    assert (nothing.status, nothing.json()) == (200, None)
    assert call(tools, kind, {"toolName": "who"}).json() == "who of mapping"
    big = "x" * 300_000
    assert call(tools, kind, {"toolName": "echo", "arguments": {"big": big}}).json() == {"big": big}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "body",
    [
        *MALFORMED,
        {},
        {"toolName": None},
        {"toolName": ""},
        {"toolName": 7},
        {"arguments": {}},
        {"name": "add"},
        {"toolName": "add", "arguments": []},
        {"toolName": "add", "arguments": "x"},
        {"toolName": "add", "arguments": 1},
    ],
    ids=short,
)
def test_a_call_without_a_tools_name_or_with_odd_arguments_is_400(tools: HostProcess, kind: str, body: Any) -> None:
    answer = call(tools, kind, body)
    assert (answer.status, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_tool_is_404(tools: HostProcess, kind: str) -> None:
    answer = call(tools, kind, {"toolName": "no-such"})
    assert (answer.status, answer.json()) == (404, {"error": "No MCP server found for tool: no-such"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tool", "reason"), [("fail", "division by cucumber"), ("silent", "KeyError"), ("exit", "1"), ("odd", "JSON")]
)
def test_a_tool_that_fails_is_500_and_says_why(tools: HostProcess, kind: str, tool: str, reason: str) -> None:
    worker = pid(tools, kind, "acme")
    answer = call(tools, kind, {"toolName": tool})
    assert answer.status == 500
    assert answer.json()["error"].startswith("Tool execution failed: ")
    assert reason in answer.json()["error"]
    records = logged(tools, level="error", plugin=kind, org="acme")
    [record] = [record for record in records if f"MCP tool '{tool}'" in record["event"]]
    assert "Traceback" in record["traceback"] or tool == "odd"
    assert pid(tools, kind, "acme") == worker


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_and_health_name_the_servers_that_run(tools: HostProcess, kind: str) -> None:
    org = "named"
    assert tools.get(f"/plugins/{kind}/{org}/metadata").json()["mcp"] == {"local": [], "external": []}
    assert tools.health(kind, org)["mcpServers"] == {"count": 0, "servers": []}
    pid(tools, kind, org)
    running = tools.get(f"/plugins/{kind}/{org}/metadata").json()["mcp"]
    assert running == {"local": [{"id": "calc"}, {"id": "mapping"}], "external": []}
    assert tools.health(kind, org)["mcpServers"] == {"count": 2, "servers": ["calc", "mapping"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("twice", "RegistrationError: an MCP server with the id 'calc' runs already"),
        ("empty", "RegistrationError: an MCP server's id must not be empty"),
        ("nothing", "RegistrationError: the initializer of MCP server 'nothing' returned object"),
        ("type", "TypeCheckError: argument 'id' of Mcp.start_local(): expected str, got int"),
        ("raises", "ZeroDivisionError"),
        ("exits", "sys.exit(5)"),
    ],
)
def test_a_server_that_does_not_start_degrades_the_worker_and_the_others_run(
    tools: HostProcess, kind: str, fault: str, reason: str
) -> None:
    org = f"fault-{fault}"
    update(tools, kind, org, fault=fault)
    assert "add" in names(tools.get(f"/plugins/{kind}/{org}/mcp/list-tools"))
    health = tools.health(kind, org)
    assert health["status"] == "degraded"
    assert reason in health["lastError"]
    assert health["mcpServers"]["servers"] == ["calc", "mapping"]


@pytest.mark.parametrize("kind", KINDS)
def test_servers_are_stopped_with_their_worker(tools: HostProcess, kind: str) -> None:
    worker = pid(tools, kind, "stopping")
    tools.post(f"/plugins/{kind}/stopping/disable")
    [record] = logged(tools, event="calculator stopped", plugin=kind, org="stopping")
    assert record["meta"] == {"pid": worker}


def test_servers_that_fail_or_hang_are_left_out_and_logged(tools: HostProcess) -> None:
    with ThreadPoolExecutor(40) as pool:  # more than a worker has threads: a hang on one must not use them up
        answers = list(pool.map(lambda _: tools.get("/plugins/faulty/acme/mcp/list-tools"), range(40)))
    for answer in answers:  # none of them late: the host's limit for requests is not much above the one for lists
        assert names(answer) == ["ok", "good"]
    assert pid(tools, "faulty", "acme") == tools.health("faulty", "acme")["pid"]
    events = "\n".join(record["event"] for record in logged(tools, level="error", plugin="faulty", org="acme"))
    for server in ("Raises", "Exits", "HangsOnThread", "HangsOnLoop", "Odd", "Number"):
        assert f"MCP server '{server}'" in events


def test_a_plugin_without_the_capability_has_no_tools(tools: HostProcess) -> None:
    assert names(tools.get("/plugins/no-mcp/acme/mcp/list-tools")) == []
    assert call(tools, "no-mcp", {"toolName": "x"}).status == 404
    assert call(tools, "no-mcp", b"{").status == 400
    assert tools.health("no-mcp", "acme")["state"] == "stopped"  # nothing was started to say so


def test_starting_a_server_without_the_capability_names_it(serve: Serve, tmp_path: Path) -> None:
    source = NO_MCP + "\n    def on_initialize(self, ctx):\n        ctx.register.route('GET', '/x', lambda req: None)\n"
    write_plugin(tmp_path / "n", source, capabilities=("routes",))
    host = serve()
    assert host.get("/plugins/n/acme/x").status == 204
    health = host.health("n", "acme")
    assert health["status"] == "degraded"
    assert "CapabilityError: ctx.mcp.start_local() needs the capability 'mcp'" in health["lastError"]


def test_a_tool_over_the_time_limit_is_504(serve: Serve, tmp_path: Path) -> None:
    for kind in KINDS:
        write_plugin(tmp_path / kind, coloured(TOOLS, kind))
    host = serve(None, "--request-timeout", "1")
    with ThreadPoolExecutor(2) as pool:
        for answer in pool.map(lambda kind: call(host, kind, {"toolName": "wait"}), KINDS):
            assert (answer.status, list(answer.json())) == (504, ["error"])
