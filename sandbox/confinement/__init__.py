"""The one place where a child gives up what it does not need.

``before_import`` runs in the plugin zygote before the first line of the plugin; ``after_fork`` runs in the worker
before it hears whose it is. Both run with one thread. Each layer is a module of this package; ``Plan`` says which of
them are to be put on, and the front has made sure that this machine has them.
"""

import os
import sys

from . import landlock, limits, privileges, seccomp
from .descriptors import close_all_but
from .environment import MINIMAL_ENVIRONMENT
from .plan import LAYERS, UNCONFINED, Layer, Level, Plan, level_of

__all__ = [
    "LAYERS",
    "MINIMAL_ENVIRONMENT",
    "UNCONFINED",
    "Layer",
    "Level",
    "Plan",
    "after_fork",
    "before_import",
    "level_of",
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
        _restrict(plan, plan.scratch)
    if "seccomp" in plan.layers:
        seccomp.install(seccomp.for_process(plan.zygote_filter, os.getpid()))


def after_fork(plan: Plan, keep: set[int], scratch: str) -> None:
    """Confine a worker further: nothing of the zygote's, and of the scratch folders its own alone, is within reach."""
    close_all_but(keep)
    if scratch:
        os.environ["HOME"] = os.environ["TMPDIR"] = scratch
        if "tempfile" in sys.modules:
            vars(sys.modules["tempfile"])["tempdir"] = None  # it may have looked in the zygote's environment
    if "landlock" in plan.layers:
        _restrict(plan, scratch)
    if "seccomp" in plan.layers:
        seccomp.install(seccomp.for_process(plan.worker_filter, os.getpid()))


def _restrict(plan: Plan, scratch: str) -> None:
    writable = (*plan.writable, *([scratch] if scratch else ()))
    landlock.restrict((*plan.readable, *_DEVICES, *writable), (*writable, "/dev/null"), plan.programs)
