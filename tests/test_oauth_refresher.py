"""Tokens are refreshed before they expire, once each, whatever happens meanwhile."""

import asyncio
import contextlib
import datetime as dt
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from hayhost import logs
from hayhost.installs import Auth
from hayhost.oauth import Refresher, refresher
from hayhost.store import Installed, StoreUnavailableError, refreshing

from .authorization_server import SECRET, Provider
from .authorizing import CONFIG, Bench, bench, described, install
from .storing import BACKENDS, make_url, run, settle


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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refreshing, "CLAIM", dt.timedelta(milliseconds=50))
    monkeypatch.setattr(refreshing, "_LEAST", dt.timedelta())
    monkeypatch.setattr(refreshing, "_LONGEST_PAUSE", dt.timedelta(milliseconds=100))


Calls = list[tuple[str, str, str]]


def new(made: Bench, calls: Calls) -> Refresher:
    def changed(plugin: str, org: str, reason: str) -> None:
        calls.append((plugin, org, reason))

    return Refresher(made.store, made.client, lambda: made.plugins, changed, poll=0.02)


@contextlib.asynccontextmanager
async def running(made: Bench) -> AsyncIterator[Calls]:
    """A refresher that runs; what it calls ``changed`` with."""
    calls: Calls = []
    async with new(made, calls):
        yield calls


async def connected(made: Bench, org: str = "acme", plugin: str = "crm", **values: Any) -> Installed:
    """An org whose token is due."""
    values = {"auth": Auth("oauth", made.provider.issue()), "auth_validity": "valid", **values}
    return await install(made.store, org, plugin, **values)


def credentials(installed: Installed) -> dict[str, Any]:
    assert installed.auth is not None
    return installed.auth.credentials


async def found(made: Bench, condition: Callable[[Installed], Any], org: str = "acme") -> Installed:
    """The installation, once it is as ``condition`` wants it."""
    deadline = time.monotonic() + 30
    while not condition(installed := await made.store.installations.get("crm", org)):
        assert time.monotonic() < deadline, installed
        await asyncio.sleep(0.01)
    return installed


def test_tokens_are_refreshed_in_the_background(url: str, provider: Provider, log: io.StringIO) -> None:
    async def main() -> None:
        async with bench(url, provider) as made:
            before = await connected(made)
            idle = await connected(made, "beta", auth=Auth("oauth", {**provider.issue(), "expiresAt": 9_999_999_999}))
            off = await connected(made, "gamma", enabled=False)
            async with running(made) as calls:
                await settle(lambda: calls)
                assert calls == [("crm", "acme", "its OAuth2 token was refreshed")]
                after = await made.store.installations.get("crm", "acme")
                assert credentials(after)["accessToken"] == provider.issued[-1]["access_token"]
                assert credentials(after)["refreshToken"] == provider.issued[-1]["refresh_token"]
                assert credentials(after)["expiresAt"] > time.time() + 3_000
                assert (after.auth_validity, after.config, after.revision) == ("valid", CONFIG, before.revision + 1)
                await made.store.installations.put("crm", "gamma", if_revision=off.revision, actor="t", enabled=True)
                await settle(lambda: len(calls) == 2)
            assert provider.used == [credentials(before)["refreshToken"], credentials(off)["refreshToken"]]
            assert await made.store.installations.get("crm", "beta") == idle
        assert not [secret for secret in provider.secrets() if secret in log.getvalue()]

    run(main())


