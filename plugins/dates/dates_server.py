"""An MCP server (revision 2025-11-25) in nothing but the standard library: one JSON-RPC message per line."""

import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

HOLIDAYS = {dt.date.fromisoformat(day.strip()) for day in os.environ.get("HOLIDAYS", "").split(",") if day.strip()}
DAY = {"type": "string", "format": "date"}
READ_ONLY = {"readOnlyHint": True, "idempotentHint": True}
TOOLS = [
    {
        "name": "weekday",
        "description": "The day of the week of a date",
        "inputSchema": {"type": "object", "properties": {"date": DAY}, "required": ["date"]},
        "annotations": READ_ONLY,
    },
    {
        "name": "working_days",
        "description": "How many working days there are from one date up to, and without, another",
        "inputSchema": {"type": "object", "properties": {"start": DAY, "end": DAY}, "required": ["start", "end"]},
        "annotations": READ_ONLY,
    },
]
MOST_DAYS = 100_000


def weekday(date: str) -> str:
    """The name of the day."""
    return f"{dt.date.fromisoformat(date):%A}"


def working_days(start: str, end: str) -> str:
    """Neither Saturdays nor Sundays nor holidays."""
    first, last = dt.date.fromisoformat(start), dt.date.fromisoformat(end)
    if (last - first).days > MOST_DAYS:
        raise ValueError(f"more than {MOST_DAYS} days")
    days = (first + dt.timedelta(number) for number in range((last - first).days))
    return str(sum(day.weekday() < 5 and day not in HOLIDAYS for day in days))


def answer(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a request. Raises ``LookupError`` if there is no such method or tool."""
    if method == "initialize":
        server = {"name": "dates", "version": "0.1.0"}
        return {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": server}
    if method == "ping":
        return {}
    if method == "tools/list":
        return {"tools": TOOLS}
    if method == "tools/call":
        tools: dict[str, Callable[..., str]] = {"weekday": weekday, "working_days": working_days}
        try:
            text, wrong = tools[params["name"]](**params.get("arguments", {})), False
        except (TypeError, ValueError) as error:  # for the model, which may do better the next time
            text, wrong = str(error), True
        return {"content": [{"type": "text", "text": text}], "isError": wrong}
    raise LookupError(method)


def main() -> None:
    """Answer until there is no more to read. Standard error is the plugin's log."""
    print(f"{len(HOLIDAYS)} holidays", file=sys.stderr)
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:  # a notification: nothing to say
            continue
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        try:
            reply["result"] = answer(message["method"], message.get("params", {}))
        except LookupError as error:
            code = -32601 if str(error) == message["method"] else -32602
            reply["error"] = {"code": code, "message": f"there is no {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
