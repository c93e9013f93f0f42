"""The one place where a child gives up what it does not need.

``before_import`` runs in the plugin zygote before the first line of the plugin; ``after_fork`` runs in the worker
before it hears whose it is. Both run with one thread. Each layer is a module of this package.
"""

from .descriptors import close_all_but
from .environment import MINIMAL_ENVIRONMENT

__all__ = ["MINIMAL_ENVIRONMENT", "after_fork", "before_import", "level"]


def before_import(keep: set[int]) -> None:
    """Confine a plugin zygote: only the standard streams and the descriptors in ``keep`` stay open."""
    close_all_but(keep)


def after_fork(keep: set[int]) -> None:
    """Confine a worker further: as ``before_import``, and nothing of the zygote's stays within reach."""
    close_all_but(keep)


def level() -> str:
    """The isolation level that the layers above amount to."""
    return "none"
