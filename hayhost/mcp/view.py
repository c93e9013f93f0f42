"""What clients of one endpoint see: the tools, prompts and resources of several servers in one list each."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from hayhost.installs import ToolLists

from .listings import Served, Shelf
from .names import Origin, assign
from .shape import KEYS

__all__ = ["ALL", "Entry", "View"]

ALL: Final = frozenset({"tools", "prompts", "resources", "completions", "logging"})
"""The capabilities that a server may have."""

_MOST_INSTRUCTIONS: Final = 32 << 10


class Entry(NamedTuple):
    """Something listed, as clients see it, and whose it is."""

    shelf: Shelf
    served: Served
    name: str
    """What its server calls it."""
    item: dict[str, Any]


class View:
    """The lists of ``shelves`` as one. With ``with_plugin``, names begin with the plugin's. ``revision`` is
    another one for every other content."""

    def __init__(self, shelves: Sequence[Shelf], lists: ToolLists, revision: str, *, with_plugin: bool) -> None:
        self.revision = revision
        self._shelves = shelves
        self._servers = [(shelf, served) for shelf in shelves for served in shelf.servers.values()]
        self.tools = self._named("tools/list", lists, with_plugin)
        self.prompts = self._named("prompts/list", None, with_plugin)
        self.resources: dict[str, Entry] = {}
        self.templates: dict[str, Entry] = {}
        for method, key, found in (
            ("resources/list", "uri", self.resources),
            ("resources/templates/list", "uriTemplate", self.templates),
        ):
            for shelf, served in self._servers:
                for item in served.lists[method].entries:  # of two servers with one address, the first has it
                    origin = Origin(shelf.plugin.name, served.id, item["name"])
                    found.setdefault(item[key], Entry(shelf, served, item[key], _marked(item, item["name"], origin)))
        listed = (self.tools, self.prompts, self.resources, self.templates)
        self.items = {
            method: [entry.item for entry in entries.values()] for method, entries in zip(KEYS, listed, strict=True)
        }

    def _named(self, method: str, lists: ToolLists | None, with_plugin: bool) -> dict[str, Entry]:
        entries = {
            Origin(shelf.plugin.name, served.id, item["name"]): (shelf, served, item)
            for shelf, served in self._servers
            for item in served.lists[method].entries
            if lists is None or lists.allows(shelf.plugin.name, item["name"])
        }
        named: dict[str, Entry] = {}
        for name, origin in assign(entries, with_plugin=with_plugin).items():
            shelf, served, item = entries[origin]
            named[name] = Entry(shelf, served, origin.name, _marked(item, name, origin))
        return named

    @property
    def problem(self) -> str:
        """Why there may be more than these; empty if all that there is is known."""
        for shelf in self._shelves:
            if not shelf.known:
                return shelf.problem or f"The MCP servers of {shelf.plugin.name} have not said yet what they have"
            for served in shelf.servers.values():
                if served.changes < 0:
                    return f"The MCP server {served.id} did not say what it has"
        return ""

    @property
    def capabilities(self) -> frozenset[str]:
        """What any of the servers can do."""
        return frozenset(name for _, served in self._servers for name in ALL if name in served.capabilities)

    @property
    def instructions(self) -> str | None:
        """What the servers say of how to use them."""
        said = [
            (shelf.plugin.manifest.display_name, served.instructions)
            for shelf, served in self._servers
            if served.instructions
        ]
        text = said[0][1] if len(said) == 1 else "\n\n".join(f"# {name}\n\n{text}" for name, text in said)
        return text[:_MOST_INSTRUCTIONS] or None

    def resource(self, uri: str) -> tuple[Shelf, Served] | None:
        """Whose ``uri`` is: who lists it, else has a template for it, else the only one that has resources."""
        if (entry := self.resources.get(uri)) is not None:
            return entry.shelf, entry.served
        for template, entry in self.templates.items():
            if uri == template or _fits(template, uri):
                return entry.shelf, entry.served
        able = [owner for owner in self._servers if "resources" in owner[1].capabilities]
        return able[0] if len(able) == 1 else None

    def with_capability(self, name: str) -> Iterable[tuple[Shelf, Served]]:
        """The servers that can do it."""
        return (owner for owner in self._servers if name in owner[1].capabilities)


def _marked(item: dict[str, Any], name: str, origin: Origin) -> dict[str, Any]:
    meta = item.get("_meta") or {}
    ours = {"hayhost/plugin": origin.plugin, "hayhost/server": origin.server, "hayhost/name": origin.name}
    return {**item, "name": name, "_meta": {**meta, **ours}}


def _fits(template: str, uri: str) -> bool:
    """Whether ``uri`` may be one of ``template`` (RFC 6570): each expression stands for anything."""
    first, *rest = [part.rpartition("}")[2] for part in template.split("{")]
    if not rest or not uri.startswith(first):
        return False
    at = len(first)
    for literal in rest[:-1]:
        at = uri.find(literal, at)
        if at < 0:
            return False
        at += len(literal)
    return len(uri) - at >= len(rest[-1]) and uri.endswith(rest[-1])
