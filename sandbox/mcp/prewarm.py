"""The official ``mcp`` package, in the memory that all workers of a plugin share.

It is large, so only plugins that use it pay, and they once: in the zygote, before it freezes what there is. What the
package builds at its first use is built there as well, or every worker would build its own.
"""

import asyncio
import contextlib
import re
import sys
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["PACKAGE", "prewarm", "uses_package"]

PACKAGE: Final = "mcp.server"
"""The module by which it is known that the package is imported: a plugin may have a file of its own called mcp.py."""

_IMPORT: Final = re.compile(rb"^\s*(?:from|import)\s+mcp\b", re.MULTILINE)
_CALLS: Final = (b"start_local_stdio", b"start_external")


def uses_package(sources: Iterable[bytes]) -> bool:
    """Whether a plugin with this Python source has imported the package, or looks as if it will need it."""
    return PACKAGE in sys.modules or any(
        any(call in source for call in _CALLS) or _IMPORT.search(source) is not None for source in sources
    )


def prewarm() -> None:
    """Import all that may be needed, and use it once, on an event loop that is gone afterwards.

    Raises ``ImportError`` if there is no such package, or another one of that name.
    """
    from . import external, official, stdio  # noqa: F401

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_use())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _use() -> None:
    """A server and a client of the package, from the handshake to a call."""
    import anyio
    from mcp.server.mcpserver import MCPServer
    from mcp.shared.memory import create_client_server_memory_streams

    from .official import OfficialServer
    from .protocol import Call
    from .remote import RemoteServer

    target = MCPServer("prewarm")

    def add(a: int, b: int) -> int:
        return a + b

    target.add_tool(add)
    call = Call("prewarm", "tools/call")
    params: dict[str, Any] = {"name": "add", "arguments": {"a": 1, "b": 2}}
    local = OfficialServer("prewarm", target, _nothing, _nothing, _nothing)
    await local.start()
    await local.list("tools/list")
    await local.request(call, "tools/call", params)
    await local.stop()

    async with create_client_server_memory_streams() as (ours, theirs), anyio.create_task_group() as group:
        low = target._lowlevel_server
        group.start_soon(low.run, *theirs, low.create_initialization_options())

        class Client(RemoteServer):
            def connect(self) -> Any:
                return contextlib.nullcontext(ours)

        client = Client("prewarm", None, _nothing, _nothing, _nothing)
        await client.start()
        await client.list("tools/list")
        await client.request(call, "tools/call", params)
        await client.stop()
        group.cancel_scope.cancel()


def _nothing(*_: object) -> None:
    pass
