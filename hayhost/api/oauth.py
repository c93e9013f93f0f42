"""Connecting an installation to an account by OAuth2: the browser is sent to the provider, and comes back here."""

import html
import secrets
from collections.abc import Mapping
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from hayhost.answers import Answer, Call
from hayhost.catalog import Plugin
from hayhost.errors import InvalidError, RequestError, StoreError
from hayhost.installs import Change
from hayhost.management import Management
from hayhost.metadata import OAuth2
from hayhost.oauth import Authorizations
from hayhost.store import Store

from .operations import Operation, Request
from .views import OAuthQuery, OAuthStarted

__all__ = ["OAuthFlows"]

_COOKIE: Final = "hay_oauth"
_CALLBACK: Final = "/oauth/callback"
_LIFETIME: Final = 600
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem;color-scheme:light dark}}
</style>
</head><body><h1>{title}</h1><p>{text}</p></body></html>
"""


class OAuthFlows:
    """Answers for OAuth2 authorizations."""

    def __init__(
        self, store: Store, management: Management, plugins: Mapping[str, Plugin], authorizations: Authorizations
    ) -> None:
        self._store = store
        self._management = management
        self._plugins = plugins
        self._authorizations = authorizations

    def operations(self) -> list[Operation]:
        """What it answers."""
        base = "/orgs/{org}/plugins/{name}/oauth"
        return [
            Operation(
                "startOAuth",
                "GET",
                base + "/start",
                "Send the browser to the provider, to connect an account",
                "org",
                self._redirect,
                {302: None, 409: None, 502: None},
                OAuthQuery,
                changes_plugin=True,
            ),
            Operation(
                "beginOAuth",
                "POST",
                base + "/start",
                "Begin to connect an account; the browser that asked is to be sent to the URL in the answer",
                "org",
                self._begin,
                {200: OAuthStarted, 409: None, 502: None},
                OAuthQuery,
                changes_plugin=True,
            ),
            *(
                Operation(
                    id,
                    "GET",
                    path,
                    summary,
                    "open",
                    self._finish,
                    {200: bytes, 400: bytes, 404: bytes, 409: bytes, 422: bytes, 502: bytes, 503: bytes},
                    any_query=True,
                    media="text/html",
                    navigation=True,
                )
                for id, path, summary in (
                    ("finishOAuth", _CALLBACK, "Where providers send the browser back to"),
                    ("finishOAuthOf", base + "/callback", "The same, for authorizations of this installation only"),
                )
            ),
        ]

    async def _start(self, request: Request) -> tuple[str, dict[str, str]]:
        """The URL to go to, and the cookie by which the browser is known when it comes back."""
        org, name, call = request.params["org"], request.params["name"], request.call
        installed = await self._store.installations.get(name, org)
        plugin = self._plugins.get(name)
        if plugin is None:
            raise RequestError("There is no plugin of this name", status=404)
        methods = {
            method.id: method
            for method in (await plugin.ready_version()).metadata.auth_methods
            if isinstance(method, OAuth2)
        }
        wanted = request.query.method if request.query.method is not None else next(iter(methods), "")
        if wanted not in methods:
            known = ", ".join(methods) or "none"
            raise InvalidError({"method": f"there is no such OAuth2 method; there are: {known[:300]}"})
        browser = _browser(call) or secrets.token_urlsafe(32)
        url = await self._authorizations.begin(
            installed,
            methods[wanted],
            redirect_uri=_redirect_uri(call),
            browser=browser,
            actor=call.principal.actor,
        )
        secure = "; Secure" if call.secure else ""
        # Lax: it has to come along when the provider sends the browser back.
        cookie = f"{_COOKIE}={browser}; Path=/api/v1; Max-Age={_LIFETIME}; HttpOnly; SameSite=Lax{secure}"
        return url, {"Set-Cookie": cookie, "Referrer-Policy": "no-referrer"}

    async def _redirect(self, request: Request) -> Answer:
        url, headers = await self._start(request)
        return Answer(302, None, {**headers, "Location": url})

    async def _begin(self, request: Request) -> Answer:
        url, headers = await self._start(request)
        return Answer(200, OAuthStarted(authorization_url=url), headers)

    async def _finish(self, request: Request) -> Answer:
        try:
            name, valid = await self._connect(request)
        except RequestError as error:
            return _page(error.status, "Not connected", error.message)
        except InvalidError as error:
            return _page(422, "Not connected", str(error))
        except StoreError as error:
            return _page(error.status, "Not connected", str(error))
        if not valid:
            return _page(200, "Connected, but not accepted", f"{name} does not accept the account's credentials.")
        return _page(200, "Connected", f"{name} is connected. You can close this window.")

    async def _connect(self, request: Request) -> tuple[str, bool]:
        """Exchange the code, and keep what comes of it: for which plugin, and whether it accepts it."""
        call = request.call
        try:
            query = parse_qs(call.query, keep_blank_values=True, max_num_fields=50, errors="strict")
        except ValueError:
            raise RequestError("The provider's answer is malformed", status=400) from None
        if (browser := _browser(call)) is None:
            raise RequestError("This authorization was begun in another browser, or too long ago", status=400)
        flow, auth = await self._authorizations.finish(
            query,
            browser=browser,
            redirect_uri=_redirect_uri(call),
            actor="oauth",
            plugin=request.params.get("name"),
            org=request.params.get("org"),
        )
        if (plugin := self._plugins.get(flow.plugin)) is None:
            raise RequestError("There is no plugin of this name", status=404)
        outcome = await self._management.put(plugin, flow.org_id, Change(auth=auth), actor="oauth")
        return plugin.name, outcome.installation.auth_validity != "invalid"


def _redirect_uri(call: Call) -> str:
    """Where a provider sends browsers back to: one place for all orgs, as providers want to know it in advance."""
    return f"{call.origin}/api/v1{_CALLBACK}"


def _browser(call: Call) -> str | None:
    """The secret that the browser was given when it set out."""
    try:
        morsel = SimpleCookie(call.headers.get("Cookie", "")[:8192]).get(_COOKIE)
    except Exception:  # http.cookies raises what it likes for what is malformed
        return None
    return morsel.value if morsel is not None and 20 <= len(morsel.value) <= 100 else None


def _page(status: int, title: str, text: str) -> Answer:
    body = _PAGE.format(title=html.escape(title), text=html.escape(text)).encode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
    return Answer(status, body, {**headers, "Referrer-Policy": "no-referrer"})
