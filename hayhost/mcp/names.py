"""The names under which tools and prompts of several servers stand in one list."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = ["MAX_NAME", "Origin", "assign"]

MAX_NAME: Final = 64
"""Characters in a name: what all model providers take."""

_SEPARATOR: Final = "__"
_PLAIN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME}}}")
_HASH: Final = 10


class Origin(NamedTuple):
    """Whose a tool or prompt is, and what its server calls it."""

    plugin: str
    server: str
    name: str


def assign(origins: Iterable[Origin], *, with_plugin: bool) -> dict[str, Origin]:
    """A name for each of ``origins``, no two the same, and fit for all model providers if ``with_plugin``.

    It is ``plugin__name``, or ``plugin__server__name`` if several servers of the plugin have that name, and depends on
    nothing of another plugin; without ``with_plugin`` it is ``name`` or ``server__name``, as it is. What is longer than
    ``MAX_NAME`` or has other characters than A-Z a-z 0-9 _ - is shortened and given a hash of the whole.
    """
    unique = list(dict.fromkeys(origins))
    shared = Counter((origin.plugin, origin.name) for origin in unique)
    named: dict[str, Origin] = {}
    for origin in unique:
        parts = [origin.server, origin.name] if shared[origin.plugin, origin.name] > 1 else [origin.name]
        name = _SEPARATOR.join([origin.plugin, *parts] if with_plugin else parts)
        if with_plugin and not _PLAIN.fullmatch(name):
            name = _shortened(name, origin)
        for again in range(1, len(unique) + 1):  # a server may choose names that look like made ones
            if name not in named:
                break
            name = _shortened(name, origin, again)
        named[name] = origin
    return named


def _shortened(name: str, origin: Origin, again: int = 0) -> str:
    digest = hashlib.sha256("\0".join([*origin, str(again)]).encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]
    return f"{re.sub('[^A-Za-z0-9_-]', '_', name)[: MAX_NAME - _HASH - 1]}_{digest}"
