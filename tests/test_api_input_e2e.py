"""Whatever is sent to the management API is answered with one clear 4xx unless it is right."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from openapi_schema_validator import OAS31Validator

from .conftest import LIMIT, Answer
from .managing import API, Manager, managed

ONE = "/orgs/acme/plugins/recorder"


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with managed(tmp_path_factory.mktemp("input"), "--spares", 0) as manager:
        manager.put("acme", config={"value": "kept", "apiKey": "kept"})
        assert manager.host.get("/plugins/recorder/acme/value").status == 200
        yield manager


@pytest.fixture(autouse=True)
def unharmed(manager: Manager) -> Iterator[None]:
    """Whatever a test sends: nothing is changed, and nothing went wrong inside."""
    before = manager.get(ONE), manager.get("/orgs"), manager.get("/tokens")
    yield
    assert (manager.get(ONE), manager.get("/orgs"), manager.get("/tokens")) == before
    assert "an internal error" not in manager.host.log
    assert "Traceback" not in manager.host.log


def _send(manager: Manager, method: str, path: str, body: bytes, kind: str | None = "application/json") -> Answer:
    headers = {} if kind is None else {"Content-Type": kind}
    return manager.host.request(method, path, body, headers)


def _is_clear(answer: Answer, *statuses: int) -> None:
    assert answer.status in (statuses or (400, 422)), answer
    assert answer.headers["Content-Type"] == "application/json"
    told = json.loads(answer.body)
    assert isinstance(told["error"], str)
    assert told["error"]
    assert len(answer.body) < 100_000


def _bodies(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every operation with a body: method, path, schema."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                concrete = path.format(org="acme", name="recorder", token="0" * 16)
                yield method.upper(), concrete, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


MALFORMED: dict[str, bytes] = {
    "nothing-but-space": b"  ",
    "unfinished": b'{"config": {',
    "trailing": b'{"config": {}} x',
    "two": b"{}{}",
    "array": b"[]",
    "null": b"null",
    "text": b'"x"',
    "number": b"1",
    "true": b"true",
    "single-quotes": b"{'config': {}}",
    "comment": b'{"config": {} /* x */}',
    "comma": b'{"config": {},}',
    "not-utf-8": b'{"config": {"value": "\xff\xfe"}}',
    "latin-1": '{"name": "J\xfcrgen"}'.encode("latin-1"),
    "utf-16": '{"config": {}}'.encode("utf-16"),
    "bom": b'\xef\xbb\xbf{"config": {}}',
    "deep-arrays": b'{"config": {"extra": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "deep-objects": b'{"config": {"extra": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}}",
    "deep-unfinished": b"[" * 900_000,
    "65-deep": b'{"config": {"extra": ' + b"[" * 65 + b"]" * 65 + b"}}",
    "duplicate": b'{"config": {}, "config": {"value": "x"}}',
    "duplicate-escaped": b'{"config": {}, "c\\u006fnfig": {"value": "x"}}',
    "duplicate-nested": b'{"config": {"value": "x", "value": "y"}}',
    "duplicate-in-list": b'{"config": {"extra": [{"a": 1, "a": 1}]}}',
    "duplicates": b'{"x":1' + b',"y":1' * 100_000 + b"}",
    "distinct-then-duplicate": b"{" + b",".join(b'"%d":1' % i for i in range(80_000)) + b',"79999":1}',
    "nul": b'{"config": {"value": "a\\u0000b"}}',
    "raw-nul": b'{"config": {"value": "a\x00b"}}',
    "nul-key": b'{"config": {"a\\u0000": "b"}}',
    "raw-control": b'{"config": {"value": "a\nb"}}',
    "surrogate": b'{"config": {"value": "\\ud800"}}',
    "surrogate-key": b'{"config": {"\\udfff": 1}}',
    "raw-surrogate": b'{"config": {"value": "\xed\xa0\x80"}}',
    "nan": b'{"config": {"count": NaN}}',
    "infinity": b'{"config": {"count": -Infinity}}',
    "1e999": b'{"config": {"count": 1e999}}',
    "huge-integer": b'{"config": {"count": ' + b"9" * 30 + b"}}",
    "endless-integer": b'{"config": {"count": ' + b"9" * 100_000 + b"}}",
    "octal": b'{"config": {"count": 0777}}',
    "hex": b'{"config": {"count": 0x10}}',
    "unknown-field": b'{"config": {}, "admin": true}',
    "prototype": b'{"__proto__": {"enabled": false}}',
    "unknown-fields": b"{" + b",".join(b'"f%d":1' % i for i in range(80_000)) + b"}",
}
LARGE = {
    "2-MiB": (b'{"name": "' + b"x" * (2 << 20) + b'"}', (413,)),
    "11-MiB": (b'{"name": "' + b"x" * (11 << 20) + b'"}', (413,)),
    "long-name": (b'{"name": "' + b"x" * 500_000 + b'"}', (422,)),
    "long-key": (b'{"' + b"k" * 500_000 + b'": 1}', (422,)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bodies(manager: Manager, kind: str) -> None:
    operations = list(_bodies(manager.get("/openapi.json")))
    assert len(operations) >= 7
    for method, path, _ in operations:
        _is_clear(_send(manager, method, path, MALFORMED[kind]))
    if kind != "unknown-field":  # which is nothing to those who look for a config only
        answer = _send(manager, "POST", "/plugins/recorder/acme/config-update", MALFORMED[kind])
        _is_clear(answer, 400)
        assert answer.json()["success"] is False


@pytest.mark.parametrize("kind", LARGE)
def test_large_bodies(manager: Manager, kind: str) -> None:
    body, statuses = LARGE[kind]
    for method, path, _ in _bodies(manager.get("/openapi.json")):
        _is_clear(_send(manager, method, path, body), *statuses)


def test_a_large_config(manager: Manager) -> None:
    for config in ({"value": "x" * 300_000}, {f"field{number}": number for number in range(20_000)}):
        for method in ("PUT", "PATCH"):
            _is_clear(manager.call(method, ONE, {"config": config}), 413)
        _is_clear(manager.call("POST", f"{ONE}/validate", {"config": config}), 413)
        _is_clear(manager.call("POST", "/plugins/recorder/acme/config-update", {"config": config}), 413)
    auth = {"methodId": "key", "credentials": {"apiKey": "x" * 300_000}}
    _is_clear(manager.call("PUT", ONE, {"auth": auth}), 413)


def test_a_config_does_not_grow_beyond_its_limit_by_patches(manager: Manager) -> None:
    manager.put("grown", config={"value": "x" * 200_000})
    _is_clear(manager.call("PATCH", "/orgs/grown/plugins/recorder", {"config": {"fault": "x" * 200_000}}), 413)
    assert list(manager.get("/orgs/grown/plugins/recorder")["config"]) == ["value"]
    manager.ok("DELETE", "/orgs/grown")


def test_very_many_wrong_fields_are_not_all_told(manager: Manager) -> None:
    answer = manager.call("PUT", ONE, {"config": {f"f{number}": number for number in range(10_000)}})
    _is_clear(answer, 422)
    assert len(answer.json()["errors"]) == 100


WRONG = [None, True, 0, -1, 1.5, "x", "", [], [1], {}, {"a": 1}]


def test_wrong_types_are_told_by_their_fields(manager: Manager) -> None:
    document = manager.get("/openapi.json")
    tried = 0
    for method, path, schema in _bodies(document):
        for name, described in schema["properties"].items():
            validator = OAS31Validator({**described, "components": document["components"]})
            for value in WRONG:
                if validator.is_valid(value):
                    continue
                answer = manager.call(method, path.removeprefix(API), {name: value})
                _is_clear(answer, 422)
                fields = [error["field"] for error in answer.json()["errors"]]
                assert any(field == name or field.startswith(f"{name}.") for field in fields), (
                    method,
                    path,
                    name,
                    value,
                )
                tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (
            {"value": 1, "count": "x", "flag": 1, "apiKey": [], "other": 1},
            ["value", "count", "flag", "apiKey", "other"],
        ),
        ({"count": True}, ["count"]),
        ({"count": "1"}, ["count"]),
        ({"flag": "true"}, ["flag"]),
        ({"": 1}, [""]),
        ({"x" * 1000: 1}, ["x" * 100]),
    ],
)
def test_all_wrong_fields_of_a_config_are_told_at_once(manager: Manager, config: Any, wrong: list[str]) -> None:
    for method in ("PUT", "PATCH"):
        answer = manager.call(method, ONE, {"config": config})
        _is_clear(answer, 422)
        assert {error["field"] for error in answer.json()["errors"]} == {f"config.{name}" for name in wrong}


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml", "x", "a/b;c"])
def test_other_content_types(manager: Manager, kind: str) -> None:
    for method, path, _ in _bodies(manager.get("/openapi.json")):
        _is_clear(_send(manager, method, path, b'{"name": "x"}', kind), 415)


QUERIES = (
    *("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=NaN", "limit=", "limit=1.5", "limit=%31%00"),
    *(
        "limit=1&limit=1",
        "limit=1&limi%74=2",
        "after=a&after=b",
        "after=%00",
        "after=%ff",
        f"after={'x' * 201}",
        "%ff=1",
    ),
    *(f"limit={'9' * 400}", f"limit={'9' * 9000}", "unknown=1", "=", "=1", "%00=1", "limit[]=1", "LIMIT=1"),
)


@pytest.mark.parametrize("query", QUERIES)
def test_malformed_queries(manager: Manager, query: str) -> None:
    for path in ("/orgs", "/orgs/acme/plugins", "/tokens", "/workers", "/audit", "/plugins", ONE):
        _is_clear(manager.call("GET", f"{path}?{query}"))


@pytest.mark.parametrize("query", ["org=..", "org=", "org=a/b", "plugin=A", "plugin=-", "org=a%00", f"org={'a' * 129}"])
def test_malformed_names_in_queries(manager: Manager, query: str) -> None:
    for path in ("/workers", "/audit"):
        _is_clear(manager.call("GET", f"{path}?{query}"))


IDS = (
    *(
        "",
        ".",
        "..",
        "...",
        "-x",
        "_x",
        ".x",
        "x/",
        "a/b",
        "a\\b",
        "a b",
        "a+b",
        "a;b",
        "a?b",
        "a#b",
        "a%b",
        "a%2fb",
        "a\0b",
    ),
    *(
        "a\nb",
        "\xe9",
        "\u0430cme",
        "\uff41cme",
        "a\u0301",
        "a\u200b",
        "a" * 129,
        "acme/../acme",
        "%",
        "*",
        "'",
        '"',
        "<x>",
    ),
)


@pytest.mark.parametrize("org", IDS)
def test_names_that_are_none(manager: Manager, org: str) -> None:
    _is_clear(manager.call("POST", "/orgs", {"id": org}))
    _is_clear(manager.call("POST", "/tokens", {"name": "x", "org": org}))
    for form in {quote(org, safe=""), quote(quote(org, safe=""), safe=""), quote(org, safe="/")}:
        if form in ("", "acme/../acme"):
            continue
        for method in ("GET", "PUT", "DELETE"):
            answer = manager.call(method, f"/orgs/{form}")
            _is_clear(answer, 400, 404, 405, 422)
        _is_clear(manager.call("PUT", f"/orgs/{form}/plugins/recorder"), 400, 404, 405, 422)
        _is_clear(manager.call("PUT", f"/orgs/acme/plugins/{form}"), 400, 404, 405, 422)


@pytest.mark.parametrize(
    "name", ["", " ", "\t", "a\nb", "a\x7fb", "\x85", "\u2028", "a\u2029b", "x" * 201, "\u3000", "a\x1b[31m"]
)
def test_names_for_people(manager: Manager, name: str) -> None:
    for method, path, body in (("POST", "/orgs", {"id": "new"}), ("PUT", "/orgs/new", {}), ("POST", "/tokens", {})):
        _is_clear(manager.call(method, path, {**body, "name": name}), 422)


@pytest.mark.parametrize("tag", ["x", '"', "", '"a" "b"', '"a",', ",", "W/", '"a\tb"', "**", '*, "a"', '"\xe9'])
@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_malformed_entity_tags(manager: Manager, header: str, tag: str) -> None:
    _is_clear(manager.call("PUT", ONE, {"config": {"value": "x"}}, **{header: tag}), 400)
    if header == "If-None-Match":
        _is_clear(manager.call("GET", ONE, **{header: tag}), 400)


@pytest.mark.parametrize(
    "path",
    [
        *("/api", "/api/", "/api/v1", "/api/v1/", "/api/v2/orgs", "/api/v1/Orgs", "/api/v1/orgs/", "/api//v1/orgs"),
        *("/api/v1/../v1/orgs", "/api/v1/%6frgs", "/api/v1/orgs%2facme", "/api/v1/orgs/acme%00", "/api/v1/orgs;/acme"),
        *("/api/v1/tokens/x", f"/api/v1/tokens/{'A' * 16}", f"/api/v1/tokens/{'0' * 17}", "/api/v1/orgs\\acme"),
    ],
)
def test_paths_that_lead_nowhere(manager: Manager, path: str) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", manager.host.port, timeout=LIMIT)
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        response = connection.getresponse()
        _is_clear(Answer(response.status, response.headers, response.read()), 400, 404)
        connection.close()


def test_other_methods_are_told_which_there_are(manager: Manager) -> None:
    for path, methods in manager.get("/openapi.json")["paths"].items():
        concrete = path.format(org="acme", name="recorder", token="0" * 16)
        known = {method.upper() for method in methods} | ({"HEAD"} if "get" in methods else set())
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"} - known:
            answer = manager.host.request(method, concrete)
            _is_clear(answer, 405)
            assert set(answer.headers["Allow"].split(", ")) == known | {"OPTIONS"}


def test_the_host_still_serves_after_all_this(manager: Manager, tmp_path: Path) -> None:
    assert manager.host.get("/plugins/recorder/acme/value").json()["value"] == "kept"
