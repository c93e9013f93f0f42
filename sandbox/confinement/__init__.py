"""The one place where a child gives up what it does not need.

``before_import`` runs in the plugin zygote before the first line of the plugin; ``after_fork`` runs in the worker
before it hears whose it is, with what ``Prepared`` has done in the zygote. All run with one thread. Each layer is a
module of this package; ``Plan`` says which of them are to be put on, and the front has made sure that this machine has
them.
"""

from . import landlock, limits, privileges, seccomp
from .descriptors import close_all_but
from .environment import MINIMAL_ENVIRONMENT, program_path
from .plan import LAYERS, UNCONFINED, Layer, Level, Plan, level_of

__all__ = [
    "LAYERS",
    "MINIMAL_ENVIRONMENT",
    "UNCONFINED",
    "Layer",
    "Level",
    "Plan",
    "Prepared",
    "after_fork",
    "before_import",
    "level_of",
    "program_path",
]

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def before_import(plan: Plan, keep: set[int]) -> None:
    """Confine a plugin zygote: only the standard streams and the descriptors in ``keep`` stay open.

    Raises ``OSError`` if a layer of ``plan`` cannot be put on.
    """
    close_all_but(keep)
    if not plan.layers:
        return
    limits.apply(plan.limits)
    if plan.uid is not None:
        privileges.become(plan.uid)
    privileges.drop_capabilities()
    privileges.forbid_new()
    if "landlock" in plan.layers:
        ruleset = _ruleset(plan, connects=plan.proxied)  # which port it is, only a worker knows
        ruleset.grant(writable=[plan.scratch])
        ruleset.restrict()
    if "seccomp" in plan.layers:
        seccomp.Filter(plan.zygote_filter).install()


class Prepared:
    """What one worker is to put on, made ready in its zygote, so that no request waits for that.

    The workers share no ruleset: what one adds to it would hold for the others as well. Raises ``OSError``.
    """

    def __init__(self, plan: Plan) -> None:
        self.ruleset = _ruleset(plan) if "landlock" in plan.layers else None
        self.filter = seccomp.Filter(plan.worker_filter) if "seccomp" in plan.layers else None

    def close(self) -> None:
        """Let go of it, in this process. Closing twice is safe."""
        if self.ruleset is not None:
            self.ruleset.close()


def after_fork(prepared: Prepared, keep: set[int], scratch: str, proxy: int = 0) -> None:
    """Confine a worker further: nothing of the zygote's, and of the scratch folders and the ports of proxies its own
    alone, is within reach. ``proxy`` is that port, or 0."""
    if prepared.ruleset is not None:
        prepared.ruleset.grant(writable=[scratch])
        if proxy:
            prepared.ruleset.grant_connecting(proxy)
        prepared.ruleset.restrict()
    close_all_but(keep)
    if prepared.filter is not None:
        prepared.filter.install()


def _ruleset(plan: Plan, *, connects: bool = False) -> landlock.Ruleset:
    ruleset = landlock.Ruleset(connects=connects)
    ruleset.grant((*plan.readable, *_DEVICES), (*plan.writable, "/dev/null"), plan.programs)
    return ruleset
