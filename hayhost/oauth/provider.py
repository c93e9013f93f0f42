"""What is said to a provider's token endpoint, and what it answers (RFC 6749, sections 4.1.3, 5 and 6)."""

import asyncio
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import SplitResult

import msgspec

from hayhost.logs import escape, get_logger
from hayhost.metadata import Metadata, OAuth2
from hayhost.store import Installed

from .errors import NotConfiguredError, OAuthError, ProviderError, RefusedError
from .outbound import Outbound, split_url

__all__ = ["Client", "Described", "Provider", "client_of", "is_revoked", "method_of", "said"]

_TIMEOUT: Final = 30.0  # of all attempts together; less than ``store.refreshing.CLAIM``
_MAX_SAID: Final = 300
_MAX_TOKEN: Final = 16 << 10
_NEVER: Final = 10 * 365 * 86_400  # who says that a token is good for longer means for ever
_CODE: Final = re.compile(r"[!-~ ]{1,100}")
# RFC 6749, and what GitHub and Slack say instead.
_REVOKED: Final = frozenset({"invalid_grant", "bad_refresh_token", "invalid_refresh_token", "token_revoked"})
# What providers say that look for the client's secret elsewhere.
_STRANGER: Final = frozenset({"invalid_client", "invalid_request", "unauthorized_client"})
# Of no use without a key that the client proves to have.
_BOUND: Final = frozenset({"dpop", "mac", "pop"})


class Described(Protocol):
    """A plugin's version, as far as OAuth2 needs to know it."""

    @property
    def metadata(self) -> Metadata:
        """What it registered."""

    @property
    def env(self) -> Mapping[str, str]:
        """The variables of the host's environment that it may know."""


@dataclass(frozen=True, slots=True)
class Client:
    """What the host is to a provider. Without a secret it is a public client (RFC 6749, section 2.1)."""

    id: str
    secret: str = field(repr=False)


def method_of(described: Described, plugin: str, method_id: str) -> OAuth2:
    """The auth method. Raises ``NotConfiguredError`` if the plugin has none of that id that is OAuth2."""
    for method in described.metadata.auth_methods:
        if isinstance(method, OAuth2) and method.id == method_id:
            return method
    raise NotConfiguredError(f"the plugin {plugin} has no OAuth2 method {method_id!r}")


def client_of(installed: Installed, method: OAuth2, described: Described) -> Client:
    """The client that an org's config names, as ``config.get`` has it. Raises ``NotConfiguredError`` without an id."""
    from hayhost.sdk.config import OrgConfig

    def warn(message: str) -> None:
        get_logger().warning(message, plugin=installed.plugin, org=installed.org_id)

    config = OrgConfig(msgspec.to_builtins(described.metadata.config_schema), installed.config, described.env, warn)
    client_id, secret = config.get_optional(method.client_id), config.get_optional(method.client_secret)
    for name, value in ((method.client_id, client_id), (method.client_secret, secret)):
        if value is not None and not isinstance(value, str):
            raise NotConfiguredError(said(f"the config field {name}, for {method.label}, is not a string"))
    if not client_id:
        raise NotConfiguredError(
            said(f"the config field {method.client_id}, the client id for {method.label}, is not set")
        )
    return Client(client_id, secret or "")


