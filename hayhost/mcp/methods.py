"""The protocol's requests at one endpoint: what is answered here, and what goes to which server."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.subscriptions import ListenHandler
from mcp.shared.exceptions import MCPError
from mcp_types.methods import serialize_server_result
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from hayhost.errors import RequestError, StoreError
from hayhost.logs import get_logger
from hayhost.rates import Rates
from hayhost.settings import Settings

from .access import Audit, ToolCall, ToolPolicy
from .calls import ServerError
from .clients import Caller, Session, is_modern
from .listings import RETRY, Listings, Served, Shelf
from .requests import NOT_AVAILABLE, TIMED_OUT, Requests, refusal
from .shape import KEYS
from .view import Entry, View

__all__ = ["Methods", "Parts"]

Context = ServerRequestContext[Any, Any]

_PAGE: Final = 500
"""Entries in one answer to a request for a list."""
_MOST_WATCHED: Final = 100  # resources that one session, or stream of news, wants to hear of
_LONGEST: Final = 3600.0  # seconds that a tool or a server may ask for
_META_TIMEOUT: Final = "hayhost/timeout"
# What a result of the revision without sessions has and one of the other may lack.
_COMPLETE: Final = {"resultType": "complete"}
_MODERN_FIELDS: Final = {**_COMPLETE, "ttlMs": 0, "cacheScope": "private"}


class Parts(Protocol):
    """What all endpoints of a host share."""

    settings: Settings
    listings: Listings
    requests: Requests
    policy: ToolPolicy
    audit: Audit
    rates: Rates


class Methods:
    """Answers the requests of one endpoint's clients. ``look(again)`` is what they see; with ``again``, servers that
    run are asked anew. ``name`` is that of the plugin whose endpoint it is, empty if it is of all."""

    def __init__(
        self,
        parts: Parts,
        org_id: str,
        name: str,
        actor: str,
        sessions: Mapping[str, Session],
        look: Callable[[bool], Awaitable[View]],
        listening: ListenHandler,
    ) -> None:
        self._parts = parts
        self._org_id = org_id
        self._name = name
        self._actor = actor
        self._sessions = sessions
        self._look = look
        self._listening = listening

    def add_to(self, server: Server[Any]) -> None:
        """Have ``server`` answer with these."""
        add = server.add_request_handler
        for method in KEYS:
            add(method, types.PaginatedRequestParams, self._guarded(self._list))
        add("tools/call", types.CallToolRequestParams, self._guarded(self._call_tool))
        add("prompts/get", types.GetPromptRequestParams, self._guarded(self._get_prompt))
        add("resources/read", types.ReadResourceRequestParams, self._guarded(self._read_resource))
        add("resources/subscribe", types.SubscribeRequestParams, self._guarded(self._subscribe))
        add("resources/unsubscribe", types.UnsubscribeRequestParams, self._guarded(self._unsubscribe))
        add("completion/complete", types.CompleteRequestParams, self._guarded(self._complete))
        add("logging/setLevel", types.SetLevelRequestParams, self._guarded(self._set_level))
        add("subscriptions/listen", types.SubscriptionsListenRequestParams, self._listen)
        server.add_notification_handler("notifications/initialized", types.NotificationParams, self._initialized)

    def _guarded(self, handler: Callable[[Context, View], Awaitable[dict[str, Any]]]) -> Any:
        async def handle(ctx: Context, _params: BaseModel) -> dict[str, Any]:
            try:
                result = await handler(ctx, await self._look(False))
                return {**_COMPLETE, **result} if is_modern(ctx) else result
            except ServerError as error:
                raise MCPError(error.code, str(error), error.data) from None
            except StoreError as error:
                raise MCPError(NOT_AVAILABLE, str(error)) from None
            except MCPError:
                raise
            except Exception as error:  # a bug of ours: the client learns no more than that
                get_logger().exception("an internal error", org=self._org_id, method=ctx.method, reason=repr(error))
                raise MCPError(types.INTERNAL_ERROR, "Internal server error") from None

        return handle

    async def _list(self, ctx: Context, view: View) -> dict[str, Any]:
        items = view.items[ctx.method]
        start, cursor = 0, (ctx.params or {}).get("cursor")
        if cursor is not None:
            of, _, offset = str(cursor).partition("-")
            if of != view.revision or not offset.isascii() or not offset.isdigit() or len(offset) > 9:
                raise MCPError(types.INVALID_PARAMS, "The cursor is not good any more; begin anew")
            start = int(offset)
        result: dict[str, Any] = {KEYS[ctx.method]: items[start : start + _PAGE]}
        if start + _PAGE < len(items):
            result["nextCursor"] = f"{view.revision}-{start + _PAGE}"
        return result

    async def _call_tool(self, ctx: Context, view: View) -> dict[str, Any]:
        name = str((ctx.params or {}).get("name"))
        began = asyncio.get_running_loop().time()
        entry, outcome = view.tools.get(name), "denied"
        if entry is None:  # perhaps it is new
            view = await self._look(True)
            entry = view.tools.get(name)
        try:
            if entry is None:
                raise _unknown(view, MCPError(types.INVALID_PARAMS, f"Unknown tool: {name[:200]}"))
            outcome = "error"
            result = await self._put(ctx, entry.shelf, entry.served, {**(ctx.params or {}), "name": entry.name}, entry)
            outcome = "tool error" if result.get("isError") is True else "ok"
            return result
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ServerError as error:
            outcome = {TIMED_OUT: "timeout", NOT_AVAILABLE: "unavailable"}.get(error.code, "error")
            raise
        finally:
            took = round((asyncio.get_running_loop().time() - began) * 1000, 1)
            self._record(ctx, entry, name, outcome, took)

    def _record(self, ctx: Context, entry: Entry | None, name: str, outcome: Any, ms: float) -> None:
        plugin = entry.shelf.plugin.name if entry else self._name
        server, tool = (entry.served.id, entry.name) if entry else ("", name)
        self._parts.audit.record(
            ToolCall(
                self._org_id, self._actor, plugin, server, tool, outcome, ms, _request(ctx).scope["hayhost.request"]
            )
        )

    async def _get_prompt(self, ctx: Context, view: View) -> dict[str, Any]:
        name = str((ctx.params or {}).get("name"))
        if (entry := view.prompts.get(name)) is None:
            raise _unknown(view, MCPError(types.INVALID_PARAMS, f"Unknown prompt: {name[:200]}"))
        return await self._put(ctx, entry.shelf, entry.served, {**(ctx.params or {}), "name": entry.name})

    async def _read_resource(self, ctx: Context, view: View) -> dict[str, Any]:
        shelf, served = self._owner(ctx, view, str((ctx.params or {}).get("uri")))
        return await self._put(ctx, shelf, served, dict(ctx.params or {}))

    def _owner(self, ctx: Context, view: View, uri: str) -> tuple[Shelf, Served]:
        if (owner := view.resource(uri)) is None:
            code = types.INVALID_PARAMS if is_modern(ctx) else -32002  # 2025-11-25, Resources, Error Handling
            raise _unknown(view, MCPError(code, "Resource not found", {"uri": uri[:2_000]}))
        return owner

    async def _complete(self, ctx: Context, view: View) -> dict[str, Any]:
        params = dict(ctx.params or {})
        ref = dict(params["ref"])
        if ref.get("type") == "ref/prompt":
            if (entry := view.prompts.get(str(ref.get("name")))) is None:
                raise _unknown(view, MCPError(types.INVALID_PARAMS, "Unknown prompt"))
            shelf, served = entry.shelf, entry.served
            ref["name"] = entry.name
        else:
            shelf, served = self._owner(ctx, view, str(ref.get("uri")))
        if "completions" not in served.capabilities:
            return {"completion": {"values": []}}
        return await self._put(ctx, shelf, served, {**params, "ref": ref})

    async def _set_level(self, ctx: Context, view: View) -> dict[str, Any]:
        if (session := self._session(ctx)) is not None:
            session.level = str((ctx.params or {})["level"])
        return {}

    async def _subscribe(self, ctx: Context, view: View) -> dict[str, Any]:
        uri = str((ctx.params or {}).get("uri"))
        session = self._session(ctx)
        shelf, served = self._owner(ctx, view, uri)
        if session is not None and (shelf, uri) not in session.watched:
            if len(session.watched) >= _MOST_WATCHED:
                raise MCPError(types.INVALID_REQUEST, f"A session may subscribe to {_MOST_WATCHED} resources")
            await self._put(ctx, shelf, served, {"uri": uri})
            shelf.wanted[uri] += 1
            session.watched.add((shelf, uri))
        return {}

    async def _unsubscribe(self, ctx: Context, view: View) -> dict[str, Any]:
        uri = str((ctx.params or {}).get("uri"))
        session = self._session(ctx)
        shelf, _ = self._owner(ctx, view, uri)
        if session is not None and (shelf, uri) in session.watched:
            session.watched.discard((shelf, uri))
            self._parts.listings.unwatch(shelf, uri)
        return {}

    async def _listen(
        self, ctx: Context, params: types.SubscriptionsListenRequestParams
    ) -> types.SubscriptionsListenResult:
        view = await self._look(False)
        watched: list[tuple[Shelf, str]] = []
        try:
            for uri in list(params.notifications.resource_subscriptions or ())[:_MOST_WATCHED]:
                owner = view.resource(uri)
                if owner is not None:
                    owner[0].wanted[uri] += 1
                    watched.append((owner[0], uri))
                    try:
                        await self._put(ctx, *owner, {"uri": uri}, method="resources/subscribe")
                    except (ServerError, MCPError):
                        pass  # it has no news then
            return await self._listening(ctx, params)
        finally:
            for shelf, uri in watched:
                self._parts.listings.unwatch(shelf, uri)

    async def _put(
        self,
        ctx: Context,
        shelf: Shelf,
        served: Served,
        params: dict[str, Any],
        entry: Entry | None = None,
        method: str | None = None,
    ) -> dict[str, Any]:
        if not self._name:  # at a plugin's own endpoint, the request was counted as it came
            try:
                self._parts.rates.check(shelf.plugin.name, self._org_id)
            except RequestError as error:
                raise refusal(error) from None
        session = self._session(ctx)
        caller = Caller(ctx, session.level if session else "")
        meta = (entry.item.get("_meta") or {}) if entry else {}
        asked = meta.get(_META_TIMEOUT)
        own = asked if isinstance(asked, int | float) and asked > 0 else served.timeout
        hints = (entry.item.get("annotations") or {}) if entry else {}
        result = await self._parts.requests.put(
            shelf,
            served,
            method or ctx.method,
            caller.params(params, served),
            caller,
            timeout=min(float(own or self._parts.settings.mcp_timeout), _LONGEST),
            id=_request(ctx).scope["hayhost.request"],
            idempotent=hints.get("idempotentHint") is True,
        )
        if method is not None:  # the host's own question: no client sees the answer
            return result
        try:
            serialize_server_result(ctx.method, ctx.protocol_version, {**_MODERN_FIELDS, **result})
        except ValidationError as error:
            where = {"plugin": shelf.plugin.name, "org": self._org_id, "server": served.id}
            problem = "; ".join(str(item["loc"]) for item in error.errors(include_url=False)[:3])
            get_logger().warning(f"an answer to {ctx.method} is not as MCP has it", **where, reason=problem[:500])
            raise ServerError(types.INTERNAL_ERROR, "The server's answer is not as MCP has it") from None
        return result

    def _session(self, ctx: Context) -> Session | None:
        return self._sessions.get(_request(ctx).headers.get("mcp-session-id", ""))

    async def _initialized(self, ctx: Context, _params: types.NotificationParams | None) -> None:
        if (session := self._session(ctx)) is not None:
            session.channel = ctx.session


def _request(ctx: Context) -> Request:
    assert isinstance(ctx.request, Request)  # the transport is HTTP
    return ctx.request


def _unknown(view: View, error: MCPError) -> Exception:
    """``error``, which says that there is no such thing, unless nobody can say that now."""
    return ServerError(NOT_AVAILABLE, view.problem, {"retryAfter": RETRY}) if view.problem else error
