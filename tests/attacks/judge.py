"""Runs attacks through a real host and judges from outside what came of them.

An attack that names a ``harm`` has succeeded when that harm is seen, whatever it says itself:

========================== =====================================================================================
``loot``                   what it answers contains a secret that it was not told
``file``                   the victim's folder or file has changed, in content or metadata
``plugin``                 the plugin's own folder has
``tcp``, ``udp``, ...      the victim has heard something on the socket of this name
``signal``                 the victim has had a signal, is stopped or is gone
``process``, ``memory``    its priorities or limits, or its memory, have changed
``log``                    what the attack would have a program say is in the host's log
``forged-log``             the log has a record that the attack made up
``flood``                  the log has more of its lines than the host lets through
``forged``                 somebody else was given an answer of the attack's
``front-descriptors``      the host holds many more descriptors than before
``peer``, ``zygote``       the other org's worker, or the plugin's zygote, is gone or stopped
``leftover``               a process of the attack outlives its worker
========================== =====================================================================================
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hayhost.inspection import pid_inside

from ..conftest import Answer, HostProcess, all_gone, wait_until, write_plugin
from ..hosting import PLUGIN, PREAMBLE, hosting
from .plugin.attack_code import ATTACKS, Attack
from .plugin.attack_code.at_import import KINDS
from .victims import VictimFiles, VictimProcess, snapshot

__all__ = ["Arena", "Result", "arena"]

SERVE_OPTIONS = (
    "--no-reload",
    "--ping-timeout",
    "3.5",
    "--request-timeout",
    "15",
    "--drain-timeout",
    "1",
    "--hook-timeout",
    "5",
)
_FLOOD = 2_000
_LIBC = ctypes.CDLL(None, use_errno=True)
_SOURCE = Path(__file__).parent / "plugin"
_PERMISSIONS = {"programs": "[tool.hay-plugin.permissions]\nnetwork = true\nsubprocess = ['python3']\n"}
_CALM = """
SECRET = {secret!r}

