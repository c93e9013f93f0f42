"""A host whose plugins are edited while it runs."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import LIMIT, Answer, HostProcess, routes, wait_until, write_plugin

__all__ = ["Lab", "Pending", "replace_file", "source"]


def source(version: object, body: str = "", hooks: str = "", **handlers: str) -> str:
    """A plugin whose ``GET /v`` says its version and worker. ``hooks`` are methods, ``handlers`` as for ``routes``."""
    answer = "async def: return {'v': VERSION, 'pid': os.getpid()}"
    text = routes("", v=answer, **handlers)
    head, _, rest = text.partition("@define_hay_plugin")
    lines = [head, f"VERSION = {version!r}", body, "@define_hay_plugin" + rest]
    lines += [f"    {line}" for line in hooks.splitlines()]
    return "\n".join(lines) + "\n"


def replace_file(file: Path, text: str) -> None:
    """Save as most editors do: a new file in the place of the old one."""
    temporary = file.with_name("." + file.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


class Pending:
    """A request that is under way on a thread of its own."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(call()))
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def answer(self) -> Answer:
        self._thread.join(LIMIT)
        assert self._answers, "there was no answer"
        return self._answers[0]


class Lab:
    """A running host with a folder of plugins, ``plugins``, and room beside it, ``outside``."""

    def __init__(self, folder: Path, *options: object, command: str = "serve") -> None:
        self.plugins, self.outside = folder / "plugins", folder / "outside"
        for made in (self.plugins, self.outside):
            made.mkdir(exist_ok=True)
        how = ["--mode", "test", "--log-format", "json"] if command == "serve" else []
        arguments = [command, self.plugins, "--port", 0, *how, *options]
        self.host = HostProcess([str(argument) for argument in arguments], writable=folder)
        if command == "serve":
            self.host.wait_ready()
        else:
            self.host.wait_for_log(" ready plugins=")
            found = re.search(r" listening url=http://[^ ]*:(\d+) ", self.host.log)
            assert found
            self.host.port = int(found[1])

    # ---- editing

    def make(self, name: str, text: str, **options: Any) -> Path:
        """Move a finished plugin into the folder."""
        made = write_plugin(self.outside / name, text, **options)
        return made.rename(self.plugins / name)

    def add(self, name: str, text: str, **options: Any) -> Path:
        """As ``make``, and wait until it is served."""
        folder = self.make(name, text, **options)
        wait_until(lambda: self.show(name).get("state") == "ready", f"{name} is served")
        return folder

    def save(self, name: str, text: str, file: str = "plugin.py") -> None:
        """Save a file of a plugin."""
        replace_file(self.plugins / name / file, text)

    def reload(self, name: str, text: str, file: str = "plugin.py") -> None:
        """As ``save``, and wait until what is saved has taken over everywhere."""
        before = self.reloads(name)
        self.save(name, text, file)
        self.wait_for_reloads(name, before + 1)

    def fail(self, name: str, text: str, file: str = "plugin.py") -> dict[str, Any]:
        """As ``save``, of something that does not load; what the API shows of the plugin then."""
        before = len(self.events("not reloaded", name))
        self.save(name, text, file)
        wait_until(lambda: len(self.events("not reloaded", name)) > before, f"{name} fails to reload")
        return self.show(name)

    def remove(self, name: str) -> None:
        """Delete a plugin's folder, and wait until it is served no more."""
        shutil.rmtree(self.plugins / name)
        wait_until(lambda: "name" not in self.show(name), f"{name} is removed")

    # ---- looking

    def get(self, name: str, path: str = "v", org: str = "acme", **options: Any) -> Answer:
        return self.host.get(f"/plugins/{name}/{org}/{path}", **options)

    def value(self, name: str, path: str, org: str = "acme") -> Any:
        """The one value in the list that ``GET /path`` answers."""
        answer = self.get(name, path, org)
        assert answer.status == 200, answer
        (value,) = answer.json()
        return value

    def version(self, name: str, org: str = "acme") -> Any:
        """What ``GET /v`` of the plugin says its version is."""
        answer = self.get(name, org=org)
        assert answer.status == 200, answer
        return answer.json()["v"]

    def pid(self, name: str, org: str = "acme") -> int:
        pid: int = self.get(name, org=org).json()["pid"]
        return pid

    def show(self, name: str) -> dict[str, Any]:
        """What the API shows of the plugin."""
        shown: dict[str, Any] = self.host.get(f"/api/v1/plugins/{name}").json()
        return shown

    def rollback(self, name: str) -> Answer:
        return self.host.post(f"/api/v1/plugins/{name}/rollback")

    def events(self, event: str, name: str) -> list[dict[str, Any]]:
        """The log's records of a plugin that begin with ``event``."""
        return [
            record
            for record in self.host.records()
            if record.get("plugin") == name and record["event"].startswith(event)
        ]

    def reloads(self, name: str) -> int:
        return len(self.events("reloaded", name))

    def wait_for_reloads(self, name: str, count: int) -> None:
        wait_until(lambda: self.reloads(name) >= count, f"{name} is reloaded {count} times", limit=30)

    def settle(self, name: str) -> None:
        """Wait until whatever was done before has been looked at: a change that counts is seen after it."""
        marker = self.plugins / name / "settle.txt"
        before = self.reloads(name)
        marker.write_text(f"{before}")
        self.wait_for_reloads(name, before + 1)

    def process(self, named: str) -> int:
        """The process below the host with ``named`` in its name or command line."""

        def matching(pid: int) -> bool:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
                return named in Path(f"/proc/{pid}/comm").read_text() or named in command
            except OSError:
                return False

        return int(wait_until(lambda: next((pid for pid in self.host.pids() if matching(pid)), 0), f"a {named}"))

    def zygote(self, name: str) -> int:
        """The parent of the worker that serves."""
        return int(Path(f"/proc/{self.pid(name)}/stat").read_text().rpartition(")")[2].split()[1])

    def close(self) -> None:
        self.host.kill()
