"""OAuth2 as a browser and a plugin meet it: a real host, and a real authorization server."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from .authorization_server import CLIENT_ID, SECRET, Provider
from .conftest import Answer, HostProcess, wait_until, write_plugin
from .hosting import PREAMBLE

ONE = "/api/v1/orgs/acme/plugins/crm"
START = ONE + "/oauth/start"
CONFIG = {"clientId": CLIENT_ID, "clientSecret": SECRET}
PLUGIN = """
@define_hay_plugin
class Crm:
    name = "crm"

    def on_initialize(self, ctx):
        ctx.register.config({
            "clientId": {"type": "string"}, "clientSecret": {"type": "string", "sensitive": True},
        })
        ctx.register.auth.oauth2(
            id="oauth", label="Acme", scopes=["read"], authorization_url="AUTHORIZE", token_url="TOKEN",
            client_id=ctx.config.field("clientId"), client_secret=ctx.config.field("clientSecret"),
        )
        ctx.register.route("GET", "/token", self.token)

    def on_validate_auth(self, ctx):
        return ctx.auth.get().credentials["accessToken"].startswith("access-")

    def token(self, req):
        auth = req.ctx.auth.get()
        return {"method": auth.method_id, **auth.credentials} if auth else {}
"""


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    provider = Provider(tmp_path)
    yield provider
    provider.close()


@pytest.fixture
def host(tmp_path: Path, provider: Provider) -> Iterator[HostProcess]:
    source = PREAMBLE + PLUGIN.replace("AUTHORIZE", provider.url("/authorize")).replace("TOKEN", provider.url("/token"))
    write_plugin(tmp_path / "plugins" / "crm", source)
    options = ["--port=0", "--log-format=json", "--egress-allow=127.0.0.1/32"]
    options += [f"--egress-nameserver={provider.nameserver}"]
    arguments = ["serve", str(tmp_path / "plugins"), *options]
    host = HostProcess(arguments, {"SSL_CERT_FILE": str(provider.ca)}, writable=tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(host.kill)
        host.wait_ready()
        provider.redirect = f"http://127.0.0.1:{host.port}/api/v1/oauth/callback"
        assert host.request("PUT", ONE, json_body={"config": CONFIG}).status == 201
        yield host


def cookie_of(answer: Answer) -> str:
    return str(answer.headers["Set-Cookie"]).partition(";")[0]


def come_back(host: HostProcess, provider: Provider, there: str, cookie: str) -> Answer:
    """What the browser sees that has been at the provider."""
    parts = urlsplit(provider.sends_to(there))
    headers = {"Cookie": cookie, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    return host.request("GET", f"{parts.path}?{parts.query}", headers=headers)


def test_an_account_is_connected_and_its_token_reaches_the_plugin(host: HostProcess, provider: Provider) -> None:
    assert host.get("/plugins/crm/acme/token").json() == {}
    started = host.get(START)
    assert started.status == 302
    there = started.headers["Location"]
    assert there.startswith(provider.url("/authorize?"))
    asked = parse_qs(urlsplit(there).query)
    assert asked["code_challenge_method"] == ["S256"]
    assert asked["redirect_uri"] == [provider.redirect]
    attributes = {part.strip() for part in started.headers["Set-Cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite=Lax", "Path=/api/v1"} <= attributes
    done = come_back(host, provider, there, cookie_of(started))
    assert (done.status, done.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"crm is connected" in done.body
    [issued] = provider.issued
    given = host.get("/plugins/crm/acme/token").json()
    assert (given["method"], given["accessToken"]) == ("oauth", issued["access_token"])
    shown = host.get(ONE)
    assert (shown.json()["authValidity"], shown.json()["auth"]["methodId"]) == ("valid", "oauth")
    everything = shown.body + done.body + host.get("/api/v1/audit").body + host.log.encode()
    for secret in provider.secrets():
        assert secret.encode() not in everything
    # The state is used up.
    parts = urlsplit(provider.sends_to(there))
    stale = f"{parts.path}?state={quote(asked['state'][0])}&code=x"
    again = host.request("GET", stale, headers={"Cookie": cookie_of(started)})
    assert again.status == 400
    assert b"used already" in again.body


def test_a_flow_is_for_the_browser_that_began_it(host: HostProcess, provider: Provider) -> None:
    started = host.post(START)
    there = started.json()["authorizationUrl"]
    other = cookie_of(host.post(START))
    assert other != cookie_of(started)
    refused = come_back(host, provider, there, other)
    assert refused.status == 400
    assert b"another browser" in refused.body
    assert come_back(host, provider, there, cookie_of(started)).status == 400  # and is used up by it
    elsewhere = host.post(START)
    parts = urlsplit(provider.sends_to(elsewhere.json()["authorizationUrl"]))
    wrong = f"/api/v1/orgs/beta/plugins/crm/oauth/callback?{parts.query}"
    refused = host.request("GET", wrong, headers={"Cookie": cookie_of(elsewhere)})
    assert refused.status == 400
    assert b"another plugin or organisation" in refused.body
    without = host.get(f"{ONE}/oauth/callback?state=x&code=y")
    assert without.status == 400
    assert host.get("/plugins/crm/acme/token").json() == {}


def test_a_provider_that_says_no(host: HostProcess, provider: Provider) -> None:
    provider.denies = True
    started = host.get(START)
    refused = come_back(host, provider, started.headers["Location"], cookie_of(started))
    assert refused.status == 400
    assert b"access_denied" in refused.body
    assert host.get(ONE).json()["auth"] is None


def test_what_cannot_be_started(host: HostProcess) -> None:
    unknown = host.get(START + "?method=saml")
    assert (unknown.status, unknown.json()["errors"][0]["field"]) == (422, "method")
    assert host.get(START.replace("acme", "beta")).status == 404
    host.request("PATCH", ONE, json_body={"config": {"clientId": None}})
    missing = host.get(START)
    assert missing.status == 409
    assert "clientId" in missing.json()["error"]


def test_tokens_are_refreshed_and_a_revoked_one_is_said(host: HostProcess, provider: Provider) -> None:
    provider.expires_in = 1
    started = host.get(START)
    assert come_back(host, provider, started.headers["Location"], cookie_of(started)).status == 200
    first = host.get("/plugins/crm/acme/token").json()["accessToken"]
    wait_until(lambda: host.get("/plugins/crm/acme/token").json()["accessToken"] != first, "a fresh token")
    provider.tokens.clear()  # revoked
    wait_until(lambda: host.get(ONE).json()["authValidity"] == "invalid", "what came of it", limit=60)
    health = wait_until(lambda: (h := host.health("crm", "acme")) and h["state"] == "degraded" and h, "degraded")
    assert "refreshed" in json.dumps(health)
    for secret in provider.secrets():
        assert secret not in host.log