@route("GET", "/pid")
async def pid(req):
    return {{"pid": os.getpid()}}
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of an attack."""

    name: str
    verdict: str
    """``succeeded``; ``refused``: an error in the plugin, whose worker lives on; ``killed``: there was no answer, or no
    worker; ``harmless``: it says that it has succeeded, but there is nothing to be seen of it."""
    detail: str
    harms: tuple[str, ...]
    disturbed: tuple[str, ...]
    """Who else did not answer as before: the host, the other org's worker, another plugin's."""


def _plugin(folder: Path, kind: str) -> None:
    write_plugin(folder, name=kind, extra=_PERMISSIONS.get(kind, ""))
    shutil.copytree(_SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    shutil.copy(_SOURCE / "attack_code" / "__init__.py", folder / "attack_code")
    (folder / "data.txt").write_text("data of the plugin\n")
    if kind in KINDS:
        (folder / "at_import.txt").write_text(kind)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


class Arena:
    """A host with the hostile plugin, a calm one and an org that has nothing to do with it; and victims."""

    def __init__(self, host: HostProcess, plugins: Path, folder: Path, secret: str) -> None:
        self.host = host
        self._plugins = plugins
        self._folder = folder
        self._secret = secret
        self._number = 0
        self._place = secrets.token_hex(3)
        self._victim = VictimProcess(folder / "victim")
        self._inside: dict[str, int] = {}

    def close(self) -> None:
        self._victim.close()

    def check(self) -> None:
        """Raise ``AssertionError``, with what the host says, if plugins do not work on it even without attacks."""
        try:
            self._bystanders()
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.host.log[-3000:]}") from None

    def level(self) -> str:
        """The level of isolation that the host says it has."""
        level: str = self.host.health("attacks", "bystander").get("isolation", "none")
        return level

    def run(self, name: str, plugin: str = "") -> Result:
        """Run one attack in a fresh worker of a fresh org, of its own plugin if none is named, and judge it."""
        attack = dataclasses.replace(ATTACKS[name], plugin=plugin or ATTACKS[name].plugin)
        self._number += 1
        files = VictimFiles(self._folder / f"files{self._number}")
        before = self._bystanders()
        own = snapshot(self._plugins / attack.plugin)
        descriptors = self._descriptors()
        token, found = secrets.token_hex(12), Evidence(attack)
        try:
            with self._cleaned(attack):
                self._perform(attack, files, token, found, before)
                found.loot({files.secret, self._secret, self._victim.secret, token})
                found.harms |= self._victim.harms()
                found.add("file", files.harmed())
                found.add("plugin", snapshot(self._plugins / attack.plugin) != own)
                if attack.silent and found.outcome == "killed":  # what it said may still be under way
                    with contextlib.suppress(AssertionError):
                        wait_until(lambda: f"executed {token}" in self.host.log, limit=2)
                log = self.host.log
                found.add("log", f"executed {token}" in log)
                found.add("flood", log.count(f"flood {token}") > _FLOOD)
                found.add("forged-log", any(_event(r).startswith(f"forged {token}") for r in _records(log)))
                if attack.harm == "front-descriptors":
                    found.add("front-descriptors", self._descriptors() > descriptors + 50)
            disturbed = self._disturbed(before)
            return found.result(disturbed)
        finally:
            if found.harms & {"signal", "process", "memory", "file"}:
                self._victim.close()
                self._victim = VictimProcess(self._folder / f"victim{self._number}")
            shutil.rmtree(files.folder, ignore_errors=True)

    def _perform(
        self, attack: Attack, files: VictimFiles, token: str, found: "Evidence", before: dict[str, int]
    ) -> None:
        base = f"{attack.name[:60]}-{self._number}"
        arguments: dict[str, Any] = {
            **self._victim.places,
            **files.places(),
            "other_plugin": str(self._plugins / "calm" / "plugin.py"),
            "module": os.path.realpath(dataclasses.__file__),
            "host_pid": self.host.pid,
            "peer_pid": self._inside["bystander"],
            "token": token,
            "place": self._place,
            "strict": False,
        }
        orgs = [base]
        peer: dict[str, Any] | None = None
        if attack.stages:
            orgs = [base if attack.again else f"{base}-a", base if attack.again else f"{base}-b"]
            if not (peer := self._worker(attack, orgs[0])):
                found.stopped("there is no worker")
                return
            left = self._attack(attack, orgs[0], {**arguments, "stage": "leave"})
            detail = left.json()["detail"] if left.status == 200 else ""
            if left.status != 200:
                found.stopped(f"the first org was answered {left.status}")
            elif left.json()["outcome"] == "refused":
                found.refused(f"the first org: {detail}")
            secret = token if attack.harm == "loot" else ""
            arguments |= {"stage": "find", "left": detail.replace(secret or "\0", ""), "peer_pid": peer["inside"]}
            arguments |= {"peer_scratch": peer["scratch"], "token": "another"}
            if attack.again:
                os.kill(peer["pid"], signal.SIGKILL)
                wait_until(lambda: all_gone([peer["pid"]]))
        org = orgs[-1]
        processes = set(self.host.pids())
        if not (own := self._worker(attack, org)):
            found.stopped("there is no worker")
            return
        arguments["strict"] = self.host.health(attack.plugin, org).get("sharing") == "strict"
        found.answer(self._attack(attack, org, arguments))
        left_over = set(self.host.pids()) - processes - {own["pid"]}
        if found.outcome == "succeeded" and attack.harm in ("peer", "zygote"):  # signals take effect later
            victim = peer["pid"] if peer and attack.harm == "peer" else own["parent"]
            with contextlib.suppress(AssertionError):
                wait_until(functools.partial(_stopped, victim), limit=2)
        found.add("peer", peer is not None and not attack.again and _stopped(peer["pid"]))
        # Above a worker that was not forked is the keeper of its own namespaces, which leaves with it.
        found.add("zygote", not arguments["strict"] and _stopped(own["parent"]))
        if own["parent"] in self.host.pids():
            with contextlib.suppress(OSError):
                os.kill(own["parent"], signal.SIGCONT)
        claimed = found.detail.partition("pid ")[2].split(" ")[0]
        mine = {pid for pid in left_over | {own["pid"]} if str(pid_inside(pid)) == claimed}
        self._disable(attack, set(orgs))
        gone = [own["pid"], *mine]
        with contextlib.suppress(AssertionError):
            wait_until(lambda: all_gone(gone), "all are gone", limit=8)
        if not all_gone(gone):
            found.add("leftover", True)
            for pid in gone:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _worker(self, attack: Attack, org: str) -> dict[str, Any] | None:
        """Where the worker is; a zygote that the attack before has ended needs a moment to be replaced."""

        def answered() -> Answer | None:
            answer = self.host.get(f"/plugins/{attack.plugin}/{org}/pid")
            health = {} if answer.status == 200 else self.host.health(attack.plugin, org)
            return answer if answer.status == 200 or health.get("state") in ("error", "broken") else None

        try:
            answer: Answer = wait_until(answered, "a worker", limit=15)
        except AssertionError:
            return None
        if answer.status != 200:
            return None
        worker: dict[str, Any] = answer.json()
        pid = self.host.health(attack.plugin, org)["pid"]
        return {**worker, "inside": worker["pid"], "pid": pid, "parent": _parent(pid)}

    def _attack(self, attack: Attack, org: str, arguments: dict[str, Any]) -> Answer:
        return self.host.post(f"/plugins/{attack.plugin}/{org}/attack/{attack.name}", json_body=arguments)

    def _disable(self, attack: Attack, orgs: Iterable[str]) -> None:
        for org in orgs:
            self.host.post(f"/plugins/{attack.plugin}/{org}/disable")

    def _descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.host.pid}/fd"))

    def _bystanders(self) -> dict[str, int]:
        pids = {}
        for name, path in (("bystander", "/plugins/attacks/bystander/pid"), ("calm", "/plugins/calm/acme/pid")):
            answer: Answer = wait_until(functools.partial(self._ok, path), f"{path} answers", limit=20)
            self._inside[name] = answer.json()["pid"]
            pids[name] = self._pid(path)
        return pids

    def _pid(self, path: str) -> int:
        """The pid that the worker behind ``path`` has outside of its namespace."""
        pid: int = self.host.get(path.replace("/pid", "/health")).json()["pid"]
        return pid

    def _ok(self, path: str) -> Answer | None:
        answer = self.host.get(path)
        return answer if answer.status == 200 else None

    def _disturbed(self, before: dict[str, int]) -> tuple[str, ...]:
        if self.host.process.poll() is not None:
            return ("host",)
        found = []
        for name, path in (("bystander", "/plugins/attacks/bystander/pid"), ("calm", "/plugins/calm/acme/pid")):
            answer = self.host.get(path)
            if answer.status != 200 or self._pid(path) != before[name]:
                found.append(name)
        return tuple(found)

    @contextlib.contextmanager
    def _cleaned(self, attack: Attack) -> Iterator[None]:
        """Put everything back that an attack may have changed outside of the victims' folders."""
        folder = self._plugins / attack.plugin
        try:
            yield
        finally:
            data = folder / "data.txt"
            data.unlink(missing_ok=True)
            data.write_text("data of the plugin\n")
            for stray in (folder / "attack_code" / "left.by.attack", folder / f"hayattack-{self._place}"):
                stray.unlink(missing_ok=True)
            for number in range(20):
                if (segment := _LIBC.shmget(int(self._place, 16) * 64 + number, 0, 0)) >= 0:
                    _LIBC.shmctl(segment, 0, None)
            for common in ("/tmp", "/var/tmp", "/dev/shm"):
                for path in Path(common).glob(f"hayattack-{self._place}*"):
                    if path.is_dir() and not path.is_symlink():
                        subprocess.run(["chmod", "-R", "u+rwx", path], check=False, capture_output=True)
                    subprocess.run(["rm", "-rf", path], check=False)


