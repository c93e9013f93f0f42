"""The table of states."""

import itertools

import pytest

from hayhost.states import IllegalTransitionError, Lifecycle, WorkerState

S = WorkerState
LEGAL = {
    (S.STOPPED, S.STARTING),
    (S.STARTING, S.READY),
    (S.STARTING, S.DEGRADED),
    (S.STARTING, S.DRAINING),
    (S.STARTING, S.STOPPED),
    (S.READY, S.DRAINING),
    (S.DEGRADED, S.DRAINING),
    (S.DRAINING, S.STOPPED),
    (S.ERROR, S.STARTING),
    (S.ERROR, S.STOPPED),
    *((state, S.ERROR) for state in S if state is not S.ERROR),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(S, S)), ids=lambda state: state.label)
def test_every_transition(old: WorkerState, new: WorkerState) -> None:
    lifecycle = Lifecycle(old)
    lifecycle.why = "before"
    if (old, new) in LEGAL:
        lifecycle.to(new, "after")
        assert (lifecycle.state, lifecycle.why) == (new, "after")
    else:
        with pytest.raises(IllegalTransitionError, match=f"{old.label} -> {new.label}"):
            lifecycle.to(new, "after")
        assert (lifecycle.state, lifecycle.why) == (old, "before")


def test_only_ready_and_degraded_serve() -> None:
    assert {state for state in S if state.serving} == {S.READY, S.DEGRADED}
    assert {state for state in S if state.health == "unhealthy"} == {S.ERROR}
