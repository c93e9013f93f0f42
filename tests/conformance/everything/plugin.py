"""The server that the MCP conformance suite asks for, as a plugin: its scenarios name the tools, prompts, resources."""

import asyncio
import hashlib
import hmac
import json
import os
import struct
import zlib
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourceUpdated,
    ToolsListChanged,
)
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata
from pydantic import BaseModel

from hayhost.sdk import HayGlobalContext, HayStartContext, define_hay_plugin

Context = ServerRequestContext[Any, Any]
Result = dict[str, Any]
Handler = Callable[[Context, Any], Awaitable[Result]]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_HEADER = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
_PIXEL = _chunk(b"IHDR", _HEADER) + _chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + _chunk(b"IEND", b"")
PNG = b64encode(b"\x89PNG\r\n\x1a\n" + _PIXEL).decode()
WAV = b64encode(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\0\0\0\0").decode()
IMAGE = {"type": "image", "data": PNG, "mimeType": "image/png"}
OBJECT = {"type": "object"}
_KEY = os.urandom(32)


def text(value: str) -> Result:
    return {"type": "text", "text": value}


def said(*content: Result) -> Result:
    return {"content": list(content)}


def resource(uri: str, mime: str, value: str) -> Result:
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": value}}


def schema(properties: Result, *required: str) -> Result:
    return {**OBJECT, "properties": properties, **({"required": list(required)} if required else {})}


def ask(message: str, properties: Result, *required: str) -> Result:
    params = {"mode": "form", "message": message, "requestedSchema": schema(properties, *required)}
    return {"method": "elicitation/create", "params": params}


def sample(prompt: str, tokens: int) -> Result:
    messages = [{"role": "user", "content": text(prompt)}]
    return {"method": "sampling/createMessage", "params": {"messages": messages, "maxTokens": tokens}}


ROOTS = {"method": "roots/list", "params": {}}
NAME = ask("What is your name?", {"name": {"type": "string"}}, "name")


def needs(requests: Result, state: str | None = None) -> Result:
    result = {"resultType": "input_required", "inputRequests": requests}
    return result if state is None else {**result, "requestState": sealed(state)}


def sealed(state: str) -> str:
    return f"{state}.{hmac.new(_KEY, state.encode(), hashlib.sha256).hexdigest()}"


def opened(params: Any) -> str | None:
    """The state of an earlier round. Raises ``MCPError`` if it is not as it was."""
    given = params.request_state
    if given is None:
        return None
    state, _, _ = given.rpartition(".")
    if not hmac.compare_digest(sealed(state), given):
        raise MCPError(types.INVALID_PARAMS, "The request's state was tampered with")
    return str(state)


def responses(params: Any, *keys: str) -> list[Result] | None:
    """The answers to what was asked in the round before, if all of them are there."""
    given = {
        key: value if isinstance(value, dict) else value.model_dump(mode="json", by_alias=True)
        for key, value in (params.input_responses or {}).items()
    }
    return [given[key] for key in keys] if all(key in given for key in keys) else None


def completed(handler: Handler) -> Handler:
    """``handler`` with what the results of the revision without sessions have besides."""

    async def handle(ctx: Context, params: Any) -> Result:
        return {"resultType": "complete", "ttlMs": 0, "cacheScope": "private", **await handler(ctx, params)}

    return handle


class Everything:
    """The server's tools, prompts and resources."""

    def __init__(self) -> None:
        self.more_tools = self.more_prompts = 0
        self.bus = InMemorySubscriptionBus()
        self.server: Server[Any] = Server(
            "everything",
            version="1.0.0",
            instructions="For conformance tests.",
            on_subscriptions_listen=ListenHandler(self.bus),
        )

        def add(method: str, params: type[BaseModel], handler: Handler) -> None:
            self.server.add_request_handler(method, params, completed(handler))

        add("tools/list", types.PaginatedRequestParams, self.list_tools)
        add("tools/call", types.CallToolRequestParams, self.call_tool)
        add("prompts/list", types.PaginatedRequestParams, self.list_prompts)
        add("prompts/get", types.GetPromptRequestParams, self.get_prompt)
        add("resources/list", types.PaginatedRequestParams, self.list_resources)
        add("resources/templates/list", types.PaginatedRequestParams, self.list_templates)
        add("resources/read", types.ReadResourceRequestParams, self.read_resource)
        add("resources/subscribe", types.SubscribeRequestParams, self.nothing)
        add("resources/unsubscribe", types.UnsubscribeRequestParams, self.nothing)
        add("completion/complete", types.CompleteRequestParams, self.complete)
        add("logging/setLevel", types.SetLevelRequestParams, self.nothing)

    async def nothing(self, ctx: Context, params: Any) -> Result:
        return {}

    # ---- tools

    async def list_tools(self, ctx: Context, params: Any) -> Result:
        tools = [
            {"name": name, "description": f"{name} of the conformance suite", "inputSchema": INPUTS.get(name, OBJECT)}
            for name in TOOLS
        ]
        extra = [
            {"name": f"extra_{number}", "description": "An extra tool", "inputSchema": OBJECT}
            for number in range(self.more_tools)
        ]
        return {"tools": [*tools, *extra]}

    async def call_tool(self, ctx: Context, params: Any) -> Result:
        tool = TOOLS.get(params.name)
        if tool is None:
            raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name}")
        return await tool(self, ctx, params)

    async def simple(self, ctx: Context, params: Any) -> Result:
        return said(text("This is a simple text response for testing."))

    async def image(self, ctx: Context, params: Any) -> Result:
        return said(IMAGE)

    async def audio(self, ctx: Context, params: Any) -> Result:
        return said({"type": "audio", "data": WAV, "mimeType": "audio/wav"})

    async def embedded(self, ctx: Context, params: Any) -> Result:
        return said(resource("test://embedded-resource", "text/plain", "This is an embedded resource content."))

    async def mixed(self, ctx: Context, params: Any) -> Result:
        data = resource("test://mixed-content-resource", "application/json", json.dumps({"test": "data", "value": 123}))
        return said(text("Multiple content types test:"), IMAGE, data)

    async def error(self, ctx: Context, params: Any) -> Result:
        return {**said(text("This tool intentionally returns an error for testing")), "isError": True}

    async def logging(self, ctx: Context, params: Any) -> Result:
        for message in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            note = types.LoggingMessageNotification(
                params=types.LoggingMessageNotificationParams(level="info", data=message)
            )
            await ctx.session.send_notification(note, related_request_id=ctx.request_id)
            await asyncio.sleep(0.05)
        return said(text("Three messages were logged"))

    async def no_logging(self, ctx: Context, params: Any) -> Result:
        return said(text("Nothing is logged unless it is asked for"))

    async def progress(self, ctx: Context, params: Any) -> Result:
        for progress in (0, 50, 100):
            await ctx.session.report_progress(progress, 100)
            await asyncio.sleep(0.05)
        return said(text("Progress was reported"))

    async def _ask(self, ctx: Context, message: str, requested: Result) -> types.ElicitResult:
        return await ctx.session.elicit_form(message, requested, related_request_id=ctx.request_id)

    async def sampling(self, ctx: Context, params: Any) -> Result:
        wanted = sample(str((params.arguments or {}).get("prompt")), 100)
        reply = await ctx.session.send_request(
            types.CreateMessageRequest.model_validate(wanted),
            types.CreateMessageResult,
            metadata=_related(ctx),
        )
        return said(text(f"LLM response: {reply.content.model_dump().get('text')}"))

    async def elicitation(self, ctx: Context, params: Any) -> Result:
        fields = {
            "username": {"type": "string", "description": "User's response"},
            "email": {"type": "string", "description": "User's email address"},
        }
        message = str((params.arguments or {}).get("message"))
        reply = await self._ask(ctx, message, schema(fields, "username", "email"))
        return said(text(f"User response: action={reply.action}, content={json.dumps(reply.content)}"))

    async def defaults(self, ctx: Context, params: Any) -> Result:
        states = ["active", "inactive", "pending"]
        fields = {
            "name": {"type": "string", "default": "John Doe"},
            "age": {"type": "integer", "default": 30},
            "score": {"type": "number", "default": 95.5},
            "status": {"type": "string", "enum": states, "default": "active"},
            "verified": {"type": "boolean", "default": True},
        }
        return await self._completed(ctx, fields)

    async def enums(self, ctx: Context, params: Any) -> Result:
        plain = ["option1", "option2", "option3"]

        def titled(*titles: str) -> list[Result]:
            return [{"const": f"value{number}", "title": title} for number, title in enumerate(titles, 1)]

        fields = {
            "untitledSingle": {"type": "string", "enum": plain},
            "titledSingle": {"type": "string", "oneOf": titled("First Option", "Second Option", "Third Option")},
            "legacyEnum": {
                "type": "string",
                "enum": ["opt1", "opt2", "opt3"],
                "enumNames": ["Option One", "Option Two", "Option Three"],
            },
            "untitledMulti": {"type": "array", "items": {"type": "string", "enum": plain}},
            "titledMulti": {
                "type": "array",
                "items": {"anyOf": titled("First Choice", "Second Choice", "Third Choice")},
            },
        }
        return await self._completed(ctx, fields)

    async def _completed(self, ctx: Context, fields: Result) -> Result:
        reply = await self._ask(ctx, "Please fill this in", schema(fields))
        return said(text(f"Elicitation completed: action={reply.action}, content={json.dumps(reply.content)}"))

    async def missing_capability(self, ctx: Context, params: Any) -> Result:
        if not _able(ctx, "sampling"):
            needed: Result = {"requiredCapabilities": {"sampling": {}}}
            raise MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "This tool needs sampling", needed)
        return said(text("The client can do it"))

    async def change_tools(self, ctx: Context, params: Any) -> Result:
        self.more_tools += 1
        await self.bus.publish(ToolsListChanged())
        await ctx.session.send_tool_list_changed()
        return said(text("There is one more tool"))

    async def change_prompts(self, ctx: Context, params: Any) -> Result:
        self.more_prompts += 1
        await self.bus.publish(PromptsListChanged())
        await ctx.session.send_notification(types.PromptListChangedNotification())
        return said(text("There is one more prompt"))

    async def touch(self, ctx: Context, params: Any) -> Result:
        """Not for the suite: say that a resource is another."""
        await self.bus.publish(ResourceUpdated("test://watched-resource"))
        await ctx.session.send_resource_updated("test://watched-resource")
        return said(text("It was touched"))

    # ---- tools that ask in several rounds

    async def ask_name(self, ctx: Context, params: Any) -> Result:
        given = responses(params, "user_name")
        name = (given[0].get("content") or {}).get("name") if given else None
        return needs({"user_name": NAME}) if not isinstance(name, str) else said(text(f"Hello, {name}!"))

    async def ask_model(self, ctx: Context, params: Any) -> Result:
        given = responses(params, "capital_question")
        if given is None:
            return needs({"capital_question": sample("What is the capital of France?", 100)})
        return said(text(json.dumps(given[0])))

    async def ask_roots(self, ctx: Context, params: Any) -> Result:
        given = responses(params, "client_roots")
        return needs({"client_roots": ROOTS}) if given is None else said(text(json.dumps(given[0])))

    async def with_state(self, ctx: Context, params: Any) -> Result:
        state, given = opened(params), responses(params, "confirm")
        if state is None or given is None:
            return needs({"confirm": ask("Please confirm", {"ok": {"type": "boolean"}}, "ok")}, "confirming")
        return said(text(f"state-ok: {state}"))

    async def several(self, ctx: Context, params: Any) -> Result:
        asked = {"user_name": NAME, "greeting": sample("Generate a greeting", 50), "client_roots": ROOTS}
        state, given = opened(params), responses(params, *asked)
        return needs(asked, "several") if state is None or given is None else said(text(json.dumps(given)))

    async def rounds(self, ctx: Context, params: Any) -> Result:
        state = opened(params)
        if state == "two" and responses(params, "step2"):
            return said(text("Both steps are done"))
        if state == "one" and responses(params, "step1"):
            color = ask("Step 2: What is your favorite color?", {"color": {"type": "string"}}, "color")
            return needs({"step2": color}, "two")
        return needs({"step1": ask("Step 1: What is your name?", {"name": {"type": "string"}}, "name")}, "one")

    async def by_capability(self, ctx: Context, params: Any) -> Result:
        asked = {"user_name": (NAME, "elicitation"), "greeting": (sample("Generate a greeting", 50), "sampling")}
        return needs({key: request for key, (request, needed) in asked.items() if _able(ctx, needed)})

    # ---- prompts and resources

    async def list_prompts(self, ctx: Context, params: Any) -> Result:
        prompts: list[Result] = [
            {"name": "test_simple_prompt", "description": "A simple prompt"},
            {
                "name": "test_prompt_with_arguments",
                "description": "A prompt with arguments",
                "arguments": [{"name": "arg1", "required": True}, {"name": "arg2", "required": True}],
            },
            {
                "name": "test_prompt_with_embedded_resource",
                "description": "A prompt with a resource",
                "arguments": [{"name": "resourceUri", "required": True}],
            },
            {"name": "test_prompt_with_image", "description": "A prompt with an image"},
            {"name": "test_input_required_result_prompt", "description": "A prompt that asks"},
        ]
        extra = [{"name": f"extra_{number}", "description": "An extra prompt"} for number in range(self.more_prompts)]
        return {"prompts": [*prompts, *extra]}

    async def get_prompt(self, ctx: Context, params: Any) -> Result:
        given = params.arguments or {}
        match params.name:
            case "test_simple_prompt":
                content = [text("This is a simple prompt for testing.")]
            case "test_prompt_with_arguments":
                content = [text(f"Prompt with arguments: arg1='{given.get('arg1')}', arg2='{given.get('arg2')}'")]
            case "test_prompt_with_embedded_resource":
                embedded = resource(
                    str(given.get("resourceUri")), "text/plain", "Embedded resource content for testing."
                )
                content = [embedded, text("Please process the embedded resource above.")]
            case "test_prompt_with_image":
                content = [IMAGE, text("Please analyze the image above.")]
            case "test_input_required_result_prompt":
                asked = ask("What context should the prompt use?", {"context": {"type": "string"}}, "context")
                answers = responses(params, "user_context")
                if answers is None:
                    return needs({"user_context": asked})
                content = [text(json.dumps(answers[0]))]
            case _:
                raise MCPError(types.INVALID_PARAMS, f"Unknown prompt: {params.name}")
        return {"messages": [{"role": "user", "content": item} for item in content]}

    async def list_resources(self, ctx: Context, params: Any) -> Result:
        listed = [
            ("test://static-text", "Static text", "text/plain"),
            ("test://static-binary", "Static binary", "image/png"),
            ("test://watched-resource", "Watched resource", "text/plain"),
        ]
        return {
            "resources": [
                {"uri": uri, "name": name, "description": name, "mimeType": mime} for uri, name, mime in listed
            ]
        }

    async def list_templates(self, ctx: Context, params: Any) -> Result:
        template = {"uriTemplate": "test://template/{id}/data", "name": "Template", "description": "By id"}
        return {"resourceTemplates": [{**template, "mimeType": "application/json"}]}

    async def read_resource(self, ctx: Context, params: Any) -> Result:
        uri = str(params.uri)
        before, _, rest = uri.partition("test://template/")
        content: Result
        if uri == "test://static-text":
            content = {"mimeType": "text/plain", "text": "This is the content of the static text resource."}
        elif uri == "test://static-binary":
            content = {"mimeType": "image/png", "blob": PNG}
        elif uri == "test://watched-resource":
            content = {"mimeType": "text/plain", "text": "Watched"}
        elif not before and rest.endswith("/data"):
            id = rest.removesuffix("/data")
            data = {"id": id, "templateTest": True, "data": f"Data for ID: {id}"}
            content = {"mimeType": "application/json", "text": json.dumps(data)}
        else:
            modern = ctx.protocol_version >= "2026"
            raise MCPError(types.INVALID_PARAMS if modern else -32002, "Resource not found", {"uri": uri})
        return {"contents": [{"uri": uri, **content}]}

    async def complete(self, ctx: Context, params: Any) -> Result:
        value = params.argument.value
        found = [word for word in ("paris", "park", "party", "test") if word.startswith(value)]
        return {"completion": {"values": found, "total": len(found), "hasMore": False}}


