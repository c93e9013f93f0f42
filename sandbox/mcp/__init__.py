"""The MCP servers of one worker: objects of the plugin's, servers of the official package, programs, remote servers.

Nothing here imports the official ``mcp`` package before a server needs it.
"""

from .protocol import MAX_MESSAGE, McpError, encode
from .runtime import McpRuntime, NoSuchToolError, ToolFailedError

__all__ = ["MAX_MESSAGE", "McpError", "McpRuntime", "NoSuchToolError", "ToolFailedError", "encode"]
