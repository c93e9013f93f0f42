"""Run with ``pytest``. The only mock is of Stripe's API: a real HTTP server on loopback."""

import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from hayhost.sdk import ConfigError
from sandbox.testing import NoSuchToolError, PluginHarness, PluginResponse

KEY = "sk_test_4eC39HqLyjWDarjtT1zdp7dc"
SECRET = "whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH"
EVENT = b'{"id": "evt_1", "type": "charge.refunded", "note": "caf\xc3\xa9"}'


class StripeMock(ThreadingHTTPServer):
    """Answers as Stripe does, as far as the plugin asks; ``requests`` has what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.requests: list[tuple[str, str, dict[str, list[str]]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, key: str, form: dict[str, list[str]]) -> tuple[int, Any]:
        self.requests.append((method, path, form))
        if key != KEY:
            return 401, {"error": {"message": f"Invalid API Key provided: {key}"}}
        match method, path:
            case "GET", "/v1/account":
                return 200, {"id": "acct_1"}
            case "GET", "/v1/customers/cus_1":
                return 200, {"id": "cus_1", "email": "ada@example.com"}
            case "GET", "/v1/customers/cus_moved":
                return 302, {"Location": self.url}
            case "GET", "/v1/customers/cus_long":
                return 200, {"id": "x" * (5 << 20)}
            case "GET", "/v1/customers/cus_broken":
                return 200, b"<html>"
            case "GET", "/v1/charges":
                charges = [{"id": f"ch_{number}"} for number in range(int(form["limit"][0]))]
                return 200, {"object": "list", "data": charges}
            case "POST", "/v1/refunds":
                return 200, {"id": "re_1", "charge": form["charge"][0], "amount": int(form.get("amount", ["500"])[0])}
        return 404, {"error": {"message": f"No such object: '{path.rpartition('/')[2]}'"}}


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, StripeMock)
        parts = urlsplit(self.path)
        length = int(self.headers.get("content-length", 0))
        form = parse_qs(parts.query or self.rfile.read(length).decode())
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        status, answer = self.server.answer(self.command, parts.path, key, form)
        self.send_response(status)
        if status == 302:
            self.send_header("location", answer["Location"])
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the plugin hangs up on what is too long or too slow
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stripe() -> Iterator[StripeMock]:
    with StripeMock() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def plugin(stripe: StripeMock) -> Iterator[PluginHarness]:
    config = {"apiKey": KEY, "webhookSecret": SECRET, "apiBase": stripe.url}
    with PluginHarness(Path(__file__).parent, config=config, org_id="acme") as harness:
        yield harness


def sign(body: bytes = EVENT, secret: str = SECRET, *, age: float = 0) -> str:
    seconds = int(time.time() - age)
    return f"t={seconds},v1={hmac.new(secret.encode(), b'%d.' % seconds + body, hashlib.sha256).hexdigest()}"


def deliver(plugin: PluginHarness, signature: str | None = None, body: bytes = EVENT) -> PluginResponse:
    headers = {"Stripe-Signature": sign(body) if signature is None else signature, "Content-Type": "application/json"}
    return plugin.request("POST", "/webhook", body=body, headers=headers)


# Webhooks


def test_signed_event_is_received(plugin: PluginHarness) -> None:
    response = deliver(plugin)
    assert response.status == 200
    assert response.json() == {"received": True, "type": "charge.refunded", "org": "acme"}
    assert [(log.level, log.message) for log in plugin.logs] == [("info", "event received")]


def test_signature_of_a_known_vector() -> None:
    """The value is what ``printf '1700000000.{}' | openssl dgst -sha256 -hmac whsec_test`` prints."""
    vector = "35495024f4ef3f94e5a93e22221544c4b75e9a42300cd965ab81cb85cd994e91"
    with PluginHarness(Path(__file__).parent) as plugin:
        header = f"t=1700000000,v1={vector}"
        plugin.module.verify(header, b"{}", "whsec_test", tolerance=300, now=1700000300)
        for now in (1700000301, 1699999699):
            with pytest.raises(plugin.module.SignatureError, match="time"):
                plugin.module.verify(header, b"{}", "whsec_test", tolerance=300, now=now)


@pytest.mark.parametrize("change", [b"charge.succeeded", b"charge.refunded "])
def test_tampered_event_is_refused(plugin: PluginHarness, change: bytes) -> None:
    response = deliver(plugin, sign(), EVENT.replace(b"charge.refunded", change))
    assert (response.status, response.json()) == (400, {"error": "No signature matches the body"})


def test_signature_with_another_secret_or_no_secret_is_refused(plugin: PluginHarness) -> None:
    assert deliver(plugin, sign(secret="whsec_other")).status == 400
    assert deliver(plugin, sign(secret="")).status == 400


def test_one_good_signature_of_several_is_enough(plugin: PluginHarness) -> None:
    time_part, _, good = sign().partition(",")
    assert deliver(plugin, f"{time_part},v1={'0' * 64},v0=x,{good}").status == 200
    assert deliver(plugin, f"{time_part},v1={'0' * 64},v0={good.removeprefix('v1=')}").status == 400


@pytest.mark.parametrize(("age", "status"), [(290, 200), (310, 400), (-290, 200), (-310, 400)])
def test_time_must_be_near(plugin: PluginHarness, age: float, status: int) -> None:
    assert deliver(plugin, sign(age=age)).status == status


def test_tolerance_is_configurable(plugin: PluginHarness, stripe: StripeMock) -> None:
    plugin.start()
    plugin.update_config({"apiKey": KEY, "webhookSecret": SECRET, "apiBase": stripe.url, "toleranceSeconds": 60})
    assert deliver(plugin, sign(age=90)).status == 400
    assert deliver(plugin, sign(age=30)).status == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "v1=00",
        "t=1",
        "t=,v1=00",
        "t=now,v1=00",
        "t=-1,v1=00",
        "t=1,t=2,v1=00",
        "t=²,v1=00",
        "t=1;v1=00",
    ],
)
def test_malformed_header_is_refused(plugin: PluginHarness, header: str) -> None:
    response = deliver(plugin, header)
    assert (response.status, response.json()) == (400, {"error": "Malformed Stripe-Signature header"})


def test_signature_that_is_not_ascii_is_refused(plugin: PluginHarness) -> None:
    assert deliver(plugin, f"t={int(time.time())},v1=ü").status == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"id": 1, "type": "x"}', b'{"id": "evt_1"}', b"\xff"])
def test_signed_body_that_is_no_event_is_refused(plugin: PluginHarness, body: bytes) -> None:
    assert deliver(plugin, body=body).status == 400


@pytest.mark.parametrize("secret", [None, ""])
def test_no_secret_configured(stripe: StripeMock, secret: str | None) -> None:
    config = {"apiKey": KEY, "apiBase": stripe.url, "webhookSecret": secret}
    with PluginHarness(Path(__file__).parent, config=config) as plugin:
        assert deliver(plugin, sign(secret="")).status == 503


def test_repeated_event_is_a_duplicate(plugin: PluginHarness) -> None:
    assert "duplicate" not in deliver(plugin).json()
    again = deliver(plugin)
    assert again.status == 200
    assert again.json() == {"received": True, "type": "charge.refunded", "org": "acme", "duplicate": True}


def test_only_the_last_hundred_events_are_remembered(plugin: PluginHarness) -> None:
    for number in range(101):
        deliver(plugin, body=b'{"id": "evt_%d", "type": "t"}' % number)
    assert len(plugin.state["events"]) == 100
    assert "duplicate" in deliver(plugin, body=b'{"id": "evt_1", "type": "t"}').json()
    assert "duplicate" not in deliver(plugin, body=b'{"id": "evt_0", "type": "t"}').json()


def test_one_of_many_simultaneous_deliveries_is_the_first(plugin: PluginHarness) -> None:
    plugin.start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: deliver(plugin).json(), range(16)))
    assert sum("duplicate" not in answer for answer in answers) == 1


# Config and credentials


def test_metadata(plugin: PluginHarness) -> None:
    plugin.start()
    metadata = plugin.metadata()
    assert metadata["routes"] == [{"method": "POST", "path": "/webhook"}]
    assert metadata["authMethods"] == [
        {"type": "apiKey", "id": "apiKey", "label": "Secret key", "configField": "apiKey"}
    ]
    assert metadata["configSchema"]["toleranceSeconds"]["default"] == 300
    assert metadata["mcp"] == {"local": [{"id": "stripe"}], "external": []}
    assert KEY not in json.dumps(metadata)
    components = [part["component"] for part in metadata["uiExtensions"] + metadata["pages"]]
    assert len(components) == 2
    assert all((Path(__file__).parent / component).is_file() for component in components)


def test_credentials_are_checked_with_stripe(plugin: PluginHarness, stripe: StripeMock) -> None:
    assert plugin.validate_auth({"methodId": "apiKey", "credentials": {"apiKey": KEY}}) is True
    assert plugin.validate_auth({"methodId": "apiKey", "credentials": {"apiKey": "sk_wrong"}}) is False
    assert [path for _, path, _ in stripe.requests] == ["/v1/account", "/v1/account"]
    assert plugin.validate_auth({"methodId": "apiKey", "credentials": {"apiKey": "sk\nevil: 1"}}) is False
    assert "sk_wrong" not in str(plugin.logs)


def test_unreachable_stripe_is_an_error_not_an_invalid_key(plugin: PluginHarness, stripe: StripeMock) -> None:
    auth = {"methodId": "apiKey", "credentials": {"apiKey": KEY}}
    with pytest.raises(plugin.module.StripeError, match="could not be asked"):
        plugin.validate_auth(auth, {"apiBase": "http://127.0.0.1:1"})


def test_key_from_the_environment(stripe: StripeMock) -> None:
    env = {"STRIPE_API_KEY": KEY, "STRIPE_WEBHOOK_SECRET": SECRET}
    with PluginHarness(Path(__file__).parent, config={"apiBase": stripe.url}, env=env) as plugin:
        assert plugin.call_tool("get_customer", {"customer": "cus_1"})
        assert deliver(plugin).status == 200


def test_connected_key_comes_before_the_configured_one(stripe: StripeMock) -> None:
    config = {"apiKey": "sk_old", "apiBase": stripe.url}
    auth = {"methodId": "apiKey", "credentials": {"apiKey": KEY}}
    with PluginHarness(Path(__file__).parent, config=config, auth=auth) as plugin:
        assert plugin.call_tool("get_customer", {"customer": "cus_1"})


def test_without_a_key_webhooks_still_work() -> None:
    with PluginHarness(Path(__file__).parent, config={"webhookSecret": SECRET}) as plugin:
        with pytest.raises(ConfigError, match="apiKey"):
            plugin.start()
        assert deliver(plugin).status == 200
        assert plugin.list_tools() == []


# Tools


def call(plugin: PluginHarness, name: str, **arguments: object) -> Any:
    return json.loads(plugin.call_tool(name, arguments)["content"][0]["text"])


def test_tools_are_listed(plugin: PluginHarness) -> None:
    tools = plugin.list_tools()
    assert [tool["name"] for tool in tools] == ["get_customer", "list_charges", "create_refund"]
    assert {tool["serverId"] for tool in tools} == {"stripe"}
    assert all(tool["inputSchema"]["type"] == "object" for tool in tools)


def test_tools(plugin: PluginHarness, stripe: StripeMock) -> None:
    assert call(plugin, "get_customer", customer="cus_1")["email"] == "ada@example.com"
    assert len(call(plugin, "list_charges", limit=3, customer="cus_1")) == 3
    assert len(call(plugin, "list_charges")) == 10
    assert len(call(plugin, "list_charges", limit=10**6)) == 100
    assert call(plugin, "create_refund", charge="ch_1") == {"id": "re_1", "charge": "ch_1", "amount": 500}
    assert call(plugin, "create_refund", charge="ch_1", amount=7)["amount"] == 7
    assert stripe.requests[1] == ("GET", "/v1/charges", {"limit": ["3"], "customer": ["cus_1"]})
    assert stripe.requests[-1] == ("POST", "/v1/refunds", {"charge": ["ch_1"], "amount": ["7"]})
    with pytest.raises(NoSuchToolError):
        plugin.call_tool("delete_everything")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_customer", {}),
        ("get_customer", {"customer": 1}),
        ("list_charges", {"limit": 0}),
        ("list_charges", {"limit": True}),
        ("create_refund", {"charge": "ch_1", "amount": -5}),
        ("create_refund", {"charge": "ch_1", "amount": "5"}),
    ],
)
def test_wrong_arguments_reach_nobody(
    plugin: PluginHarness, stripe: StripeMock, name: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="must be"):
        plugin.call_tool(name, arguments)
    assert stripe.requests == []


@pytest.mark.parametrize("customer", ["..", "../account", "cus_1?expand[]=sources", "cus/1", ""])
def test_ids_cannot_lead_elsewhere(plugin: PluginHarness, stripe: StripeMock, customer: str) -> None:
    with pytest.raises(plugin.module.StripeError, match="not the id"):
        plugin.call_tool("get_customer", {"customer": customer})
    assert stripe.requests == []


@pytest.mark.parametrize(
    ("customer", "message"),
    [
        ("cus_2", "No such object: 'cus_2'"),
        ("cus_moved", "Stripe answered 302"),
        ("cus_long", "longer than"),
        ("cus_broken", "something else than JSON"),
    ],
)
def test_errors_have_the_provider_s_message(
    plugin: PluginHarness, stripe: StripeMock, customer: str, message: str
) -> None:
    with pytest.raises(plugin.module.StripeError, match=message):
        plugin.call_tool("get_customer", {"customer": customer})
    assert len(stripe.requests) == 1  # a redirect is not followed, and nothing is asked twice


def test_key_is_in_no_message(stripe: StripeMock) -> None:
    config = {"apiKey": "sk_live_secret", "apiBase": stripe.url}
    with PluginHarness(Path(__file__).parent, config=config) as plugin:
        with pytest.raises(plugin.module.StripeError) as caught:
            plugin.call_tool("get_customer", {"customer": "cus_1"})
        assert str(caught.value) == "Invalid API Key provided: [key]"
        assert caught.value.status == 401
        assert "sk_live_secret" not in str(plugin.logs)


def test_slow_answer_is_given_up(stripe: StripeMock, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"apiKey": KEY, "apiBase": stripe.url}
    released = threading.Event()
    monkeypatch.setattr(stripe, "answer", lambda *_: (released.wait(30), (200, {}))[1])
    with PluginHarness(Path(__file__).parent, config=config) as plugin:
        monkeypatch.setitem(plugin.module.StripeApi._call.__globals__, "TIMEOUT_SECONDS", 0.1)
        with pytest.raises(plugin.module.StripeError, match="could not be asked: timed out"):
            plugin.call_tool("get_customer", {"customer": "cus_1"})
    released.set()