def _records(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _event(record: dict[str, Any]) -> str:
    return str(record.get("event", ""))


class Evidence:
    """What is known of one attack so far."""

    def __init__(self, attack: Attack) -> None:
        self._attack = attack
        self.outcome = "refused"
        self.detail = ""
        self.harms: set[str] = set()

    def answer(self, answer: Answer) -> None:
        """The attack's own answer, if it came to one."""
        if answer.status == 200 and answer.headers["Content-Type"].startswith("application/json"):
            told = answer.json()
            self.outcome, self.detail = told["outcome"], told["detail"]
        else:
            self.stopped(f"answered {answer.status}")

    def refused(self, detail: str) -> None:
        self.outcome, self.detail = "refused", detail

    def stopped(self, detail: str) -> None:
        self.outcome, self.detail = "killed", detail

    def add(self, harm: str, seen: bool) -> None:
        if seen:
            self.harms.add(harm)

    def loot(self, secret: set[str]) -> None:
        """Look for what the attack should not know."""
        self.add("loot", any(text in self.detail for text in secret) and self.outcome == "succeeded")

    def result(self, disturbed: tuple[str, ...]) -> Result:
        """The verdict."""
        harm = self._attack.harm
        succeeded = harm in self.harms if harm else self.outcome == "succeeded"
        if succeeded or self.harms:
            verdict = "succeeded"
        else:
            verdict = "harmless" if self.outcome == "succeeded" else self.outcome
        return Result(self._attack.name, verdict, self.detail, tuple(sorted(self.harms)), disturbed)


@contextlib.contextmanager
def arena(folder: Path, options: Sequence[object] = (), kinds: Iterable[str] = KINDS) -> Iterator[Arena]:
    """A host with ``options`` on the hostile plugin in the given kinds, beside that which does nothing at import."""
    plugins = folder / "plugins"
    secret = secrets.token_hex(12)
    write_plugin(plugins / "calm", PREAMBLE + _CALM.format(secret=secret) + PLUGIN)
    for kind in ("attacks", *kinds):
        _plugin(plugins / kind, kind)
    folder.chmod(0o755)
    with hosting(plugins, *SERVE_OPTIONS, *options, writable=False) as host:
        found = Arena(host, plugins, folder, secret)
        try:
            found.check()
            yield found
        finally:
            found.close()
