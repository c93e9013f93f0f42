"""Run with ``pytest``. The only mock is of the CRM's API: a real HTTP server on loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from sandbox.testing import PluginHarness

FOLDER = Path(__file__).parent
TOKEN = "token-of-acme"
AUTH = {"methodId": "oauth", "credentials": {"accessToken": TOKEN}}


class CrmMock(ThreadingHTTPServer):
    """The CRM, with 120 contacts; ``broken_after`` is the cursor at which it starts to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.contacts = {f"c{n}": {"id": f"c{n}", "name": f"Name {n}", "email": f"{n}@x.example"} for n in range(120)}
        self.requests: list[str] = []
        self.broken_after: str | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if path == "/me":
            return 200, {"id": "user"}
        if path == "/contacts":
            start, limit = int(query.get("after", 0)), int(query["limit"])
            if query.get("after") == self.broken_after is not None:
                return 503, {"message": "Down for maintenance"}
            rows = list(self.contacts.values())[start : start + limit]
            return 200, {"results": rows, "next": str(start + limit) if start + limit < len(self.contacts) else None}
        if path == "/contacts/search":
            found = [contact for contact in self.contacts.values() if query["q"] in contact["name"]]
            return 200, {"results": found[: int(query["limit"])]}
        contact = self.contacts.get(unquote(path.removeprefix("/contacts/")))
        if contact is None:
            return 404, {"message": "No such contact"}
        if method == "PATCH":
            if "@" not in body.get("email", "@"):
                return 422, {"message": "email is not an address"}
            contact.update(body)
        return 200, contact


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, CrmMock)
        parts = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers["authorization"] == f"Bearer {TOKEN}":
            status, answer = self.server.answer(self.command, parts.path, dict(parse_qsl(parts.query)), body)
        else:
            status, answer = 401, {"message": "The token has expired"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_PATCH = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def crm() -> Iterator[CrmMock]:
    with CrmMock() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def plugin(crm: CrmMock) -> Iterator[PluginHarness]:
    with PluginHarness(FOLDER, config={"apiBase": crm.url}, auth=AUTH, org_id="acme") as harness:
        yield harness


# Contacts


def test_contacts_are_streamed_page_by_page(plugin: PluginHarness, crm: CrmMock) -> None:
    response = plugin.request("GET", "/contacts?limit=110")
    assert response.status == 200
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert [json.loads(line)["id"] for line in response.text.splitlines()] == [f"c{n}" for n in range(110)]
    assert [chunk.count(b"\n") for chunk in response.chunks] == [50, 50, 10]
    assert crm.requests[-1] == "GET /contacts?limit=10&after=100"


def test_contacts_end_where_the_crm_s_end(plugin: PluginHarness, crm: CrmMock) -> None:
    assert len(plugin.request("GET", "/contacts?limit=1000").text.splitlines()) == 120
    assert len(plugin.request("GET", "/contacts").text.splitlines()) == 100
    crm.contacts.clear()
    response = plugin.request("GET", "/contacts")
    assert (response.status, response.body) == (200, b"")


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5", "", "²", "10001", "9" * 5000])
def test_limit_is_checked(plugin: PluginHarness, crm: CrmMock, limit: str) -> None:
    assert plugin.request("GET", f"/contacts?limit={limit}").status == 400
    assert crm.requests == []


def test_failure_at_the_first_page_has_a_status(crm: CrmMock) -> None:
    auth = {"methodId": "oauth", "credentials": {"accessToken": "expired"}}
    with PluginHarness(FOLDER, config={"apiBase": crm.url}, auth=auth) as plugin:
        response = plugin.request("GET", "/contacts")
        assert (response.status, response.json()) == (401, {"error": "The token has expired"})
    with PluginHarness(FOLDER, config={"apiBase": "http://127.0.0.1:1"}, auth=AUTH) as plugin:
        assert plugin.request("GET", "/contacts").status == 502


def test_failure_at_a_later_page_breaks_the_stream_off(plugin: PluginHarness, crm: CrmMock) -> None:
    crm.broken_after = "50"
    with pytest.raises(plugin.module.CrmError, match="Down for maintenance"):
        plugin.request("GET", "/contacts?limit=110")


def test_one_contact(plugin: PluginHarness) -> None:
    assert plugin.request("GET", "/contacts/c7").json()["name"] == "Name 7"
    missing = plugin.request("GET", "/contacts/nobody")
    assert (missing.status, missing.json()) == (404, {"error": "No such contact"})


@pytest.mark.parametrize("id", ["..", ".", "..%2Fme", "%2e%2e", "search%3Fq=x"])
def test_ids_cannot_lead_elsewhere(plugin: PluginHarness, id: str) -> None:
    assert plugin.request("GET", f"/contacts/{id}").status == 404


def test_update(plugin: PluginHarness, crm: CrmMock) -> None:
    response = plugin.request("PUT", "/contacts/c1", json={"email": "ada@x.example"})
    assert response.json() == {"id": "c1", "name": "Name 1", "email": "ada@x.example"}
    assert crm.contacts["c1"]["email"] == "ada@x.example"
    refused = plugin.request("PUT", "/contacts/c1", json={"email": "ada"})
    assert (refused.status, refused.json()) == (422, {"error": "email is not an address"})


@pytest.mark.parametrize("fields", [{}, [], None, {"id": "c2"}, {"name": 1}, {"name": "x", "role": "admin"}])
def test_update_is_checked(plugin: PluginHarness, crm: CrmMock, fields: Any) -> None:
    assert plugin.request("PUT", "/contacts/c1", json=fields).status == 400
    assert crm.requests == []


# Auth, config, pages


@pytest.mark.parametrize("auth", [None, {"methodId": "oauth", "credentials": {}}])
def test_not_connected(crm: CrmMock, auth: dict[str, Any] | None) -> None:
    with PluginHarness(FOLDER, config={"apiBase": crm.url}, auth=auth) as plugin:
        for method, path in (("GET", "/contacts"), ("GET", "/contacts/c1"), ("PUT", "/contacts/c1")):
            response = plugin.request(method, path, json={"name": "x"})
            assert (response.status, response.json()) == (401, {"error": "Connect the CRM first"})
        with pytest.raises(plugin.module.CrmError, match="Connect"):
            plugin.call_tool("search_contacts", {"query": "Name"})
    assert crm.requests == []


def test_credentials_are_checked_with_the_crm(plugin: PluginHarness) -> None:
    assert plugin.validate_auth(AUTH) is True
    for credentials in ({"accessToken": "expired"}, {"accessToken": "a\nb"}, {}):
        assert plugin.validate_auth({"methodId": "oauth", "credentials": credentials}) is False
    with pytest.raises(plugin.module.CrmError, match="could not be asked"):
        plugin.validate_auth(AUTH, {"apiBase": "http://127.0.0.1:1"})


def test_metadata(plugin: PluginHarness) -> None:
    metadata = plugin.metadata()
    assert metadata["authMethods"] == [
        {
            "type": "oauth2",
            "id": "oauth",
            "label": "Connect CRM",
            "authorizationUrl": "https://login.crm.example/oauth/authorize",
            "tokenUrl": "https://login.crm.example/oauth/token",
            "scopes": ["contacts.read", "contacts.write"],
            "clientId": "clientId",
            "clientSecret": "clientSecret",
        }
    ]
    assert {page["slot"] for page in metadata["pages"]} == {"standalone", "before-settings", "after-settings"}
    assert all((FOLDER / page["component"]).is_file() for page in metadata["pages"])
    assert len(metadata["routes"]) == 3


# Tools


def test_search(plugin: PluginHarness) -> None:
    assert [tool["name"] for tool in plugin.list_tools()] == ["search_contacts"]
    result = plugin.call_tool("search_contacts", {"query": "Name 11", "limit": 3})
    assert [contact["id"] for contact in json.loads(result["content"][0]["text"])] == ["c11", "c110", "c111"]


@pytest.mark.parametrize("arguments", [{}, {"query": ""}, {"query": 1}, {"query": "x", "limit": 0}])
def test_search_arguments_are_checked(plugin: PluginHarness, crm: CrmMock, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        plugin.call_tool("search_contacts", arguments)
    assert crm.requests == []