def test_a_chain_of_short_lived_rotating_tokens(file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.expires_in = 1
    monkeypatch.setattr(refreshing, "_LEAST", dt.timedelta(seconds=0.1))

    async def main() -> None:
        async with bench(file, provider) as made:
            await connected(made)
            async with running(made) as calls:
                await settle(lambda: len(calls) >= 4)
        assert len(set(provider.used)) == len(provider.used) >= 4

    run(main())


def test_what_the_provider_does_not_give_anew_is_kept(file: str, provider: Provider) -> None:
    provider.rotating = False
    provider.changes = {"scope": None}

    async def main() -> None:
        async with bench(file, provider) as made:
            before = await connected(made)
            async with running(made) as calls:
                await settle(lambda: calls)
            after = await made.store.installations.get("crm", "acme")
            assert credentials(after)["refreshToken"] == credentials(before)["refreshToken"]
            assert credentials(after)["scope"] == "read"
            assert credentials(after)["accessToken"] != credentials(before)["accessToken"]

    run(main())


def test_a_refresh_token_is_used_once(url: str, provider: Provider) -> None:
    """However many hosts and requests want it refreshed at once."""

    async def main() -> None:
        async with bench(url, provider) as one, bench(url, provider) as other:
            before = await connected(one)
            calls: Calls = []
            hosts = [new(one, calls), new(other, calls)]
            await asyncio.gather(*(host.refresh("crm", "acme") for host in hosts * 25))
            await settle(lambda: calls)
            await asyncio.gather(*(host.refresh("crm", "acme") for host in hosts))
            assert provider.used == [credentials(before)["refreshToken"]]
            assert len(calls) == 1
            orgs = [f"org-{number}" for number in range(30)]
            tokens = [credentials(await connected(one, org))["refreshToken"] for org in orgs]
            async with hosts[0], hosts[1]:
                await asyncio.gather(*(host.refresh("crm", org) for org in orgs for host in hosts))
                await settle(lambda: len(calls) == 31)
            assert sorted(provider.used[1:]) == sorted(tokens)
            for org in ("acme", *orgs):
                assert (await other.store.installations.get("crm", org)).auth_validity == "valid"

    run(main())


@pytest.mark.usefixtures("impatient")
def test_failures_degrade_and_are_retried(url: str, provider: Provider, log: io.StringIO) -> None:
    provider.instead = lambda handler: handler.send(503)

    async def main() -> None:
        async with bench(url, provider) as made:
            before = await connected(made)
            async with running(made) as calls:
                failed = await found(made, lambda installed: installed.auth_error)
                assert failed.auth_error == "the OAuth2 token could not be refreshed: auth.test answered 503"
                assert failed.installation().problem == failed.auth_error
                assert (failed.auth, failed.auth_validity, failed.revision) == (before.auth, "valid", before.revision)
                await settle(lambda: len(provider.requests) >= 4)
                assert calls == [("crm", "acme", failed.auth_error)]
                assert log.getvalue().count("a token was not refreshed") == 1
                provider.instead = None
                fine = await found(made, lambda installed: not installed.auth_error)
                assert fine.installation().problem == ""
                await settle(lambda: len(calls) == 2)
                assert len(provider.used) == 1
        assert not [secret for secret in provider.secrets() if secret in log.getvalue()]

    run(main())


@pytest.mark.usefixtures("impatient")
def test_what_was_revoked_is_not_tried_again(url: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(url, provider) as made:
            await connected(made)
            provider.tokens.clear()
            async with running(made) as calls:
                gone = await found(made, lambda installed: installed.auth_validity == "invalid")
                assert "auth.test says invalid_grant" in gone.auth_error
                await settle(lambda: calls)
                assert calls == [("crm", "acme", gone.auth_error)]
                await made.store.installations.put(
                    "crm", "acme", if_revision=None, actor="t", config={**CONFIG, "a": 1}
                )
                await connected(made, "beta")  # the refresher goes on meanwhile
                await settle(lambda: len(calls) == 2)
                assert len(provider.used) == 2
                await connected(made)
                back = await found(made, lambda installed: installed.auth_validity != "invalid")
                assert back.auth_error == ""
                await settle(lambda: len(calls) == 3)
                assert len(provider.used) == 3

    run(main())


@pytest.mark.usefixtures("impatient")
def test_a_client_that_is_missing_or_wrong_is_a_failure_like_others(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            await connected(made, config={})
            async with running(made):
                await found(made, lambda installed: "the client id for Acme, is not set" in installed.auth_error)
                wrong = {**CONFIG, "clientSecret": "wr0ng"}
                await made.store.installations.put("crm", "acme", if_revision=None, actor="t", config=wrong)
                await found(made, lambda installed: "invalid_client" in installed.auth_error)
                await made.store.installations.put("crm", "acme", if_revision=None, actor="t", config=CONFIG)
                fine = await found(made, lambda installed: not installed.auth_error)
                assert fine.auth_validity == "valid"

    run(main())


class Held:
    """Answers of the provider that wait until ``go``."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self.waiting = 0
        provider.instead = self._answer

    def _answer(self, handler: Any) -> None:
        self.waiting += 1
        self._provider.released.wait(30)
        credentials = {"access_token": "new-access", "refresh_token": "new-refresh", "expires_in": 3_600}
        handler.send(200, str(credentials).replace("'", '"'))

    def go(self) -> None:
        self._provider.released.set()


def test_what_is_changed_meanwhile_is_not_lost(url: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(url, provider) as made:
            for org in ("config", "tokens", "gone"):
                await connected(made, org)
            held = Held(provider)
            async with running(made) as calls:
                await settle(lambda: held.waiting == 3)
                put = made.store.installations.put
                await put("crm", "config", if_revision=None, actor="t", config={**CONFIG, "new": 1})
                await put("crm", "tokens", if_revision=None, actor="t", auth=Auth("oauth", {"accessToken": "given"}))
                await made.store.installations.delete("crm", "gone", actor="t")
                held.go()
                await settle(lambda: calls)
            assert calls == [("crm", "config", "its OAuth2 token was refreshed")]
            config = await made.store.installations.get("crm", "config")
            assert (config.config["new"], credentials(config)["accessToken"]) == (1, "new-access")
            given = await made.store.installations.get("crm", "tokens")
            assert credentials(given) == {"accessToken": "given"}

    run(main())


@pytest.mark.parametrize("done", [False, True])
def test_new_tokens_are_kept_although_the_database_was_away(
    file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    monkeypatch.setattr(refresher, "_PAUSES", (0.01,))

    async def main() -> None:
        async with bench(file, provider) as made:
            await connected(made)
            put, failures = made.store.installations.put, 0

            async def failing(*arguments: Any, **options: Any) -> Installed:
                nonlocal failures
                failures += 1
                if failures > 3:
                    return await put(*arguments, **options)
                if done:  # and nobody knows
                    await put(*arguments, **options)
                raise StoreUnavailableError("away")

            monkeypatch.setattr(made.store.installations, "put", failing)
            async with running(made) as calls:
                await settle(lambda: calls)
            assert len(provider.used) == len(calls) == 1
            after = await made.store.installations.get("crm", "acme")
            assert credentials(after)["accessToken"] == provider.issued[-1]["access_token"]

    run(main())


def test_a_provider_that_hangs_holds_up_no_other(file: str, provider: Provider) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            made.plugins = {"hangs": described(provider, tokenUrl=provider.url("/hangs")), **made.plugins}
            waiting: list[None] = []

            def hang(handler: Any) -> None:
                if handler.path == "/hangs":
                    waiting.append(None)
                    provider.released.wait(30)
                    handler.send(503)
                    return
                handler.send(200, '{"access_token": "new"}')

            provider.instead = hang
            for number in range(20):
                await connected(made, f"org-{number}", "hangs")
            await connected(made, "last")
            async with running(made) as calls:
                await settle(lambda: ("crm", "last", "its OAuth2 token was refreshed") in calls)
                await settle(lambda: len(waiting) == 16)
                provider.released.set()
                await settle(lambda: len(waiting) == 20)

    run(main())


def test_stopping_waits_for_what_is_under_way(file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            await connected(made)
            held = Held(provider)
            async with running(made) as calls:
                await settle(lambda: held.waiting)
                asyncio.get_running_loop().call_later(0.05, held.go)
            assert len(calls) == 1
            assert credentials(await made.store.installations.get("crm", "acme"))["accessToken"] == "new-access"
            monkeypatch.setattr(refresher, "_GRACE", 0.05)
            provider.released.clear()
            await connected(made)
            async with running(made) as calls:
                await settle(lambda: held.waiting == 2)
            assert calls == []
            held.go()

    run(main())


def test_what_only_looks_like_tokens_is_left_alone(file: str, provider: Provider, log: io.StringIO) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            like = await connected(made, auth=Auth("key", provider.issue()))
            await connected(made, "beta", "absent")
            async with running(made) as calls:
                await connected(made, "gamma")
                await settle(lambda: calls)
                refreshes = Refresher(made.store, made.client, lambda: made.plugins, _never)
                await refreshes.refresh("absent", "beta")
            assert len(provider.used) == 1
            assert await made.store.installations.get("crm", "acme") == like
            assert "not refreshed" not in log.getvalue()
            assert SECRET not in log.getvalue()

    run(main())


def _never(*arguments: str) -> None:
    raise AssertionError(arguments)


@pytest.mark.usefixtures("impatient")
def test_a_claim_that_runs_out_is_not_used_twice_by_its_host(
    file: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with bench(file, provider) as made:
            await connected(made)
            held, claim, claimed = Held(provider), made.store.refreshes.claim, []

            async def claiming(*arguments: Any) -> list[Installed]:
                found = await claim(*arguments)
                claimed.extend(found)
                return found

            monkeypatch.setattr(made.store.refreshes, "claim", claiming)
            async with running(made) as calls:
                await settle(lambda: len(claimed) >= 4)
                held.go()
                await settle(lambda: calls)
            assert held.waiting == len(calls) == 1

    run(main())
