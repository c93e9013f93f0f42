"""Routes, seen from a client: what handlers receive, what their results become, and what is never let through."""

import concurrent.futures
import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from .conftest import LIMIT, Answer, HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting, logged

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

INTERNAL_ERROR = {"error": "Internal server error"}
BIG = os.urandom(3 << 20)
BIG_HEADERS = {"Content-Type": "application/octet-stream"}

# ---- what handlers return

RETURNS = """
async def letters():
    yield "a"
    yield ""
    yield "é"

def digits():
    yield b"1"
    yield bytearray(b"2")
    yield memoryview(b"3")

def nothing():
    return
    yield

VALUES = {
    "dict": lambda: {"a": [1, None, True, 1.5, "é"]},
    "dict-empty": lambda: {},
    "list": lambda: [1, {"b": 2}],
    "list-empty": lambda: [],
    "str": lambda: "héllo",
    "str-empty": lambda: "",
    "bytes": lambda: bytes(range(256)),
    "bytes-empty": lambda: b"",
    "none": lambda: None,
    "iterator": lambda: iter([b"x", "y"]),
    "generator": digits,
    "async-generator": letters,
    "generator-empty": nothing,
}

@route("GET", "/sync/{kind}")
def sync_value(req):
    return VALUES[req.params["kind"]]()

@route("GET", "/async/{kind}")
async def async_value(req):
    return VALUES[req.params["kind"]]()

@route("GET", "/response/{kind}")
def response_value(req):
    return Response(VALUES[req.params["kind"]](), 299, {"X-Kind": "k", "Content-Type": "text/x-test"})

@route("GET", "/plain/{kind}")
async def plain_response(req):
    return Response(VALUES[req.params["kind"]]())

@route("GET", "/generator-handler")
def generator_handler(req):
    yield req.method
    yield req.path

@route("GET", "/async-generator-handler")
async def async_generator_handler(req):
    yield req.method.encode()
    yield req.path.encode()

@route("GET", "/status/{status}")
async def status(req):
    return Response({"s": req.params["status"]}, int(req.params["status"]))

@route("GET", "/cached")
async def cached(req):
    return Response(None, 304, {"ETag": '"e"'})

@route("GET", "/where")
def where_sync(req):
    return {"main": threading.current_thread() is threading.main_thread()}

@route("POST", "/where")
async def where_async(req):
    return {"main": threading.current_thread() is threading.main_thread()}

class Handlers:
    async def __call__(self, req):
        return "called"

route("GET", "/callable")(Handlers())
"""

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"
KINDS = {
    "dict": (JSON, '{"a":[1,null,true,1.5,"é"]}'.encode()),
    "dict-empty": (JSON, b"{}"),
    "list": (JSON, b'[1,{"b":2}]'),
    "list-empty": (JSON, b"[]"),
    "str": (TEXT, "héllo".encode()),
    "str-empty": (TEXT, b""),
    "bytes": (BYTES, bytes(range(256))),
    "bytes-empty": (BYTES, b""),
    "iterator": (BYTES, b"xy"),
    "generator": (BYTES, b"123"),
    "async-generator": (TEXT, "aé".encode()),
    "generator-empty": (TEXT, b""),
}

# ---- what handlers receive

RECEIVES = """
@route("POST", "/seen/{first}/and/{second}")
async def seen(req):
    return {
        "method": req.method,
        "path": req.path,
        "params": req.params,
        "query": req.query,
        "headers": dict(req.headers),
        "size": len(req.body),
        "org": req.ctx.org.id,
        "id": req.id,
    }

@route("GET", "/items/special")
async def special(req):
    return "literal"

@route("GET", "/items/{id}")
async def item(req):
    return req.params

@route("GET", "/items/special/{id}")
async def special_item(req):
    return {"special": req.params["id"]}

@route("GET", "/query")
def query(req):
    return req.query

@route("GET", "/header/{name}")
def header(req):
    name = req.params["name"]
    return {"value": req.headers.get(name), "in": name in req.headers, "upper": req.headers.get(name.upper())}

@route("POST", "/json")
async def read_json(req):
    return {"got": req.json()}

@route("POST", "/json-caught")
def read_json_caught(req):
    try:
        req.json()
    except ValueError as error:
        return Response({"mine": type(error).__name__}, 418)

@route("POST", "/text")
def read_text(req):
    return {"text": req.text()}

@route("POST", "/form")
async def read_form(req):
    return {key: [plain(value) for value in values] for key, values in req.form().items()}

def plain(value):
    if isinstance(value, str):
        return value
    return [value.filename, value.content_type, list(value.content[:300]), len(value.content)]

@route("POST", "/body")
async def body(req):
    return req.body

@route("POST", "/body-stream/{size}")
async def body_stream(req):
    size = int(req.params["size"])
    for start in range(0, len(req.body), size):
        yield req.body[start:start + size]

for method in ("PUT", "PATCH", "DELETE"):
    @route(method, "/methods")
    async def any_method(req):
        return {"method": req.method, "body": req.text()}
"""

# ---- what goes wrong

FAILS = """
class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")

def raises(error):
    raise error

async def first_item_is_wrong():
    yield 5

async def fails_at_once():
    raise RuntimeError("early")
    yield b""

def refuses_at_once():
    raise HTTPError(409, "busy")
    yield b""

class Nested(dict):
    pass

def endless():
    value = []
    value.append(value)
    return value

def mutated():
    response = Response("x")
    response.headers["X-Injected"] = "a\\r\\nX-Evil: 1"
    return response

NONSENSE = {
    "object": lambda: object(),
    "number": lambda: 42,
    "true": lambda: True,
    "float": lambda: 1.5,
    "set": lambda: {1, 2},
    "tuple": lambda: (1, 2),
    "class": lambda: Response,
    "dict-of-object": lambda: {"a": object()},
    "cycle": endless,
    "surrogate": lambda: "\\ud800",
    "surrogate-in-dict": lambda: {"a": "\\ud800"},
    "status-low": lambda: Response("x", 99),
    "status-high": lambda: Response("x", 600),
    "status-text": lambda: Response("x", "200"),
    "body-object": lambda: Response(object()),
    "header-number": lambda: Response("x", 200, {"X-A": 1}),
    "header-newline": lambda: Response("x", 200, {"X-A": "a\\nb"}),
    "header-return": lambda: Response("x", 200, {"X-A": "a\\r\\nSet-Cookie: a=b"}),
    "header-null": lambda: Response("x", 200, {"X-A": "a\\0b"}),
    "header-wide": lambda: Response("x", 200, {"X-A": "\\u20ac"}),
    "header-name": lambda: Response("x", 200, {"X A": "a"}),
    "header-name-colon": lambda: Response("x", 200, {"X-A: b\\r\\nX-B": "a"}),
    "header-name-empty": lambda: Response("x", 200, {"": "a"}),
    "header-name-long": lambda: Response("x", 200, {"X" * 5000: "a"}),
    "header-long": lambda: Response("x", 200, {"X-A": "a" * 20000}),
    "headers-long": lambda: Response("x", 200, {f"X-{n}": "a" * 16000 for n in range(90)}),
    "headers-many": lambda: Response("x", 200, {f"X-{n}": "a" for n in range(500)}),
    "header-mutated": mutated,
    "length-nonsense": lambda: Response(iter([b"x"]), 200, {"Content-Length": "many"}),
    "first-item": first_item_is_wrong,
    "stream-fails-at-once": fails_at_once,
    "exception": lambda: raises(RuntimeError("no luck")),
    "unprintable": lambda: raises(Unprintable()),
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: raises(KeyboardInterrupt()),
    "stop-iteration": lambda: next(iter([])),
    "cancelled": lambda: raises(asyncio.CancelledError()),
    "generator-exit": lambda: raises(GeneratorExit()),
    "recursion": lambda: raises(RecursionError()),
    "group": lambda: raises(ExceptionGroup("several", [ValueError("one")])),
    "base-group": lambda: raises(BaseExceptionGroup("several", [SystemExit(1)])),
    "surrogate-message": lambda: raises(RuntimeError("\\udcff")),
    "http-error-status": lambda: raises(HTTPError(200, "no error")),
}

@route("GET", "/nonsense/sync/{kind}")
def nonsense_sync(req):
    return NONSENSE[req.params["kind"]]()

@route("GET", "/nonsense/async/{kind}")
async def nonsense_async(req):
    return NONSENSE[req.params["kind"]]()

@route("GET", "/http-error/{status}")
def http_error(req):
    raise HTTPError(int(req.params["status"]), req.query.get("message", ["nö"])[0])

@route("GET", "/http-error-surrogate")
async def http_error_surrogate(req):
    raise HTTPError(404, "no \\udcff")

@route("GET", "/refused-stream")
async def refused_stream(req):
    return refuses_at_once()

@route("GET", "/traceback")
async def traceback(req):
    return helper({})

def helper(table):
    return table["the-missing-key"]  # the line that fails

@route("GET", "/breaks/{kind}")
async def breaks(req):
    async def agen():
        yield b"whole"
        raise RuntimeError("broken in the middle")

    def gen():
        yield b"whole"
        sys.exit(1)

    def wrong_item():
        yield b"whole"
        yield 7

    async def fixed():
        yield b"whole"

    kind = req.params["kind"]
    return {
        "async": agen,
        "sync": gen,
        "item": wrong_item,
        "short": lambda: Response(fixed(), 200, {"Content-Length": "100"}),
        "long": lambda: Response(fixed(), 200, {"Content-Length": "3"}),
    }[kind]()
"""

# ---- headers and addresses

ANSWERS = """
@route("GET", "/headers")
async def headers(req):
    return Response(
        req.query.get("body", ["x"])[0],
        200,
        {name: values[0] for name, values in req.query.items() if name != "body"},
    )

@route("GET", "/health")
async def my_health(req):
    return "mine"

@route("GET", "/metadata")
async def my_metadata(req):
    return "mine"

@route("POST", "/metadata")
async def my_post_metadata(req):
    return "mine"

@route("GET", "/mcp/list-tools")
async def my_tools(req):
    return "mine"

@route("POST", "/disable")
async def my_disable(req):
    return "mine"

@route("GET", "/forged")
async def forged(req):
    import re
    from sandbox import answers
    answers._VALUE = answers._TOKEN = re.compile("(?s).*")
    return Response("x", 200, {req.query["name"][0]: req.query["value"][0]})
"""

# ---- at the same time

CONCURRENT = """
EVENTS = []
TOGETHER = threading.Barrier(3)
ASYNC = []
BOTH = asyncio.Event()
RELEASED = {name: threading.Event() for name in ("sync", "async", "leaving-blocked")}

@route("GET", "/meet/sync")
def meet_sync(req):
    TOGETHER.wait(30)
    return "met"

@route("GET", "/meet/async")
async def meet_async(req):
    ASYNC.append(req.id)
    if len(ASYNC) == 3:
        BOTH.set()
    await BOTH.wait()
    return "met"

@route("GET", "/events")
async def events(req):
    return EVENTS

@route("GET", "/wait/{name}")
async def wait(req):
    name = req.params["name"]
    EVENTS.append(f"{name} began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        EVENTS.append(f"{name} cancelled")
        raise

@route("GET", "/wait-stream/{name}")
async def wait_stream(req):
    name = req.params["name"]
    try:
        yield b"x"
        EVENTS.append(f"{name} began")
        await asyncio.Event().wait()
    finally:
        EVENTS.append(f"{name} cancelled")

@route("GET", "/endless/{name}")
def endless_stream(req):
    name = req.params["name"]
    EVENTS.append(f"{name} began")
    try:
        while True:
            yield b"x" * 65536
    finally:
        EVENTS.append(f"{name} cancelled")

@route("GET", "/blocked/{name}")
def blocked_stream(req):
    name = req.params["name"]
    try:
        EVENTS.append(f"{name} began")
        RELEASED[name].wait(30)
        yield b"x"
    finally:
        EVENTS.append(f"{name} cancelled")

@route("POST", "/release/{kind}")
async def release(req):
    RELEASED[req.params["kind"]].set()

@route("GET", "/live/sync")
def live_sync(req):
    yield "first"
    RELEASED["sync"].wait(30)
    yield "second"

@route("GET", "/live/async")
async def live_async(req):
    yield "first"
    while not RELEASED["async"].is_set():
        await asyncio.sleep(0.01)
    yield "second"

@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid()}
"""

SOURCE = PREAMBLE + RETURNS + RECEIVES + FAILS + ANSWERS + CONCURRENT + PLUGIN
AT = "/plugins/r/acme"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("plugins")
    write_plugin(folder / "r", SOURCE)
    write_plugin(folder / "all", PREAMBLE + 'route("GET", "/{anything}")(lambda req: "mine")\n' + PLUGIN)
    with hosting(folder) as host:
        yield host


# ---- every kind of result


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_becomes_a_body_of_its_own_type(host: HostProcess, way: str, kind: str) -> None:
    answer = host.get(f"{AT}/{way}/{kind}")
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, *KINDS[kind])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_none_is_204_without_a_body(host: HostProcess, way: str) -> None:
    answer = host.get(f"{AT}/{way}/none")
    assert (answer.status, answer.body) == (204, b"")
    assert "Content-Type" not in answer.headers
    assert "Content-Length" not in answer.headers


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_carries_any_body_with_its_own_status_and_headers(host: HostProcess, kind: str) -> None:
    answer = host.get(f"{AT}/response/{kind}")
    assert (answer.status, answer.body) == (299, KINDS[kind][1])
    assert (answer.headers["Content-Type"], answer.headers["X-Kind"]) == ("text/x-test", "k")


def test_a_response_with_no_body_is_empty_but_keeps_its_status(host: HostProcess) -> None:
    answer = host.get(f"{AT}/plain/none")
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")
    assert host.get(f"{AT}/response/none").status == 299


@pytest.mark.parametrize("kind", ["dict", "list", "str", "bytes"])
def test_a_response_that_names_no_type_has_the_one_of_its_body(host: HostProcess, kind: str) -> None:
    answer = host.get(f"{AT}/plain/{kind}")
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, *KINDS[kind])


@pytest.mark.parametrize("status", [200, 201, 301, 400, 404, 418, 500, 503, 599])
def test_every_status_is_passed_on(host: HostProcess, status: int) -> None:
    answer = host.get(f"{AT}/status/{status}")
    assert (answer.status, answer.json()) == (status, {"s": str(status)})


@pytest.mark.parametrize("status", [204, 205, 304])
def test_a_status_without_a_body_has_none_whatever_the_handler_gave(host: HostProcess, status: int) -> None:
    connection = host.connect()
    for _ in range(2):  # were there a body, the second answer would begin with it
        connection.request("GET", f"{AT}/status/{status}")
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, b"")
    connection.close()


def test_a_304_keeps_its_headers(host: HostProcess) -> None:
    answer = host.get(f"{AT}/cached")
    assert (answer.status, answer.headers["ETag"]) == (304, '"e"')


@pytest.mark.parametrize("handler", ["generator-handler", "async-generator-handler"])
def test_a_handler_may_be_a_generator_itself(host: HostProcess, handler: str) -> None:
    assert host.get(f"{AT}/{handler}").body == f"GET/{handler}".encode()


def test_sync_handlers_run_on_threads_and_async_ones_on_the_loop(host: HostProcess) -> None:
    assert host.get(f"{AT}/where").json() == {"main": False}
    assert host.post(f"{AT}/where").json() == {"main": True}


def test_a_callable_object_is_a_handler(host: HostProcess) -> None:
    assert host.get(f"{AT}/callable").body == b"called"


# ---- bodies


def test_a_big_binary_body_is_byte_exact_both_ways(host: HostProcess) -> None:
    answer = host.post(f"{AT}/body", BIG)
    assert answer.headers["Content-Length"] == str(len(BIG))
    assert answer.body == BIG


def test_a_big_chunked_body_is_byte_exact_both_ways(host: HostProcess) -> None:
    connection = host.connect()
    pieces = (BIG[start : start + 100_001] for start in range(0, len(BIG), 100_001))
    connection.request("POST", f"{AT}/body-stream/70001", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert response.read() == BIG
    connection.close()


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 262_144, 262_145])
def test_bodies_at_the_limits_of_frames_and_windows_are_byte_exact(host: HostProcess, size: int) -> None:
    assert host.post(f"{AT}/body", BIG[:size]).body == BIG[:size]
    assert host.post(f"{AT}/body-stream/{size}", BIG[:size]).body == BIG[:size]


@pytest.mark.parametrize("headers", [{}, {"Transfer-Encoding": "chunked"}])
def test_an_empty_body_is_empty(host: HostProcess, headers: dict[str, str]) -> None:
    connection = host.connect()
    connection.request("POST", f"{AT}/body", iter([]) if headers else None, headers, encode_chunked=bool(headers))
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


# ---- what a handler receives


def test_a_request_says_all_about_itself(host: HostProcess) -> None:
    seen = host.post(f"{AT}/seen/a%20b%2Fc/and/%E2%82%AC+%25?x=1", b"12345", headers={"X-One": "1"}).json()
    assert seen["method"] == "POST"
    assert seen["path"] == "/seen/a%20b%2Fc/and/%E2%82%AC+%25"
    assert seen["params"] == {"first": "a b/c", "second": "€+%"}
    assert seen["query"] == {"x": ["1"]}
    assert seen["headers"]["x-one"] == "1"
    assert seen["size"] == 5
    assert seen["org"] == "acme"
    assert seen["id"]


def test_every_request_has_an_id_of_its_own(host: HostProcess) -> None:
    ids = {host.post(f"{AT}/seen/a/and/b").json()["id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("sent", "value"),
    [
        ("plain", "plain"),
        ("a%20b", "a b"),
        ("a+b", "a+b"),
        ("..%2f..%2Fetc", "../../etc"),
        ("%2e%2e", ".."),
        ("%252F", "%2F"),
        ("%00", "\0"),
        ("%zz", "%zz"),
        ("%ff", "\N{REPLACEMENT CHARACTER}"),
        ("%E2%82%AC", "€"),
        ("a;b=c", "a;b=c"),
        ("{id}", "{id}"),
    ],
)
def test_a_parameter_is_one_segment_decoded_once(host: HostProcess, sent: str, value: str) -> None:
    answer = host.get(f"{AT}/items/{sent}")
    assert (answer.status, answer.json()) == (200, {"id": value})


def test_a_target_with_raw_utf_8_means_its_percent_encoded_form(host: HostProcess) -> None:
    connection = socket.create_connection(("127.0.0.1", host.port), LIMIT)  # as curl sends what a shell has
    connection.sendall(f"POST {AT}/seen/é/and/x%20y?q=€ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    response = http.client.HTTPResponse(connection)
    response.begin()
    seen = json.loads(response.read())
    connection.close()
    assert (seen["params"], seen["query"]) == ({"first": "é", "second": "x y"}, {"q": ["€"]})
    assert seen["path"] == "/seen/%C3%A9/and/x%20y"


@pytest.mark.parametrize("path", ["/items/", "/items", "/items/a/b", "/items//", "//items/a", "/items/a/"])
def test_a_parameter_is_never_empty_nor_several_segments(host: HostProcess, path: str) -> None:
    answer = host.get(AT + path)
    assert (answer.status, list(answer.json())) == (404, ["error"])


def test_a_literal_segment_beats_a_parameter(host: HostProcess) -> None:
    assert host.get(f"{AT}/items/special").body == b"literal"
    assert host.get(f"{AT}/items/specially").json() == {"id": "specially"}
    assert host.get(f"{AT}/items/special/7").json() == {"special": "7"}


def test_a_query_has_every_value_of_every_key(host: HostProcess) -> None:
    query = host.get(f"{AT}/query?a=1&b=&a=%202+x&c&%C3%A9=%26%3D;z&a=1").json()
    assert query == {"a": ["1", " 2 x", "1"], "b": [""], "c": [""], "é": ["&=;z"]}
    assert host.get(f"{AT}/query").json() == {}
    assert host.get(f"{AT}/query?").json() == {}
    assert host.get(f"{AT}/query?a=?b").json() == {"a": ["?b"]}


def test_a_query_of_absurdly_many_fields_is_refused(host: HostProcess) -> None:
    answer = host.get(f"{AT}/query?" + "&".join(["a=1"] * 1_001))
    assert (answer.status, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize("name", ["x-some", "X-Some", "X-SOME"])
def test_headers_compare_without_case(host: HostProcess, name: str) -> None:
    seen = host.get(f"{AT}/header/{name}", headers={"x-SoMe": "vålue"}).json()
    assert seen == {"value": "vålue", "in": True, "upper": "vålue"}


def test_repeated_headers_are_joined(host: HostProcess) -> None:
    connection = host.connect()
    connection.putrequest("GET", f"{AT}/header/x-many")
    for value in ("1", "2"):
        connection.putheader("X-Many", value)
    connection.endheaders()
    assert json.loads(connection.getresponse().read())["value"] == "1, 2"
    connection.close()


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_other_methods_have_bodies_too(host: HostProcess, method: str) -> None:
    assert host.request(method, f"{AT}/methods", "é".encode()).json() == {"method": method, "body": "é"}


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "é\u2028"]}, [], "text", 12, None, True])
def test_json_is_decoded(host: HostProcess, value: Any) -> None:
    assert host.post(f"{AT}/json", json.dumps(value)).json() == {"got": value}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1,]",
        b"NaN",
        b"[Infinity]",
        b'"\xff"',
        b"\xff\xfe",
        b"{'a': 1}",
        b"1 2",
        b"[" * 100_000,
        b"1" * 9_999,
    ],
    ids=["empty", "open", "comma", "nan", "infinity", "latin", "bom", "quotes", "two", "deep", "digits"],
)
def test_malformed_json_is_400_unless_the_author_catches_it(host: HostProcess, body: bytes) -> None:
    answer = host.post(f"{AT}/json", body)
    assert (answer.status, list(answer.json())) == (400, ["error"])
    assert "JSON" in answer.json()["error"]
    caught = host.post(f"{AT}/json-caught", body)
    assert (caught.status, caught.json()) == (418, {"mine": "BadRequestError"})


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (None, "é".encode(), "é"),
        ("text/plain", b"", ""),
        ("text/plain; charset=latin-1", b"\xe9", "é"),
        ('text/plain; charset="utf-16"', "é".encode("utf-16"), "é"),
    ],
)
def test_text_is_decoded_as_its_type_says(host: HostProcess, kind: str | None, body: bytes, text: str) -> None:
    assert host.post(f"{AT}/text", body, headers={"Content-Type": kind} if kind else {}).json() == {"text": text}


@pytest.mark.parametrize("charset", ["utf-8", "no-such", "idna", "undefined", "hex", "rot13", "x/../y", "ä"])
def test_text_that_is_none_is_400(host: HostProcess, charset: str) -> None:
    answer = host.post(f"{AT}/text", b"\xff\xfe\xfd", headers={"Content-Type": f"text/plain; charset={charset}"})
    assert (answer.status, list(answer.json())) == (400, ["error"])


def test_a_urlencoded_form_has_every_value_of_every_field(host: HostProcess) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    answer = host.post(f"{AT}/form", "a=1&a=2&b=%C3%A9+%26&c=", headers=kind)
    assert answer.json() == {"a": ["1", "2"], "b": ["é &"], "c": [""]}


def part(disposition: str, content: bytes, kind: str = "") -> bytes:
    lines = [b"--b", f"Content-Disposition: form-data; {disposition}".encode()]
    if kind:
        lines.append(f"Content-Type: {kind}".encode())
    return b"\r\n".join([*lines, b"", content]) + b"\r\n"


MULTIPART = {"Content-Type": 'multipart/form-data; boundary="b"'}


def test_a_multipart_form_has_fields_and_byte_exact_files(host: HostProcess) -> None:
    content = bytes(range(256))
    body = (
        part('name="a"', "é".encode())
        + part('name="a"', b"two")
        + part('name="f"; filename="p.png"', content, "image/png")
        + part('name="big"; filename="b"', BIG[: 1 << 20])
        + b"--b--\r\n"
    )
    form = host.post(f"{AT}/form", body, headers=MULTIPART).json()
    assert form["a"] == ["é", "two"]
    assert form["f"] == [["p.png", "image/png", list(content), 256]]
    assert form["big"] == [["b", "application/octet-stream", list(BIG[:300]), 1 << 20]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing of the kind",
        part('name="a"', b"never ends"),
        part('name="a"', b"1") + b"--b",
        part('filename="no-name"', b"1") + b"--b--\r\n",
        part('name="a"', b"\xff") + b"--b--\r\n",
        part('name="a"', b"x", "text/plain; charset=no-such") + b"--b--\r\n",
        part('name="a"', b"x\xff", "text/plain; charset=undefined") + b"--b--\r\n",
        b"--b\r\nno colon\r\n\r\n1\r\n--b--\r\n",
        b"".join(part(f'name="a{n}"', b"") for n in range(1_001)) + b"--b--\r\n",
    ],
    ids=["empty", "text", "open", "cut", "nameless", "latin", "charset", "undefined", "header", "many"],
)
def test_a_malformed_multipart_form_is_400(host: HostProcess, body: bytes) -> None:
    answer = host.post(f"{AT}/form", body, headers=MULTIPART)
    assert (answer.status, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=", "text/plain; boundary=b"]
)
def test_what_is_no_form_is_400(host: HostProcess, kind: str) -> None:
    answer = host.post(f"{AT}/form", b"a=1", headers={"Content-Type": kind} if kind else {})
    assert (answer.status, list(answer.json())) == (400, ["error"])


# ---- errors


@pytest.mark.parametrize("status", [400, 401, 404, 409, 429, 500, 503])
def test_http_error_is_its_status_and_message(host: HostProcess, status: int) -> None:
    answer = host.get(f"{AT}/http-error/{status}")
    assert (answer.status, answer.headers["Content-Type"], answer.json()) == (status, JSON, {"error": "nö"})


def test_http_error_with_text_that_is_not_unicode_keeps_its_status(host: HostProcess) -> None:
    answer = host.get(f"{AT}/http-error-surrogate")
    assert (answer.status, answer.json()) == (404, {"error": "no \\udcff"})


def test_http_error_before_the_first_item_of_a_stream_is_its_status(host: HostProcess) -> None:
    answer = host.get(f"{AT}/refused-stream")
    assert (answer.status, answer.json()) == (409, {"error": "busy"})


NONSENSE = re.findall(r'^    "([a-z-]+)": ', FAILS.split("NONSENSE = {")[1].split("\n}")[0], re.MULTILINE)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("kind", NONSENSE)
def test_whatever_else_goes_wrong_is_500_with_a_log_line(host: HostProcess, way: str, kind: str) -> None:
    path, pid = f"/nonsense/{way}/{kind}", host.get(f"{AT}/pid").json()
    answer = host.get(AT + path, timeout=10)
    assert (answer.status, answer.json()) == (500, INTERNAL_ERROR)
    assert not [name for name in answer.headers if name.lower() in {"x-a", "x-b", "x-evil", "set-cookie"}]
    wait_until(
        lambda: [r for r in host.records() if r["level"] == "error" and path in r["event"]], f"{path} in the log", 15
    )
    assert host.get(f"{AT}/pid").json() == pid


def test_a_traceback_is_in_the_log_with_the_authors_lines_and_nowhere_else(host: HostProcess) -> None:
    answer = host.get(f"{AT}/traceback")
    assert (answer.status, answer.body) == (500, json.dumps(INTERNAL_ERROR, separators=(",", ":")).encode())
    [record] = logged(host, event="GET /traceback failed: KeyError: 'the-missing-key'")
    line = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "# the line that fails" in text)
    assert f'plugin.py", line {line}, in helper' in record["traceback"]
    assert "sandbox/" not in record["traceback"]
    assert (record["plugin"], record["org"], record["source"], record["level"]) == ("r", "acme", "plugin", "error")
    assert record["worker"] == host.get(f"{AT}/pid").json()["pid"]
    assert record["request"]


@pytest.mark.parametrize("kind", ["async", "sync", "item", "short", "long"])
def test_an_answer_that_breaks_off_is_never_taken_for_the_whole(host: HostProcess, kind: str) -> None:
    pid = host.get(f"{AT}/pid").json()
    connection = host.connect()
    connection.request("GET", f"{AT}/breaks/{kind}")
    response = connection.getresponse()
    assert response.status == 200
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    response.close()
    connection.close()
    assert host.get(f"{AT}/pid").json() == pid  # and it is nobody else's problem


def test_a_stream_that_breaks_off_is_explained_in_the_log(host: HostProcess) -> None:
    connection = host.connect()
    connection.request("GET", f"{AT}/breaks/async")
    response = connection.getresponse()
    [record, *_] = logged(
        host, event="the streamed answer to GET /breaks/async broke off: RuntimeError: broken in the middle"
    )
    assert "in agen" in record["traceback"]
    response.close()
    connection.close()


# ---- HEAD, OPTIONS and what there is not


@pytest.mark.parametrize("path", ["/sync/dict", "/sync/str", "/async/generator", "/health", "/metadata"])
def test_head_is_get_without_the_body(host: HostProcess, path: str) -> None:
    got = host.get(AT + path)
    connection = host.connect()
    connection.request("HEAD", AT + path)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    assert response.headers["Content-Type"] == got.headers["Content-Type"]
    if "Content-Length" in got.headers and path != "/health":
        assert response.headers["Content-Length"] == got.headers["Content-Length"]
    connection.request("GET", f"{AT}/sync/str")  # on the same connection: nothing of a body is left over
    assert connection.getresponse().read() == "héllo".encode()
    connection.close()


def test_head_of_a_big_body_has_its_length(host: HostProcess) -> None:
    answer = host.request("HEAD", f"{AT}/headers?body={'x' * 20_000}")
    assert (answer.status, answer.headers["Content-Length"], answer.body) == (200, "20000", b"")


def allow(answer: Answer) -> set[str]:
    return set(answer.headers["Allow"].split(", "))


ALLOWED = {
    "/sync/x": {"GET", "HEAD", "OPTIONS"},
    "/where": {"GET", "HEAD", "POST", "OPTIONS"},
    "/methods": {"PUT", "PATCH", "DELETE", "OPTIONS"},
    "/items/a%2Fb": {"GET", "HEAD", "OPTIONS"},
    "/metadata": {"GET", "HEAD", "OPTIONS"},
    "/health": {"GET", "HEAD", "OPTIONS"},
    "/validate-auth": {"POST", "OPTIONS"},
    "/config-update": {"POST", "OPTIONS"},
    "/disable": {"POST", "OPTIONS"},
    "/mcp/list-tools": {"GET", "HEAD", "OPTIONS"},
    "/mcp/call-tool": {"POST", "OPTIONS"},
}


@pytest.mark.parametrize("path", ALLOWED)
def test_options_says_what_a_path_answers(host: HostProcess, path: str) -> None:
    answer = host.request("OPTIONS", AT + path)
    assert (answer.status, answer.body, allow(answer)) == (204, b"", ALLOWED[path])


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for path in ALLOWED for method in METHODS if method not in ALLOWED[path]]
)
def test_another_method_is_405_with_allow(host: HostProcess, path: str, method: str) -> None:
    answer = host.request(method, AT + path)
    assert (answer.status, allow(answer)) == (405, ALLOWED[path])
    if method != "HEAD":
        assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        f"{AT}/no-such",
        f"{AT}",
        f"{AT}/",
        f"{AT}/where/",
        f"{AT}/Where",
        f"{AT}/%77here",
        "/plugins/r/",
        "/plugins/r",
        "/plugins/no-such/acme/where",
        "/plugins/R/acme/where",
        "/plugins/r/%61cme/where",
        "/plugins/r/a%2Fb/where",
        "/plugins/r/-acme/where",
        "/plugins/r/" + "a" * 129 + "/where",
        "/plugins/r/../r/acme/where",
        "/plugins//r/acme/where",
        "/no-such",
    ],
)
def test_an_unknown_path_is_404_as_json(host: HostProcess, path: str, method: str) -> None:
    answer = host.request(method, path)
    assert (answer.status, answer.headers["Content-Type"], list(answer.json())) == (404, JSON, ["error"])
    assert "Allow" not in answer.headers


def test_the_hosts_own_paths_are_never_the_plugins(host: HostProcess) -> None:
    for path in ("/health", "/metadata", "/mcp/list-tools"):
        answer = host.get(AT + path)
        assert answer.status == 200
        assert answer.body != b"mine"
    assert host.get("/plugins/all/acme/something").body == b"mine"
    for path, status in {"/health": 200, "/metadata": 200, "/mcp": 406, "/disable": 405}.items():
        answer = host.get(f"/plugins/all/acme{path}")  # not as a parameter's value either
        assert answer.status == status
        assert answer.body != b"mine"
    assert host.post(f"{AT}/metadata").status == 405
    assert host.post("/plugins/r/never-used/disable").json() == {"success": True}
    warnings = [record["event"] for record in host.records() if record["level"] == "warning"]
    for route in ("GET /health", "GET /metadata", "POST /metadata", "GET /mcp/list-tools", "POST /disable"):
        assert [text for text in warnings if f"route {route} is never reached" in text], route
    listed = host.get(f"{AT}/metadata").json()["routes"]
    assert {"method": "GET", "path": "/items/{id}"} in listed


# ---- health


def test_health_says_what_a_worker_is_and_does(host: HostProcess) -> None:
    stopped = host.health("r", "never-started")
    assert (stopped["status"], stopped["state"], stopped["pid"], stopped["uptime"]) == ("healthy", "stopped", None, 0)
    assert stopped["memory"] == {"rss": None, "pss": None}
    pid = host.get("/plugins/r/healthy/pid").json()["pid"]
    answer = host.get("/plugins/r/healthy/health")
    health = answer.json()
    assert (answer.status, health["status"], health["state"], health["pid"]) == (200, "healthy", "ready", pid)
    assert (health["orgId"], health["plugin"], health["version"]) == ("healthy", "r", "1.2.3")
    assert (health["mcpServers"], health["sharing"], health["lastError"]) == ({"count": 0, "servers": []}, "fork", None)
    assert datetime.fromisoformat(health["timestamp"]).utcoffset() == timedelta(0)
    assert 0 < health["memory"]["pss"] <= health["memory"]["rss"] < 1 << 30
    assert isinstance(health["isolation"], str)
    wait_until(lambda: host.health("r", "healthy")["uptime"] > health["uptime"] >= 0, "uptime to grow")
    assert set(health) == set(stopped)


