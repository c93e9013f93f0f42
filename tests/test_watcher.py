"""The real watcher process, over its socket."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hayhost.watcher import Hint

from .conftest import LIMIT, wait_until

QUIET = 0.05
DIRECTORY = "plugins"


class Watching:
    """A watcher and what it said so far."""

    def __init__(
        self, directory: Path, *, poll: bool = False, quiet: float = QUIET, prefix: tuple[str, ...] = ()
    ) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-m", "hayhost.watcher", str(theirs.fileno())]
            self.process = subprocess.Popen(
                [*prefix, *command], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
            )
        watch = {"directory": str(directory), "quiet": quiet, "poll": poll}
        self.socket.sendall(json.dumps(watch).encode() + b"\n")
        self.lines = self.socket.makefile("rb")
        self.hints: list[Hint] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: any(hint.ready for hint in self.hints) or not self._reader.is_alive(), "ready")

    def _read(self) -> None:
        for line in self.lines:
            self.hints.append(Hint(**json.loads(line)))

    @property
    def touched(self) -> list[str]:
        return [name for hint in self.hints for name in hint.touched]

    @property
    def problems(self) -> list[str]:
        return [hint.problem for hint in self.hints if hint.problem]

    def wait_for(self, name: str) -> None:
        """Wait until ``name`` is said to be touched, and forget what was said."""
        wait_until(lambda: name in self.touched, f"a hint for {name!r} in {self.touched}", limit=20)
        self.hints.clear()

    def close(self) -> bytes:
        """End it as a front that ends does; what it wrote to stderr."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
            self.process.wait(LIMIT)
        finally:
            self.process.kill()
            _, errors = self.process.communicate()
            self._reader.join(LIMIT)
            self.lines.close()
            self.socket.close()
        return errors or b""


Watch = Callable[..., Watching]


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder of plugins: ``p`` with a module and a package, and ``sentinel``."""
    for folder in ("p/pkg", "sentinel"):
        (tmp_path / DIRECTORY / folder).mkdir(parents=True)
    (tmp_path / DIRECTORY / "p/plugin.py").write_text("1")
    (tmp_path / DIRECTORY / "p/pkg/x.py").write_text("1")
    return tmp_path / DIRECTORY


@pytest.fixture
def watch(plugins: Path) -> Iterator[Watch]:
    """``watch(poll=True)``: a watcher of ``plugins``, ready."""
    begun: list[Watching] = []

    def begin(**options: object) -> Watching:
        begun.append(Watching(plugins, **options))  # type: ignore[arg-type]
        return begun[-1]

    yield begin
    for watching in begun:
        watching.close()


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name("." + file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def _by_backup(file: Path, text: str) -> None:
    file.rename(file.with_name(file.name + "~"))
    file.write_text(text)


def _move_in(plugin: Path) -> None:
    outside = plugin.parent.parent / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/x.py").write_text("1")
    outside.rename(plugin / "moved-in")


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda plugin: (plugin / "plugin.py").write_text("2"),
    "replaced": lambda plugin: _replace(plugin / "plugin.py", "2"),
    "by-backup": lambda plugin: _by_backup(plugin / "plugin.py", "2"),
    "nested": lambda plugin: (plugin / "pkg/x.py").write_text("2"),
    "new": lambda plugin: (plugin / "y.py").write_text("2"),
    "removed": lambda plugin: (plugin / "plugin.py").unlink(),
    "renamed": lambda plugin: (plugin / "plugin.py").rename(plugin / "z.py"),
    "folder-moved-in": _move_in,
    "folder-moved-out": lambda plugin: (plugin / "pkg").rename(plugin.parent.parent / "pkg"),
    "moved-out": lambda plugin: plugin.rename(plugin.parent.parent / "gone"),
}


@pytest.mark.parametrize("poll", [False, True], ids=["events", "poll"])
def test_every_change_is_a_hint(watch: Watch, plugins: Path, poll: bool) -> None:
    for name in CHANGES:
        shutil.copytree(plugins / "p", plugins / name)
    watching = watch(poll=poll)
    for name, change in CHANGES.items():
        change(plugins / name)
    wait_until(lambda: set(CHANGES) <= set(watching.touched), "a hint for each of the changes", limit=20)
    assert "p" not in watching.touched


@pytest.mark.parametrize("poll", [False, True], ids=["events", "poll"])
def test_reading_and_droppings_are_no_hints(watch: Watch, plugins: Path, poll: bool) -> None:
    watching = watch(poll=poll)
    for name in (
        "plugin.pyc",
        "plugin.py~",
        ".plugin.py.swp",
        ".#plugin.py",
        "4913",
        "x.tmp",
        "__pycache__/plugin.pyc",
    ):
        (plugins / "p" / name).parent.mkdir(exist_ok=True)
        (plugins / "p" / name).write_text("x")
    for folder in (".git", "p/.git", "p/.venv"):
        (plugins / folder).mkdir()
        (plugins / folder / "index").write_text("x")
    (plugins / "p/plugin.py").read_text()
    (plugins / "sentinel/x").write_text("1")
    wait_until(lambda: "sentinel" in watching.touched)
    assert "p" not in watching.touched


def test_a_folder_that_is_new_is_watched_at_once_and_deeply(watch: Watch, plugins: Path) -> None:
    watching = watch()
    (plugins / "new/a/b").mkdir(parents=True)
    watching.wait_for("new")
    (plugins / "new/a/b/x.py").write_text("1")
    watching.wait_for("new")


def test_many_changes_are_one_hint(watch: Watch, plugins: Path) -> None:
    watching = watch(quiet=0.5)
    for number in range(500):
        (plugins / f"p/pkg/{number}.py").write_text("1")
    wait_until(lambda: "p" in watching.touched)
    (plugins / "sentinel/x").write_text("1")
    wait_until(lambda: "sentinel" in watching.touched)
    assert watching.touched.count("p") == 1


@pytest.mark.parametrize("poll", [False, True], ids=["events", "poll"])
def test_the_directory_moved_away_and_back(watch: Watch, plugins: Path, poll: bool) -> None:
    watching = watch(poll=poll)
    plugins.rename(plugins.with_name("away"))
    watching.wait_for("")
    plugins.with_name("away").rename(plugins)
    watching.wait_for("")
    (plugins / "p/plugin.py").write_text("2")
    watching.wait_for("p")


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_the_directory_made_anew(watch: Watch, plugins: Path, how: str) -> None:
    watching = watch()
    if how == "moved":
        plugins.rename(plugins.with_name("away"))
    else:
        shutil.rmtree(plugins)  # what is made next may even get the same inode
    (plugins / "p").mkdir(parents=True)
    watching.wait_for("")
    (plugins / "p/plugin.py").write_text("2")
    watching.wait_for("p")
    (plugins / "p/plugin.py").write_text("3")
    watching.wait_for("p")


def test_the_directory_as_a_link_that_is_set_anew(plugins: Path) -> None:
    link = plugins.with_name("current")
    link.symlink_to(plugins)
    shutil.copytree(plugins, plugins.with_name("next"))
    watching = Watching(link)
    try:
        other = plugins.with_name("other")
        other.symlink_to(plugins.with_name("next"))
        other.replace(link)
        watching.wait_for("")
        (plugins.with_name("next") / "p/plugin.py").write_text("2")
        watching.wait_for("p")
    finally:
        watching.close()


@pytest.mark.parametrize("poll", [False, True], ids=["events", "poll"])
def test_linked_plugins(watch: Watch, plugins: Path, poll: bool) -> None:
    real = plugins.with_name("real")
    (real / "deep").mkdir(parents=True)
    watching = watch(poll=poll)
    (plugins / "linked").symlink_to(real)
    watching.wait_for("linked")
    (real / "deep/x.py").write_text("1")
    watching.wait_for("linked")
    release = plugins.with_name("release")
    release.mkdir()
    other = plugins.with_name("other")
    other.symlink_to(release)
    other.replace(plugins / "linked")
    watching.wait_for("linked")
    (release / "x.py").write_text("1")
    watching.wait_for("linked")
    shutil.rmtree(release)
    watching.wait_for("linked")
    release.mkdir()
    (release / "x.py").write_text("2")
    watching.wait_for("linked")


def test_a_new_link_loses_no_event_of_others(watch: Watch, plugins: Path) -> None:
    watching = watch(quiet=0.2)
    (plugins / "linked").symlink_to(plugins.parent)  # watching is set up anew because of it
    for number in range(200):
        (plugins / "p/plugin.py").write_text(str(number))
        (plugins / "sentinel/x").write_text(str(number))
    wait_until(lambda: {"linked", "p", "sentinel"} <= set(watching.touched))


def test_it_ends_quietly_with_the_front(plugins: Path) -> None:
    watching = Watching(plugins)
    (plugins / "p/plugin.py").write_text("2")
    watching.wait_for("p")
    watching.socket.shutdown(socket.SHUT_RDWR)
    assert watching.process.wait(LIMIT) == 0
    assert watching.close() == b""


def test_it_ends_with_a_front_that_was_killed(tmp_path: Path) -> None:
    script = f"""
