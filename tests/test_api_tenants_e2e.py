"""A token of one org is good for nothing of another, on every route that the document or the worker's URLs have."""

import http.client
import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hayhost.routes import HOST_ROUTES

from .conftest import LIMIT, wait_until
from .managing import API, Manager, managed

# Names that are found nowhere else.
OURS, THEIRS = "alpha-4711", "beta-0815"
PLUGIN = "recorder"
SECRET = "their-5ecret"


class Org(NamedTuple):
    """An org, and who manages it."""

    id: str
    manager: Manager
    token_id: str


class Case(NamedTuple):
    """One operation of the document, or one URL of a worker, as a request for an org."""

    name: str
    method: str
    path: str
    body: Any
    admin: bool
    open: bool = False
    """Whether it needs no token at all."""


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with managed(tmp_path_factory.mktemp("tenants"), "--spares", 0) as manager:
        manager.token = manager.new_token("admin")
        yield manager


def _org(admin: Manager, org: str) -> Org:
    auth = {"methodId": "key", "credentials": {"apiKey": SECRET}}
    if admin.call("GET", f"/orgs/{org}").status == 404:
        admin.put(org, config={"value": f"value of {org}"}, auth=auth)
        admin.host.get(f"/plugins/{PLUGIN}/{org}/value")
    secret = admin.new_token(f"{org}'s", org)
    return Org(org, Manager(admin.host, secret), secret.split("_")[1])


@pytest.fixture(scope="module")
def ours(admin: Manager) -> Org:
    return _org(admin, OURS)


@pytest.fixture(scope="module")
def theirs(admin: Manager) -> Org:
    return _org(admin, THEIRS)


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def _cases(document: dict[str, Any], org: Org) -> Iterator[Case]:
    """Every operation of the document for ``org``, wherever an org's id or token can be named."""
    for path, methods in document["paths"].items():
        concrete = path.format(org=org.id, name=PLUGIN, token=org.token_id).removeprefix(API)
        for method, operation in methods.items():
            admin = {"bearer": ["admin"]} in operation["security"]
            body: dict[str, Any] | None = None
            if (described := operation.get("requestBody")) is not None:
                schema = _resolve(document, described["content"]["application/json"]["schema"])
                filled = {"id": org.id, "org": org.id, "name": "a name", "enabled": True, "config": {}}
                body = {name: filled[name] for name in schema["properties"] if name in filled}
            query = [one["name"] for one in operation["parameters"] if one["in"] == "query"]
            suffix = f"?org={org.id}" if "org" in query else ""
            yield Case(
                operation["operationId"], method.upper(), concrete + suffix, body, admin, not operation["security"]
            )


def _of_worker(org: Org) -> Iterator[Case]:
    auth = {"methodId": "key", "credentials": {"apiKey": "x"}}
    body = {"authState": auth, "config": {"value": "stolen"}, "toolName": "x"}
    for path, method in {**HOST_ROUTES, "/mcp": "POST", "/value": "GET", "/echo": "POST"}.items():
        yield Case(path, method, f"/plugins/{PLUGIN}/{org.id}{path}", body if method == "POST" else None, False)


def _names_an_org(case: Case, org: Org) -> bool:
    return org.id in case.path or org.token_id in case.path or org.id in json.dumps(case.body)


def _state(admin: Manager, org: Org) -> Any:
    """All that there is of an org, but for what time changes."""
    tokens = admin.get(f"/tokens?org={org.id}")["items"]
    return (
        admin.get(f"/orgs/{org.id}"),
        admin.get(f"/orgs/{org.id}/plugins/{PLUGIN}"),
        [{**token, "lastUsed": None} for token in tokens],
        [(worker["pid"], worker["state"]) for worker in admin.get(f"/workers?org={org.id}")["items"]],
        admin.hooks(org.id),
        admin.get(f"/audit?org={org.id}&limit=1000")["items"],
    )


def _read_some(manager: Manager, case: Case) -> tuple[int, bytes]:
    """Status and body, of a stream its first line."""
    connection = manager.host.connect()
    try:
        whole = (
            case.path if case.path.startswith(f"/plugins/{PLUGIN}/") and case.path.count("/") > 3 else API + case.path
        )
        accept = "application/json, text/event-stream"
        headers = {"Authorization": f"Bearer {manager.token}", "Content-Type": "application/json", "Accept": accept}
        connection.request(case.method, whole, None if case.body is None else json.dumps(case.body), headers)
        response = connection.getresponse()
        stream = response.headers.get_content_type() == "text/event-stream"
        return response.status, response.readline() if stream else response.read()
    finally:
        connection.close()


