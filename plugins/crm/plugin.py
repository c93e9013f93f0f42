"""CRM: contacts of a CRM that an org connects with OAuth 2. Its provider is made up; the way to write it is not."""

import json
from collections.abc import AsyncIterator
from typing import Any

from crm_api import CrmApi, CrmError

from hayhost.sdk import (
    AuthReader,
    HayAuthValidationContext,
    HayGlobalContext,
    HayStartContext,
    HTTPError,
    McpInitContext,
    OrgConfig,
    Request,
    Response,
    define_hay_plugin,
)

MAX_CONTACTS = 10_000
EDITABLE = {"name", "email", "phone"}
# The provider's refusals that a client of ours can do something about. Any other is a bad gateway.
PASSED_ON = {400, 401, 404, 409, 422, 429}


@define_hay_plugin
class Crm:
    """The host runs the OAuth flow and refreshes the tokens; the plugin says where, and reads the access token."""

    name = "CRM"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        """Say what the plugin has. Fields come first: the auth method refers to them, never to their values."""
        ctx.register.config(
            {
                "clientId": {"type": "string", "label": "Client id", "env": "CRM_CLIENT_ID", "required": True},
                "clientSecret": {
                    "type": "string",
                    "label": "Client secret",
                    "env": "CRM_CLIENT_SECRET",
                    "sensitive": True,
                    "required": True,
                },
                "apiBase": {"type": "string", "label": "API address", "default": "https://api.crm.example"},
            }
        )
        ctx.register.auth.oauth2(
            id="oauth",
            label="Connect CRM",
            authorization_url="https://login.crm.example/oauth/authorize",
            token_url="https://login.crm.example/oauth/token",
            scopes=["contacts.read", "contacts.write"],
            client_id=ctx.config.field("clientId"),
            client_secret=ctx.config.field("clientSecret"),
        )
        ctx.register.route("GET", "/contacts", self.list_contacts)
        ctx.register.route("GET", "/contacts/{id}", self.get_contact)
        ctx.register.route("PUT", "/contacts/{id}", self.update_contact)
        page = ctx.register.page
        page(id="setup", title="Set up", component="components/CrmSetup.vue", slot="before-settings")
        page(id="fields", title="Field mapping", component="components/CrmFields.vue", slot="after-settings")
        page(
            id="contacts",
            title="Contacts",
            component="components/CrmContacts.vue",
            icon="users",
            slot="standalone",
            requires_setup=True,
        )

    async def on_start(self, ctx: HayStartContext) -> None:
        """Start the org's tools; whether it has connected is asked at each call."""
        await ctx.mcp.start_local("crm", CrmTools)

    def on_validate_auth(self, ctx: HayAuthValidationContext) -> bool:
        """A token is valid if the provider says whose it is."""
        try:
            connect(ctx.config, ctx.auth).me()
        except CrmError as error:
            if error.status != 401:
                raise  # the provider could not be asked: the log will say so
            return False
        return True

    # The client blocks while it waits for the provider. In handlers that are not async that is fine: each runs on a
    # thread. An async one would hold up the worker's other requests, so it leaves the waiting to threads.

    async def list_contacts(self, req: Request) -> Response:
        """Stream contacts as JSON lines, at most ``?limit=`` (100) of them, while the provider is asked for more."""
        limit = _limit(req.query.get("limit", ["100"])[-1])
        pages = _api(req).pages(limit)
        try:  # before the answer begins, so that an error still has a status of its own
            first: list[Any] = await anext(pages, [])
        except CrmError as error:
            raise _http_error(error) from error
        return Response(_json_lines(first, pages), headers={"Content-Type": "application/x-ndjson"})

    def get_contact(self, req: Request) -> dict[str, Any]:
        """One contact."""
        try:
            return _api(req).contact(req.params["id"])
        except CrmError as error:
            raise _http_error(error) from error

    def update_contact(self, req: Request) -> dict[str, Any]:
        """Change some fields of a contact and answer with all of it."""
        fields = req.json()
        if not isinstance(fields, dict) or not fields or not fields.keys() <= EDITABLE:
            raise HTTPError(400, f"Send an object with some of: {', '.join(sorted(EDITABLE))}")
        if not all(isinstance(value, str) for value in fields.values()):
            raise HTTPError(400, "Every field is a string")
        try:
            return _api(req).update(req.params["id"], fields)
        except CrmError as error:
            raise _http_error(error) from error


class CrmTools:
    """The MCP server: one tool."""

    def __init__(self, mcp: McpInitContext) -> None:
        self._mcp = mcp

    def list_tools(self) -> list[dict[str, Any]]:
        """The tool, with a JSON Schema of its arguments."""
        properties = {"query": {"type": "string", "minLength": 1}, "limit": {"type": "integer", "minimum": 1}}
        return [
            {
                "name": "search_contacts",
                "description": "Find contacts by a part of their name, e-mail address or phone number.",
                "inputSchema": {"type": "object", "properties": properties, "required": ["query"]},
            }
        ]

    def call_tool(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Search; the result has the shape of MCP's ``tools/call``."""
        query, limit = arguments.get("query"), arguments.get("limit", 10)
        if not isinstance(query, str) or not query.strip():
            raise ValueError("query must be a string that is not empty")
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError("limit must be a whole number above 0")
        found = connect(self._mcp.config, self._mcp.auth).search(query, limit)
        return {"content": [{"type": "text", "text": json.dumps(found)}]}


def connect(config: OrgConfig, auth: AuthReader) -> CrmApi:
    """A client with the org's access token. Raises ``CrmError`` with status 401 if the org has not connected."""
    state = auth.get()
    token = state.credentials.get("accessToken") if state else None
    if not isinstance(token, str) or not token:
        raise CrmError("Connect the CRM first", 401)
    return CrmApi(token, config.get("apiBase"))


def _api(req: Request) -> CrmApi:
    try:
        return connect(req.ctx.config, req.ctx.auth)
    except CrmError as error:
        raise _http_error(error) from error


def _http_error(error: CrmError) -> HTTPError:
    return HTTPError(error.status if error.status in PASSED_ON else 502, str(error))


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_CONTACTS):
        raise HTTPError(400, f"limit is a whole number from 1 to {MAX_CONTACTS}")
    return int(text)


async def _json_lines(page: list[Any], pages: AsyncIterator[list[Any]]) -> AsyncIterator[str]:
    """Each item is sent as soon as it is yielded; when the client is gone, the generator is closed."""
    while page:
        yield "".join(f"{json.dumps(contact)}\n" for contact in page)
        page = await anext(pages, [])