import socket, subprocess, sys
ours, theirs = socket.socketpair()
command = [sys.executable, "-I", "-m", "hayhost.watcher", str(theirs.fileno())]
child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
theirs.close()
ours.sendall(b'{{"directory": {json.dumps(str(tmp_path))}, "quiet": 0.0, "poll": false}}\\n')
ours.recv(1, socket.MSG_PEEK)
print(child.pid, flush=True)
sys.stdin.read()
"""
    front = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert front.stdout is not None
    watcher = int(front.stdout.readline())
    front.send_signal(signal.SIGKILL)  # with what the watcher said unread
    front.communicate()
    wait_until(lambda: not Path(f"/proc/{watcher}/stat").exists() or " Z " in Path(f"/proc/{watcher}/stat").read_text())


def test_by_hand_it_says_what_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "hayhost.watcher"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "hayhost serve" in done.stderr


def _limited(limit: str, value: int) -> tuple[str, ...]:
    """A prefix that runs a command with a limit of inotify; the test is skipped where that may not be set."""
    shell = ("unshare", "-Ur", "sh", "-c", f'echo {value} > /proc/sys/user/{limit} && exec "$@"', "sh")
    try:
        done = subprocess.run([*shell, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no unshare: {error}")
    if done.returncode != 0:
        pytest.skip(f"user namespaces are refused: {done.stderr.strip()}")
    return shell


@pytest.mark.parametrize(
    ("limit", "value", "named"),
    [("max_inotify_instances", 0, "max_user_instances"), ("max_inotify_watches", 3, "max_user_watches")],
)
def test_limits_are_said_and_changes_are_seen_all_the_same(
    watch: Watch, plugins: Path, limit: str, value: int, named: str
) -> None:
    watching = watch(prefix=_limited(limit, value))
    (problem,) = watching.problems
    assert f"sysctl fs.inotify.{named}" in problem
    assert "--poll" in problem
    (plugins / "p/pkg/x.py").write_text("2")
    watching.wait_for("p")
    assert watching.problems == [], "said once"


def test_names_that_are_not_utf8(watch: Watch, plugins: Path) -> None:
    watching = watch()
    with open(os.fsencode(plugins) + b"/p/\xff.txt", "wb"):
        pass
    watching.wait_for("p")
    os.mkdir(os.fsencode(plugins) + b"/\xff")
    watching.wait_for("")
