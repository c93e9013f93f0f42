"""Stripe: signed webhooks in, and customers, charges and refunds as tools."""

import time
from collections import deque
from typing import Any

from stripe_api import StripeApi, StripeError
from stripe_signature import SignatureError, verify
from stripe_tools import StripeTools

from hayhost.sdk import (
    HayAuthValidationContext,
    HayGlobalContext,
    HayStartContext,
    HTTPError,
    McpInitContext,
    Request,
    define_hay_plugin,
)

# Stripe delivers an event again until it is answered 2xx; this many ids tell a repeated one from a new one.
REMEMBERED_EVENTS = 100


@define_hay_plugin
class Stripe:
    """Every org's worker has a copy of its own; what belongs to the org comes with the contexts."""

    name = "Stripe"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        """Say what the plugin has. No org is known yet, so there are fields here and no values."""
        ctx.register.config(
            {
                "apiKey": {
                    "type": "string",
                    "label": "Secret key",
                    "placeholder": "sk_live_…",
                    "env": "STRIPE_API_KEY",
                    "sensitive": True,
                    "required": True,
                },
                "webhookSecret": {
                    "type": "string",
                    "label": "Webhook signing secret",
                    "description": "Of the endpoint in Stripe's dashboard that points at this plugin's /webhook",
                    "placeholder": "whsec_…",
                    "env": "STRIPE_WEBHOOK_SECRET",
                    "sensitive": True,
                },
                "apiBase": {"type": "string", "label": "API address", "default": "https://api.stripe.com"},
                "toleranceSeconds": {
                    "type": "number",
                    "label": "Greatest age of a webhook, in seconds",
                    "default": 300,
                },
            }
        )
        ctx.register.auth.api_key(id="apiKey", label="Secret key", config_field="apiKey")
        ctx.register.route("POST", "/webhook", self.webhook)
        ctx.register.ui(slot="after-settings", component="components/StripeStatus.vue")
        ctx.register.page(
            id="settings",
            title="Stripe settings",
            component="components/StripeSettings.vue",
            icon="credit-card",
            slot="after-settings",
        )

    async def on_start(self, ctx: HayStartContext) -> None:
        """Start the org's tools. Without a key this raises ``ConfigError``: webhooks still work, health says why."""
        await ctx.mcp.start_local("stripe", lambda mcp: StripeTools(connect(mcp)))

    def on_validate_auth(self, ctx: HayAuthValidationContext) -> bool:
        """Ask Stripe whether it knows the key. Not async, because it waits for the network: it runs on a thread."""
        try:
            connect(ctx).account()
        except StripeError as error:
            if error.status not in (401, 403):
                raise  # Stripe could not be asked: the log will say so
            ctx.logger.info("Stripe refused the key", meta={"reason": str(error)})
            return False
        return True

    async def webhook(self, req: Request) -> dict[str, Any]:
        """Take an event that Stripe signed. The signature is over the bytes, so it is checked before they are read."""
        config = req.ctx.config
        secret = config.get("webhookSecret")
        if not secret:  # an empty secret would make every signature forgeable
            raise HTTPError(503, "No webhook signing secret is configured")
        try:
            verify(
                req.headers.get("Stripe-Signature", ""),
                req.body,
                secret,
                tolerance=config.get("toleranceSeconds"),
                now=time.time(),
            )
        except SignatureError as error:
            raise HTTPError(400, str(error)) from error
        event = req.json()
        if (
            not isinstance(event, dict)
            or not isinstance(event.get("id"), str)
            or not isinstance(event.get("type"), str)
        ):
            raise HTTPError(400, "The body is not an event")
        answer = {"received": True, "type": event["type"], "org": req.ctx.org.id}
        # In `state`, not on `self`: state survives when the plugin is reloaded.
        seen: deque[str] = req.ctx.state.setdefault("events", deque(maxlen=REMEMBERED_EVENTS))
        if event["id"] in seen:
            return {**answer, "duplicate": True}
        seen.append(event["id"])
        req.ctx.logger.info("event received", meta={"id": event["id"], "type": event["type"]})
        return answer


def connect(ctx: McpInitContext | HayAuthValidationContext) -> StripeApi:
    """A client with the key that the org connected with, or else the one in its settings or the environment."""
    auth = ctx.auth.get()
    key = auth.credentials.get("apiKey") if auth else None
    return StripeApi(key or ctx.config.get("apiKey"), ctx.config.get("apiBase"))
