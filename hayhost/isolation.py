"""How the workers of this host are confined: what the machine gives, what was asked for, and each plugin's plan."""

import asyncio
import functools
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandbox.confinement import (
    LAYERS,
    MINIMAL_ENVIRONMENT,
    UNCONFINED,
    Layer,
    Level,
    Plan,
    landlock,
    level_of,
    program_path,
    seccomp,
)
from sandbox.confinement.cgroups import Cgroups, find
from sandbox.confinement.limits import limits_of
from sandbox.confinement.namespaces import SCRATCH, outermost

from .egress import Egress
from .errors import HostError, SettingsError
from .inspection import Descriptors, inspect
from .logs import get_logger
from .manifest import Manifest
from .overuse import Overuse
from .processes import Nursery
from .scratch import Folders
from .settings import Settings

__all__ = ["Isolation", "Quarters", "programs_of"]

# What one worker gets unless its manifest says otherwise.
_MEMORY: Final = 512 << 20
_PROCESSES: Final = 256  # threads count: a busy worker has one for each request in a handler that blocks
_FILES: Final = 1024
_SCRATCH: Final = 64 << 20
_PROCESSORS: Final = 1.0

_SYSTEM: Final = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/share/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/share/locale",
    "/usr/share/mime",
    "/usr/share/zoneinfo",
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/pki",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/timezone",
)
_FOR_PROGRAMS: Final = ("/usr/share",)
# Users of plugins are taken from here at random: far from any that an administrator gives out.
_UIDS: Final = (1 << 30, 1 << 31)
_REMOVE_AGAIN: Final = 0.05
_REMOVE_TRIES: Final = 100
_MOVERS: Final = 4
_BEFORE_MOVED: Final = 4 << 20  # what a worker has written to by then: 2.8 MiB were measured
_DYING: Final = 1.0  # how long the last workers may take to be gone


@dataclass(frozen=True, slots=True)
class Quarters:
    """What one worker has to itself: ``name`` is that of its scratch folder, its cgroup and nothing else."""

    name: str
    scratch: str


