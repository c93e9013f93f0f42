"""The route table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayhost.routes import HOST_ROUTES, Match, RouteTable
from hayhost.sdk._registry import RESERVED_PATHS

TABLE = RouteTable(
    [
        ("GET", "/"),
        ("GET", "/items"),
        ("POST", "/items"),
        ("GET", "/items/{id}"),
        ("GET", "/items/new"),
        ("DELETE", "/items/{id}/tags/{tag}"),
        ("PUT", "/items/new/tags/{tag}"),
        ("GET", "/metadata"),
        ("GET", "/slash/"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/", Match(0, [])),
        ("HEAD", "/", Match(0, [])),
        ("GET", "/items", Match(1, [])),
        ("POST", "/items", Match(2, [])),
        ("GET", "/items/7", Match(3, ["id", "7"])),
        ("GET", "/items/a%2Fb%20c", Match(3, ["id", "a/b c"])),
        ("GET", "/items/%2e%2e", Match(3, ["id", ".."])),
        ("GET", "/items/%ff", Match(3, ["id", "\ufffd"])),
        ("GET", "/items/new", Match(4, [])),
        ("DELETE", "/items/7/tags/x", Match(5, ["id", "7", "tag", "x"])),
        ("DELETE", "/items/new/tags/x", Match(5, ["id", "new", "tag", "x"])),
        ("PUT", "/items/new/tags/x", Match(6, ["tag", "x"])),
        ("GET", "/items/", frozenset()),
        ("GET", "/items//tags", frozenset()),
        ("GET", "//items", frozenset()),
        ("GET", "/Items", frozenset()),
        ("GET", "/slash", frozenset()),
        ("GET", "/slash/", Match(8, [])),
        ("GET", "/metadata", frozenset()),
        ("PATCH", "/items", frozenset({"GET", "HEAD", "POST"})),
        ("OPTIONS", "/items/new", frozenset({"GET", "HEAD"})),
        ("GET", "/" + "a/" * 5_000, frozenset()),
    ],
)
def test_match(method: str, path: str, expected: object) -> None:
    assert TABLE.match(method, path) == expected


@given(st.text(max_size=60).map(lambda text: "/" + text))
def test_no_path_raises(path: str) -> None:
    found = TABLE.match("GET", path)
    assert isinstance(found, Match | frozenset)


def test_the_hosts_paths_are_the_ones_that_plugins_cannot_reach() -> None:
    assert set(HOST_ROUTES) <= RESERVED_PATHS
