"""Echo: a plugin with two routes."""

from typing import Any

from hayhost.sdk import HayGlobalContext, Request, define_hay_plugin


@define_hay_plugin
class Echo:
    """Sends back what it gets."""

    name = "Echo"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        """Register the routes. This runs once per version of the plugin, before any org is known."""
        ctx.register.route("POST", "/echo", self.echo)
        ctx.register.route("GET", "/hello/{name}", self.hello)

    async def echo(self, req: Request) -> dict[str, Any]:
        """Answer with the JSON that was sent; a body that is not JSON is answered 400 without us."""
        return {"org": req.ctx.org.id, "query": req.query, "body": req.json()}

    async def hello(self, req: Request) -> dict[str, str]:
        """Greet whoever the path names."""
        return {"message": f"Hello, {req.params['name']}!"}
