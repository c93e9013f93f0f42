"""Which layers this machine gives: each is really put on, in a child that is thrown away."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Final

from . import landlock, namespaces, privileges, seccomp
from .plan import Layer

__all__ = ["interpreter", "probe"]

_SOME_UID: Final = 1 << 30
_MOST: Final = 4096


def probe() -> dict[str, str]:
    """By layer, why it cannot be had; empty if it can. Cgroups and inspection are the front's to try."""
    return {layer: _try(put_on) for layer, put_on in _PROBES.items()}


def interpreter() -> list[str]:
    """The folders and files that Python itself, its installed packages and the worker runtime are read from."""
    runtime = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    paths = [path for path in sys.path if os.path.isabs(path) and path != runtime]
    paths += [os.path.join(runtime, package) for package in ("hayhost", "sandbox")]
    for prefix in (sys.prefix, sys.base_prefix):
        paths += [os.path.join(prefix, name) for name in ("lib", "lib64", "pyvenv.cfg")]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _try(put_on: Callable[[], None]) -> str:
    """Why ``put_on`` fails in a child, or empty."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            put_on()
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"{error.strerror if isinstance(error, OSError) else error}"[:_MOST].encode() or b"?")
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        problem = pipe.read(_MOST).decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return problem or (f"the trial ended with status {status}" if status else "")


def _landlock() -> None:
    version = landlock.abi()
    if not version:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock, or does not use it (lsm= in its command line)")
    privileges.forbid_new()
    ruleset = landlock.Ruleset()
    ruleset.grant(["/proc"])
    ruleset.restrict()
    try:
        os.listdir("/")
    except PermissionError:
        return
    raise OSError(errno.EINVAL, "a folder that was not granted could be listed")


def _seccomp() -> None:
    privileges.forbid_new()
    rules = seccomp.Rules()
    seccomp.Filter(seccomp.zygote_filter(rules)).install()
    seccomp.Filter(seccomp.worker_filter(rules)).install()
    try:
        os.setpriority(os.PRIO_PROCESS, 1, 19)
    except PermissionError:
        return
    raise OSError(errno.EINVAL, "a system call that is refused was not")


def _namespaces() -> None:
    namespaces.unshare()
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            reason = os.strerror(os.waitstatus_to_exitcode(status))
            raise OSError(errno.EPERM, f"no private root can be mounted: {reason}")
        return
    try:
        namespaces.enter(["/usr/lib"])
        namespaces.Scratches(1 << 20, os.geteuid(), os.getegid()).make("trial")
        os._exit(0)
    except OSError as error:
        os._exit(error.errno or 1)
    finally:
        os._exit(1)


def _uid() -> None:
    if os.geteuid():
        raise OSError(errno.EPERM, "only root can give each plugin a user of its own")
    privileges.become(_SOME_UID)


_PROBES: Final[dict[Layer, Callable[[], None]]] = {
    "landlock": _landlock,
    "seccomp": _seccomp,
    "namespaces": _namespaces,
    "uid": _uid,
}
