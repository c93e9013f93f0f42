"""The clients of an endpoint: their sessions, and what a server may say to them while it answers."""

from typing import Any, Final

import mcp_types as types
from mcp.server.connection import allowed_log_levels
from mcp.server.context import ServerRequestContext
from mcp.server.session import ServerSession
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.subscriptions import PromptsListChanged, ResourceUpdated, ServerEvent, ToolsListChanged
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, ConfigDict, ValidationError

from .calls import ServerError
from .listings import MODERN, Served, Shelf

__all__ = ["Caller", "Session", "is_modern"]

_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
_RESERVED: Final = "io.modelcontextprotocol/"
_NEEDS: Final = {"sampling/createMessage": "sampling", "elicitation/create": "elicitation", "roots/list": "roots"}


def is_modern(ctx: ServerRequestContext[Any, Any]) -> bool:
    """Whether a request is of a revision without sessions."""
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS


class Session:
    """What the host keeps of a session of the revision with sessions, beside what the official package does."""

    def __init__(self, now: float) -> None:
        self.channel: ServerSession | None = None
        """Reaches the client apart from any request; ``None`` until it is initialized."""
        self.level = ""
        """The least level of log messages that it wants; empty for all."""
        self.watched: set[tuple[Shelf, str]] = set()
        self.active = 0
        self.used = now

    async def tell(self, event: ServerEvent) -> None:
        """Tell it that something is another."""
        if self.channel is None:
            return
        if isinstance(event, ResourceUpdated):
            await self.channel.send_resource_updated(event.uri)
        elif isinstance(event, ToolsListChanged):
            await self.channel.send_tool_list_changed()
        elif isinstance(event, PromptsListChanged):
            await self.channel.send_prompt_list_changed()
        else:
            await self.channel.send_resource_list_changed()


class _Question(BaseModel):
    """A request to a client, passed on as it is."""

    method: str
    params: dict[str, Any]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="allow")


class Caller:
    """Who made one request; ``level`` is the least level of log messages that its session wants."""

    def __init__(self, ctx: ServerRequestContext[Any, Any], level: str) -> None:
        self._ctx = ctx
        meta = (ctx.params or {}).get("_meta")
        self._meta = meta if isinstance(meta, dict) else {}
        self.wants_progress = self._meta.get("progressToken") is not None
        levels = allowed_log_levels(ctx.protocol_version, self._meta)
        self._levels = levels & set(_LEVELS[_LEVELS.index(level) :]) if level in _LEVELS else levels

    def params(self, params: dict[str, Any], served: Served) -> dict[str, Any]:
        """``params`` as ``served`` takes them: with what says who asks, if it is of the revision that has that."""
        meta = {key: value for key, value in self._meta.items() if key != "progressToken"}
        if not (is_modern(self._ctx) and served.modern):
            meta = {key: value for key, value in meta.items() if not key.startswith(_RESERVED)}
            if not served.handshake:
                meta[f"{_RESERVED}protocolVersion"] = MODERN
                meta[f"{_RESERVED}clientCapabilities"] = {}
        params = {key: value for key, value in params.items() if key != "_meta"}
        return {**params, "_meta": meta} if meta else params

    async def progress(self, params: dict[str, Any]) -> None:
        """Pass a progress notification on, under the client's own token."""
        progress, total, message = params.get("progress"), params.get("total"), params.get("message")
        if isinstance(progress, int | float):
            await self._ctx.session.report_progress(
                progress,
                total if isinstance(total, int | float) else None,
                message if isinstance(message, str) else None,
            )

    async def log(self, params: dict[str, Any]) -> None:
        """Pass a log message on, if it is of a level that the client wants."""
        if params.get("level") in self._levels:
            try:
                notification = types.LoggingMessageNotification(
                    params=types.LoggingMessageNotificationParams.model_validate(params)
                )
            except ValidationError:
                return
            await self._ctx.session.send_notification(notification, related_request_id=self._ctx.request_id)

    async def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The client's answer to a request of the server's. Raises ``ServerError``."""
        able = self._ctx.session.client_capabilities
        if method != "ping" and (method not in _NEEDS or getattr(able, _NEEDS[method], None) is None):
            raise ServerError(types.METHOD_NOT_FOUND, f"The client does not answer {method[:100]}")
        try:
            reply = await self._ctx.session.send_request(
                _Question(method=method, params=params),  # type: ignore[arg-type]  # what it is, its server answers for
                _Reply,
                metadata=ServerMessageMetadata(related_request_id=self._ctx.request_id),
            )
        except MCPError as error:
            raise ServerError(error.code, error.message, error.data) from None
        except ValidationError:
            raise ServerError(types.INTERNAL_ERROR, "The client's answer is malformed") from None
        return reply.model_dump(mode="json")