def said(text: str, secrets: Iterable[str] = ()) -> str:
    """Somebody else's words, fit for errors and logs: short, on one line, and without ``secrets``."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[secret]")
    text = escape(text)
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]}…"


class _Token(msgspec.Struct):
    access_token: str
    token_type: str | None = None
    refresh_token: str | None = None
    expires_in: int | float | str | None = None
    scope: str | list[str] | None = None


class Provider:
    """Speaks to token endpoints. All methods raise ``RefusedError`` or ``ProviderError``."""

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound
        self._in_body: set[str] = set()  # endpoints that want the client's secret there

    async def check(self, method: OAuth2) -> SplitResult:
        """The parts of the authorization URL, if both URLs of ``method`` may be used; but not whether they answer."""
        split_url(method.token_url)
        return await self._outbound.check(method.authorization_url)

    async def exchange(
        self, method: OAuth2, client: Client, *, code: str, verifier: str, redirect_uri: str
    ) -> dict[str, Any]:
        """Credentials for a code."""
        return await self._ask(
            method,
            client,
            "authorization_code",
            {"code": code, "redirect_uri": redirect_uri, "code_verifier": verifier},
        )

    async def refresh(self, method: OAuth2, client: Client, credentials: Mapping[str, Any]) -> dict[str, Any]:
        """New credentials for old ones. What the provider does not give anew stays (RFC 6749, section 6)."""
        token = str(credentials["refreshToken"])
        fresh = await self._ask(method, client, "refresh_token", {"refresh_token": token})
        kept = {key: credentials[key] for key in ("refreshToken", "scope") if key in credentials}
        return {**kept, **fresh}

    async def _ask(self, method: OAuth2, client: Client, grant: str, parameters: dict[str, str]) -> dict[str, Any]:
        url = method.token_url
        secrets = (client.secret, *(parameters[key] for key in parameters if key != "redirect_uri"))
        ways = ["client_secret_basic", "client_secret_post"] if client.secret else ["none"]
        if url in self._in_body:
            ways.reverse()
        asked = time.time()
        try:
            async with asyncio.timeout(_TIMEOUT):
                for way in ways:
                    status, body = await self._outbound.post(url, *_form(client, way, grant, parameters))
                    answer = _Answer(str(split_url(url).hostname), status, body, secrets)
                    if not (answer.is_stranger and way is not ways[-1]):
                        break
        except TimeoutError:
            raise ProviderError(f"{split_url(url).hostname} did not answer within {_TIMEOUT:g} s") from None
        if client.secret and not answer.is_stranger:
            (self._in_body.add if way == "client_secret_post" else self._in_body.discard)(url)
        return answer.credentials(asked)


def _form(client: Client, way: str, grant: str, parameters: dict[str, str]) -> tuple[dict[str, str], str]:
    """Headers and body of a request."""
    from authlib.oauth2 import ClientAuth
    from authlib.oauth2.rfc6749.parameters import prepare_token_request

    headers = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
    try:
        body = prepare_token_request(grant, **parameters)
        _, headers, body = ClientAuth(client.id, client.secret, way).prepare("POST", "", headers, body)
    except UnicodeError:
        raise NotConfiguredError("the client's id or secret has characters that cannot be sent") from None
    return headers, body


class _Answer:
    """An answer of ``host``; it must not say any of the ``secrets`` that were sent."""

    def __init__(self, host: str, status: int, body: bytes, secrets: Iterable[str]) -> None:
        self._host = host
        self._status = status
        self._secrets = tuple(secrets)
        try:
            self._document = msgspec.json.decode(body)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            self._document = None
        error = self._document.get("error") if isinstance(self._document, dict) else None
        self._error = error if isinstance(error, str) and status < 500 else ""

    @property
    def is_stranger(self) -> bool:
        """Whether the provider may not have recognised the client in this way; if so, nothing is used up."""
        return self._error in _STRANGER or (self._status == 401 and not self._error)

    def credentials(self, asked: float) -> dict[str, Any]:
        """What to keep, if it was asked for at ``asked``. Raises ``RefusedError`` or ``ProviderError``."""
        if self._error:
            raise self._refusal()
        if not 200 <= self._status < 300:
            redirect = ", a redirect, which is not followed" if 300 <= self._status < 400 else ""
            raise ProviderError(f"{self._host} answered {self._status}{redirect}")
        try:
            token = msgspec.convert(self._document, _Token)
            return _credentials(token, asked)
        except msgspec.ValidationError as error:
            reason = said(str(error), self._secrets)
        except (ValueError, OverflowError) as error:
            reason = str(error)
        raise ProviderError(f"{self._host} answered what is no token: {reason}")

    def _refusal(self) -> RefusedError:
        description = self._document.get("error_description")
        more = f": {description}" if isinstance(description, str) and description else ""
        code = self._error if _CODE.fullmatch(self._error) else "error"
        return RefusedError(said(f"{self._host} says {self._error}{more}", self._secrets), code)


def is_revoked(error: OAuthError) -> bool:
    """Whether a refresh failed for good: the refresh token is worth nothing any more."""
    return isinstance(error, RefusedError) and error.code in _REVOKED


def _credentials(token: _Token, asked: float) -> dict[str, Any]:
    kind = token.token_type or "Bearer"
    if not re.fullmatch(r"[A-Za-z0-9._~:/+-]{1,100}", kind):
        raise ValueError("its token_type is malformed")
    if kind.lower() in _BOUND:
        raise ValueError(f"its token_type is {kind}, which needs a key that the host does not have")
    for name in ("access_token", "refresh_token"):
        value = getattr(token, name)
        if value is not None and not 0 < len(value) <= _MAX_TOKEN and (value or name == "access_token"):
            raise ValueError(f"its {name} is empty or too long")
    credentials: dict[str, Any] = {"accessToken": token.access_token, "tokenType": kind}
    if token.refresh_token:
        credentials["refreshToken"] = token.refresh_token
    if token.expires_in is not None:
        seconds = float(token.expires_in) if not isinstance(token.expires_in, str) else _number(token.expires_in)
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError("its expires_in is no time")
        if 0 < seconds < _NEVER:
            credentials["expiresAt"] = int(asked + seconds)
    if token.scope:
        scope = token.scope if isinstance(token.scope, str) else " ".join(token.scope)
        credentials["scope"] = scope[:_MAX_TOKEN]
    return credentials


def _number(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError("its expires_in is no number")
    return float(text)
