"""Traces of a running host, exported to a real collector."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .collecting import Collected, Collector
from .commands import environment
from .conftest import LIMIT, HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CLIENT}-01"

PLAIN = (
    PREAMBLE
    + """
@route("GET", "/items/{id}")
async def item(req):
    return {"traceparent": req.headers.get("traceparent"), "tracestate": req.headers.get("tracestate")}

@route("POST", "/fail")
def fail(req):
    raise ValueError("broken")

@route("GET", "/die")
async def die(req):
    os._exit(3)

@route("GET", "/modules")
async def modules(req):
    return sorted(name for name in sys.modules if name.startswith("opentelemetry"))
"""
    + PLUGIN
    + """
    def on_start(self, ctx):
        time.sleep(0.01)

    def on_config_update(self, ctx):
        1 / 0
"""
)

TRACED = (
    PREAMBLE
    + """
from opentelemetry import trace
tracer = trace.get_tracer("shop")

@route("GET", "/buy/{what}")
async def buy(req):
    with tracer.start_as_current_span("look up", attributes={"what": req.params["what"], "many": 1 << 70}):
        with tracer.start_as_current_span("price") as span:
            span.add_event("found", {"n": 1})
    return {}

@route("GET", "/on-a-thread")
def on_a_thread(req):
    with tracer.start_as_current_span("threaded"):
        raise ValueError("no luck")

@route("GET", "/many")
async def many(req):
    for number in range(1_000):
        tracer.start_span("one of many").end()
    return {}

def forge(**given):
    from sandbox import tracing, wire
    span = dict(trace_id="ab" * 16, span_id="cd" * 8, parent_id="ef" * 8, name="forged", kind=0, started=0,
                ended=(1 << 63) - 1, failed=False, attributes=[["hayhost.org", "other"]])
    tracing._provided[0].send(wire.Spans([wire.Span(**{**span, **given})]))

@route("GET", "/forge")
async def forged(req):
    _, trace_id, span_id, _ = req.headers["traceparent"].split("-")
    forge()
    forge(trace_id=req.query["of"][0])
    forge(trace_id=trace_id, parent_id=span_id, name="own")
    return {}

@route("GET", "/nonsense")
async def nonsense(req):
    forge(**{req.query["field"][0]: json.loads(req.query["value"][0])})
    await asyncio.Event().wait()