def test_every_operation_refuses_a_token_of_another_org(admin: Manager, ours: Org, theirs: Org) -> None:
    before = _state(admin, theirs)
    cases = [*_cases(admin.get("/openapi.json"), theirs), *_of_worker(theirs)]
    assert len(cases) > 30
    shared = set()
    for case in cases:
        status, body = _read_some(ours.manager, case)
        if case.name == "finishOAuth":  # what is good there is a state and a cookie
            assert status == 400, (case, status, body)
        elif case.admin or _names_an_org(case, theirs):
            assert status in (403, 404), (case, status, body)
            assert json.loads(body)["error"]
        else:
            shared.add(case.name)
            assert status == 200, (case, body)
        assert SECRET.encode() not in body
        if not case.open:
            assert THEIRS.encode() not in body, case
    # What names no org has been looked at: it tells an org of itself.
    assert shared == {"openapi", "listPlugins", "getPlugin", "events", "getHost", "listProblems"}
    assert _state(admin, theirs) == before


def test_the_same_requests_are_good_with_a_token_of_their_own(admin: Manager, ours: Org) -> None:
    """Or the test before would say nothing."""
    cases = [*_cases(admin.get("/openapi.json"), ours), *_of_worker(ours)]
    gone = {"deleteInstallation", "disable", "/disable"}  # what they remove is wanted by the others
    for case in sorted(cases, key=lambda case: case.name in gone):
        if "value" in (case.body or {}).get("config", {}):
            admin.put(OURS, config={"value": "again"}, enabled=True)
        status, body = _read_some(ours.manager, case)
        if case.admin:
            assert status == 403, (case, body)
        elif "OAuth" in case.name:  # the plugin has no such method, and nobody was sent anywhere
            assert status in (400, 422), (case, body)
        elif case.path.endswith(("/mcp", "/call-tool")):  # there is none, whoever asks
            assert status in (400, 404), (case, body)
        else:
            assert status in (200, 201, 204) or case.name in gone, (case, status, body)


def test_lists_have_nothing_of_another_org(admin: Manager, ours: Org, theirs: Org) -> None:
    admin.put(OURS, config={"value": "listed"}, enabled=True)
    for org in (OURS, THEIRS):
        assert admin.host.get(f"/plugins/{PLUGIN}/{org}/value").status == 200
    for path in (
        "/workers",
        "/logs?limit=1000",
        "/audit?limit=1000",
        "/plugins",
        f"/plugins/{PLUGIN}",
        f"/orgs/{OURS}/plugins",
    ):
        answer = ours.manager.ok("GET", path)
        assert THEIRS not in answer.body.decode(), path
    assert {worker["org"] for worker in ours.manager.get("/workers")["items"]} == {OURS}
    assert {entry["org"] for entry in ours.manager.get("/audit?limit=1000")["items"]} == {OURS}


@pytest.mark.parametrize(
    "form",
    [
        "%62eta-0815",
        "beta%2D0815",
        f"{OURS}/../{THEIRS}",
        f"{OURS}%2f..%2f{THEIRS}",
        f"{OURS}/..%2f{THEIRS}",
        f"./{THEIRS}",
        f"/{THEIRS}",
        f"{THEIRS};x",
        f"{THEIRS}%00",
        f"{THEIRS}%20",
        f"{THEIRS}.",
        f"%2e/{THEIRS}",
        f"{OURS}%5c..%5c{THEIRS}",
        f"{OURS}%252f..%252f{THEIRS}",
        "\u0432eta-0815",
        "beta-\uff10815",
    ],
)
def test_no_form_of_an_orgs_name_reaches_another(admin: Manager, ours: Org, theirs: Org, form: str) -> None:
    from urllib.parse import quote

    form = form if form.isascii() else quote(form)
    before = _state(admin, theirs)
    for path in (
        f"{API}/orgs/{form}",
        f"{API}/orgs/{form}/plugins/{PLUGIN}",
        f"/plugins/{PLUGIN}/{form}/config-update",
    ):
        for method in ("GET", "PUT", "POST", "DELETE"):
            headers = {"Authorization": f"Bearer {ours.manager.token}"}
            answer = ours.manager.host.request(method, path, headers=headers, json_body={"config": {"value": "x"}})
            assert answer.status in (403, 404, 405), (method, path, answer)
    assert _state(admin, theirs) == before


def _malformed(good: str) -> dict[str, list[str]]:
    identifier = good.split("_")[1]
    return {
        "empty": [""],
        "no-token": ["Bearer"],
        "only-spaces": ["Bearer   "],
        "basic": [f"Basic {good}"],
        "no-scheme": [good],
        "two-words": [f"Bearer {good} {good}"],
        "list": [f"Bearer {good}, Bearer {good}"],
        "twice": [f"Bearer {good}", f"Bearer {good}"],
        "good-then-bad": [f"Bearer {good}", "Bearer x"],
        "bad-then-good": ["Bearer x", f"Bearer {good}"],
        "longer": [f"Bearer {good}x"],
        "shorter": [f"Bearer {good[:-1]}"],
        "other-case": [f"Bearer {good.swapcase()}"],
        "quoted": [f'Bearer "{good}"'],
        "tab": [f"Bearer\t{good}"],
        "of-zeros": [f"Bearer hay_{identifier}_{'A' * 43}"],
        "without-secret": [f"Bearer hay_{identifier}_"],
        "only-id": [f"Bearer {identifier}"],
        "sql": ["Bearer hay_' OR 1=1 --_x"],
        "latin-1": ["Bearer hay_\xe9\xff"],
        "long": [f"Bearer {'x' * 10_000}"],
        "param": [f"Bearer token={good}"],
    }


