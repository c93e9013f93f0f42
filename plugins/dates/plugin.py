"""Dates: tools for an AI agent, from a program that speaks MCP on its standard input and output."""

from hayhost.sdk import HayGlobalContext, HayStartContext, define_hay_plugin


@define_hay_plugin
class Dates:
    """Starts the program, once for each org. Its tools are the plugin's."""

    name = "Dates"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        """Register what an org can set."""
        ctx.register.config(
            {"holidays": {"type": "string", "label": "Holidays", "description": "Such as 2026-12-25, 2027-01-01"}}
        )

    async def on_start(self, ctx: HayStartContext) -> None:
        """Start the program. It knows of the org only what stands here; with the worker, it ends."""
        await ctx.mcp.start_local_stdio(
            id="dates",
            command="python3",
            args=["-I", "dates_server.py"],
            env=ctx.config.to_env({"holidays": "HOLIDAYS"}),
        )
