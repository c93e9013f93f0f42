"""``/metrics`` of a running host, read as Prometheus does."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from .conftest import HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting
from .managing import Manager, managed
from .mcping import call
from .scraping import scrape

SHOP = (
    PREAMBLE
    + """
@route("GET", "/items/{id}")
async def item(req):
    return {"id": req.params["id"]}

@route("POST", "/items")
def add(req):
    return Response(b"", status=int(req.text() or 201))

@route("GET", "/die")
async def die(req):
    os._exit(3)

@route("GET", "/forever")
async def forever(req):
    await asyncio.Event().wait()

@route("GET", "/say")
async def say(req):
    req.ctx.logger.warning("said")
    return {}
"""
    + PLUGIN
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    write_plugin(folder / "shop", SHOP)
    return folder


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[HostProcess]:
    with hosting(folder, "--request-timeout", 1, "--metrics-orgs") as host:
        yield host


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("managed")
    folder.chmod(0o755)
    with managed(folder) as manager:
        yield manager


def test_requests_are_counted_by_the_declared_route_and_never_by_the_path(host: HostProcess) -> None:
    before = scrape(host).sum("requests_total", plugin="shop", route="/items/{id}")
    for number in range(20):
        assert host.get(f"/plugins/shop/acme/items/n{number}").status == 200
    assert host.request("HEAD", "/plugins/shop/acme/items/n1").status == 200
    for path in ("nothing", "items/1/2", "nothing/else"):
        assert host.get(f"/plugins/shop/acme/{path}").status == 404
    assert host.get("/plugins/nobody/acme/items/1").status == 404
    assert host.request("BREW", "/plugins/shop/acme/health").status == 405
    found = scrape(host)
    labels = {"plugin": "shop", "route": "/items/{id}", "method": "GET"}
    assert found.sum("requests_total", code="200", **labels) == before + 21
    assert found.sum("request_duration_seconds_count", **labels) == before + 21
    assert found.sum("request_duration_seconds_bucket", le="+Inf", **labels) == before + 21
    assert found.sum("requests_total", plugin="shop", route="other", code="404") >= 3
    assert found.sum("requests_total", plugin="", route="other", code="404") >= 1
    assert found.sum("requests_total", plugin="shop", route="/health", method="other", code="405") == 1
    known = {"/items/{id}", "/items", "/die", "/forever", "/say", "/health", "/metadata", "/mcp", "other"}
    assert found.values("requests_total", "route", plugin="shop") <= known
    assert "n1" not in found.text
    assert "BREW" not in found.text


def test_statuses_that_plugins_choose(host: HostProcess) -> None:
    for status in (201, 418, 503):
        assert host.post("/plugins/shop/acme/items", str(status)).status == status
    found = scrape(host)
    assert {"201", "418", "503"} <= found.values("requests_total", "code", plugin="shop", route="/items")
    assert not found.find("refused_requests_total", code="503"), "it was not the host who refused"


def test_requests_that_the_host_refuses_say_why(host: HostProcess) -> None:
    assert host.get("/plugins/shop/dying/die").status == 502
    assert host.get("/plugins/shop/slow/forever").status == 504
    found = scrape(host)
    assert found.sum("refused_requests_total", plugin="shop", code="502", reason="worker_lost") == 1
    assert found.sum("refused_requests_total", plugin="shop", code="504", reason="timeout") == 1
    assert found.sum("requests_total", plugin="shop", route="/die", code="502") == 1
    wait_until(lambda: scrape(host).sum("worker_restarts_total", plugin="shop") == 1)
    assert scrape(host).sum("org_restarts_total", plugin="shop", org="dying") == 1


def test_clients_that_leave_are_counted(host: HostProcess) -> None:
    connection = host.connect()
    connection.request("GET", "/plugins/shop/left/forever")
    wait_until(lambda: scrape(host).sum("requests_in_flight", plugin="shop") == 1)
    assert scrape(host).sum("connections", state="active") >= 2
    connection.close()
    wait_until(lambda: scrape(host).sum("requests_total", plugin="shop", code="499") == 1)


def test_starts_and_hooks_and_loads(host: HostProcess) -> None:
    assert host.get("/plugins/shop/fresh/say").status == 200
    found = scrape(host)
    phases = found.values("worker_start_seconds_count", "phase", plugin="shop")
    assert phases == {"forked", "confined", "identity", "on_start", "all"}
    for phase in phases:
        labels = {"plugin": "shop", "phase": phase}
        assert found.sum("worker_start_seconds_count", **labels) >= 1
        assert found.sum("worker_start_seconds_sum", **labels) > 0
    assert found.sum("plugin_load_seconds_count", plugin="shop", action="load", outcome="ok") == 1
    assert found.sum("queue_wait_seconds_count", plugin="shop") >= 1
    assert found.sum("workers", plugin="shop", state="ready") >= 1
    assert found.sum("plugin_up", plugin="shop") == 1
    assert found.sum("log_records_total", plugin="shop", level="warning") >= 1


def test_what_plugins_take(host: HostProcess) -> None:
    assert host.get("/plugins/shop/acme/items/1").status == 200
    wait_until(lambda: scrape(host).sum("plugin_pss_bytes", plugin="shop") > 0)
    found = scrape(host)
    assert 0 < found.sum("plugin_private_dirty_bytes", plugin="shop") <= found.sum("plugin_pss_bytes", plugin="shop")
    assert found.find("plugin_cpu_seconds_total", plugin="shop")
    assert found.sum("org_requests_total", org="acme") >= 1


def test_the_host_itself(host: HostProcess) -> None:
    found = scrape(host)
    wait_until(lambda: scrape(host).sum("event_loop_lag_seconds_count") > found.sum("event_loop_lag_seconds_count"))
    names = {name for name, _, _ in found.samples}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= names
    listening = host.connect()
    listening.request("GET", "/api/v1/events")
    listening.getresponse().readline()
    assert scrape(host).sum("event_listeners") == 1
    listening.close()
    wait_until(lambda: scrape(host).sum("event_listeners") == 0)


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, "text/plain"),
        ("text/plain;version=0.0.4", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text; version=banana; " + "q" * 5_000, "text/plain"),
    ],
)
def test_formats(host: HostProcess, accept: str | None, media: str) -> None:
    answer = host.get("/metrics", headers={"Accept": accept} if accept else {})
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith(media)
    if media == "application/openmetrics-text":
        families = {family.name for family in parse_openmetrics(answer.body.decode())}  # type: ignore[no-untyped-call]
        assert {"hayhost_requests", "hayhost_request_duration_seconds", "hayhost_workers"} <= families


def test_many_at_once(host: HostProcess) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(host.get("/metrics").status)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("POST", 405), ("OPTIONS", 204)])
def test_methods(host: HostProcess, method: str, status: int) -> None:
    assert host.request(method, "/metrics").status == status


def test_it_is_for_those_who_manage_the_host(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with managed(tmp_path) as manager:
        host = manager.host
        assert host.get("/metrics").status == 200, "as long as there is no token"
        assert host.get("/metrics", headers={"Host": "evil.example"}).status == 403
        assert host.get("/metrics", headers={"Origin": "http://evil.example"}).status == 403
        manager.ok("POST", "/orgs", {"id": "acme"})
        manager.token = manager.new_token("admin")
        theirs = manager.new_token("theirs", "acme")
        assert host.get("/metrics").status == 401
        for token, status in ((manager.token, 200), (theirs, 403), ("hay_nonsense", 401)):
            assert host.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status == status


def test_hooks_and_the_store(manager: Manager) -> None:
    manager.ok("POST", "/orgs", {"id": "acme"})
    manager.put("acme")
    manager.put("acme", config={"fault": "on_config_update:raise"})
    assert manager.call("POST", "/plugins/recorder/acme/echo", "x").status == 200
    manager.ok("POST", "/orgs/acme/plugins/recorder/disable")
    found = scrape(manager.host)
    for hook, failures in (("on_enable", 0), ("on_config_update", 1), ("on_start", 0)):
        assert found.sum("hook_seconds_count", plugin="recorder", hook=hook) >= 1
        assert found.sum("hook_failures_total", plugin="recorder", hook=hook) == failures
    wait_until(lambda: scrape(manager.host).sum("hook_seconds_count", hook="on_disable") == 1)
    assert found.sum("store_seconds_count", operation="write") >= 3
    assert found.sum("store_seconds_count", operation="read") >= 1
    assert found.sum("store_errors_total") == 0
    routes = found.values("requests_total", "route", plugin="")
    assert "/api/v1/orgs/{org}/plugins/{name}" in routes
    assert not any("acme" in route for route in routes)
    assert not found.find("org_requests_total"), "not without --metrics-orgs"
    assert "acme" not in found.text


def test_breakers_and_failed_starts(tmp_path: Path, serve: Serve) -> None:
    dying = "@define_hay_plugin\nclass P:\n    name = 'x'\n    def on_initialize(self, ctx): register(ctx)\n"
    dying += "    def on_start(self, ctx): os._exit(1)\n"
    write_plugin(tmp_path / "dying", PREAMBLE + '@route("GET", "/")\ndef get(req): return {}\n' + dying)
    host = serve(tmp_path)
    for _ in range(6):
        assert host.get("/plugins/dying/acme/").status == 503
    found = scrape(host)
    assert found.sum("worker_failed_starts_total", plugin="dying") == 5
    assert found.sum("breaker_openings_total", plugin="dying") == 1
    assert found.sum("breakers_open", plugin="dying") == 1
    assert found.sum("workers", plugin="dying", state="error") == 1
    assert found.sum("refused_requests_total", code="503", reason="start_failed") == 5
    assert found.sum("refused_requests_total", code="503", reason="breaker_open") == 1


def test_evictions(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "shop", SHOP)
    host = serve(tmp_path, "--max-workers", 1, "--spares", 0)
    for org in ("a", "b"):
        assert host.get(f"/plugins/shop/{org}/items/1").status == 200
    assert scrape(host).sum("worker_stops_total", plugin="shop", reason="evicted") == 1


def test_tools_are_counted(tmp_path: Path, serve: Serve) -> None:
    source = PREAMBLE + (
        "class Tools:\n"
        "    def list_tools(self):\n"
        "        return [{'name': 'add', 'description': 'd', 'inputSchema': {'type': 'object'}}]\n"
        "    def call_tool(self, name, arguments):\n"
        "        return {'content': [{'type': 'text', 'text': '3'}]}\n"
        "@define_hay_plugin\nclass P:\n    name = 'x'\n"
        "    async def on_start(self, ctx): await ctx.mcp.start_local('calc', lambda mcp: Tools())\n"
    )
    write_plugin(tmp_path / "calc", source)
    host = serve(tmp_path)
    call(host, "/plugins/calc/acme/mcp", "add")
    call(host, "/plugins/calc/acme/mcp", "x" * 1_000)
    found = scrape(host)
    assert found.values("mcp_tool_call_seconds_count", "tool", plugin="calc") == {"add", "other"}
    assert found.sum("mcp_tool_call_seconds_count", tool="add", outcome="ok") == 1
    assert found.sum("mcp_tool_call_seconds_count", tool="other", outcome="denied") == 1


def test_series_of_what_is_gone_are_gone(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "shop", SHOP)
    write_plugin(tmp_path / "brief", SHOP)
    host = serve(tmp_path, "--metrics-orgs")
    for name in ("shop", "brief"):
        assert host.get(f"/plugins/{name}/acme/items/1").status == 200
    assert scrape(host).values("org_requests_total", "plugin") == {"shop", "brief"}
    shutil.rmtree(tmp_path / "brief")
    wait_until(lambda: "brief" not in scrape(host).text)
    write_plugin(tmp_path / "shop", SHOP.replace("/items/{id}", "/things/{id}"))
    wait_until(lambda: host.get("/plugins/shop/acme/things/1").status == 200)
    found = scrape(host)
    assert not found.find("requests_total", route="/items/{id}")
    assert found.sum("requests_total", route="/things/{id}", code="200") == 1
    assert found.sum("plugin_load_seconds_count", plugin="shop", action="reload", outcome="ok") == 1


def test_a_load_that_fails(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "shop", SHOP)
    host = serve(tmp_path)
    (tmp_path / "shop" / "plugin.py").write_text("1 / 0")
    wait_until(lambda: scrape(host).sum("plugin_load_failing", plugin="shop") == 1)
    found = scrape(host)
    assert found.sum("plugin_load_seconds_count", plugin="shop", action="reload", outcome="error") == 1
    assert found.sum("plugin_up", plugin="shop") == 1, "the version before is served on"


def test_the_library_is_imported_when_it_is_needed(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "shop", SHOP)
    host = serve(tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert host.get("/plugins/shop/acme/items/1").status == 200
    heavy = ("prometheus_client", "opentelemetry", "hayhost.metrics.exposition")
    assert "hayhost.metrics.counts" in host.log
    assert not [name for name in heavy if name in host.log]
    scrape(host)
    host.wait_for_log("prometheus_client")


def test_a_worker_that_ended_keeps_its_processor_time(host: HostProcess) -> None:
    pid = host.health("shop", "spent")["pid"]
    assert host.get("/plugins/shop/spent/items/1").status == 200
    pid = host.health("shop", "spent")["pid"]
    before = scrape(host).sum("plugin_cpu_seconds_total", plugin="shop")
    os.kill(pid, 9)
    wait_until(lambda: scrape(host).sum("org_restarts_total", plugin="shop", org="spent") == 1)
    assert scrape(host).sum("plugin_cpu_seconds_total", plugin="shop") >= before
