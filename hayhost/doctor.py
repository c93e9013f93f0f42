"""What the layers of isolation are for, what to do where one is missing, and ``hayhost doctor`` for a running host."""

import asyncio
import os
import sys
import time
from typing import Any, Final

import msgspec

from .errors import UnavailableError
from .settings import Settings

__all__ = ["ABOUT", "REMEDIES", "Doctor"]

ABOUT: Final = {
    "limits": "limits on one process's memory, files and processor time",
    "landlock": "which files and ports are within reach",
    "seccomp": "which system calls are",
    "namespaces": "a private root, process tree and network",
    "cgroups": "limits on all processes of a worker together",
    "uid": "a user for each plugin",
    "inspection": "the host looks at each worker before it trusts it",
}
REMEDIES: Final = {
    "landlock": "use Linux 5.13 or newer with landlock among its security modules (cat /sys/kernel/security/lsm)",
    "seccomp": "use x86_64 or aarch64 and a kernel with CONFIG_SECCOMP_FILTER",
    "namespaces": (
        "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces, "
        "kernel.apparmor_restrict_unprivileged_userns=0), run as root, or give a container CAP_SYS_ADMIN"
    ),
    "cgroups": "run as root, or as a systemd service with Delegate=memory pids cpu",
    "uid": "run as root: the plugins then do not; keep Python and the plugins where other users can read them",
}
"""What to do about a layer that the machine does not give."""

# Seconds that an examination may take; most take two.
_LONGEST: Final = 60.0
_MAX_REPORT: Final = 1 << 20


class Doctor:
    """Has a process of its own examine the machine, as the host's own would not be free for its requests meanwhile."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._examined = -float("inf")
        self._report: dict[str, Any] = {}

    async def report(self, max_age: float) -> dict[str, Any]:
        """What ``hayhost doctor --json`` says, ``max_age`` seconds old at most; ``examinedAt`` is since the epoch.

        Raises ``UnavailableError`` if it says nothing.
        """
        async with self._lock:  # who comes meanwhile takes the same
            if time.monotonic() - self._examined > max_age:
                self._report = {**await self._examine(), "examinedAt": round(time.time(), 3)}
                self._examined = time.monotonic()
            return self._report

    async def _examine(self) -> dict[str, Any]:
        settings = self._settings
        arguments = ["--isolation", settings.isolation, "--require", settings.require, "--layers", settings.layers]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "hayhost", "doctor", "--json", *arguments],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("HAY")},  # keys among them
            limit=_MAX_REPORT,
        )
        try:
            async with asyncio.timeout(_LONGEST):
                output, _ = await process.communicate()
            return msgspec.json.decode(output, type=dict[str, Any])
        except TimeoutError:
            raise UnavailableError(f"The examination did not end within {_LONGEST:g} s", 60) from None
        except msgspec.MsgspecError:
            raise UnavailableError("The examination ended without a report", 60) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
