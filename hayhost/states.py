"""The states of an org's plugin, and which may follow which. No I/O here."""

import time
from enum import Enum
from typing import Final

__all__ = ["IllegalTransitionError", "Lifecycle", "WorkerState"]


class WorkerState(Enum):
    """A state of a worker; the members carry what follows from being in it."""

    STOPPED = ("stopped", False, "healthy")
    STARTING = ("starting", False, "healthy")
    READY = ("ready", True, "healthy")
    DEGRADED = ("degraded", True, "degraded")
    DRAINING = ("draining", False, "healthy")
    ERROR = ("error", False, "unhealthy")

    def __init__(self, label: str, serving: bool, health: str) -> None:
        self.label = label
        self.serving = serving
        """Whether new requests may be given to it."""
        self.health = health
        """What ``GET /health`` calls it."""


_S = WorkerState
_NEXT: Final[dict[WorkerState, frozenset[WorkerState]]] = {
    _S.STOPPED: frozenset({_S.STARTING, _S.ERROR}),
    _S.STARTING: frozenset({_S.READY, _S.DEGRADED, _S.DRAINING, _S.STOPPED, _S.ERROR}),
    _S.READY: frozenset({_S.DRAINING, _S.ERROR}),
    _S.DEGRADED: frozenset({_S.DRAINING, _S.ERROR}),
    _S.DRAINING: frozenset({_S.STOPPED, _S.ERROR}),
    _S.ERROR: frozenset({_S.STARTING, _S.STOPPED}),
}


class IllegalTransitionError(Exception):
    """A state was asked for that cannot follow the current one; nothing has changed."""


class Lifecycle:
    """A state with why it is so and since when (seconds since the epoch)."""

    __slots__ = ("since", "state", "why")

    def __init__(self, state: WorkerState = WorkerState.STOPPED) -> None:
        self.state = state
        self.why = ""
        self.since = time.time()

    def to(self, state: WorkerState, why: str = "") -> None:
        """Move to ``state``. Raises ``IllegalTransitionError`` if the table does not have it."""
        if state not in _NEXT[self.state]:
            raise IllegalTransitionError(f"{self.state.label} -> {state.label}")
        self.state, self.why, self.since = state, why, time.time()
