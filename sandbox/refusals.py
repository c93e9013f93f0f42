"""What a plugin's author is told when the sandbox has refused something: which permission to ask for.

The kernel only says EPERM. Where a call can be told to be refused before it is made, the exception says why; for
everything else ``hint`` finds words for the log.
"""

import _posixsubprocess
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from .confinement import Plan

__all__ = ["hint", "install"]

_PROGRAMS: Final = 'a plugin may start programs only if its manifest asks for it: permissions.subprocess = ["git"]'
_LISTED: Final = "a plugin may start only the programs that its manifest lists in permissions.subprocess"
_FILES: Final = "a plugin may read its own folder, and may write only to the folder that tempfile.gettempdir() names"
_SPAWNERS: Final = ("execv", "execve", "fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen")


def install(plan: Plan) -> None:
    """Have the functions that start programs say why they do not. In the worker, where nothing of ours forks."""
    if "seccomp" not in plan.layers or plan.programs:
        return

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EPERM, _PROGRAMS)

    modules: Sequence[tuple[str, Sequence[str]]] = (("os", _SPAWNERS), ("posix", _SPAWNERS))
    for module, names in modules:
        for name in names:
            if hasattr(sys.modules[module], name):
                setattr(sys.modules[module], name, refuse)
    spawn: Callable[..., Any] = refuse
    _posixsubprocess.fork_exec = spawn
    if "subprocess" in sys.modules:
        sys.modules["subprocess"]._fork_exec = spawn  # type: ignore[attr-defined]  # its own name for the same


def hint(error: BaseException, plan: Plan) -> str:
    """What may help an author whose plugin met ``error``; empty if the sandbox has nothing to do with it."""
    if not plan.layers:
        return ""
    match error:
        case MemoryError():
            return "permissions.memory in the manifest can ask for more"
        case RuntimeError() if "can't start new thread" in str(error):
            return "permissions.memory and permissions.processes in the manifest can ask for more"
        case OSError(errno=errno.EMFILE):
            return "permissions.files in the manifest can ask for more"
        case OSError(errno=errno.EDQUOT | errno.ENOSPC | errno.EFBIG):
            return f"a worker's scratch folder holds {plan.scratch_size >> 20} MiB"
        case OSError(errno=errno.EPERM | errno.EACCES | errno.ENOENT) if _starts_program(error):
            return _LISTED
        case OSError(errno=errno.EPERM | errno.EACCES | errno.EROFS, filename=str()):
            return _FILES
        case OSError(errno=errno.ENOENT, filename=str(name)) if os.path.isabs(name) and not _visible(name, plan):
            return _FILES
    return ""


def _starts_program(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "_execute_child"  # of subprocess.Popen


def _visible(name: str, plan: Plan) -> bool:
    return any((name + "/").startswith(tree + "/") for tree in (*plan.trees, *plan.writable, plan.scratch))
