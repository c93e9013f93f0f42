"""Plugins that are edited while the real host serves them."""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import LIMIT, HostProcess, all_gone, descriptors_of, seen_of, wait_until, write_plugin
from .reloading import Lab, Pending, replace_file, source

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

GONE = "import os\nos._exit(7)\n"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One host for all tests that leave it as it was; each has plugins of its own."""
    lab = Lab(tmp_path_factory.mktemp("reload"), "--drain-timeout", 20)
    yield lab
    lab.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """``own("--poll")``: a host for one test."""
    labs: list[Lab] = []

    def begin(*options: object, command: str = "serve") -> Lab:
        labs.append(Lab(tmp_path, *options, command=command))
        return labs[-1]

    yield begin
    for lab in labs:
        lab.close()


def _wait_for(gate: Path) -> str:
    """Source that waits for a file, wherever it stands."""
    return f"import os as _os, time as _time\nwhile not _os.path.exists({str(gate)!r}): _time.sleep(0.01)\n"


def _async_wait(gate: Path) -> str:
    return f"while not os.path.exists({str(gate)!r}): await asyncio.sleep(0.01)"


# ---- ways of editing


def _in_place(plugin: Path, text: str) -> None:
    (plugin / "plugin.py").write_text(text)


def _by_rename(plugin: Path, text: str) -> None:
    replace_file(plugin / "plugin.py", text)


def _by_backup(plugin: Path, text: str) -> None:
    (plugin / "plugin.py").rename(plugin / "plugin.py~")
    (plugin / "plugin.py").write_text(text)
    (plugin / "plugin.py~").unlink()


def _by_backup_elsewhere(plugin: Path, text: str) -> None:
    (plugin / "plugin.py").rename(plugin.parent.parent / "outside/backup.py")
    (plugin / "plugin.py").write_text(text)


def _by_sed(plugin: Path, text: str) -> None:
    subprocess.run(["sed", "-i", "s/^VERSION = .*/VERSION = 2/", plugin / "plugin.py"], check=True)


def _piecemeal(plugin: Path, text: str) -> None:
    with (plugin / "plugin.py").open("w") as file:
        for line in text.splitlines(keepends=True):
            file.write(line)
            file.flush()


def _under_old_times(plugin: Path, text: str) -> None:
    times = (plugin / "plugin.py").stat()
    (plugin / "plugin.py").write_text(text)
    os.utime(plugin / "plugin.py", ns=(times.st_atime_ns, times.st_mtime_ns))


EDITS = [_in_place, _by_rename, _by_backup, _by_backup_elsewhere, _by_sed, _piecemeal, _under_old_times]


@pytest.mark.parametrize("edit", EDITS)
def test_every_way_of_saving_is_one_reload(lab: Lab, edit: Callable[[Path, str], None]) -> None:
    name = "edit" + edit.__name__.replace("_", "-")
    plugin = lab.add(name, source(1))
    assert lab.version(name) == 1
    edit(plugin, source(2))
    lab.wait_for_reloads(name, 1)
    assert lab.version(name) == 2
    lab.settle(name)
    assert (lab.reloads(name), len(lab.events("not reloaded", name))) == (2, 0)


PARTS = {
    "helper.py": ("value = 1", "value = 2"),
    "pkg/deep/helper.py": ("value = 1", "value = 2"),
    "vendor/dependency/__init__.py": ("value = 1", "value = 2"),
    "templates/page.html": ("1", "2"),
    ".env": ("1", "2"),
}


@pytest.mark.parametrize("part", PARTS)
def test_everything_in_the_folder_counts(lab: Lab, part: str) -> None:
    name = f"part-{list(PARTS).index(part)}"
    if part.endswith(".py"):
        module = part.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        body = "import sys\nsys.path.append(__file__[:-9] + 'vendor')\n"
        body += f"from {module.removeprefix('vendor.')} import value\n"
    else:
        body = f"value = int(open({part!r}).read())"
    before, after = PARTS[part]
    lab.add(name, source(0, body, part="async def: return [value]"), files={part: before})
    assert lab.value(name, "part") == 1
    lab.reload(name, after, part)
    assert lab.value(name, "part") == 2


def test_the_manifest_counts(lab: Lab) -> None:
    plugin = lab.add("manifest", source(1))
    text = (plugin / "pyproject.toml").read_text()
    lab.reload("manifest", text.replace("1.2.3", "2.0.0"), "pyproject.toml")
    assert lab.show("manifest")["current"]["version"] == "2.0.0"
    assert lab.host.health("manifest", "acme")["version"] == "2.0.0"
    assert lab.events("reloaded", "manifest")[-1]["changes"] == "version 1.2.3 -> 2.0.0"


def test_a_linked_plugin_is_edited_and_then_linked_anew(lab: Lab) -> None:
    for version in (1, 3):
        write_plugin(lab.outside / f"release-{version}", source(version), name="linked")
    (lab.plugins / "linked").symlink_to(lab.outside / "release-1")
    wait_until(lambda: lab.show("linked").get("state") == "ready")
    assert lab.version("linked") == 1
    replace_file(lab.outside / "release-1/plugin.py", source(2))
    lab.wait_for_reloads("linked", 1)
    assert lab.version("linked") == 2
    other = lab.outside / "other"
    other.symlink_to(lab.outside / "release-3")
    other.rename(lab.plugins / "linked")
    lab.wait_for_reloads("linked", 2)
    assert lab.version("linked") == 3
    (lab.plugins / "linked").unlink()
    wait_until(lambda: "name" not in lab.show("linked"))


def test_git_checkout_of_many_files_is_one_reload_of_each_plugin(lab: Lab) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", *arguments]
        subprocess.run(command, cwd=repository, check=True, capture_output=True)

    repository = lab.outside / "repository"
    names = ["git-a", "git-b"]
    for version in (1, 2):
        for name in names:
            files = {f"pkg/m{number}.py": f"value = {version}" for number in range(100)}
            body = "import importlib\nALL = {importlib.import_module(f'pkg.m{n}').value for n in range(100)}"
            write_plugin(repository / name, source(version, body, all="async def: return sorted(ALL)"), files=files)
        if version == 1:
            git("init", "-q")
        git("add", "-A")
        git("commit", "-q", "-m", str(version))
    git("checkout", "-q", "main~1")
    for name in names:
        (lab.plugins / name).symlink_to(repository / name)
    for name in names:
        wait_until(lambda name=name: lab.show(name).get("state") == "ready")  # type: ignore[misc]
        assert lab.get(name, "all").json() == [1]
    git("checkout", "-q", "main")
    for name in names:
        lab.wait_for_reloads(name, 1)
        assert lab.get(name, "all").json() == [2], "no mix of two commits"
        assert (lab.reloads(name), len(lab.events("not reloaded", name))) == (1, 0)


def test_nothing_is_reloaded_without_a_change_of_content(lab: Lab) -> None:
    plugin = lab.add("quiet", source(1), files={"data.txt": "1", "helper.py": ""})
    pid = lab.pid("quiet")
    (plugin / "plugin.py").touch()
    (plugin / "plugin.py").write_text(source(1))
    replace_file(plugin / "plugin.py", source(1))
    os.chmod(plugin / "data.txt", 0o600)
    os.utime(plugin / "data.txt", (1, 1))
    (plugin / "data.txt").read_text()
    subprocess.run(["grep", "-rq", "nothing", plugin], check=False)
    subprocess.run(["python3", "-m", "compileall", "-q", plugin], check=True)
    for path in ("helper.pyc", "plugin.py~", ".plugin.py.swp", ".#plugin.py", "4913", ".git/index", "#plugin.py#"):
        (plugin / path).parent.mkdir(exist_ok=True)
        (plugin / path).write_text("x")
    assert list(plugin.glob("__pycache__/*.pyc"))
    lab.get("quiet")
    lab.settle("quiet")
    assert lab.reloads("quiet") == 1, "that of the last change"
    assert len(lab.show("quiet")["history"]) == 2
    assert lab.pid("quiet") != pid


def test_what_is_changed_back_to_what_serves_is_not_loaded(lab: Lab) -> None:
    lab.add("forth-and-back", source(1))
    pid = lab.pid("forth-and-back")
    lab.fail("forth-and-back", "1/0")
    lab.save("forth-and-back", source(1))
    lab.host.wait_for_log("the plugin is again what is served")
    assert lab.show("forth-and-back")["error"] is None
    assert lab.pid("forth-and-back") == pid


# ---- what does not load


ERRORS = {
    "import": ("1/0\n" + source(2), "ZeroDivisionError: division by zero"),
    "syntax": (source(2).replace("VERSION = 2", "VERSION = = 2"), "SyntaxError: invalid syntax (plugin.py, line "),
    "initialize": (source(2).replace("ctx.register", "ctx.rejister", 1), "AttributeError: "),
    "no plugin": ("VERSION = 2", "exports no result of define_hay_plugin"),
    "import ends the process": (GONE + source(2), "while it was loading"),
    "import exits": ("import sys\nsys.exit(3)", "the plugin called sys.exit(3)"),
    "on_start ends the process": (
        source(2, hooks="def on_start(self, ctx):\n    os._exit(7)"),
        "its worker does not start: the worker died before it was ready",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_does_not_load_leaves_the_old_serving_until_the_next_save(lab: Lab, error: str) -> None:
    name = "error-" + error.replace(" ", "-").replace("_", "-")
    lab.add(name, source(1))
    pid = lab.pid(name)
    text, reason = ERRORS[error]
    shown = lab.fail(name, text)
    assert reason in shown["error"]
    assert shown["current"] is not None
    assert reason in shown["history"][0]["error"]
    health = lab.host.health(name, "acme")
    assert reason in health["lastError"]
    assert (health["status"], health["pid"]) == ("healthy", pid)
    assert (lab.version(name), lab.pid(name)) == (1, pid)
    assert lab.version(name, "another-org") == 1, "orgs without a worker get the old version too"
    lab.reload(name, source(3))
    assert (lab.version(name), lab.version(name, "another-org")) == (3, 3)
    assert lab.show(name)["error"] is None
    assert lab.host.health(name, "acme")["lastError"] is None


def test_the_traceback_is_the_author_s(lab: Lab) -> None:
    plugin = lab.add("trace", source(1), files={"helper.py": "def fail():\n    pass\n"})
    (plugin / "helper.py").write_text("def fail():\n    raise ValueError('on purpose')\n")
    shown = lab.fail("trace", "import helper\nhelper.fail()\n")
    lines = shown["traceback"].splitlines()
    assert [line.strip() for line in lines if line.lstrip().startswith("File")] == [
        f'File "{plugin}/plugin.py", line 2, in <module>',
        f'File "{plugin}/helper.py", line 2, in fail',
    ]
    assert lines[-1] == "ValueError: on purpose"


def test_a_plugin_that_is_broken_when_it_comes_is_healed_by_a_save(lab: Lab) -> None:
    lab.make("ill", "1/0")
    wait_until(lambda: lab.show("ill").get("state") == "error")
    answer = lab.get("ill")
    assert answer.status == 503
    assert "ZeroDivisionError" in answer.json()["error"]
    lab.save("ill", source(2))
    wait_until(lambda: lab.show("ill")["state"] == "ready")
    assert lab.version("ill") == 2


def test_a_save_heals_an_org_whose_worker_did_not_start_at_once(lab: Lab) -> None:
    lab.add("breaker", source(1, hooks="def on_start(self, ctx):\n    os._exit(7)"))
    while "does not start" not in lab.get("breaker").json()["error"]:
        pass  # from now on the breaker refuses for ten seconds
    lab.reload("breaker", source(2))
    assert lab.version("breaker") == 2


def test_a_bad_manifest_leaves_a_served_plugin_as_it_is(lab: Lab) -> None:
    plugin = lab.add("bad-manifest", source(1))
    pid = lab.pid("bad-manifest")
    good = (plugin / "pyproject.toml").read_text()
    lab.save("bad-manifest", good.replace('category = "tool"', 'category = "fun"'), "pyproject.toml")
    wait_until(lambda: "category" in (lab.show("bad-manifest")["error"] or ""))
    lab.save("bad-manifest", source(2))
    (lab.outside / "x").mkdir(exist_ok=True)
    lab.add("bad-manifest-sentinel", source(1))
    assert (lab.version("bad-manifest"), lab.pid("bad-manifest")) == (1, pid)
    assert "category" in lab.host.health("bad-manifest", "acme")["lastError"]
    errors = [record for record in lab.show("bad-manifest")["history"] if record["error"]]
    assert len(errors) == 1, "one problem is one record"
    lab.reload("bad-manifest", good, "pyproject.toml")
    assert lab.version("bad-manifest") == 2


# ---- plugins that come and go


def test_a_plugin_comes_and_goes_and_comes_again(lab: Lab) -> None:
    for version in (1, 2):
        lab.add("guest", source(version))
        assert lab.version("guest") == version
        pid = lab.pid("guest")
        zygote = lab.zygote("guest")
        lab.remove("guest")
        assert lab.get("guest").status == 404
        wait_until(lambda pids=[pid, zygote]: all_gone(pids), "its processes are gone")  # type: ignore[misc]


def test_a_plugin_that_is_written_piece_by_piece_is_served_in_the_end(lab: Lab) -> None:
    folder = lab.plugins / "piecemeal"
    folder.mkdir()
    (folder / "plugin.py").write_text(source(1))
    lab.add("piecemeal-sentinel", source(1))
    assert lab.get("piecemeal").status == 404
    write_plugin(folder, source(2))
    wait_until(lambda: lab.show("piecemeal").get("state") == "ready")
    assert lab.version("piecemeal") == 2


def test_a_moved_folder_is_the_same_plugin(lab: Lab) -> None:
    body = "DATA = 'data.txt'"
    plugin = lab.add("moved", source(1, body, data="async def: return open(DATA).read()"), files={"data.txt": "here"})
    pid = lab.pid("moved")
    lab.get("moved", "v")
    plugin.rename(lab.plugins / "moved-elsewhere")
    lab.wait_for_reloads("moved", 1)
    assert lab.get("moved", "data").body == b"here"
    assert lab.pid("moved") != pid
    (lab.plugins / "moved-elsewhere/data.txt").write_text("there")
    lab.wait_for_reloads("moved", 2)
    assert lab.get("moved", "data").body == b"there"


def test_a_changed_name_is_another_plugin(lab: Lab) -> None:
    plugin = lab.add("named", source(1))
    assert lab.version("named") == 1
    text = (plugin / "pyproject.toml").read_text()
    lab.save("named", text.replace('name = "named"', 'name = "renamed"', 1), "pyproject.toml")
    wait_until(lambda: lab.show("renamed").get("state") == "ready")
    assert lab.version("renamed") == 1
    assert lab.get("named").status == 404


def test_a_copy_with_the_same_name_does_not_take_over(lab: Lab) -> None:
    plugin = lab.add("original", source(1))
    pid = lab.pid("original")
    copy = lab.plugins / "a-copy-of-original"  # sorts before it
    shutil.copytree(plugin, lab.outside / "copy")
    (lab.outside / "copy/plugin.py").write_text(source(2))
    (lab.outside / "copy").rename(copy)
    lab.host.wait_for_log("a-copy-of-original: the name 'original' is taken by the folder 'original'")
    assert (lab.version("original"), lab.pid("original")) == (1, pid)
    shutil.rmtree(plugin)
    lab.wait_for_reloads("original", 1)
    assert lab.version("original") == 2, "with the first gone the name is free"


def test_a_removal_during_a_start_leaks_nothing(lab: Lab) -> None:
    started, gate = lab.outside / "removal-started", lab.outside / "removal-gate"
    hook = f"""async def on_start(self, ctx):
    with open({str(started)!r}, 'w') as file: file.write(str(os.getpid()))
    {_async_wait(gate)}"""
    lab.add("short-lived", source(1, hooks=hook))
    pending = Pending(lambda: lab.get("short-lived"))
    pid = int(wait_until(lambda: started.exists() and started.read_text()))
    lab.remove("short-lived")
    assert pending.answer().status in (404, 503)
    wait_until(lambda: all_gone([pid]), "the worker that was starting is gone")


def test_a_removal_during_a_load_leaks_nothing(lab: Lab) -> None:
    loading, gate = lab.outside / "load-began", lab.outside / "load-gate"
    lab.add("unloaded", source(1))
    note = f"import os\nopen({str(loading)!r}, 'w').write(str(os.getpid()))\n"
    lab.save("unloaded", note + _wait_for(gate) + source(2))
    pid = int(wait_until(lambda: loading.exists() and loading.read_text()))
    lab.remove("unloaded")
    wait_until(lambda: all_gone([pid]), "the zygote that was loading is gone")


# ---- saves in quick succession


def test_the_last_of_many_saves_wins(lab: Lab) -> None:
    lab.add("burst", source(0))
    assert lab.version("burst") == 0
    for version in range(1, 30):
        lab.save("burst", source(version))
    wait_until(lambda: lab.version("burst") == 29)
    digests = [record["digest"] for record in lab.show("burst")["history"]]
    assert len(set(digests)) == len(digests), "no content is served twice"


def test_a_save_during_a_load_makes_it_begin_again(lab: Lab) -> None:
    loading, gate = lab.outside / "again-began", lab.outside / "again-gate"
    lab.add("again", source(1))
    assert lab.version("again") == 1
    note = f"import os\nopen({str(loading)!r}, 'w').write(str(os.getpid()))\n"
    lab.save("again", note + _wait_for(gate) + source(2))
    pid = int(wait_until(lambda: loading.exists() and loading.read_text()))
    lab.reload("again", source(3))
    assert lab.version("again") == 3
    wait_until(lambda: all_gone([pid]), "the zygote of the version between is gone")
    assert lab.show("again")["error"] is None
    assert [record["action"] for record in lab.show("again")["history"]] == ["reload", "load"]


def test_a_save_during_an_exchange_is_served_after_it(lab: Lab) -> None:
    started, gate = lab.outside / "exchange-began", lab.outside / "exchange-gate"
    lab.add("exchange", source(1))
    assert lab.version("exchange") == 1
    hook = f"async def on_start(self, ctx):\n    open({str(started)!r}, 'w').close()\n    {_async_wait(gate)}"
    lab.save("exchange", source(2, hooks=hook))
    wait_until(started.exists)
    lab.save("exchange", source(3))
    assert lab.version("exchange") == 1, "the worker of the next version is still starting"
    gate.touch()
    wait_until(lambda: lab.version("exchange") == 3)
    assert [record["error"] for record in lab.show("exchange")["history"]] == ["", "", ""]


def test_a_request_that_waits_for_a_start_gets_what_serves_by_then(lab: Lab) -> None:
    started, gate = lab.outside / "start-began", lab.outside / "start-gate"
    hook = f"async def on_start(self, ctx):\n    open({str(started)!r}, 'w').close()\n    {_async_wait(gate)}"
    lab.add("waiting", source(1, hooks=hook))
    pending = Pending(lambda: lab.get("waiting"))
    wait_until(started.exists)
    lab.reload("waiting", source(2))
    second = Pending(lambda: lab.get("waiting"))
    gate.touch()
    assert [pending.answer().json()["v"], second.answer().json()["v"]] == [2, 2]


def test_a_file_that_is_saved_again_unchanged_while_it_is_read_is_read_again(lab: Lab) -> None:
    count, gate = lab.outside / "torn-count", lab.outside / "torn-gate"
    note = f"open({str(count)!r}, 'a').write('x')\nVALUE = open('data.txt').read()\n"
    plugin = lab.add("torn", source(1), files={"data.txt": "whole"})
    lab.save("torn", source(2, note + _wait_for(gate), value="async def: return VALUE"))
    wait_until(count.exists)
    with (plugin / "data.txt").open("r+") as file:  # an editor in the middle of writing the same once more
        file.truncate()
        file.write("whole")
    gate.touch()
    lab.wait_for_reloads("torn", 1)
    assert len(count.read_text()) >= 2
    assert lab.get("torn", "value").body == b"whole"


@pytest.mark.parametrize("seconds", [0, 0.5])  # the latter is longer than a folder has to be quiet for
def test_a_plugin_that_writes_into_its_own_folder_when_it_loads_is_not_reloaded_for_ever(
    lab: Lab, seconds: float
) -> None:
    name = f"writer{seconds > 0:d}"
    body = f"import time\nopen('cache.txt', 'w').write(str(time.time_ns()))\ntime.sleep({seconds})"
    lab.add(name, source(1))
    lab.reload(name, source(2, body))
    assert lab.version(name) == 2
    lab.add(f"{name}-sentinel", source(1))
    for version in (2, 3):  # each takes as long as another reload of the writer would
        lab.reload(f"{name}-sentinel", source(version, f"import time\ntime.sleep({seconds})"))
    assert lab.reloads(name) == 1
    lab.reload(name, source(3, body))
    assert lab.version(name) == 3


# ---- state


STATE = """
class Counter:
    def __init__(self): self.value = 0
    def up(self): self.value += 1; return self.value + OFFSET