def _related(ctx: Context) -> ServerMessageMetadata:
    return ServerMessageMetadata(related_request_id=ctx.request_id)


def _able(ctx: Context, capability: str) -> bool:
    return getattr(ctx.session.client_capabilities, capability, None) is not None


TOOLS: dict[str, Callable[[Everything, Context, Any], Awaitable[Result]]] = {
    "test_simple_text": Everything.simple,
    "test_image_content": Everything.image,
    "test_audio_content": Everything.audio,
    "test_embedded_resource": Everything.embedded,
    "test_multiple_content_types": Everything.mixed,
    "test_error_handling": Everything.error,
    "test_tool_with_logging": Everything.logging,
    "test_logging_tool": Everything.no_logging,
    "test_tool_with_progress": Everything.progress,
    "test_sampling": Everything.sampling,
    "test_elicitation": Everything.elicitation,
    "test_elicitation_sep1034_defaults": Everything.defaults,
    "test_elicitation_sep1330_enums": Everything.enums,
    "test_missing_capability": Everything.missing_capability,
    "test_streaming_elicitation": Everything.ask_name,
    "test_trigger_tool_change": Everything.change_tools,
    "test_trigger_prompt_change": Everything.change_prompts,
    "touch": Everything.touch,
    "test_input_required_result_elicitation": Everything.ask_name,
    "test_input_required_result_sampling": Everything.ask_model,
    "test_input_required_result_list_roots": Everything.ask_roots,
    "test_input_required_result_request_state": Everything.with_state,
    "test_input_required_result_tampered_state": Everything.with_state,
    "test_input_required_result_multiple_inputs": Everything.several,
    "test_input_required_result_multi_round": Everything.rounds,
    "test_input_required_result_capabilities": Everything.by_capability,
}
INPUTS = {
    "test_sampling": schema({"prompt": {"type": "string"}}, "prompt"),
    "test_elicitation": schema({"message": {"type": "string"}}, "message"),
}


@define_hay_plugin
class Plugin:
    name = "Everything"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        pass

    async def on_start(self, ctx: HayStartContext) -> None:
        await ctx.mcp.start_local("everything", lambda mcp: Everything().server)
