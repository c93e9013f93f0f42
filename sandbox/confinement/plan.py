"""What a plugin's processes are confined to: decided in the front, carried out in the children."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, get_args

from .limits import Limits

__all__ = ["LAYERS", "UNCONFINED", "Layer", "Level", "Plan", "level_of"]

Layer = Literal["limits", "landlock", "seccomp", "namespaces", "cgroups", "uid", "inspection"]
LAYERS: Final[tuple[Layer, ...]] = get_args(Layer)


class Level(IntEnum):
    """How much a worker is confined; each level has the layers of those below it."""

    NONE = 0
    LIMITED = 1
    CONFINED = 2
    NAMESPACED = 3
    HARDENED = 4

    @property
    def label(self) -> str:
        """As it is called in settings and in ``/health``."""
        return self.name.lower()

    @property
    def layers(self) -> frozenset[Layer]:
        """The layers that it takes."""
        return _NEEDS[self]


_NEEDS: Final[dict[Level, frozenset[Layer]]] = {
    Level.NONE: frozenset(),
    Level.LIMITED: frozenset({"limits"}),
    Level.CONFINED: frozenset({"limits", "landlock", "seccomp"}),
    Level.NAMESPACED: frozenset({"limits", "landlock", "seccomp", "namespaces"}),
    Level.HARDENED: frozenset({"limits", "landlock", "seccomp", "namespaces", "cgroups", "uid"}),
}


def level_of(layers: Iterable[Layer]) -> Level:
    """The highest level all of whose layers are among ``layers``."""
    given = frozenset(layers)
    return max(level for level in Level if level.layers <= given)


@dataclass(frozen=True, slots=True)
class Plan:
    """The confinement of one plugin version: of its zygote and of every worker."""

    layers: frozenset[Layer] = frozenset()
    trees: tuple[str, ...] = ()
    """Folders and files that may be read: the plugin, the interpreter, what both need; as they are called there."""
    readable: tuple[str, ...] = ()
    """The same, symbolic links resolved, and none below another."""
    writable: tuple[str, ...] = ()
    """Folders that the operator lets plugins write to, besides their scratch folders."""
    programs: tuple[str, ...] = ()
    """Files that may be executed; none without the manifest's ``subprocess``."""
    proxied: bool = False
    """Whether programs reach the network by a proxy of the broker's, on a port in the namespaces that is each worker's
    own."""
    scratch: str = ""
    """The folder that the workers' scratch folders are in."""
    scratch_size: int = 0
    limits: Limits = ()
    memory: int = 0
    """Bytes that a worker and all that it starts may use, where a cgroup counts them."""
    processes: int = 0
    """Processes and threads of a worker, counted likewise."""
    uid: int | None = None
    """The plugin's own user and group."""
    zygote_filter: bytes = b""
    worker_filter: bytes = b""

    @property
    def level(self) -> Level:
        """What the layers amount to."""
        return level_of(self.layers)


UNCONFINED: Final = Plan()