class Isolation:
    """The layers that are in force on this host, and the parts of them that the front keeps."""

    def __init__(self, settings: Settings) -> None:
        self.layers: frozenset[Layer] = frozenset()
        self.problems: dict[str, str] = {}
        """By layer, why this machine does not give it."""
        self._wanted: frozenset[Layer] = frozenset()
        self.folders = Folders()
        nameserver = "" if settings.egress_nameserver == "system" else settings.egress_nameserver
        self.egress = Egress(allow=settings.egress_allow, nameserver=nameserver)
        """Connects to the network for workers."""
        self._settings = settings
        self._interpreter: tuple[str, ...] = ()
        self._cgroups: Cgroups | None = None
        self._moving: set[str] = set()
        self._left: set[str] = set()
        self._overuse = Overuse()
        self._movers = ThreadPoolExecutor(_MOVERS, thread_name_prefix="cgroups")

    @property
    def level(self) -> Level:
        """The level that the layers in force amount to."""
        return level_of(self.layers)

    @property
    def missing(self) -> dict[str, str]:
        """By layer that was asked for and is not in force, why this machine does not give it."""
        return {layer: problem for layer, problem in sorted(self.problems.items()) if layer in self._wanted}

    async def start(self, nursery: Nursery) -> None:
        """Find out what there is, and decide. Raises ``SettingsError`` below the level that is required."""
        probed = await nursery.probe()
        self._decide(probed.problems, probed.interpreter)
        nursery.contain, nursery.left, nursery.ran_out = self.contain_zygote, self.left, self.ran_out

    def _decide(self, problems: dict[str, str], interpreter: Iterable[str]) -> None:
        self._interpreter = tuple(interpreter)
        self.problems = {layer: problem for layer, problem in problems.items() if problem}
        self._wanted, required = wanted, _ = _wanted(self._settings)
        if "cgroups" in wanted:
            try:
                self._cgroups = find(f"hayhost-{os.getpid()}-{secrets.token_hex(4)}", os.getpid())
            except OSError as error:
                self.problems["cgroups"] = str(error)
        hidden = next((path for path in self._interpreter if not _passable(path)), "")
        if hidden and "namespaces" not in wanted - self.problems.keys() and "uid" in wanted - self.problems.keys():
            self.problems["uid"] = f"other users cannot reach {hidden}, and without namespaces it stays where it is"
        self.layers = frozenset(wanted - self.problems.keys())
        if self._settings.layers != "auto" and (missing := sorted(wanted - self.layers)):
            self.close()
            raise SettingsError("\n".join(f"layers: {layer}: {self.problems[layer]}" for layer in missing))
        if self.level < required:
            self.close()
            raise SettingsError(_refusal(self.level, required, self.problems))
        if "namespaces" not in self.layers:
            try:
                self.folders.open(shared="uid" in self.layers)
            except OSError as error:
                raise HostError(f"no folder for the workers' scratch folders can be made: {error}") from None

    def log(self) -> None:
        """Say what is in force, and what is not and why."""
        record = get_logger().info if self.level >= Level.CONFINED else get_logger().warning
        missing = {f"no_{layer}": problem for layer, problem in self.missing.items()}
        record("isolation", isolation=self.level.label, layers=",".join(sorted(self.layers)), **missing)

    def plan(self, manifest: Manifest) -> Plan:
        """The confinement of the plugin of ``manifest``. Raises ``HostError`` if a command that it names is missing."""
        if not self.layers:
            return UNCONFINED
        permissions = manifest.permissions
        if permissions.network:
            self.egress.want()
        programs = tuple(path for command in permissions.subprocess for path in programs_of(command, manifest.folder))
        layers = self.layers
        if "uid" in layers and (private := _private(manifest, "namespaces" in layers)):
            layers -= {"uid"}
            get_logger().warning(
                "the plugin gets no user of its own: other users cannot read its files (chmod -R o+rX helps)",
                plugin=manifest.name,
                file=private,
            )
            if level_of(layers) < _wanted(self._settings)[1]:
                raise HostError(f"other users cannot read {private}, and isolation requires a user of its own for it")
        namespaces = "namespaces" in layers
        uid = _UIDS[0] + secrets.randbelow(_UIDS[1] - _UIDS[0]) if "uid" in layers else None
        abi = landlock.abi() if "landlock" in layers else 0
        proxied = bool(programs and permissions.network)
        if proxied and (problem := self.unproxied):
            proxied = False
            get_logger().warning("the programs of the plugin have no network", plugin=manifest.name, reason=problem)
        rules = seccomp.Rules(
            subprocess=bool(programs),
            private_root=namespaces,
            private_processes=namespaces,
            scoped_signals=abi >= landlock.SIGNALS_SCOPED,
            truncate=namespaces or abi >= landlock.TRUNCATE_GOVERNED,
            connect=proxied,
        )
        trees = (str(manifest.folder), *self._interpreter, *_SYSTEM, *programs, *(_FOR_PROGRAMS if programs else ()))
        filtered = "seccomp" in layers
        return Plan(
            layers=layers,
            trees=tuple(dict.fromkeys(trees)),
            readable=tuple(outermost(os.path.realpath(tree) for tree in trees if os.path.exists(tree))),
            writable=tuple(self._settings.writable),
            programs=programs,
            proxied=proxied,
            scratch=SCRATCH if namespaces else self._folder(),
            scratch_size=_SCRATCH,
            memory=permissions.memory or _MEMORY,
            processes=permissions.processes or _PROCESSES,
            limits=limits_of(
                memory=permissions.memory or _MEMORY,
                counted="cgroups" in layers,
                files=permissions.files or _FILES,
                file_size=_SCRATCH,
                cpu_seconds=permissions.cpu_seconds,
            )
            if "limits" in layers
            else (),
            uid=uid,
            zygote_filter=seccomp.zygote_filter(rules) if filtered else b"",
            worker_filter=seccomp.worker_filter(rules) if filtered else b"",
        )

    def _folder(self) -> str:
        try:
            return self.folders.add()
        except OSError as error:
            raise HostError(f"no folder for the plugin's scratch folders can be made: {error}") from None

    @property
    def unproxied(self) -> str:
        """What is missing for programs to reach the broker's proxy and nothing else; empty if nothing is."""
        if missing := [layer for layer in ("namespaces", "landlock", "seccomp") if layer not in self.layers]:
            return f"that needs isolation by {', '.join(missing)}; hayhost doctor says why there is none"
        if (abi := landlock.abi()) < landlock.CONNECT_GOVERNED:
            return f"that needs Landlock {landlock.CONNECT_GOVERNED} (Linux 6.7); this kernel has {abi}"
        return ""

    def admit(self, pid: int, plan: Plan, expected: Descriptors, threads: int) -> str:
        """Look at a new worker; why it cannot be admitted, or empty."""
        return inspect(pid, plan, expected, threads) if "inspection" in plan.layers else ""

    async def contain_zygote(self, name: str, pid: int, plan: Plan) -> str:
        """Put a zygote into a cgroup of its own before it imports the plugin; why that failed, or empty.

        What its workers had before they were moved stays counted here, so there is room for all of them.
        """
        workers = self._settings.max_workers * 5 // 4 + 8  # with those that are on their way out
        memory = plan.memory + workers * _BEFORE_MOVED
        return await self._move(name, pid, plan, memory, _PROCESSES)

    async def contain(self, name: str, pid: int, plan: Plan) -> str:
        """Put a worker into a cgroup of its own; why that failed, or empty.

        It takes the kernel many milliseconds to move a process, so a thread waits for it, and no request does.
        """
        return await self._move(name, pid, plan, plan.memory, plan.processes)

    async def _move(self, name: str, pid: int, plan: Plan, memory: int, processes: int) -> str:
        if self._cgroups is None or "cgroups" not in plan.layers:
            return ""
        add = functools.partial(
            self._cgroups.add, name, pid, memory=memory, processes=processes, processors=_PROCESSORS
        )
        self._moving.add(name)
        try:
            await asyncio.get_running_loop().run_in_executor(self._movers, add)
        except OSError as error:
            return f"it cannot be put into a cgroup: {error}"
        finally:
            self._moving.discard(name)
            if name in self._left:
                self._left.discard(name)
                self.left(name)
        return ""

    def ran_out(self, name: str, plan: Plan) -> str:
        """What to tell the author of a worker that was killed because of its memory; empty if it was not."""
        if self._cgroups is None or not self._cgroups.ran_out(name):
            return ""
        used = f"it used more than its {plan.memory >> 20} MiB of memory"
        return f"{used}; permissions.memory in the manifest can ask for more"

    def left(self, name: str) -> None:
        """The worker with these quarters is gone."""
        if name in self._moving:
            self._left.add(name)  # its cgroup is only being made
        elif self._cgroups is not None and not self._cgroups.remove(name):
            asyncio.get_running_loop().call_later(_REMOVE_AGAIN, self._remove, name, _REMOVE_TRIES)

    def _remove(self, name: str, tries: int) -> None:
        """Remove the cgroup of a worker that was not reaped yet when its end was seen."""
        if self._cgroups is not None and not self._cgroups.remove(name) and tries:
            asyncio.get_running_loop().call_later(_REMOVE_AGAIN, self._remove, name, tries - 1)

    @property
    def measures(self) -> bool:
        """Whether nothing but ``oversized`` bounds the scratch folders."""
        return bool(self.folders.path)

    def oversized(self, paths: Iterable[str]) -> list[str]:
        """The scratch folders among ``paths`` that have grown too large. Walks them: not for the event loop."""
        return [path for path in paths if self.folders.size(path) > _SCRATCH]

    @property
    def watches(self) -> bool:
        """Whether no cgroup bounds what workers take of the machine, so that somebody has to look."""
        return "limits" in self.layers and self._cgroups is None

    def overusing(self, workers: Mapping[int, Plan], living: Iterable[int]) -> dict[int, str]:
        """Look at ``workers``, which are some of the ``living``, by pid: why some have to be ended.

        Reads files of the kernel's: not for the event loop.
        """
        self._overuse.forget(living)
        return self._overuse.look(workers)

    async def stop(self) -> None:
        """End the egress broker, and close."""
        await self.egress.stop()
        self.close()

    def close(self) -> None:
        """Give back what the front keeps of it. Closing twice is safe."""
        self.folders.close()
        self._movers.shutdown()
        if self._cgroups is not None:
            self._cgroups.close(patience=_DYING)
            self._cgroups = None


