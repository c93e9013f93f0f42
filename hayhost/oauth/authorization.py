"""Authorizations: a browser is sent to the provider, and comes back with a code."""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from hayhost.installs import Auth
from hayhost.metadata import OAuth2
from hayhost.store import Flow, Installed, NotFoundError, Store

from .errors import NotConfiguredError, OAuthError, ProviderError, RefusedError
from .provider import Described, Provider, client_of, method_of, said

__all__ = ["Authorizations", "Plugins"]

Plugins = Callable[[], Mapping[str, Described]]
"""The plugins that are loaded now, by name."""

_OWN: Final = frozenset(
    {"response_type", "client_id", "redirect_uri", "scope", "state", "code_challenge", "code_challenge_method"}
)
_MAX_PARAMETER: Final = 4_096


class Authorizations:
    """Begins and finishes authorizations: each has a ``state`` for one use by one browser, and a PKCE verifier."""

    def __init__(self, store: Store, provider: Provider, plugins: Plugins) -> None:
        self._store = store
        self._provider = provider
        self._plugins = plugins

    async def begin(self, installed: Installed, method: OAuth2, *, redirect_uri: str, browser: str, actor: str) -> str:
        """The URL to send the browser to; ``browser`` is a secret that only it has, such as a cookie's value.

        Raises ``NotConfiguredError`` without a client id, ``ProviderError`` if the plugin's URLs are not good, and as
        ``Flows.begin`` does.
        """
        from authlib.oauth2 import OAuth2Client

        described = self._described(installed.plugin)
        client = client_of(installed, method, described)
        parts = await self._provider.check(method)
        if taken := sorted(_OWN.intersection(name for name, _ in parse_qsl(parts.query, keep_blank_values=True))):
            raise ProviderError(f"the plugin's authorization URL has a parameter {taken[0]} already")
        verifier = secrets.token_urlsafe(64)
        state = await self._store.flows.begin(
            installed.plugin, installed.org_id, method.id, verifier=verifier, browser=browser, actor=actor
        )
        url, _ = OAuth2Client(
            None, client_id=client.id, redirect_uri=redirect_uri, code_challenge_method="S256"
        ).create_authorization_url(
            method.authorization_url, state=state, code_verifier=verifier, scope=method.scopes or None
        )
        return str(url)

    async def finish(
        self,
        query: Mapping[str, Sequence[str]],
        *,
        browser: str,
        redirect_uri: str,
        actor: str,
        plugin: str | None = None,
        org: str | None = None,
    ) -> tuple[Flow, Auth]:
        """What came of an authorization, whose ``state`` is used up by it, and its credentials, which are not kept yet.

        ``query`` are the parameters that the browser came back with; ``plugin`` and ``org``, if given, are those that
        it must have been begun for. Raises ``RefusedError`` if the provider or its user said no, and other
        ``OAuthError``.
        """
        if (state := _single(query, "state")) is None:
            raise OAuthError("The provider's answer has no state")
        try:
            flow = await self._store.flows.take(state, browser=browser, actor=actor)
        except NotFoundError as error:
            raise OAuthError(str(error)) from None
        try:
            if plugin not in (None, flow.plugin) or org not in (None, flow.org_id):
                raise OAuthError("this authorization was begun for another plugin or organisation")
            return flow, await self._credentials(flow, query, redirect_uri)
        except OAuthError as error:
            await self._store.audit.append(
                actor, "oauth.finish", org=flow.org_id, plugin=flow.plugin, outcome=error.message
            )
            raise

    async def _credentials(self, flow: Flow, query: Mapping[str, Sequence[str]], redirect_uri: str) -> Auth:
        described = self._described(flow.plugin)
        method = method_of(described, flow.plugin, flow.method_id)
        self._check_issuer(method, _single(query, "iss"))
        if (refused := _single(query, "error")) is not None:
            description = _single(query, "error_description")
            more = f": {description}" if description else ""
            raise RefusedError(said(f"{method.label} says {refused}{more}"), said(refused)[:100])
        if (code := _single(query, "code")) is None:
            raise OAuthError("the provider's answer has neither a code nor an error")
        try:
            installed = await self._store.installations.get(flow.plugin, flow.org_id)
        except NotFoundError as error:
            raise OAuthError(str(error), status=404) from None
        client = client_of(installed, method, described)
        credentials = await self._provider.exchange(
            method, client, code=code, verifier=flow.verifier, redirect_uri=redirect_uri
        )
        return Auth(method.id, credentials)

    def _described(self, plugin: str) -> Described:
        if (described := self._plugins().get(plugin)) is None:
            raise NotConfiguredError(f"the plugin {plugin} is not loaded")
        return described

    def _check_issuer(self, method: OAuth2, issuer: str | None) -> None:
        """Refuse the answer of another provider (RFC 9207), which would have the code sent to the wrong one.

        A plugin says no issuer; but its authorization endpoint and issuer are of one origin.
        """
        if issuer is None:
            return
        expected = urlsplit(method.authorization_url)
        origin = re.match("[^/]*//[^/?#]*", issuer)
        if origin is None or origin[0].lower() != f"{expected.scheme}://{expected.netloc}".lower():
            raise OAuthError(f"the answer is of another provider than {expected.netloc}")


def _single(query: Mapping[str, Sequence[str]], name: str) -> str | None:
    """The value of a parameter; ``None`` if it is not given. Raises ``OAuthError`` if it is given more than once."""
    values = query.get(name) or ()
    if len(values) > 1 or any(len(value) > _MAX_PARAMETER or not value for value in values):
        raise OAuthError(f"the parameter {name} is empty, too long, or given more than once")
    return values[0] if values else None