@pytest.mark.parametrize("kind", _malformed("hay_0_x"))
@pytest.mark.parametrize("path", [f"{API}/orgs/{OURS}", f"/plugins/{PLUGIN}/{OURS}/mcp/list-tools"])
def test_a_malformed_authorization_is_a_401(admin: Manager, ours: Org, kind: str, path: str) -> None:
    assert ours.manager.token is not None
    connection = http.client.HTTPConnection("127.0.0.1", admin.host.port, timeout=LIMIT)
    connection.putrequest("GET", path)
    for value in _malformed(ours.manager.token)[kind]:
        connection.putheader("Authorization", value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 401, body
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert json.loads(body)["error"]
    assert ours.manager.token.encode() not in body


def test_a_token_is_good_in_any_case_of_its_scheme_and_in_no_url(ours: Org) -> None:
    token = ours.manager.token
    assert Manager(ours.manager.host).call("GET", f"/orgs/{OURS}", Authorization=f"bEaReR {token}").status == 200
    for query in (f"?access_token={token}", f"?token={token}", f"?Authorization=Bearer%20{token}"):
        assert Manager(ours.manager.host).call("GET", f"/orgs/{OURS}{query}").status == 401


def test_a_revoked_token_is_good_for_nothing(admin: Manager) -> None:
    doomed = _org(admin, OURS)
    head = f"GET {API}/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {doomed.manager.token}\r\n"
    head += "Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", admin.host.port), LIMIT) as stream, stream.makefile("rb") as lines:
        stream.sendall(head.encode())
        assert any(line == b": hello\n" for line in lines)
        cases = list(_cases(admin.get("/openapi.json"), doomed))
        assert doomed.manager.call("GET", f"/orgs/{OURS}").status == 200
        admin.ok("DELETE", f"/tokens/{doomed.token_id}")
        for case in cases:
            status, _ = _read_some(doomed.manager, case)
            assert status == 401, case
        assert doomed.manager.call("GET", f"/plugins/{PLUGIN}/{OURS}/health").status == 401
        admin.put(OURS, config={"value": "not for them"})
        assert b"event:" not in lines.read(), "the next event ends what was begun with it"


def test_an_expired_token_is_good_for_nothing(admin: Manager) -> None:
    past = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    assert Manager(admin.host, admin.new_token("past", expires=past)).call("GET", "/orgs").status == 401
    soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    manager = Manager(admin.host, admin.new_token("soon", expires=soon))
    assert manager.call("GET", "/orgs").status == 200
    wait_until(lambda: manager.call("GET", "/orgs").status == 401, "the token expires")


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00"])
def test_a_token_of_a_moment_that_is_no_year_is_refused(admin: Manager, moment: str) -> None:
    assert admin.call("POST", "/tokens", {"name": "never", "expires": moment}).status == 422
    admin.get("/tokens")


def test_the_token_of_a_deleted_org_is_good_for_nothing(admin: Manager) -> None:
    gone = _org(admin, "gone-1234")
    assert gone.manager.call("GET", "/orgs/gone-1234").status == 200
    admin.ok("DELETE", "/orgs/gone-1234")
    assert gone.manager.call("GET", "/orgs/gone-1234").status == 401
    admin.ok("POST", "/orgs", {"id": "gone-1234"})
    assert gone.manager.call("GET", "/orgs/gone-1234").status == 401, "an org of the same name is another one"


def test_an_orgs_token_does_not_bring_its_org_about(admin: Manager, ours: Org) -> None:
    for method, path in product(("PUT", "POST", "PATCH", "DELETE"), (f"/orgs/{OURS}", "/orgs", "/tokens")):
        answer = ours.manager.call(method, path, {"name": "mine"})
        assert answer.status in (403, 405), (method, path, answer)


def test_the_first_token_closes_the_host(tmp_path: Path) -> None:
    with managed(tmp_path, "--spares", 0) as local:
        local.put("first")
        assert local.call("GET", "/orgs").status == 200
        token = local.new_token("admin")
        cases = list(_cases(local.get("/openapi.json"), Org("first", local, token.split("_")[1])))
        for case in cases:
            assert (local.call(case.method, case.path, case.body).status == 401) == (not case.open), case
        admin = Manager(local.host, token)
        admin.ok("DELETE", f"/tokens/{token.split('_')[1]}")
        assert local.call("GET", "/orgs").status == 401, "that the last one is revoked opens nothing"