"""
    + PLUGIN
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("traces")
    write_plugin(folder / "plain", PLAIN)
    write_plugin(folder / "traced", TRACED)
    with hosting(folder, "--tracing", "--spares", 0, env=collector.environment) as host:
        yield host


def _one(collector: Collector, name: str, **attributes: object) -> Collected:
    found: list[Collected] = wait_until(lambda: collector.find(name, **attributes), f"{name} {attributes}")
    assert len(found) == 1
    return found[0]


def test_a_request_is_one_trace_from_the_client_to_the_handler(host: HostProcess, collector: Collector) -> None:
    headers = {"traceparent": PARENT, "tracestate": "vendor=1,other=2", "X-Secret": "s3cr3t-header"}
    answer = host.get("/plugins/plain/acme/items/s3cr3t-path?token=s3cr3t-query", headers=headers)
    server = _one(collector, "GET /plugins/{plugin}/{org}/items/{id}", hayhost__org="acme")
    handler = _one(collector, "GET /items/{id}", hayhost__org="acme")
    assert (server.trace_id, server.parent_id, server.kind) == (TRACE, CLIENT, 2)
    assert (handler.trace_id, handler.parent_id) == (TRACE, server.span_id)
    assert server.start <= handler.start <= handler.end <= server.end
    assert server.attributes == {
        "http.request.method": "GET",
        "http.route": "/plugins/{plugin}/{org}/items/{id}",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "hayhost.plugin": "plain",
        "hayhost.org": "acme",
        "hayhost.request": server.attributes["hayhost.request"],
    }
    assert server.resource["service.name"] == "hayhost"
    assert handler.resource == {
        "service.name": "plain",
        "service.namespace": "hayhost",
        "hayhost.plugin": "plain",
        "hayhost.org": "acme",
    }
    assert answer.json() == {
        "traceparent": f"00-{TRACE}-{handler.span_id}-01",
        "tracestate": "vendor=1,other=2",
    }
    assert b"s3cr3t" not in collector.raw


def test_the_start_of_a_worker_is_in_the_trace_of_the_request_that_needs_it(
    host: HostProcess, collector: Collector
) -> None:
    assert host.get("/plugins/plain/cold/items/1").status == 200
    server = _one(collector, "GET /plugins/{plugin}/{org}/items/{id}", hayhost__org="cold")
    start = _one(collector, "start worker", hayhost__org="cold")
    assert (start.trace_id, start.parent_id) == (server.trace_id, server.span_id)
    for phase in ("forked", "confined", "identity", "on_start"):
        span = _one(collector, phase, hayhost__org="cold")
        assert span.parent_id == start.span_id
        assert start.start <= span.start < span.end <= start.end
    on_start = _one(collector, "on_start", hayhost__org="cold")
    assert on_start.end - on_start.start > 5_000_000


def test_hooks(host: HostProcess, collector: Collector) -> None:
    assert host.get("/plugins/plain/hooked/items/1").status == 200
    assert host.post("/plugins/plain/hooked/config-update", json_body={"config": {}}).status == 200
    server = _one(collector, "POST /plugins/{plugin}/{org}/config-update", hayhost__org="hooked")
    hook = _one(collector, "on_config_update", hayhost__org="hooked")
    assert server.start <= hook.start <= hook.end <= server.end
    assert hook.failed


@pytest.mark.parametrize(
    "given",
    [
        "nonsense",
        f"00-{'0' * 32}-{CLIENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{CLIENT}-01",
        f"00-{TRACE.upper()}-{CLIENT}-01",
        f"00-{TRACE}-{CLIENT}-01" + "x" * 5_000,
        "",
    ],
)
def test_a_malformed_parent_is_none(host: HostProcess, given: str) -> None:
    answer = host.get("/plugins/plain/acme/items/1", headers={"traceparent": given, "tracestate": "a=b"}).json()
    assert TRACE not in answer["traceparent"]
    assert answer["tracestate"] is None


def test_a_state_that_is_too_long_is_left_out(host: HostProcess) -> None:
    headers = {"traceparent": PARENT, "tracestate": ",".join(f"k{number}={'v' * 200}" for number in range(30))}
    answer = host.get("/plugins/plain/acme/items/1", headers=headers).json()
    assert answer["traceparent"].startswith(f"00-{TRACE}-")
    assert answer["tracestate"] is None


def test_what_is_not_sampled_is_not_recorded(host: HostProcess, collector: Collector) -> None:
    trace = "1" * 32
    headers = {"traceparent": f"00-{trace}-{CLIENT}-00"}
    answer = host.get("/plugins/plain/unsampled/items/1", headers=headers).json()
    assert answer["traceparent"].startswith(f"00-{trace}-")
    assert answer["traceparent"].endswith("-00")
    assert host.get("/plugins/plain/unsampled/modules").status == 200
    wait_until(lambda: collector.find("GET /modules", hayhost__org="unsampled"))
    assert not [span for span in collector.find() if span.trace_id == trace]


def test_failures(host: HostProcess, collector: Collector) -> None:
    assert host.post("/plugins/plain/failing/fail").status == 500
    server = _one(collector, "POST /plugins/{plugin}/{org}/fail", hayhost__org="failing")
    assert (server.failed, server.attributes["error.type"]) == (True, "500")
    assert _one(collector, "POST /fail", hayhost__org="failing").failed
    assert host.get("/plugins/plain/failing/die").status == 502
    server = _one(collector, "GET /plugins/{plugin}/{org}/die", hayhost__org="failing")
    assert (server.failed, server.attributes["http.response.status_code"]) == (True, 502)
    assert not collector.find("GET /die"), "nobody was left to tell"


def test_spans_of_the_plugins_own_join(host: HostProcess, collector: Collector) -> None:
    assert host.get("/plugins/traced/acme/buy/tea").status == 200
    handler = _one(collector, "GET /buy/{what}", hayhost__org="acme")
    above = _one(collector, "look up", hayhost__org="acme")
    below = _one(collector, "price", hayhost__org="acme")
    assert (above.trace_id, above.parent_id) == (handler.trace_id, handler.span_id)
    assert (below.trace_id, below.parent_id) == (handler.trace_id, above.span_id)
    assert above.attributes == {"what": "tea", "many": str(1 << 70)}
    assert below.events == ["found"]
    assert above.resource["hayhost.plugin"] == "traced"
    assert host.get("/plugins/traced/acme/on-a-thread").status == 500
    threaded = _one(collector, "threaded")
    assert threaded.parent_id == _one(collector, "GET /on-a-thread").span_id
    assert (threaded.failed, threaded.events) == (True, ["exception"])


def test_spans_of_one_request_are_bounded(host: HostProcess, collector: Collector) -> None:
    assert host.get("/plugins/traced/chatty/many").status == 200
    wait_until(lambda: collector.find("GET /plugins/{plugin}/{org}/many", hayhost__org="chatty"))
    assert host.get("/plugins/traced/chatty/buy/tea").status == 200
    wait_until(lambda: collector.find("price", hayhost__org="chatty"))
    assert len(collector.find("one of many")) == 128


def test_a_worker_adds_to_the_traces_of_its_own_requests_only(host: HostProcess, collector: Collector) -> None:
    assert host.get("/plugins/plain/victim/items/1").status == 200
    theirs = _one(collector, "GET /items/{id}", hayhost__org="victim")
    assert host.get(f"/plugins/traced/forger/forge?of={theirs.trace_id}").status == 200
    own = _one(collector, "own")
    assert own.resource["hayhost.org"] == "forger"
    assert own.attributes == {"hayhost.org": "other"}, "what a plugin calls its own attributes is its own affair"
    server = _one(collector, "GET /plugins/{plugin}/{org}/forge")
    assert server.start - 2e9 <= own.start <= own.end <= server.end + 60e9
    assert not collector.find("forged")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("span_id", '"x"'),
        ("trace_id", '"%s"' % ("g" * 32)),
        ("kind", "9"),
        ("name", '"%s"' % ("n" * 5_000)),
        ("ended", "-1"),
    ],
)
def test_a_malformed_span_ends_its_worker(host: HostProcess, field: str, value: str) -> None:
    answer = host.get(f"/plugins/traced/{field}/nonsense?field={field}&value={value}")
    assert answer.status == 502, answer
    answer = host.get("/plugins/plain/acme/items/1")
    assert answer.status == 200, answer


def test_a_plugin_without_the_package_does_not_get_it(host: HostProcess) -> None:
    assert host.get("/plugins/plain/acme/modules").json() == []


def test_off_it_is_not_there(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "plain", PLAIN)
    host = serve(tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    answer = host.get("/plugins/plain/acme/items/1", headers={"traceparent": PARENT}).json()
    assert answer["traceparent"] == PARENT, "it is the plugin's to read"
    assert "opentelemetry" not in host.log
    assert "hayhost.front" in host.log


def test_a_collector_that_is_not_there_stops_nobody(tmp_path: Path, serve: Serve) -> None:
    write_plugin(tmp_path / "plain", PLAIN)
    host = serve(tmp_path, "--tracing", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    for _ in range(5):
        assert host.get("/plugins/plain/acme/items/1").status == 200
    assert host.stop() == 0


def test_what_is_left_is_exported_at_the_end(tmp_path: Path, serve: Serve) -> None:
    collector = Collector()
    write_plugin(tmp_path / "plain", PLAIN)
    host = serve(tmp_path, "--tracing", env={**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"})
    assert host.get("/plugins/plain/acme/items/1").status == 200
    assert not collector.requests
    assert host.stop() == 0
    assert collector.find("GET /items/{id}")
    collector.close()


def test_without_the_extra_it_says_what_is_missing(tmp_path: Path) -> None:
    write_plugin(tmp_path / "plain", PLAIN)
    hide = "import sys; sys.modules['opentelemetry'] = None; from hayhost.cli import main; main()"
    command = [sys.executable, "-P", "-c", hide, "serve", str(tmp_path), "--mode", "test", "--port", "0", "--tracing"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert "pip install 'hayhost[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr
