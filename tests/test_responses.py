"""What of a plugin's headers reaches the client."""

import pytest
from tornado.httputil import HTTPHeaders

from hayhost.responses import BadResponseError, plugin_headers, read_head, start_line, whole_head

BASE = "/plugins/p/acme/"


def sent(*given: tuple[str, str]) -> list[tuple[str, str]]:
    return [pair for pair in plugin_headers(given, BASE)[0].get_all() if pair[0] != "X-Content-Type-Options"]


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "Transfer-Encoding",
        "upgrade",
        "Keep-Alive",
        "Strict-Transport-Security",
        "Clear-Site-Data",
        "Service-Worker-Allowed",
        "Server",
        "Date",
        "Alt-Svc",
    ],
)
def test_headers_that_speak_for_the_connection_or_the_origin_are_dropped(name: str) -> None:
    assert sent(("content-type", "application/json"), (name, "x")) == [("Content-Type", "application/json")]


def test_other_headers_pass() -> None:
    given = [("content-type", "text/plain; charset=utf-8"), ("x-a", "1"), ("x-a", "2"), ("location", "/x")]
    assert sorted(sent(*given)) == sorted((name.title(), value) for name, value in given)


@pytest.mark.parametrize(
    ("kind", "sandboxed"),
    [
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("image/svg+xml", True),
        ("application/xhtml+xml", True),
        ("text/xml", True),
        ("text/plainhtml", True),
        ("", True),
        ("application/json", False),
        ("text/plain; charset=utf-8", False),
        ("text/event-stream", False),
        ("image/png", False),
    ],
)
def test_what_a_browser_could_run_is_sandboxed(kind: str, sandboxed: bool) -> None:
    headers, _ = plugin_headers([("content-type", kind)] if kind else [], BASE)
    assert (headers.get("Content-Security-Policy") == "sandbox") is sandboxed
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_policy_of_the_plugins_own_is_kept_beside_the_sandbox() -> None:
    headers, _ = plugin_headers([("content-type", "text/html"), ("content-security-policy", "img-src *")], BASE)
    assert headers.get_list("Content-Security-Policy") == ["img-src *", "sandbox"]


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        ("a=b", "a=b; Path=/plugins/p/acme/"),
        ("a=b; Path=/", "a=b; Path=/plugins/p/acme/"),
        ("a=b; path=/plugins/p/other/", "a=b; Path=/plugins/p/acme/"),
        ("a=b; Path=/plugins/p/acme/../other/", "a=b; Path=/plugins/p/acme/"),
        ("a=b; Path=/plugins/p/acme/%2e%2e/", "a=b; Path=/plugins/p/acme/"),
        ("a=b; Path=/plugins/p/acme/sub; HttpOnly", "a=b; HttpOnly; Path=/plugins/p/acme/sub"),
        ("a=b; Domain=example.com; Secure; SameSite=Lax", "a=b; Secure; SameSite=Lax; Path=/plugins/p/acme/"),
        ("a=b; DOMAIN = evil ; path = /", "a=b; Path=/plugins/p/acme/"),
    ],
)
def test_cookies_are_confined(cookie: str, expected: str) -> None:
    assert sent(("set-cookie", cookie), ("content-type", "text/plain"))[0] == ("Set-Cookie", expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a b", "x"),
        ("", "x"),
        ("a:", "x"),
        ("x", "a\r\nb: c"),
        ("x", "a\nb"),
        ("x", "\0"),
        ("x", "☃"),
        ("content-length", "-1"),
        ("content-length", "1_0"),
        ("content-length", "٣"),
        ("content-length", "9" * 19),
    ],
)
def test_what_is_not_a_header_is_refused(name: str, value: str) -> None:
    with pytest.raises(BadResponseError):
        plugin_headers([(name, value)], BASE)


def test_two_lengths_are_refused() -> None:
    with pytest.raises(BadResponseError):
        plugin_headers([("content-length", "1"), ("Content-Length", "1")], BASE)
    assert plugin_headers([("content-length", "17")], BASE)[1] == 17


def test_request_headers_lose_what_concerns_the_connection() -> None:
    headers = HTTPHeaders({"Connection": "close, X-Drop", "X-Drop": "1", "TE": "trailers", "X-Keep": "2", "Host": "h"})
    assert sorted(read_head(headers).for_plugin) == [("host", "h"), ("x-keep", "2")]


def test_an_unknown_status_has_a_reason_all_the_same() -> None:
    assert start_line(299)[1:] == (299, "Unknown")
    assert start_line(404)[2] == "Not Found"


def test_what_a_proxy_says_counts_only_if_it_is_believed() -> None:
    headers = HTTPHeaders({"X-Forwarded-For": "1.2.3.4", "Forwarded": "for=x", "Host": "h"})
    assert read_head(headers).for_plugin == [("host", "h")]
    assert len(read_head(headers, forwarded=True).for_plugin) == 3


def test_a_token_of_the_hosts_is_not_for_the_plugin() -> None:
    headers = HTTPHeaders({"Authorization": "Bearer mine"})
    assert read_head(headers).for_plugin == [("authorization", "Bearer mine")]
    headers.add("Authorization", "Bearer hay_0123456789abcdef_secret")
    assert read_head(headers).for_plugin == []


@pytest.mark.parametrize("given", [("set-cookie", "a=b"), ("Set-Cookie", "a=b")])
def test_a_head_that_is_remembered_has_nothing_of_another_org(given: tuple[str, str]) -> None:
    for org in ("acme", "other"):
        assert f"Path=/plugins/p/{org}/\r\n".encode() in whole_head(200, [given], f"/plugins/p/{org}/")


def test_a_whole_head_is_what_a_streamed_one_would_be() -> None:
    given = [("content-type", "text/html"), ("X-A", "\xe9"), ("connection", "close"), ("content-length", "7")]
    lines = whole_head(299, given, BASE).decode("latin-1").split("\r\n")
    assert lines[0] == "HTTP/1.1 299 Unknown"
    assert lines[1:-1] == [f"{name}: {value}" for name, value in plugin_headers(given, BASE)[0].get_all()]


@pytest.mark.parametrize("given", [("x\n", "1"), ("x", "1\r\nset-cookie: a=b")])
def test_a_whole_head_has_no_more_lines_than_headers(given: tuple[str, str]) -> None:
    for _ in range(2):  # nor does it once it is known
        with pytest.raises(BadResponseError):
            whole_head(200, [given], BASE)
