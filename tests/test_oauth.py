"""Authorizations with a real authorization server, and providers that answer what they should not."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import structlog

from hayhost import logs
from hayhost.oauth import NotConfiguredError, OAuthError, Outbound, ProviderError, RefusedError, outbound
from hayhost.oauth import provider as provider_module

from .authorization_server import CLIENT_ID, HOST, REDIRECT, SECRET, Provider
from .authorizing import BROWSER, CONFIG, Bench, bench, described, install
from .storing import BACKENDS, make_url, run


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_url(request.param, tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return make_url("sqlite", tmp_path)


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    made = Provider(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
    yield made
    made.close()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    handlers, config, stream = logging.getLogger().handlers[:], structlog.get_config(), io.StringIO()
    logs.configure("json", "debug", stream)
    logging.getLogger("authlib.oauth2.rfc6749.grants").setLevel(logging.WARNING)  # of the server, which is in here too
    yield stream
    structlog.configure(**config)
    logging.getLogger().handlers[:] = handlers


def test_an_authorization(url: str, provider: Provider, log: io.StringIO) -> None:
    async def main() -> None:
        async with bench(url, provider) as made:
            there = await made.begin(await install(made.store))
            asked = parse_qs(urlsplit(there).query)
            assert there.startswith(provider.url("/authorize?"))
            assert set(asked) == {
                "response_type",
                "client_id",
                "redirect_uri",
                "scope",
                "state",
                "code_challenge",
                "code_challenge_method",
            }
            assert asked["code_challenge_method"] == ["S256"]
            assert asked["scope"] == ["read write"]
            assert len(asked["state"][0]) >= 43
            flow, auth = await made.finish(provider.browse(there), plugin="crm", org="acme")
            assert (flow.plugin, flow.org_id, flow.method_id, auth.method_id) == ("crm", "acme", "oauth", "oauth")
            [issued] = provider.issued
            expires = auth.credentials.pop("expiresAt")
            assert auth.credentials == {
                "accessToken": issued["access_token"],
                "refreshToken": issued["refresh_token"],
                "tokenType": "Bearer",
                "scope": "read write",
            }
            assert isinstance(expires, int)
            with pytest.raises(OAuthError, match="used already") as caught:
                await made.finish({"state": asked["state"], "code": ["x"]})
            audit = str([(entry.action, entry.outcome) for entry in (await made.store.audit.list()).items])
            shown = there + audit + repr((flow, auth, caught.value)) + log.getvalue()
            for secret in (SECRET, BROWSER, flow.verifier, *provider.secrets()):
                assert secret not in shown

    run(main())


def test_a_state_is_for_one_browser_plugin_and_org(url: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(url, provider) as made:
            installed = await install(made.store)
            for wrong, message in (
                ({"browser": "another"}, "another browser"),
                ({"org": "beta"}, "another plugin or organisation"),
                ({"plugin": "stripe"}, "another plugin or organisation"),
            ):
                query = provider.browse(await made.begin(installed))
                with pytest.raises(OAuthError, match=message):
                    await made.finish(query, **wrong)
                with pytest.raises(OAuthError, match="used already"):
                    await made.finish(query)
            assert not [request for request in provider.requests if request[0] == "POST"]
            for query, message in (
                ({}, "no state"),
                ({"state": ["made-up"], "code": ["x"]}, "not begun here"),
                ({"state": ["a", "b"]}, "more than once"),
                ({"state": ["\0\ud800"]}, "not begun here"),
                ({"state": ["x" * 5_000]}, "too long"),
            ):
                with pytest.raises(OAuthError, match=message) as caught:
                    await made.finish(query)
                assert caught.value.status == 400

    run(main())


def test_a_code_is_of_use_only_with_its_own_verifier(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store)
            mine, theirs = [provider.browse(await made.begin(installed)) for _ in range(2)]
            with pytest.raises(RefusedError, match=f"{HOST} says invalid_grant: Code challenge failed") as caught:
                await made.finish({"state": mine["state"], "code": theirs["code"]})
            assert caught.value.code == "invalid_grant"
            last = (await made.store.audit.list(action="oauth.finish")).items[0]
            assert "invalid_grant" in last.outcome

    run(main())


def test_the_client_is_what_config_get_would_say(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            bare = await install(made.store, config={})
            with pytest.raises(
                NotConfiguredError, match="the config field clientId, the client id for Acme, is not set"
            ) as caught:
                await made.begin(bare)
            assert caught.value.status == 409
            made.plugins["crm"] = described(provider, {"CLIENT_ID": CLIENT_ID, "CLIENT_SECRET": SECRET})
            _, auth = await made.finish(provider.browse(await made.begin(bare)))
            assert auth.credentials["accessToken"]
            made.plugins["crm"] = described(provider, {"CLIENT_ID": "other", "CLIENT_SECRET": SECRET}, clientId="fixed")
            assert f"client_id={CLIENT_ID}" in await made.begin(bare)
            stored = await install(made.store, config={"fixed": "stored"})
            assert "client_id=stored" in await made.begin(stored)
            made.plugins["crm"] = described(provider, clientId="number")
            with pytest.raises(NotConfiguredError, match="the config field number, for Acme, is not a string"):
                await made.begin(bare)
            query = provider.browse(await _begun(made))
            made.plugins["crm"] = described(provider, id="another")
            with pytest.raises(NotConfiguredError, match="has no OAuth2 method 'oauth'"):
                await made.finish(query)
            query, method = provider.browse(await _begun(made)), made.method
            made.plugins.clear()
            with pytest.raises(NotConfiguredError, match="the plugin crm is not loaded"):
                await made.finish(query)
            with pytest.raises(NotConfiguredError, match="the plugin crm is not loaded"):
                await made.authorizations.begin(bare, method, redirect_uri=REDIRECT, browser="b", actor="t")

    run(main())


async def _begun(made: Bench) -> str:
    made.plugins["crm"] = described(made.provider)
    return await made.begin(await install(made.store))


@pytest.mark.parametrize("ways", [{"client_secret_basic"}, {"client_secret_post"}, {"none"}])
def test_the_client_is_known_by_what_the_provider_wants(file: str, provider: Provider, ways: set[str]) -> None:
    provider.client_methods = ways

    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store, config={**CONFIG, "clientSecret": None if "none" in ways else SECRET})
            for _ in range(2):
                await made.finish(provider.browse(await made.begin(installed)))
            posts = [request for request in provider.requests if request[0] == "POST"]
            assert len(posts) == (3 if "client_secret_post" in ways else 2)  # it is remembered what works
            assert all(SECRET not in path and path == "/token" for _, path, _, _ in posts)
            assert ("Authorization" in posts[-1][2]) == ("client_secret_basic" in ways)

    run(main())


def test_a_wrong_secret_is_told_of(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store, config={**CONFIG, "clientSecret": "wr0ng"})
            for _ in range(2):
                with pytest.raises(RefusedError, match="invalid_client") as caught:
                    await made.finish(provider.browse(await made.begin(installed)))
                assert "wr0ng" not in str(caught.value)

    run(main())


def test_errors_of_the_provider(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store)
            provider.denies = True
            with pytest.raises(RefusedError, match="Acme says access_denied") as caught:
                await made.finish(provider.browse(await made.begin(installed)))
            assert (caught.value.code, caught.value.status) == ("access_denied", 400)
            hostile = "\x1b[31m<script>\u202e\r\nSet-Cookie: a=b" + "x" * 3_000
            state = parse_qs(urlsplit(await made.begin(installed)).query)["state"]
            with pytest.raises(RefusedError) as caught:
                await made.finish({"state": state, "error": [hostile], "error_description": [hostile]})
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 400
            assert len(caught.value.code) <= 100
            state = parse_qs(urlsplit(await made.begin(installed)).query)["state"]
            with pytest.raises(OAuthError, match="neither a code nor an error"):
                await made.finish({"state": state})

    run(main())


@pytest.mark.parametrize(
    ("issuer", "good"),
    [
        ("https://{host}", True),
        ("https://{host}/tenant", True),
        ("https://evil.test", False),
        ("http://{host}", False),
        ("https://{host}.evil.test", False),
        ("https://[", False),
        ("x", False),
    ],
)
def test_the_answer_of_another_issuer_is_refused(file: str, provider: Provider, issuer: str, good: bool) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            query = provider.browse(await made.begin(await install(made.store)))
            query["iss"] = [issuer.format(host=f"{HOST}:{provider.port}")]
            if good:
                await made.finish(query)
                return
            with pytest.raises(OAuthError, match=r"of another provider than auth\.test"):
                await made.finish(query)
            assert not [request for request in provider.requests if request[0] == "POST"]

    run(main())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"expires_in": None}, {"expiresAt": None}),
        ({"expires_in": 0}, {"expiresAt": None}),
        ({"expires_in": 10**12}, {"expiresAt": None}),
        ({"expires_in": "60"}, {}),
        ({"expires_in": 60.5}, {}),
        ({"token_type": None}, {"tokenType": "Bearer"}),
        ({"token_type": "bot"}, {"tokenType": "bot"}),
        ({"refresh_token": None}, {"refreshToken": None}),
        ({"scope": ["a", "b"]}, {"scope": "a b"}),
        ({"scope": None, "id_token": "x", "extra": {"deep": [1]}}, {"scope": None, "extra": None}),
    ],
)
def test_answers_that_are_odd_but_good(
    file: str, provider: Provider, changes: dict[str, Any], found: dict[str, Any]
) -> None:
    provider.changes = changes

    async def main() -> None:
        async with bench(file, provider) as made:
            _, auth = await made.finish(provider.browse(await made.begin(await install(made.store))))
            assert auth.credentials["accessToken"] == provider.issued[-1]["access_token"]
            for key, value in found.items():
                assert auth.credentials.get(key) == value

    run(main())


def _sends(status: int, body: str = "", *headers: tuple[str, str]) -> Callable[[Any], None]:
    return lambda handler: handler.send(status, body, list(headers))


def _raw(data: bytes) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return answer


def _endless(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:  # until the client leaves
        handler.wfile.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")


def _echo(handler: Any) -> None:
    code = parse_qs(handler.provider.requests[-1][3])["code"][0]
    handler.send(400, f'{{"error": "invalid_grant", "error_description": "no {code} of {SECRET}"}}')


TOKEN = '"access_token": "t0ken"'
GZIP = ("Content-Encoding", "gzip")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (_sends(500, '{"error": "invalid_grant"}'), ProviderError, "auth.test answered 500$"),
        (_sends(503), ProviderError, "answered 503"),
        (_sends(404, "<html>"), ProviderError, "answered 404"),
        (_sends(302, "", ("Location", "http://127.0.0.1:1/")), ProviderError, "302, a redirect, which is not followed"),
        (_sends(307, "", ("Location", "/token")), ProviderError, "307, a redirect"),
        (_sends(200, "<html>"), ProviderError, "what is no token"),
        (_sends(200), ProviderError, "what is no token"),
        (_sends(200, "[]"), ProviderError, "what is no token"),
        (_sends(200, "[" * 60_000), ProviderError, "what is no token"),
        (_sends(200, "{}"), ProviderError, "missing required field `access_token`"),
        (_sends(200, '{"access_token": 7}'), ProviderError, "no token"),
        (_sends(200, '{"access_token": ""}'), ProviderError, "access_token is empty"),
        (_sends(200, f'{{"access_token": "{"x" * 20_000}"}}'), ProviderError, "too long"),
        (_sends(200, f'{{{TOKEN}, "token_type": 7}}'), ProviderError, "no token"),
        (_sends(200, f'{{{TOKEN}, "token_type": "DPoP"}}'), ProviderError, "DPoP, which needs a key"),
        (_sends(200, f'{{{TOKEN}, "token_type": "a\\nb"}}'), ProviderError, "token_type is malformed"),
        (_sends(200, f'{{{TOKEN}, "expires_in": "soon"}}'), ProviderError, "expires_in is no number"),
        (_sends(200, f'{{{TOKEN}, "expires_in": -1}}'), ProviderError, "expires_in is no time"),
        (_sends(200, f'{{{TOKEN}, "expires_in": {"9" * 400}}}'), ProviderError, "no token"),
        (_sends(200, f'{{{TOKEN}, "expires_in": true}}'), ProviderError, "no token"),
        (_sends(200, "\x1f\x8b\x08", GZIP), ProviderError, "no token"),
        (_sends(200, " " * 70_000), ProviderError, "more than 64 KiB"),
        (_endless, ProviderError, "more than 64 KiB"),
        (_raw(b"SSH-2.0-OpenSSH\r\n"), ProviderError, "no HTTP"),
        (_raw(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}"), ProviderError, "broke off"),
        (_raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5_000 + b"\r\n"), ProviderError, "broke off"),
        (_raw(b""), ProviderError, "broke off"),
        (_sends(200, '{"error": "bad_verification_code"}'), RefusedError, "says bad_verification_code"),
        (_sends(400, '{"error": "x", "error_description": ["y"]}'), RefusedError, "says x$"),
        (_sends(400, '{"error": {"code": 7}}'), ProviderError, "answered 400"),
        (_echo, RefusedError, r"no \[secret\] of \[secret\]"),
    ],
)
def test_answers_that_are_not_good(
    file: str,
    provider: Provider,
    log: io.StringIO,
    answer: Callable[[Any], None],
    error: type[OAuthError],
    message: str,
) -> None:
    provider.instead = answer

    async def main() -> None:
        async with bench(file, provider) as made:
            query = provider.browse(await made.begin(await install(made.store)))
            with pytest.raises(error, match=message) as caught:
                await made.finish(query)
            assert str(caught.value).isprintable()
            shown = str(caught.value) + log.getvalue() + str((await made.store.audit.list()).items)
            assert not [secret for secret in (SECRET, "t0ken", *query["code"]) if secret in shown]

    run(main())


def test_a_provider_that_does_not_answer(file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not provider.released.wait(0.01):
            handler.wfile.write(b" ")

    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store)
            monkeypatch.setattr(outbound, "_TIMEOUT", 0.3)
            for answer in (provider.hang, drip):
                provider.instead = answer
                query = provider.browse(await made.begin(installed))
                with pytest.raises(ProviderError, match=r"did not answer within 0\.3 s"):
                    await made.finish(query)
            monkeypatch.setattr(outbound, "_TIMEOUT", 60)
            monkeypatch.setattr(provider_module, "_TIMEOUT", 0.3)
            query = provider.browse(await made.begin(installed))
            with pytest.raises(ProviderError, match=r"did not answer within 0\.3 s"):
                await made.finish(query)

    run(main())


@pytest.mark.parametrize(
    ("host", "answers", "message"),
    [
        ("127.0.0.1", None, "127.0.0.1 is a loopback address"),
        ("[::1]", None, "a loopback address"),
        ("[::ffff:127.0.0.1]", None, "an IPv4-mapped address"),
        ("169.254.169.254", None, "a link-local address"),
        ("10.0.0.1", None, "a private address"),
        ("127.1", None, "unusual spelling"),
        ("0x7f000001", None, "unusual spelling"),
        ("inner.test", ["127.0.0.1"], "inner.test is a loopback address"),
        ("inner.test", ["10.1.2.3", "169.254.169.254", "::1"], "address, which no plugin may connect to"),
        ("inner.test", ["64:ff9b::7f00:1"], "a NAT64 address"),
        ("gone.test", None, "gone.test"),
        ("b\u00fccher.test", None, "not an https URL"),
    ],
)
def test_a_token_url_leads_nowhere_inside(
    file: str, provider: Provider, host: str, answers: list[str] | None, message: str
) -> None:
    if answers:
        provider.names.set(host, answers)

    async def main() -> None:
        async with bench(file, provider, allow=()) as made:
            with pytest.raises(ProviderError, match=message):
                await made.client._outbound.post(f"https://{host}:{provider.port}/token", {}, "a=b")
        assert not provider.requests

    run(main())


def test_the_address_that_is_connected_to_is_the_one_that_was_judged(file: str, provider: Provider) -> None:
    provider.names.set("rebind.test", ["127.0.0.1"], ["127.0.0.2"])

    async def main() -> None:
        async with bench(file, provider) as made:
            url = provider.url("/token", "rebind.test")
            status, _ = await made.client._outbound.post(url, {}, "a=b")
            assert status == 400
            assert provider.names.asked == ["rebind.test"]
            with pytest.raises(ProviderError, match=r"rebind\.test is a loopback address"):
                await made.client._outbound.post(url, {}, "a=b")

    run(main())


def test_tls_is_needed_and_verified(file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.names.set("public.test", "93.184.216.34")

    async def main() -> None:
        async with bench(file, provider) as made:
            post = made.client._outbound.post
            with pytest.raises(ProviderError, match=r"other\.test has no good certificate: .*other\.test"):
                await post(provider.url("/token", "other.test"), {}, "a=b")
            with pytest.raises(ProviderError, match="does not speak TLS"):
                await post(f"https://{HOST}:{provider.plain}/token", {}, "a=b")
            with pytest.raises(ProviderError, match=r"public\.test has to be used with https"):
                await post("http://public.test/token", {}, "a=b")
            assert (await post(f"http://{HOST}:{provider.plain}/token", {}, "a=b"))[0] == 400  # it is allowed
            with pytest.raises(ProviderError, match="cannot be reached: Connection refused"):
                await post(f"https://{HOST}:1/token", {}, "a=b")
            made.plugins["crm"] = described(provider, authorizationUrl="http://public.test/authorize")
            with pytest.raises(ProviderError, match=r"public\.test has to be used with https"):
                await made.begin(await install(made.store))
            made.plugins["crm"] = described(provider, authorizationUrl=f"http://{HOST}/authorize")
            assert (await made.begin(await install(made.store))).startswith(f"http://{HOST}/authorize?")
        monkeypatch.delenv("SSL_CERT_FILE")
        async with bench(file, provider) as made:
            with pytest.raises(ProviderError, match="has no good certificate"):
                await made.client._outbound.post(provider.url("/token"), {}, "a=b")

    run(main())


def test_proxies_of_the_environment_are_not_used(
    file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def main() -> None:
        async with bench(file, provider) as made:
            await made.finish(provider.browse(await made.begin(await install(made.store))))

    run(main())


@pytest.mark.parametrize(
    "url",
    [
        "ftp://auth.test/",
        "javascript:alert(1)",
        "https://",
        "https:///token",
        "https://user:pw@auth.test/",
        "https://auth.test/#fragment",
        "https://auth.test/a b",
        "https://auth.test/\r\nX: y",
        "https://auth.test:99999/",
        "https://auth.test:x/",
        "https://auth.test\\@evil.test/",
        "//auth.test/",
        "",
    ],
)
def test_urls_that_are_no_endpoints(file: str, provider: Provider, url: str) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store)
            for plugin in (described(provider, authorizationUrl=url or " "), described(provider, tokenUrl=url or " ")):
                made.plugins["crm"] = plugin
                with pytest.raises(ProviderError, match="not an https URL"):
                    await made.begin(installed)

    run(main())


def test_an_authorization_url_may_have_parameters_of_its_own(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            installed = await install(made.store)
            made.plugins["crm"] = described(provider, authorizationUrl=provider.url("/authorize?access_type=offline"))
            there = await made.begin(installed)
            assert parse_qs(urlsplit(there).query)["access_type"] == ["offline"]
            await made.finish(provider.browse(there))
            for name in ("state", "redirect_uri", "client_id"):
                url = provider.url(f"/authorize?{name}=mine")
                made.plugins["crm"] = described(provider, authorizationUrl=url)
                with pytest.raises(ProviderError, match=f"has a parameter {name} already"):
                    await made.begin(installed)

    run(main())


def test_nothing_is_loaded_before_it_is_needed() -> None:
    code = "import sys, hayhost.oauth; print([m for m in sys.modules if m.startswith(('authlib', 'tornado.simple'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_hosts_own_names_are_resolved_as_ever() -> None:
    before = dict(os.environ)
    Outbound().close()
    assert dict(os.environ) == before


def test_secrets_show_in_no_repr() -> None:
    assert SECRET not in repr(provider_module.Client(CLIENT_ID, SECRET))