def _wanted(settings: Settings) -> tuple[frozenset[Layer], Level]:
    """The layers that are asked for, and the level that is required."""
    required = Level[settings.require.upper()]
    if settings.layers != "auto":
        names = {name.strip() for name in settings.layers.split(",")} - {"", "none"}
        if unknown := sorted(names - set(LAYERS)):
            raise SettingsError(
                f"layers: {', '.join(unknown)}: no such layer; there are {', '.join(LAYERS)}, and auto and none"
            )
        return frozenset(layer for layer in LAYERS if layer in names), Level.NONE
    if settings.isolation == "auto":
        return frozenset(LAYERS), required
    level = Level[settings.isolation.upper()]
    inspection: frozenset[Layer] = frozenset({"inspection"} if level.layers else ())
    return level.layers | inspection, level  # asked for by name, it is had or nothing is started


def _refusal(level: Level, required: Level, problems: dict[str, str]) -> str:
    lines = [f"plugins would be isolated at the level {level.label} only, and {required.label} is required"]
    lines += [f"  {layer}: {problem}" for layer, problem in sorted(problems.items()) if layer in required.layers]
    lines.append("`hayhost doctor` says what to do about it; --require LEVEL or --isolation LEVEL asks for less")
    return "\n".join(lines)


def _passable(path: str) -> bool:
    """Whether any user can get at ``path``."""
    here = Path(os.path.realpath(path))
    try:
        if not here.stat().st_mode & stat.S_IROTH:
            return False
        return all(parent.stat().st_mode & stat.S_IXOTH for parent in here.parents)
    except OSError:
        return True  # it does not exist, so nobody needs it


