"""Which of a plugin's routes a path is."""

from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

from hayhost.sdk._registry import RESERVED_PATHS

__all__ = ["HOST_ROUTES", "Match", "RouteTable"]

HOST_ROUTES = {
    "/metadata": "GET",
    "/health": "GET",
    "/validate-auth": "POST",
    "/config-update": "POST",
    "/disable": "POST",
    "/mcp/list-tools": "GET",
    "/mcp/call-tool": "POST",
}
"""The host's own paths below a worker's root, and the method each answers."""


class Match(NamedTuple):
    """``route`` is the route's place in the order of registration; ``params`` are names and values in turn."""

    route: int
    params: list[str]


class _Node:
    __slots__ = ("children", "methods", "wildcard")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.wildcard: _Node | None = None
        self.methods: dict[str, tuple[int, list[str]]] = {}


class RouteTable:
    """Finds routes by path segments. A literal segment wins over a parameter, at every depth."""

    def __init__(self, routes: Iterable[tuple[str, str]] = ()) -> None:
        self._root = _Node()
        self._literal: dict[str, _Node] = {}
        for index, (method, path) in enumerate(routes):
            if path in RESERVED_PATHS:
                continue
            node, names = self._root, []
            for segment in path[1:].split("/"):
                if segment.startswith("{"):
                    names.append(segment[1:-1])
                    node.wildcard = node = node.wildcard or _Node()
                else:
                    node = node.children.setdefault(segment, _Node())
            node.methods[method] = (index, names)
            if not names:
                self._literal[path] = node

    def match(self, method: str, path: str) -> Match | frozenset[str]:
        """The route of ``method path`` (HEAD counts as GET), or the methods that the path has: none, if it is unknown.

        Segments are compared as they were sent; a parameter's value is percent-decoded once.
        """
        if method == "HEAD":
            method = "GET"
        node = self._literal.get(path)
        if node is not None and method in node.methods:
            return Match(node.methods[method][0], [])
        if path in RESERVED_PATHS:  # not a parameter's value either
            return frozenset()
        allowed: set[str] = set()
        for node, values in _walk(self._root, path[1:].split("/"), 0, []):
            if method in node.methods:
                index, names = node.methods[method]
                return Match(index, [text for pair in zip(names, values, strict=True) for text in pair])
            allowed.update(node.methods)
        if "GET" in allowed:
            allowed.add("HEAD")
        return frozenset(allowed)


_MAX_SEGMENTS = 64


def _walk(node: _Node, segments: list[str], at: int, values: list[str]) -> "Iterable[tuple[_Node, list[str]]]":
    if len(segments) > _MAX_SEGMENTS:
        return
    if at == len(segments):
        if node.methods:
            yield node, values
        return
    segment = segments[at]
    if (child := node.children.get(segment)) is not None:
        yield from _walk(child, segments, at + 1, values)
    if node.wildcard is not None and segment:
        yield from _walk(node.wildcard, segments, at + 1, [*values, unquote(segment, errors="replace")])