"""
COUNT = "async def: return [req.ctx.state.setdefault('counter', Counter()).up()]"


def test_state_moves_to_the_new_worker_with_instances_of_the_plugin_s_own_classes(lab: Lab) -> None:
    lab.add("state", source(1, STATE + "OFFSET = 0", count=COUNT))
    assert [lab.value("state", "count") for _ in range(3)] == [1, 2, 3]
    assert lab.value("state", "count", "other") == 1
    lab.reload("state", source(2, STATE + "OFFSET = 100", count=COUNT))
    assert lab.value("state", "count") == 104, "the old value, the new code"
    assert lab.value("state", "count", "other") == 102, "each org has its own"


def test_state_of_a_module_of_its_own_and_of_some_size(lab: Lab) -> None:
    fill = "async def: req.ctx.state['thing'] = helper.Thing('x' * 3_000_000)"
    show = "async def: return [type(req.ctx.state['thing']).__module__, len(req.ctx.state['thing'].text)]"
    helper = "class Thing:\n    def __init__(self, text): self.text = text\n"
    plugin = lab.add("things", source(1, "import helper", fill=fill, show=show), files={"helper.py": helper})
    lab.get("things", "fill")
    lab.reload("things", source(2, "import helper", fill=fill, show=show))
    assert lab.get("things", "show").json() == ["helper", 3_000_000]
    lab.reload("things", helper + "# changed\n", "helper.py")
    assert lab.get("things", "show").json() == ["helper", 3_000_000]
    assert plugin.exists()


def test_state_is_there_in_on_start(lab: Lab) -> None:
    hook = "def on_start(self, ctx):\n    ctx.state['starts'] = ctx.state.get('starts', 0) + 1"
    show = "async def: return [req.ctx.state['starts']]"
    lab.add("starts", source(1, hooks=hook, show=show))
    assert lab.value("starts", "show") == 1
    lab.reload("starts", source(2, hooks=hook, show=show))
    assert lab.value("starts", "show") == 2


@pytest.mark.parametrize(
    ("case", "before", "after", "warning"),
    [
        ("unpicklable", "(x for x in ())", "", "the state cannot be carried over and is dropped"),
        ("class-is-gone", "Old()", "", "the state of the worker before this one does not load and is dropped"),
        ("raises", "Old()", "class Old:\n    def __setstate__(self, state): 1/0\n", "ZeroDivisionError"),
        ("exits", "Old()", "class Old:\n    def __setstate__(self, state): sys.exit()\n", "does not load"),
    ],
)
def test_state_that_cannot_move_is_dropped_with_a_warning(
    lab: Lab, case: str, before: str, after: str, warning: str
) -> None:
    name = f"state-{case}"
    fill = f"async def: req.ctx.state['x'] = {before}; return [len(req.ctx.state)]"
    show = "async def: return [len(req.ctx.state)]"
    body = "class Old:\n    def __init__(self): self.value = 1\n"
    lab.add(name, source(1, body, fill=fill, show=show))
    assert lab.value(name, "fill") == 1
    lab.reload(name, source(2, after, fill=fill, show=show))
    assert lab.value(name, "show") == 0
    assert lab.version(name) == 2
    told = [record for record in lab.host.records() if record.get("plugin") == name and warning in record["event"]]
    assert [(record["level"], record["source"]) for record in told] == [("warning", "plugin")]
    assert lab.show(name)["error"] is None


def test_a_request_that_changes_the_state_during_the_exchange_waits_for_the_new_worker(lab: Lab) -> None:
    count = "async def:\n state = req.ctx.state\n state['n'] = state.get('n', 0) + 1\n return [state['n']]"
    lab.add("counted", source(0, count=count))
    counted: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            counted.append(lab.value("counted", "count"))

    thread = threading.Thread(target=client)
    thread.start()
    for version in range(1, 4):
        lab.reload("counted", source(version, count=count))
    stop.set()
    thread.join(LIMIT)
    assert counted == list(range(1, len(counted) + 1)), "no count is lost"


# ---- requests under way


def test_requests_and_streams_under_way_finish_on_the_old_version(lab: Lab) -> None:
    gate = lab.outside / "drain-gate"
    slow = f"async def:\n print('slow began')\n {_async_wait(gate)}\n return {{'v': VERSION, 'pid': os.getpid()}}"
    flow = f"async def:\n yield 'first '\n {_async_wait(gate)}\n yield str(VERSION)"
    hook = "def on_stop(self, ctx):\n    print('on_stop of', VERSION)"
    lab.add("drain", source(1, hooks=hook, slow=slow, flow=flow))
    pid = lab.pid("drain")
    pending = Pending(lambda: lab.get("drain", "slow"))
    lab.host.wait_for_log("slow began")
    connection = lab.host.connect()
    connection.request("GET", "/plugins/drain/acme/flow")
    stream = connection.getresponse()
    assert stream.read(6) == b"first "
    lab.reload("drain", source(2, hooks=hook, slow=slow, flow=flow))
    assert lab.version("drain") == 2
    assert not pending.done
    assert not all_gone([pid]), "the old worker is still at it"
    assert lab.events("on_stop of", "drain") == []
    gate.touch()
    answer = pending.answer()
    assert (answer.status, answer.json()) == (200, {"v": 1, "pid": pid})
    assert stream.read() == b"1"
    connection.close()
    wait_until(lambda: all_gone([pid]), "the old worker is gone")
    assert [record["event"] for record in lab.events("on_stop of", "drain")] == ["on_stop of 1"]


def test_a_worker_that_does_not_finish_is_ended_at_the_drain_limit(own: Callable[..., Lab]) -> None:
    lab = own("--drain-timeout", 0.2)
    lab.add("p", source(1, slow="async def:\n print('slow began')\n await asyncio.sleep(600)"))
    pid = lab.pid("p")
    pending = Pending(lambda: lab.get("p", "slow"))
    lab.host.wait_for_log("slow began")
    lab.reload("p", source(2))
    assert pending.answer().status == 502
    wait_until(lambda: all_gone([pid]))


def test_the_next_request_on_a_connection_that_stays_open_gets_the_new_code(lab: Lab) -> None:
    lab.add("kept", source(1))
    connection = lab.host.connect()

    def version() -> Any:
        connection.request("GET", "/plugins/kept/acme/v")
        return http.client.HTTPConnection.getresponse(connection).read()

    assert b'"v":1' in version()
    lab.reload("kept", source(2))
    assert b'"v":2' in version()
    connection.close()


def test_an_upload_that_began_before_is_answered_by_the_new_code(lab: Lab) -> None:
    size = "async def: return [VERSION, len(req.body)]"
    lab.add("upload", source(1, size=size))
    assert lab.version("upload") == 1
    connection = lab.host.connect()
    connection.putrequest("POST", "/plugins/upload/acme/size")
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"12345")
    lab.reload("upload", source(2, before="async def: return [0]", size=size))  # another place in the table of routes
    connection.send(b"67890")
    assert connection.getresponse().read() == b"[2,10]"
    connection.close()


def test_the_table_of_routes_changes(lab: Lab) -> None:
    lab.add("table", source(1, old="async def: return 'old'", both="async def: return [1]"))
    assert lab.get("table", "old").body == b"old"
    assert lab.get("table", "new").status == 404
    lab.reload("table", source(2, new="async def: return 'new'", both="async def: return [2]"))
    assert lab.get("table", "new").body == b"new"
    assert lab.get("table", "old").status == 404
    assert lab.value("table", "both") == 2
    assert lab.get("table", "new", "idle-org").body == b"new"
    changes = lab.events("reloaded", "table")[-1]["changes"]
    for change in ("route -GET /old", "route +GET /new"):
        assert change in changes
    assert "both" not in changes
    routes = [(route["method"], route["path"]) for route in lab.get("table", "metadata").json()["routes"]]
    assert ("GET", "/new") in routes
    assert ("GET", "/old") not in routes


# ---- one version per worker


def test_lazy_imports_are_of_the_version_that_runs(lab: Lab) -> None:
    lazy = "async def:\n import helper\n return [helper.value]"
    added = "async def:\n import added\n return [1]"
    standard = "async def:\n import colorsys\n return colorsys.__file__"
    handlers = {"lazy": lazy, "added": added, "standard": standard}
    plugin = lab.add("lazy", source(1, **handlers), files={"helper.py": "value = 1"})
    assert lab.version("lazy") == 1
    for path, text in (("helper.py", "value = 2"), ("added.py", ""), ("colorsys.py", "1/0")):
        (plugin / path).write_text(text)
    lab.fail("lazy", "1/0")
    assert lab.value("lazy", "lazy") == 1, "as it was when this version was loaded"
    assert lab.get("lazy", "added").status == 500
    (record,) = lab.events("GET /added failed", "lazy")
    assert f"{plugin}/added.py was added after this version of the plugin was loaded" in record["event"]
    assert "next reload" in record["event"]
    assert not lab.get("lazy", "standard").body.decode().startswith(str(plugin))
    assert lab.value("lazy", "lazy", "a-new-org") == 1, "a worker that starts now is of the same version"
    (plugin / "colorsys.py").unlink()
    lab.reload("lazy", source(3, **handlers))
    assert lab.value("lazy", "lazy") == 2
    assert lab.value("lazy", "added") == 1


def test_tracebacks_show_the_lines_that_run(lab: Lab) -> None:
    plugin = lab.add("lines", source(1, boom="async def: raise ValueError('x')  # the first version"))
    assert lab.version("lines") == 1
    lab.fail("lines", "1/0\n" + "# another line\n" * 100)
    assert lab.get("lines", "boom").status == 500
    (record,) = lab.events("GET /boom failed", "lines")
    assert "# the first version" in record["traceback"]
    assert plugin.exists()


def test_saves_of_the_same_size_in_one_second_are_all_served(lab: Lab) -> None:
    show = "async def: return [helper.value]"
    lab.add("same-size", source(0, "import helper", show=show), files={"helper.py": "value = 0"})
    for version in range(1, 5):
        lab.reload("same-size", f"value = {version}", "helper.py")
        assert lab.value("same-size", "show") == version
    assert not list((lab.plugins / "same-size").rglob("*.pyc")), "nothing of ours is left in the author's folder"


def test_plugins_that_cannot_be_forked_are_reloaded_too(lab: Lab) -> None:
    body = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    count = "async def:\n req.ctx.state['n'] = req.ctx.state.get('n', 0) + 1\n return [req.ctx.state['n']]"
    lab.add("strict", source(1, body, count=count))
    assert lab.host.health("strict", "acme")["sharing"] == "strict"
    assert (lab.version("strict"), lab.version("strict", "other")) == (1, 1)
    assert lab.value("strict", "count") == 1
    lab.fail("strict", "1/0")
    assert lab.version("strict") == 1
    before = lab.host.pids()
    lab.reload("strict", source(2, body, count=count))
    assert (lab.version("strict"), lab.version("strict", "other")) == (2, 2)
    assert lab.value("strict", "count") == 2
    answer = lab.rollback("strict")
    assert answer.status == 409
    assert "cannot be forked" in answer.json()["error"]
    lab.reload("strict", source(3, body, count=count))
    assert lab.version("strict") == 3
    wait_until(lambda: len(lab.host.pids()) <= len(before) + 2, "no process is left behind")


# ---- going back


def test_after_a_rollback_the_old_code_serves_until_the_next_change(lab: Lab) -> None:
    lab.add("undo", source(1, count=COUNT, body=STATE + "OFFSET = 0"))
    assert lab.value("undo", "count") == 1
    lab.reload("undo", source(2, count=COUNT, body=STATE + "OFFSET = 100"))
    assert lab.value("undo", "count") == 102
    zygotes = len(lab.host.pids())
    assert lab.rollback("undo").status == 200
    assert lab.value("undo", "count") == 3, "with the state"
    assert lab.version("undo", "idle-org") == 1
    wait_until(lambda: len(lab.host.pids()) <= zygotes + 2)
    (lab.plugins / "undo/plugin.py").touch()
    lab.add("undo-sentinel", source(1))
    assert lab.version("undo") == 1, "what is on the disk was rolled back from"
    lab.reload("undo", source(3))
    assert lab.version("undo") == 3


def test_a_rollback_to_what_does_not_start_any_more_changes_nothing(lab: Lab) -> None:
    poison = lab.outside / "poison"
    hook = f"def on_start(self, ctx):\n    if os.path.exists({str(poison)!r}): os._exit(7)"
    lab.add("poisoned", source(1, hooks=hook))
    assert lab.version("poisoned") == 1
    lab.reload("poisoned", source(2))
    poison.touch()
    answer = lab.rollback("poisoned")
    assert answer.status == 409
    assert "was not rolled back" in answer.json()["error"]
    assert lab.version("poisoned") == 2
    poison.unlink()
    assert lab.rollback("poisoned").status == 200
    assert lab.version("poisoned") == 1


def test_only_the_version_before_is_kept(lab: Lab) -> None:
    lab.add("kept-once", source(1))
    zygotes = [lab.zygote("kept-once")]
    for version in (2, 3, 4):
        lab.reload("kept-once", source(version))
        zygotes.append(lab.zygote("kept-once"))
    wait_until(lambda: all_gone(zygotes[:2]), "the zygotes of older versions are gone")
    assert not all_gone([zygotes[2]])
    os.kill(zygotes[2], signal.SIGKILL)
    wait_until(lambda: lab.show("kept-once")["previous"] is None)
    assert lab.rollback("kept-once").status == 409
    assert lab.version("kept-once") == 4


# ---- processes that die


def test_a_watcher_that_is_killed_comes_back_and_sees_what_it_missed(lab: Lab) -> None:
    lab.add("unwatched", source(1))
    assert lab.version("unwatched") == 1
    watcher = lab.process("hayhost.watcher")
    os.kill(watcher, signal.SIGSTOP)  # it sees nothing from now on
    lab.save("unwatched", source(2))
    os.kill(watcher, signal.SIGKILL)
    lab.wait_for_reloads("unwatched", 1)
    assert lab.version("unwatched") == 2
    assert lab.process("hayhost.watcher") != watcher
    lab.reload("unwatched", source(3))
    assert lab.version("unwatched") == 3


def test_a_new_zygote_that_is_killed_while_it_loads(lab: Lab) -> None:
    loading, gate = lab.outside / "kill-began", lab.outside / "kill-gate"
    lab.add("killed", source(1))
    pid = lab.pid("killed")
    note = f"import os\nopen({str(loading)!r}, 'w').write(str(os.getpid()))\n"
    lab.save("killed", note + _wait_for(gate) + source(2))
    os.kill(int(wait_until(lambda: loading.exists() and loading.read_text())), signal.SIGKILL)
    wait_until(lambda: "its process was killed by signal 9" in (lab.show("killed")["error"] or ""))
    assert lab.pid("killed") == pid
    lab.reload("killed", source(3))
    assert lab.version("killed") == 3


def test_the_zygote_that_serves_is_killed_while_the_next_one_loads(lab: Lab) -> None:
    loading, gate = lab.outside / "other-began", lab.outside / "other-gate"
    lab.add("orphans", source(1))
    zygote, pid = lab.zygote("orphans"), lab.pid("orphans")
    note = f"import os\nopen({str(loading)!r}, 'w').write(str(os.getpid()))\n"
    lab.save("orphans", note + _wait_for(gate) + source(2))
    wait_until(loading.exists)
    os.kill(zygote, signal.SIGKILL)
    lab.host.wait_for_log("the plugin's zygote died; starting it anew")
    assert lab.pid("orphans") == pid, "its workers live on"
    gate.touch()
    wait_until(lambda: lab.version("orphans") == 2)
    assert lab.version("orphans", "idle-org") == 2
    lab.save("orphans", source(3))
    wait_until(lambda: lab.version("orphans") == 3)
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in lab.host.pids() if Path(f"/proc/{pid}").exists()]
    zygotes = len([name for name in names if name == "hay:orphans"])
    assert zygotes <= 2 + 2 + 1, "current and previous version, two workers and a spare"


def test_the_nursery_is_killed_during_a_reload(own: Callable[..., Lab]) -> None:
    lab = own("--spares", 0)
    loading, gate = lab.outside / "began", lab.outside / "gate"
    lab.add("p", source(1))
    lab.add("broken", source(1))
    assert (lab.version("p"), lab.version("broken")) == (1, 1)
    lab.fail("broken", "1/0")
    note = f"import os\nopen({str(loading)!r}, 'w').write(str(os.getpid()))\n"
    lab.save("p", note + _wait_for(gate) + source(2))
    pid = int(wait_until(lambda: loading.exists() and loading.read_text()))
    nursery = lab.process("hay-nursery")
    os.kill(nursery, signal.SIGKILL)
    lab.host.wait_for_log("the nursery died; starting it anew")
    gate.touch()
    wait_until(lambda: lab.version("p") == 2)
    assert lab.version("p", "idle-org") == 2
    assert lab.version("broken") == 1
    assert lab.version("broken", "idle-org") == 1, "what is on the disk does not load, what was loaded does"
    lab.reload("p", source(3))
    assert lab.version("p") == 3
    wait_until(lambda: all_gone([pid]), "the zygote without a nursery is gone")
    new = lab.process("hay-nursery")
    parent = int(Path(f"/proc/{lab.zygote('p')}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent == new, "what serves is looked after by the new nursery"
    lab.reload("broken", source(2))
    assert lab.version("broken") == 2


def test_without_watching_nothing_is_reloaded_and_a_lost_zygote_never_mixes_versions(own: Callable[..., Lab]) -> None:
    lab = own("--no-reload", "--spares", 0)
    lab.host.stop()
    write_plugin(lab.plugins / "p", source(1))
    lab = own("--no-reload", "--spares", 0)
    assert lab.version("p") == 1
    lab.save("p", source(2))
    assert not any("watcher" in Path(f"/proc/{pid}/cmdline").read_text() for pid in lab.host.pids())
    assert lab.version("p", "other") == 1
    os.kill(lab.zygote("p"), signal.SIGKILL)  # version 1 is nowhere but in its workers now
    assert lab.version("p", "third") == 2
    wait_until(lambda: lab.version("p") == lab.version("p", "other") == 2, "the others follow")


# ---- other ways to watch


def test_polling(own: Callable[..., Lab]) -> None:
    lab = own("--poll", "--debounce", 0)
    lab.add("p", source(1))
    assert lab.version("p") == 1
    lab.reload("p", source(2))
    assert lab.version("p") == 2
    watcher = lab.process("hayhost.watcher")
    links = [os.readlink(f"/proc/{watcher}/fd/{fd}") for fd in os.listdir(f"/proc/{watcher}/fd")]
    assert not [link for link in links if "inotify" in link]
    lab.remove("p")
    assert lab.get("p").status == 404


def test_inotify_limits_are_said_and_plugins_reloaded_all_the_same(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", source(1))
    shell = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    prefix = ["unshare", "-Ur", "sh", "-c", shell, "sh"]
    try:
        refused = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no unshare: {error}")
    if refused.returncode != 0:
        pytest.skip(f"user namespaces are refused: {refused.stderr.strip()}")
    arguments = ["serve", str(tmp_path), "--mode", "test", "--port", "0", "--log-format", "json"]
    host = HostProcess(arguments, prefix=prefix)
    try:
        host.wait_ready()
        (record,) = [record for record in host.records() if "fs.inotify.max_user_instances" in record["event"]]
        assert record["level"] == "warning"
        assert "sysctl" in record["event"]
        assert host.get("/plugins/p/acme/v").json()["v"] == 1
        replace_file(tmp_path / "p/plugin.py", source(2))
        wait_until(lambda: host.get("/plugins/p/acme/v").json()["v"] == 2)
    finally:
        host.kill()


def test_the_plugins_folder_is_moved_away_and_made_anew(own: Callable[..., Lab]) -> None:
    lab = own()
    lab.add("p", source(1))
    lab.add("q", source(1))
    pid = lab.pid("p")
    lab.plugins.rename(lab.outside / "away")
    lab.host.wait_for_log("the plugins folder is gone; its plugins are served on")
    assert lab.pid("p") == pid
    (lab.outside / "away").rename(lab.plugins)
    lab.reload("p", source(2))
    assert (lab.version("p"), lab.version("q")) == (2, 1)
    lab.plugins.rename(lab.outside / "away")
    lab.plugins.mkdir()
    lab.make("p", source(3))
    wait_until(lambda: lab.get("p").status == 200 and lab.version("p") == 3)
    wait_until(lambda: lab.get("q").status == 404, "what is not there any more is not served")
    lab.reload("p", source(4))
    assert lab.version("p") == 4


def test_watching_costs_no_process_that_forks_a_thread(lab: Lab) -> None:
    lab.add("threads", source(1))
    assert lab.version("threads") == 1
    for pid in (lab.process("hay-nursery"), lab.zygote("threads")):
        assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert b"watchdog" not in seen_of(lab.host.pid, "maps")


# ---- hayhost dev


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """``hayhost dev`` as its author sees it, on a console."""
    lab = Lab(tmp_path_factory.mktemp("dev"), command="dev")
    yield lab
    lab.close()


def _console(lab: Lab) -> list[str]:
    return lab.host.log.splitlines()


def test_dev_says_in_one_line_what_a_save_did(dev: Lab) -> None:
    dev.make("line", source(1))
    dev.host.wait_for_log(" line plugin loaded ms=")
    assert dev.version("line") == 1
    dev.save("line", source(2, extra="async def: return [1]"))
    dev.host.wait_for_log(" line reloaded ms=")
    assert dev.version("line") == 2, "the very next request has the new code"
    (line,) = [line for line in _console(dev) if " line reloaded ms=" in line]
    assert "changes=route +GET /extra, route +POST /extra" in line


def test_dev_shows_the_author_s_traceback(dev: Lab) -> None:
    dev.make("trace", source(1))
    dev.host.wait_for_log(" trace plugin loaded ms=")
    assert dev.version("trace") == 1
    dev.save("trace", "import json\njson.loads('{')\n")
    dev.host.wait_for_log(" trace not reloaded, the version before is served on")
    lines = _console(dev)
    at = next(number for number, line in enumerate(lines) if " trace not reloaded" in line)
    assert "reason=JSONDecodeError: " in lines[at]
    shown = [line.removeprefix("    | ") for line in lines[at + 1 :] if line.startswith("    | ")]
    assert shown[1] == f'  File "{dev.plugins}/trace/plugin.py", line 2, in <module>'
    assert [line for line in shown if line.lstrip().startswith("File")] == [shown[1]]
    assert dev.version("trace") == 1


def test_dev_points_at_a_syntax_error(dev: Lab) -> None:
    dev.make("syntax", source(1))
    dev.host.wait_for_log(" syntax plugin loaded ms=")
    dev.save("syntax", "value = 1\nvalue = = 2\n")
    dev.host.wait_for_log(" syntax not reloaded")
    log = dev.host.log.partition(" syntax not reloaded")[2]
    assert "reason=SyntaxError: invalid syntax (plugin.py, line 2)" in log
    assert f'File "{dev.plugins}/syntax/plugin.py", line 2' in log
    assert "    |     value = = 2\n    |             ^\n" in log
    assert "importlib" not in log


def test_dev_checks_the_author_s_own_annotations(dev: Lab) -> None:
    helper = "def double(value: int) -> int:\n    return value * 2\n"
    good, bad = "async def: return [helper.double(2)]", "async def: return [helper.double('2')]"
    dev.make("typed", source(1, "import helper", good=good, bad=bad), files={"helper.py": helper})
    dev.host.wait_for_log(" typed plugin loaded ms=")
    assert dev.value("typed", "good") == 4
    assert dev.get("typed", "bad").status == 500
    log = dev.host.wait_for_log('argument "value" (str) is not an instance of int')
    assert f'File "{dev.plugins}/typed/helper.py", line 1, in double' in log


def test_serve_does_not_check_them(lab: Lab) -> None:
    helper = "def double(value: int) -> int:\n    return value * 2\n"
    lab.add(
        "untyped", source(1, "import helper", bad="async def: return helper.double('2')"), files={"helper.py": helper}
    )
    assert lab.get("untyped", "bad").body == b"22"


# ---- all at once


def _descriptors(pid: int) -> int:
    return descriptors_of(pid)


def test_reloads_under_load_lose_nothing_and_leave_nothing(own: Callable[..., Lab]) -> None:
    orgs, clients, reloads = 5, 8, 10
    lab = own()
    lab.add("p", source(0))
    for org in range(orgs):
        assert lab.version("p", f"org{org}") == 0
    stop = threading.Event()
    served = [0]
    """The versions that have taken over everywhere, so far."""
    failed: list[object] = []
    stale: list[tuple[int, int]] = []
    answers = [0] * clients

    def client(number: int) -> None:
        connection = lab.host.connect()
        turn = number
        while not stop.is_set():
            turn += 1
            least = served[-1]
            try:
                connection.request("GET", f"/plugins/p/org{turn % orgs}/v")
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                failed.append(repr(error))
                connection.close()
                continue
            answers[number] += 1
            if answer.status != 200:
                failed.append((answer.status, body))
            elif (version := int(body.partition(b":")[2].partition(b",")[0])) < least:
                stale.append((least, version))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    plateau: list[int] = []
    descriptors = 0
    try:
        for version in range(1, reloads + 1):
            before = list(answers)
            lab.reload("p", source(version))
            served.append(version)
            wait_until(lambda before=before: all(now > then for now, then in zip(answers, before, strict=True)))  # type: ignore[misc]
            if version == 3:
                # The nursery, the watcher, two zygotes, the workers and a spare, which may be a while in coming.
                wait_until(lambda: len(lab.host.pids()) >= 2 + 2 + orgs + 1, "all are there")
                plateau, descriptors = lab.host.pids(), _descriptors(lab.host.pid)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    assert (failed, stale) == ([], [])
    assert sum(answers) > reloads * clients
    wait_until(lambda: len(lab.host.pids()) <= len(plateau), "the processes are back on their plateau")
    wait_until(lambda: _descriptors(lab.host.pid) <= descriptors, "and the descriptors")
    assert lab.show("p")["workers"] == orgs
    assert lab.host.stop() == 0


def test_with_one_worker_at_most_plugins_are_reloaded_too(own: Callable[..., Lab]) -> None:
    lab = own("--max-workers", 1, "--spares", 0)
    lab.add("p", source(1))
    assert lab.version("p") == 1
    lab.reload("p", source(2))
    assert lab.version("p") == 2


def test_stopping_during_a_reload_is_clean(own: Callable[..., Lab]) -> None:
    lab = own()
    loading, gate = lab.outside / "began", lab.outside / "gate"
    lab.add("p", source(1))
    assert lab.version("p") == 1
    lab.save("p", f"open({str(loading)!r}, 'w').close()\n" + _wait_for(gate) + source(2))
    wait_until(loading.exists)
    pids = lab.host.pids()
    assert lab.host.stop() == 0
    wait_until(lambda: all_gone(pids))
    with contextlib.suppress(FileNotFoundError):
        assert "Traceback" not in lab.host.log