def test_a_plugin_that_cannot_be_forked_has_workers_of_their_own(serve: Serve, tmp_path: Path) -> None:
    threads = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    write_plugin(tmp_path / "t", PREAMBLE + threads + CONCURRENT + PLUGIN)
    host = serve()
    pids = {org: host.get(f"/plugins/t/{org}/pid").json()["pid"] for org in ("a", "b")}
    assert pids["a"] != pids["b"]
    health = host.health("t", "a")
    assert (health["sharing"], health["pid"]) == ("strict", pids["a"])
    assert "thread" in health["sharingReason"]
    assert host.get("/plugins/t/a/pid").json()["pid"] == pids["a"]


# ---- headers of answers


def headers_of(host: HostProcess, **headers: str) -> http.client.HTTPMessage:
    query = "&".join(f"{name.replace('_', '-')}={_quoted(value)}" for name, value in headers.items())
    answer = host.get(f"{AT}/headers?{query}")
    assert (answer.status, answer.body) == (200, b"x")
    return answer.headers


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def test_every_answer_is_nosniff(host: HostProcess) -> None:
    for path in ("/sync/bytes", "/async/generator", "/nonsense/sync/object", "/no-such", "/health", "/sync/none"):
        answer = host.get(AT + path)
        if answer.status != 204:
            assert answer.headers.get_all("X-Content-Type-Options") == ["nosniff"], path
    assert headers_of(host, X_Content_Type_Options="other").get_all("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize("kind", ["text/html", "TEXT/HTML; charset=utf-8", "application/xhtml+xml", "image/svg+xml"])
def test_what_a_browser_may_run_is_sandboxed(host: HostProcess, kind: str) -> None:
    assert headers_of(host, Content_Type=kind).get_all("Content-Security-Policy") == ["sandbox"]


def test_a_plugins_own_policy_cannot_lift_the_sandbox(host: HostProcess) -> None:
    policies = headers_of(host, Content_Type="text/html", Content_Security_Policy="sandbox allow-scripts")
    assert "sandbox" in (policies.get_all("Content-Security-Policy") or [])  # every policy is enforced


def test_json_and_text_are_not_sandboxed(host: HostProcess) -> None:
    assert "Content-Security-Policy" not in headers_of(host, Content_Type="application/json")
    assert "Content-Security-Policy" not in host.get(f"{AT}/sync/dict").headers


@pytest.mark.parametrize(
    ("cookie", "confined"),
    [
        ("a=1", f"a=1; Path={AT}/"),
        ("a=1; Path=/; Domain=example.com; HttpOnly", f"a=1; HttpOnly; Path={AT}/"),
        ("a=1; path=/plugins/r/other/", f"a=1; Path={AT}/"),
        (f"a=1; Path={AT}/below", f"a=1; Path={AT}/below"),
        (f"a=1; Path={AT}/../other", f"a=1; Path={AT}/"),
        (f"a=1; Path={AT}/%2e%2e/other", f"a=1; Path={AT}/"),
        ("a=1;DOMAIN=x;Path=/;Secure;SameSite=Lax", f"a=1; Secure; SameSite=Lax; Path={AT}/"),
    ],
)
def test_a_cookie_is_confined_to_the_workers_own_path(host: HostProcess, cookie: str, confined: str) -> None:
    assert headers_of(host, Set_Cookie=cookie).get_all("Set-Cookie") == [confined]


@pytest.mark.parametrize(
    "name",
    ["Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade", "Trailer", "TE", "Proxy-Authenticate", "Server"],
)
def test_hop_by_hop_headers_of_an_answer_are_dropped(host: HostProcess, name: str) -> None:
    headers = headers_of(host, **{name.replace("-", "_"): "chunked"})
    assert "chunked" not in (headers.get_all(name) or [])
    assert headers["Content-Length"] == "1"


@pytest.mark.parametrize("length", ["0", "1", "5000", "many", "-1"])
def test_the_length_of_a_whole_body_is_not_the_plugins_to_say(host: HostProcess, length: str) -> None:
    assert headers_of(host, Content_Length=length).get_all("Content-Length") == ["1"]
    big = host.get(f"{AT}/headers?Content-Length={length}&body={'x' * 30_000}")
    assert (big.status, len(big.body), big.headers["Content-Length"]) == (200, 30_000, "30000")


def test_hop_by_hop_headers_of_a_request_are_dropped(host: HostProcess) -> None:
    given = {
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "X-Kept": "2",
        "TE": "trailers",
        "Proxy-Authorization": "p",
    }
    seen = host.post(f"{AT}/seen/a/and/b", headers=given).json()["headers"]
    assert seen["x-kept"] == "2"
    assert not {"connection", "x-hop", "te", "proxy-authorization", "transfer-encoding"} & seen.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-A", "a\r\nSet-Cookie: evil=1"),
        ("X-A", "a\nX-Evil: 1"),
        ("X-A", "a\r\n\r\n<script>"),
        ("X-A: b\r\nX-Evil", "1"),
        ("X-A", "a\0"),
        ("Content-Length", "0\r\nX-Evil: 1"),
    ],
)
def test_a_worker_that_speaks_the_protocol_itself_cannot_inject_headers(
    host: HostProcess, name: str, value: str
) -> None:
    # The plugin has switched off the checks of its own process: the front's own are all that is left.
    answer = host.get(f"/plugins/r/forger/forged?name={_quoted(name)}&value={_quoted(value)}")
    if name == "Content-Length":  # never the plugin's, however it is spelt
        assert answer.body == b"x"
    else:
        assert (answer.status, list(answer.json())) == (502, ["error"])
    assert "X-Evil" not in answer.headers
    assert "Set-Cookie" not in answer.headers
    assert b"script" not in answer.body


# ---- at the same time


@pytest.mark.parametrize("way", ["sync", "async"])
def test_handlers_of_one_worker_run_at_the_same_time(host: HostProcess, way: str) -> None:
    with ThreadPoolExecutor(3) as pool:  # each waits for the other two
        answers = list(pool.map(lambda _: host.get(f"{AT}/meet/{way}"), range(3)))
    assert [answer.body for answer in answers] == [b"met"] * 3


