"""MCP spoken by hand: requests of both revisions, as any client may send them."""

import contextlib
import http.client
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from .conftest import Answer, HostProcess

SESSIONS = "2025-11-25"
STATELESS = "2026-07-28"
_ACCEPT = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
_ids = itertools.count(1)


def messages(answer: Answer) -> list[dict[str, Any]]:
    """What an answer says, as JSON or as a stream of events."""
    if answer.headers.get_content_type() == "application/json":
        return [answer.json()]
    lines = answer.body.decode().splitlines()
    return [json.loads(line[5:]) for line in lines if line.startswith("data:") and line[5:].strip()]


def stateless_request(method: str, params: dict[str, Any] | None = None) -> tuple[str, dict[str, str]]:
    """Body and headers of a request of the revision without sessions."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": STATELESS,
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = params or {}
    body = {"jsonrpc": "2.0", "id": next(_ids), "method": method}
    body["params"] = {**params, "_meta": {**meta, **params.get("_meta", {})}}
    headers = {**_ACCEPT, "MCP-Protocol-Version": STATELESS, "Mcp-Method": method}
    if isinstance(name := params.get("name") or params.get("uri"), str):
        headers["Mcp-Name"] = name
    return json.dumps(body), headers


def ask(host: HostProcess, path: str, method: str, params: dict[str, Any] | None = None, **headers: str) -> Any:
    """The last message of the answer to a request of the revision without sessions."""
    body, own = stateless_request(method, params)
    return messages(host.post(path, body, headers={**own, **headers}))[-1]


def call(host: HostProcess, path: str, tool: str, **arguments: Any) -> Any:
    """The answer to a call of a tool."""
    return ask(host, path, "tools/call", {"name": tool, "arguments": arguments})


def tools(host: HostProcess, path: str) -> list[str]:
    """The names of all tools."""
    names: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        result = ask(host, path, "tools/list", cursor)["result"]
        names += [tool["name"] for tool in result["tools"]]
        if "nextCursor" not in result:
            return names
        cursor = {"cursor": result["nextCursor"]}


class Session:
    """A session of the revision that has them."""

    def __init__(self, host: HostProcess, path: str, **headers: str) -> None:
        self.host = host
        self.path = path
        self.headers = {**_ACCEPT, **headers}
        client = {"protocolVersion": SESSIONS, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        self.opening = self.post("initialize", client)
        self.id = self.opening.headers.get("Mcp-Session-Id", "")
        if self.opening.status == 200:
            self.headers |= {"Mcp-Session-Id": self.id, "MCP-Protocol-Version": SESSIONS}
            assert self.notify("notifications/initialized").status == 202

    @property
    def server(self) -> dict[str, Any]:
        """What the server says of itself."""
        result: dict[str, Any] = messages(self.opening)[-1]["result"]
        return result

    def post(self, method: str, params: dict[str, Any] | None = None) -> Answer:
        body = {"jsonrpc": "2.0", "id": next(_ids), "method": method, "params": params or {}}
        return self.host.post(self.path, json.dumps(body), headers=self.headers)

    def notify(self, method: str, params: dict[str, Any] | None = None) -> Answer:
        body = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        return self.host.post(self.path, json.dumps(body), headers=self.headers)

    def ask(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """The last message of the answer."""
        return messages(self.post(method, params))[-1]

    def call(self, tool: str, **arguments: Any) -> Any:
        return self.ask("tools/call", {"name": tool, "arguments": arguments})

    def end(self) -> Answer:
        return self.host.request("DELETE", self.path, headers=self.headers)


class Stream:
    """What a server sends on one answer, as it comes."""

    def __init__(self, host: HostProcess, method: str, path: str, body: str | None, headers: dict[str, str]) -> None:
        self.received: list[dict[str, Any]] = []
        self._connection = host.connect()
        self._connection.request(method, path, body, headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._lines():
                if line.startswith(b"data:") and line[5:].strip():
                    self.received.append(json.loads(line[5:]))
        except (OSError, ValueError, http.client.HTTPException, AttributeError):
            pass  # closed

    def _lines(self) -> Iterator[bytes]:
        while line := self._response.readline():
            yield line

    def methods(self) -> list[str]:
        """The methods of the notifications that have come."""
        return [message["method"] for message in self.received if "method" in message]

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        """Leave."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._response.close()
        self._connection.close()


def news(session: Session) -> Stream:
    """The stream of news of a session."""
    return Stream(session.host, "GET", session.path, None, session.headers)


def listen(host: HostProcess, path: str, **wanted: Any) -> Stream:
    """A stream of news of the revision without sessions."""
    body, headers = stateless_request("subscriptions/listen", {"notifications": wanted})
    return Stream(host, "POST", path, body, headers)
