"""A plugin with OAuth2, as the host sees it, and what authorizes orgs for it with the authorization server."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec

from hayhost.metadata import Metadata
from hayhost.oauth import Authorizations, Outbound
from hayhost.oauth import Provider as Client
from hayhost.store import ExistsError, Installed, Store

from .authorization_server import CLIENT_ID, REDIRECT, SECRET, Provider
from .storing import opened

__all__ = ["BROWSER", "CONFIG", "Bench", "Described", "bench", "described", "install"]

CONFIG = {"clientId": CLIENT_ID, "clientSecret": SECRET}
BROWSER = "cookie-5ecret"


class Described(NamedTuple):
    """A version of a plugin."""

    metadata: Metadata
    env: dict[str, str]


def described(provider: Provider, env: dict[str, str] | None = None, **method: Any) -> Described:
    """A plugin that ``provider`` authorizes; ``method`` says what is different in its method."""
    given = {
        "configSchema": {
            "clientId": {"type": "string", "env": "CLIENT_ID"},
            "clientSecret": {"type": "string", "env": "CLIENT_SECRET", "sensitive": True},
            "number": {"type": "number", "default": 7},
            "fixed": {"type": "string", "default": CLIENT_ID},
        },
        "authMethods": [
            {"type": "apiKey", "id": "key", "label": "Key", "configField": "clientSecret"},
            {
                "type": "oauth2",
                "id": "oauth",
                "label": "Acme",
                "authorizationUrl": provider.url("/authorize"),
                "tokenUrl": provider.url("/token"),
                "scopes": ["read", "write"],
                "clientId": "clientId",
                "clientSecret": "clientSecret",
                **method,
            },
        ],
    }
    return Described(msgspec.convert(given, Metadata), env or {})


async def install(store: Store, org: str = "acme", plugin: str = "crm", **values: Any) -> Installed:
    """Install the plugin."""
    with contextlib.suppress(ExistsError):
        await store.orgs.create(org, actor="test")
    values = {"config": CONFIG, "sensitive": ["clientSecret"], **values}
    return await store.installations.put(plugin, org, if_revision=None, actor="test", **values)


class Bench:
    """A store, a plugin, and what speaks to the provider."""

    def __init__(self, store: Store, provider: Provider, outbound: Outbound) -> None:
        self.store = store
        self.provider = provider
        self.plugins: dict[str, Described] = {"crm": described(provider)}
        self.client = Client(outbound)
        self.authorizations = Authorizations(store, self.client, lambda: self.plugins)

    @property
    def method(self) -> Any:
        return self.plugins["crm"].metadata.auth_methods[1]

    async def begin(self, installed: Installed, **values: Any) -> str:
        values = {"redirect_uri": REDIRECT, "browser": BROWSER, "actor": "test", **values}
        return await self.authorizations.begin(installed, self.method, **values)

    async def finish(self, query: dict[str, list[str]], **values: Any) -> Any:
        values = {"redirect_uri": REDIRECT, "browser": BROWSER, "actor": "test", **values}
        return await self.authorizations.finish(query, **values)


@contextlib.asynccontextmanager
async def bench(url: str, provider: Provider, allow: tuple[str, ...] = ("127.0.0.1/32",)) -> AsyncIterator[Bench]:
    """A bench with a store at ``url``."""
    outbound = Outbound(allow=allow, nameserver=provider.nameserver)
    try:
        async with opened(url) as store:
            yield Bench(store, provider, outbound)
    finally:
        outbound.close()