def _private(manifest: Manifest, private_root: bool) -> str:
    """A file or folder that the plugin needs and other users cannot read; empty if there is none.

    In a private root the folders above the plugin's are no obstacle.
    """
    if not private_root and not _passable(str(manifest.folder)):
        return str(manifest.folder)
    entry = manifest.folder / (manifest.entry if manifest.entry.endswith(".py") else "")
    for path in {manifest.folder, manifest.file, entry}:
        mode = path.stat().st_mode
        if not mode & stat.S_IROTH or (path.is_dir() and not mode & stat.S_IXOTH):
            return str(path)
    return ""


def programs_of(command: str, folder: Path) -> Iterator[str]:
    """The files that must be executable for ``command`` to run: itself, its interpreter, the dynamic loader.

    Raises ``HostError`` if there is no such command.
    """
    paths = _found(command) if os.sep not in command else [os.path.join(folder, command)]
    if not paths or not os.path.isfile(paths[0]):
        raise HostError(f"permissions.subprocess: there is no command {command!r} on this machine")
    for path in paths:
        yield from _needed(path)


def _found(command: str) -> list[str]:
    """The files that may be meant: what a worker finds on its PATH, and what came with packages of this Python."""
    places = (MINIMAL_ENVIRONMENT["PATH"], program_path())
    return list(dict.fromkeys(path for place in places if (path := shutil.which(command, path=place))))


def _needed(path: str, depth: int = 4) -> Iterator[str]:
    yield path
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"#!") and depth:
        words = os.fsdecode(head[2:].partition(b"\n")[0]).split()
        for word in words[: 2 if words and os.path.basename(words[0]) == "env" else 1]:
            for interpreter in _found(word):
                yield from _needed(interpreter, depth - 1)
    elif head.startswith(b"\x7fELF") and (loader := _loader(head)) is not None:
        yield loader


def _loader(head: bytes) -> str | None:
    """The dynamic loader that a 64-bit ELF file names (elf(5), PT_INTERP)."""
    offset, size, count = (
        int.from_bytes(head[at : at + length], "little") for at, length in ((32, 8), (54, 2), (56, 2))
    )
    for index in range(count):
        entry = head[offset + index * size :][:size]
        if int.from_bytes(entry[:4], "little") == 3:
            start, length = int.from_bytes(entry[8:16], "little"), int.from_bytes(entry[32:40], "little")
            return os.fsdecode(head[start : start + length].rstrip(b"\0")) or None
    return None
