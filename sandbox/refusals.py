"""What a plugin's author is told when the sandbox has refused something: which permission to ask for.

The kernel only says EPERM. Where a call can be told to be refused before it is made, the exception says why; for
everything else ``hint`` finds words for the log.
"""

import _posixsubprocess
import errno
import functools
import logging
import os
import posix
import stat
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from .confinement import Plan

__all__ = ["hint", "install", "refuse_forks"]

_PROGRAMS: Final = 'a plugin may start programs only if its manifest asks for it: permissions.subprocess = ["git"]'
_LISTED: Final = "a plugin may start only the programs that its manifest lists in permissions.subprocess"
_FILES: Final = "a plugin may read its own folder, and may write only to the folder that tempfile.gettempdir() names"
_SEMAPHORES: Final = "a plugin has no semaphores that processes share: use threads, with threading.Lock and queue.Queue"
_REFUSED: Final = "the sandbox does not let plugins do this, and no permission does"
_LOADING: Final = (
    "while it loads, a plugin may read its own folder and write nowhere: what writes belongs into on_start or later"
)
_CHAIN: Final = 8
_OTHERS: Final = "the plugin runs as a user of its own, and other users may not read this file: chmod o+r"
_SYNCHRONIZE: Final = "/multiprocessing/synchronize.py"
_NOT_STARTED: Final = (126, 127)
_SPAWNERS: Final = ("execv", "execve", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen")


def install(plan: Plan) -> None:
    """Have functions of Python put up with what is refused, or say why. In the zygote, for its workers as well."""
    if "seccomp" not in plan.layers:
        return
    if "namespaces" not in plan.layers:
        for name in ("chmod", "utime"):
            _tolerate(name, tuple(f"{os.path.realpath(folder)}/" for folder in (plan.scratch, *plan.writable)))
    if plan.programs:
        _explain_system()
    else:
        _refuse_programs()


def _tolerate(name: str, folders: tuple[str, ...]) -> None:
    """Have ``os.<name>`` do nothing in ``folders`` where it is refused.

    Landlock does not govern it, so without a private root it is refused everywhere, and with it ``shutil.copy`` and
    ``copytree``. Modes and times matter little there: the folders are the worker's own, or meant to be shared.
    """
    original: Callable[..., None] = getattr(os, name)

    @functools.wraps(original)
    def tolerant(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
        try:
            original(path, *args, dir_fd=dir_fd, **kwargs)
        except PermissionError:
            if isinstance(path, int) or dir_fd is not None:
                raise
            os.lstat(path)
            if not f"{os.path.realpath(os.fsdecode(path))}/".startswith(folders):
                raise

    for supported in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in supported:
            supported.add(tolerant)  # shutil looks there
    setattr(os, name, tolerant)


def refuse_forks(plan: Plan) -> None:
    """The same for ``os.fork``, in the worker, where nothing of ours forks."""
    if "seccomp" in plan.layers and not plan.programs:
        _replace("fork")


def _refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError(errno.EPERM, _PROGRAMS)


def _refuse_programs() -> None:
    _replace(*_SPAWNERS)
    spawn: Callable[..., Any] = _refuse
    _posixsubprocess.fork_exec = spawn
    if "subprocess" in sys.modules:
        sys.modules["subprocess"]._fork_exec = spawn  # type: ignore[attr-defined]  # its own name for the same


def _explain_system() -> None:
    """Have ``os.system`` log why a program did not start: there is only the shell's exit code to tell it by."""
    original = os.system

    @functools.wraps(original)
    def system(command: Any) -> int:
        status = original(command)
        if status >= 0 and os.waitstatus_to_exitcode(status) in _NOT_STARTED:
            logging.getLogger("os.system").warning(
                "%.200r did not start: %s; os.system needs sh there, too", command, _LISTED
            )
        return status

    os.system = system


def _replace(*names: str) -> None:
    for module in (os, posix):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, _refuse)


def hint(error: BaseException, plan: Plan, *, loading: bool = False) -> str:
    """What may help an author whose plugin met ``error``; empty if the sandbox has nothing to do with it.

    ``loading`` while the plugin is imported and in ``on_initialize``.
    """
    for _ in range(_CHAIN if plan.layers else 0):
        if help := _hint(error, plan):
            return _LOADING if loading and help == _FILES else help
        before = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or before or error  # libraries raise errors of their own instead
    return ""


def _hint(error: BaseException, plan: Plan) -> str:
    match error:
        case MemoryError():
            return "permissions.memory in the manifest can ask for more"
        case RuntimeError() if "can't start new thread" in str(error):
            return "permissions.memory and permissions.processes in the manifest can ask for more"
        case OSError(errno=errno.EMFILE):
            return "permissions.files in the manifest can ask for more"
        case OSError(errno=errno.EDQUOT | errno.ENOSPC | errno.EFBIG):
            return f"a worker's scratch folder holds {plan.scratch_size >> 20} MiB"
        case OSError(errno=errno.ENOENT) if "No usable temporary directory" in str(error):  # tempfile has tried them
            return _FILES
        case OSError(errno=errno.EPERM | errno.EACCES | errno.ENOENT) if _starts_program(error):
            return _LISTED
        case OSError(errno=errno.EACCES | errno.ENOENT, filename=None) if _innermost(error)[1].endswith(_SYNCHRONIZE):
            return _SEMAPHORES
        case OSError(errno=errno.EPERM, filename=None) if error.strerror == os.strerror(errno.EPERM):
            return _REFUSED if "seccomp" in plan.layers else ""
        case OSError(errno=errno.EACCES, filename=str(name)) if plan.uid is not None and _unreadable(name, plan):
            return _OTHERS
        case OSError(errno=errno.EPERM | errno.EACCES | errno.EROFS, filename=str()):
            return _FILES
        case OSError(errno=errno.ENOENT, filename=str(name)) if os.path.isabs(name) and not _visible(name, plan):
            return _FILES
        case Exception(args=("unable to open database file" | "attempt to write a readonly database",)):
            return _FILES  # sqlite3 does not say which file
    return ""


def _unreadable(name: str, plan: Plan) -> bool:
    try:
        return _visible(os.path.abspath(name), plan) and not os.stat(name).st_mode & stat.S_IROTH
    except OSError:
        return False


def _starts_program(error: BaseException) -> bool:
    return _innermost(error)[0] == "_execute_child"  # of subprocess.Popen


def _innermost(error: BaseException) -> tuple[str, str]:
    """The function that raised, and its file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_name, trace.tb_frame.f_code.co_filename) if trace is not None else ("", "")


def _visible(name: str, plan: Plan) -> bool:
    return any((name + "/").startswith(tree + "/") for tree in (*plan.trees, *plan.writable, plan.scratch))