@pytest.mark.parametrize("path", ["wait", "wait-stream", "endless", "blocked"])
def test_a_handler_whose_client_has_left_is_cancelled(host: HostProcess, path: str) -> None:
    name = f"leaving-{path}"
    connection = socket.create_connection(("127.0.0.1", host.port), LIMIT)
    connection.sendall(f"GET {AT}/{path}/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    wait_until(lambda: f"{name} began" in host.get(f"{AT}/events").json(), f"{name} began")
    connection.close()
    if path == "blocked":  # a thread cannot be interrupted: what it runs ends first
        host.post(f"{AT}/release/{name}")
    wait_until(lambda: f"{name} cancelled" in host.get(f"{AT}/events").json(), f"{name} cancelled")
    assert "closing a streamed answer failed" not in host.log


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_streamed_answer_arrives_as_it_is_produced(host: HostProcess, way: str) -> None:
    connection = host.connect()
    connection.request("GET", f"{AT}/live/{way}")
    response = connection.getresponse()
    assert response.read(5) == b"first"
    assert host.post(f"{AT}/release/{way}").status == 204  # only now can there be a second
    assert response.read() == b"second"
    connection.close()


def test_many_requests_on_one_connection(host: HostProcess) -> None:
    connection = host.connect()
    for number in range(20):
        connection.request("POST", f"{AT}/body", str(number))
        assert connection.getresponse().read() == str(number).encode()
    connection.close()


# ---- limits


LIMITED = (
    PREAMBLE
    + """
@route("POST", "/size")
async def size(req):
    return {"size": len(req.body)}

@route("GET", "/forever")
async def forever(req):
    await asyncio.Event().wait()

@route("GET", "/block")
def block(req):
    threading.Event().wait(30)

@route("GET", "/die")
async def die(req):
    os._exit(5)

ARRIVED = asyncio.Event()

@route("GET", "/stream-die")
async def stream_die(req):
    yield b"x"
    await ARRIVED.wait()
    os._exit(5)

@route("POST", "/arrived")
async def arrived(req):
    ARRIVED.set()

@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid()}
"""
    + PLUGIN
)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("limited")
    write_plugin(folder / "l", LIMITED)
    write_plugin(folder / "dies", LIMITED + "\n    def on_start(self, ctx):\n        os._exit(6)\n")
    write_plugin(folder / "broken", "import no_such_module")
    with hosting(folder, "--max-body", "100k", "--request-timeout", "1") as host:
        yield host


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(limited: HostProcess, chunked: bool) -> None:
    def post(size: int) -> tuple[int, Any]:
        connection = limited.connect()
        data = [b"x" * size] if chunked else b"x" * size
        headers = {"Transfer-Encoding": "chunked"} if chunked else {}
        connection.request("POST", "/plugins/l/a/size", data, headers, encode_chunked=chunked)
        response = connection.getresponse()
        answer = (response.status, json.loads(response.read()))
        connection.close()
        return answer

    assert post(100 << 10) == (200, {"size": 100 << 10})
    status, answer = post((100 << 10) + 1)
    assert (status, list(answer)) == (413, ["error"])
    assert post(4 << 20)[0] == 413


@pytest.mark.parametrize("path", ["forever", "block"])
def test_a_handler_over_its_time_is_504(limited: HostProcess, path: str) -> None:
    answer = limited.get(f"/plugins/l/slow-{path}/{path}", timeout=10)
    assert (answer.status, list(answer.json())) == (504, ["error"])
    assert limited.get(f"/plugins/l/slow-{path}/pid").status == 200


def test_a_worker_that_dies_in_a_request_is_502(limited: HostProcess) -> None:
    before = limited.get("/plugins/l/dying/pid").json()
    answer = limited.get("/plugins/l/dying/die")
    assert (answer.status, list(answer.json())) == (502, ["error"])
    assert limited.get("/plugins/l/dying/pid").json() != before


def test_a_worker_that_dies_in_a_stream_breaks_the_connection(limited: HostProcess) -> None:
    connection = limited.connect()
    connection.request("GET", "/plugins/l/dying-too/stream-die")
    response = connection.getresponse()
    assert response.read(1) == b"x"
    limited.post("/plugins/l/dying-too/arrived")
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    response.close()
    connection.close()


def test_a_worker_that_cannot_start_is_503(limited: HostProcess) -> None:
    answer = limited.get("/plugins/dies/a/pid")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    assert int(answer.headers["Retry-After"]) >= 1
    health = limited.get("/plugins/dies/a/health")
    assert (health.status, health.json()["status"], health.json()["state"]) == (503, "unhealthy", "error")
    assert health.json()["lastError"]


@pytest.mark.parametrize("path", ["pid", "metadata"])
def test_a_plugin_that_did_not_load_is_503(limited: HostProcess, path: str) -> None:
    answer = limited.get(f"/plugins/broken/a/{path}")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    assert "no_such_module" in answer.json()["error"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_full_queue_is_503_with_retry_after(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    write_plugin(
        tmp_path / "plugins" / "q",
        PREAMBLE
        + f"""
@route("GET", "/gated")
async def gated(req):
    req.ctx.logger.info("inside")
    while not os.path.exists({str(gate)!r}):
        await asyncio.sleep(0.01)
    return "done"
"""
        + PLUGIN,
    )
    host = serve(tmp_path / "plugins", "--max-requests", "1", "--max-queue", "1")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(host.get, "/plugins/q/a/gated")
        host.wait_for_log('"inside"')
        others = [pool.submit(host.get, "/plugins/q/a/gated") for _ in range(2)]
        done, waiting = concurrent.futures.wait(others, LIMIT, concurrent.futures.FIRST_COMPLETED)
        gate.touch()
        refused, queued = done.pop().result(), waiting.pop().result()
    assert (first.result().body, queued.body) == (b"done", b"done")
    assert (refused.status, list(refused.json())) == (503, ["error"])
    assert int(refused.headers["Retry-After"]) >= 1
