"""What attacks are made of: their register, system calls by name, and a scratch folder that is cleaned up."""

import asyncio
import ctypes
import dataclasses
import errno
import functools
import inspect
import os
import shutil
import tempfile
import types
from collections.abc import Callable
from typing import Any, TypeVar

from .numbers import NUMBERS

__all__ = [
    "ATTACKS",
    "NUMBERS",
    "REACHED",
    "Attack",
    "Refused",
    "attack",
    "call",
    "libc",
    "perform",
    "probe",
    "scratch",
    "surface",
]

Victims = types.SimpleNamespace
"""Who to aim at: paths, ports, pids, addresses. What the attack is to find out is not in it."""

F = TypeVar("F", bound=Callable[..., Any])

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The attack did not work, and there is no ``OSError`` to say so."""


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack. ``run(victims)`` raises ``OSError`` or ``Refused`` if it was refused; else it succeeded."""

    name: str
    family: str
    about: str
    run: Callable[..., Any]
    harm: str = ""
    """The evidence from outside without which it has not succeeded; see ``tests/attacks/judge.py``. Empty: none."""
    plugin: str = "attacks"
    """What the plugin does while it is imported: ``attacks`` is nothing, and so is ``programs``, which may start some
    and use the network."""
    stages: bool = False
    """Whether one org leaves something (``victims.stage == "leave"``) that another one then looks for (``"find"``)."""
    again: bool = False
    """Whether it is the same org that looks for it, with its next worker."""
    silent: bool = False
    """Whether its success ends the worker without an answer."""
    ends: bool = False
    """Whether stopping it can mean ending its worker; else it must be refused with an error."""
    root: bool = False
    """Whether it needs privileges even without confinement."""
    host: bool = False
    """Whether the host withstands it without any layer of isolation."""
    success: str = ""


ATTACKS: dict[str, Attack] = {}


def attack(about: str, **options: Any) -> Callable[[F], F]:
    """Register a function as an attack named after it, of the family that its module is named after."""

    def add(run: F) -> F:
        name = run.__name__.replace("_", "-")
        _add(name, run.__module__, about, run, **options)
        return run

    return add


def _add(name: str, module: str, about: str, run: Callable[..., Any], **options: Any) -> None:
    assert name not in ATTACKS, name
    family = module.rpartition(".")[2].partition("_")[0]
    ATTACKS[name] = Attack(name, family, about, run, **options)


def call(name: str, *arguments: Any) -> int:
    """A system call, past all wrappers. Raises ``OSError``."""
    return call_number(NUMBERS[name], *arguments)


def call_number(number: int, *arguments: Any) -> int:
    """A system call by number. Integers are as wide as a register."""
    ready = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *ready)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


REACHED = (errno.EINVAL, errno.EFAULT, errno.EBADF, errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)
"""Errors that the kernel's own code gives to senseless arguments: whoever sees them has got past the filter."""


def probe(name: str, *arguments: Any, reached: tuple[int, ...] = REACHED) -> str:
    """Make a system call with arguments that do no harm; that the kernel judges them is enough of a success."""
    try:
        return f"{name} returned {call(name, *arguments)}"
    except OSError as error:
        if error.errno not in reached:
            raise
        return f"{name} reached the kernel: {error.strerror}"


def surface(name: str, about: str, syscall: str, *arguments: Any, module: str, **options: Any) -> None:
    """Register a ``probe`` as an attack."""
    reached = options.pop("reached", REACHED)

    def run(_victims: Victims) -> str:
        return probe(syscall, *arguments, reached=reached)

    options.setdefault("success", "the kernel, not the filter, answers the call")
    _add(name, module, about, run, **options)


_PLACE = [""]


@functools.cache
def scratch() -> str:
    """A fresh folder below ``$TMPDIR``, removed after the attack."""
    return tempfile.mkdtemp(prefix=f"hayattack-{_PLACE[0]}-")


async def perform(attack: Attack, arguments: dict[str, Any]) -> dict[str, str]:
    """Run an attack and say what came of it."""
    _PLACE[0] = arguments["place"]
    try:
        victims = Victims(**arguments)
        if attack.family == "resources" and not inspect.iscoroutinefunction(attack.run):
            result = await asyncio.to_thread(attack.run, victims)  # it takes long: pings shall be answered meanwhile
        else:
            result = attack.run(victims)
        if inspect.isawaitable(result):
            result = await result
        return {"outcome": "succeeded", "detail": str(result)[:4000]}
    except Exception as error:  # most are OSError or Refused; without memory or threads it can be anything
        return {"outcome": "refused", "detail": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        if scratch.cache_info().currsize:
            shutil.rmtree(scratch(), ignore_errors=True)
            scratch.cache_clear()
