"""How workers are isolated: the levels, what still works at each, and what the manifest's permissions change."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hayhost import scratch
from hayhost.isolation import Isolation
from hayhost.scratch import Folders
from hayhost.settings import Settings
from sandbox.confinement import Level, Plan
from sandbox.confinement.cgroups import Cgroups
from sandbox.confinement.probes import probe

from .commands import run_hayhost
from .conftest import LIMIT, HostProcess, Serve, all_gone, routes, wait_until, write_plugin
from .hosting import hosting

PROBLEMS = probe()
CGROUPS = "no cgroups" if os.geteuid() else ""


def _available(level: Level) -> bool:
    return not any(PROBLEMS.get(layer, CGROUPS if layer == "cgroups" else "") for layer in level.layers)


LEVELS = [level.label for level in Level if level and _available(level)]

HONEST = routes(
    "import tempfile",
    asyncio="""async def:
        import asyncio
        async def one(number):
            await asyncio.sleep(0)
            return number
        assert sum(await asyncio.gather(*map(one, range(100)))) == 4950
        return str(await asyncio.to_thread(sum, [1, 2]))
    """,
    threads="""def:
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(16) as pool:
            return str(sum(pool.map(lambda n: n, range(100))))
    """,
    ssl="""def:
        import ssl
        context = ssl.create_default_context()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="example.com")
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        return str(len(outgoing.read()) > 100 and len(context.get_ca_certs()) > 10)
    """,
    sqlite="""def:
        import sqlite3
        with tempfile.TemporaryDirectory() as folder:
            database = sqlite3.connect(folder + "/data.db")
            mode, = database.execute("pragma journal_mode=wal").fetchone()
            database.execute("create table t (n)")
            with database:
                database.executemany("insert into t values (?)", [(n,) for n in range(1000)])
            total, = database.execute("select sum(n) from t").fetchone()
            database.close()
            return f"{mode} {total}"
    """,
    files="""def:
        import shutil
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.mkdir(folder + "/deep")
            os.link(file.name, folder + "/deep/link")
            os.rename(folder + "/deep/link", folder + "/moved")
            os.symlink("moved", folder + "/symbolic")
            with open(__file__) as own:
                assert "tempfile" in own.read()
            return str(os.stat(folder + "/symbolic").st_size) + os.environ["HOME"].replace(tempfile.gettempdir(), " ok")
    """,
    copies="""def:
        import shutil, tarfile, zipfile
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(__file__, folder + "/copy")
            shutil.copy2(__file__, folder + "/copy2")
            shutil.copytree(os.path.dirname(__file__), folder + "/tree")
            os.chmod(folder + "/copy", 0o600)
            os.utime(folder + "/copy")
            with tarfile.open(folder + "/t", "w") as tar:
                tar.add(folder + "/copy", "in/tar")
            with tarfile.open(folder + "/t") as tar:
                tar.extractall(folder)
            with zipfile.ZipFile(folder + "/z", "w") as archive:
                archive.write(folder + "/copy", "in/zip")
            with zipfile.ZipFile(folder + "/z") as archive:
                archive.extractall(folder)
            return " ".join(sorted(os.listdir(folder + "/in")))
    """,
    user="""def:
        import getpass
        return getpass.getuser()
    """,
    numpy="""def:
        import numpy
        return str(int((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum()))
    """,
    pydantic="""def:
        from pydantic import BaseModel
        class Point(BaseModel):
            x: int
        return Point(x="3").model_dump_json()
    """,
    zoneinfo="""def:
        from datetime import datetime
        from zoneinfo import ZoneInfo
        return datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")).isoformat()
    """,
    locale="""def:
        import locale
        return locale.setlocale(locale.LC_ALL, "C.UTF-8") + locale.str(1.5)
    """,
    misc="""def:
        import hashlib, mmap, multiprocessing, platform, random, secrets, socket, uuid
        a, b = socket.socketpair()
        a.send(b"x")
        mmap.mmap(-1, 4096).close()
        assert len({uuid.uuid4(), uuid.uuid4()}) == 2 and secrets.token_hex() and random.random()
        return b.recv(1).decode() + str(os.cpu_count() > 0) + platform.system() + hashlib.sha256(b"").hexdigest()[:4]
    """,
)
WORKS = {
    "asyncio": "3",
    "threads": "4950",
    "ssl": "True",
    "sqlite": "wal 499500",
    "files": "100000 ok",
    "copies": "tar zip",
    "user": "plugin",
    "numpy": "8000000",
    "pydantic": '{"x":3}',
    "zoneinfo": "2026-07-01T00:00:00+02:00",
    "locale": "C.UTF-81.5",
    "misc": "xTrueLinuxe3b0",
}


@pytest.fixture(scope="module", params=LEVELS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A host at each level that this machine gives."""
    folder = tmp_path_factory.mktemp("plugins")
    write_plugin(folder / "p", HONEST)
    with hosting(folder, "--isolation", request.param) as host:
        host.level = request.param  # type: ignore[attr-defined]  # for the tests below
        yield host


@pytest.mark.parametrize("name", WORKS)
def test_what_honest_plugins_use_works(host: HostProcess, name: str) -> None:
    answer = host.get(f"/plugins/p/acme/{name}")
    assert (answer.status, answer.body.decode()) == (200, WORKS[name]), host.log


def test_the_level_is_shown_in_health_and_in_the_log(host: HostProcess) -> None:
    level = host.level  # type: ignore[attr-defined]
    assert host.health("p", "nobody")["isolation"] == level
    assert host.get("/plugins/p/acme/asyncio").status == 200
    assert host.health("p", "acme")["isolation"] == level
    [record] = [record for record in host.records() if record["event"] == "isolation"]
    assert record["isolation"] == level


# ---- levels


# A user namespace in which there can be no further one, and a user without privileges in it: as in most containers.
CONTAINER = """
import ctypes, os, sys
uid, gid = os.geteuid(), os.getegid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
for file, text in ("setgroups", "deny"), ("uid_map", f"4242 {uid} 1"), ("gid_map", f"4242 {gid} 1"):
    open(f"/proc/self/{file}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execv(sys.argv[1], sys.argv[1:])
"""
IN_CONTAINER = [sys.executable, "-c", CONTAINER]


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Callable[..., HostProcess]]:
    """``container(folder, *options)``: a host where namespaces are refused."""
    if PROBLEMS["namespaces"]:
        pytest.skip(f"namespaces are refused here anyway: {PROBLEMS['namespaces']}")
    started: list[HostProcess] = []

    def begin(folder: Path, *options: str) -> HostProcess:
        arguments = ["serve", str(folder), "--mode", "test", "--port", "0", "--log-format", "json", *options]
        started.append(HostProcess(arguments, prefix=IN_CONTAINER))
        return started[-1]

    yield begin
    for host in started:
        host.kill()


def test_where_namespaces_are_refused_it_is_confined(container: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", HONEST)
    host = container(tmp_path).wait_ready()
    assert host.get("/plugins/p/acme/sqlite").body == b"wal 499500"
    assert host.health("p", "acme")["isolation"] == "confined"
    [record] = [record for record in host.records() if record["event"] == "isolation"]
    assert "no_namespaces" in record


def test_below_the_required_level_it_does_not_start(container: Callable[..., HostProcess], tmp_path: Path) -> None:
    for options in (["--require", "namespaced"], ["--isolation", "namespaced"]):
        host = container(tmp_path, *options)
        assert host.process.wait(LIMIT) == 1
        assert "at the level confined only, and namespaced is required" in host.log
        assert "hayhost doctor" in host.log


def test_layers_by_hand_are_no_level(tmp_path: Path) -> None:
    report = run_hayhost("doctor", "--json", "--layers", "limits,landlock", "--require", "confined")
    assert (report.code, report.json()["level"]) == (1, "limited")


def test_a_layer_that_there_is_not(tmp_path: Path) -> None:
    done = run_hayhost("serve", tmp_path, "--mode=test", "--port=0", "--layers=landlock,magic")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("hayhost: layers: magic: no such layer; there are limits, landlock,")


# ---- permissions


def grants(**permissions: object) -> str:
    """The table of a manifest."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in permissions.items()]
    return "\n[tool.hay-plugin.permissions]\n" + "\n".join(lines) + "\n"


SPAWN = routes(
    "import subprocess",
    true="def:\n return str(subprocess.run(['true']).returncode)",
    sh="def:\n return subprocess.run(['sh', '-c', 'echo $((1 + 1)) > $TMPDIR/x; cat $TMPDIR/x'], capture_output=True)"
    ".stdout.decode()",
    shell="def:\n return str(os.system('true'))",
    fork="def:\n return str(os.fork())",
    aio="async def:\n process = await asyncio.create_subprocess_exec('true')\n return str(await process.wait())",
)


@pytest.mark.parametrize("name", ["true", "shell", "fork", "aio"])
def test_programs_are_refused_with_the_permission_to_ask_for(serve: Serve, tmp_path: Path, name: str) -> None:
    write_plugin(tmp_path / "p", SPAWN)
    host = serve()
    assert host.get(f"/plugins/p/acme/{name}").status == 500
    host.wait_for_log("permissions.subprocess = [")
    assert host.health("p", "acme")["state"] == "ready"


def test_programs_that_are_listed_run_and_others_do_not(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", SPAWN, extra=grants(subprocess=["true"]))
    host = serve()
    assert host.get("/plugins/p/acme/true").body == b"0", host.log
    assert host.get("/plugins/p/acme/aio").body == b"0", host.log
    assert host.get("/plugins/p/acme/sh").status == 500
    host.wait_for_log("lists in permissions.subprocess")


def test_the_log_has_what_os_system_does_not_tell(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", SPAWN, extra=grants(subprocess=["true"]))
    host = serve()
    assert host.get("/plugins/p/acme/shell").body == str(127 << 8).encode()
    host.wait_for_log("lists in permissions.subprocess; os.system needs sh there, too")


def test_multiprocessing_works_with_the_permission(serve: Serve, tmp_path: Path) -> None:
    source = """def:
        import multiprocessing
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=theirs.send, args=("sent",))
        process.start()
        process.join()
        return f"{process.exitcode} {ours.recv()}"
    """
    write_plugin(tmp_path / "p", routes("", fork=source), extra=grants(subprocess=["true"]))
    assert serve().get("/plugins/p/acme/fork").body == b"0 sent"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("os._exit(3)", "its process exited with code 3 while it was loading"),
        ("os.abort()", "was killed by signal 6 (Aborted) while it was loading; if it lacks memory, permissions.memory"),
    ],
    ids=["exit", "abort"],
)
def test_a_plugin_that_dies_while_it_loads_is_told_how(tmp_path: Path, level: str, source: str, told: str) -> None:
    write_plugin(tmp_path / "p", f"import os\n{source}\n")
    [error] = run_hayhost("check", "--json", "--isolation", level, tmp_path / "p").json()["errors"]
    assert told in error


def test_check_takes_the_options_of_isolation(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", routes("", one="def:\n return '1'"))
    for level in LEVELS:
        assert run_hayhost("check", "--json", "--isolation", level, tmp_path / "p").json()["isolation"] == level
    none = run_hayhost("check", "--json", "--layers", "none", "--require", "none", tmp_path / "p")
    assert none.json()["isolation"] == "none"


def test_what_was_not_asked_for_is_not_said_to_be_missing(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", routes("", one="def:\n return '1'"))
    with hosting(tmp_path, "--isolation", "limited", "--require", "none") as host:
        [record] = [record for record in host.records() if record["event"] == "isolation"]
        assert [key for key in record if key.startswith("no_")] == []


def test_a_cgroup_that_is_made_after_its_worker_left_is_removed() -> None:
    made, may_go_on, removed = threading.Event(), threading.Event(), []

    class Slow(Cgroups):
        def add(self, name: str, pid: int, **_: Any) -> None:
            made.set()
            may_go_on.wait(LIMIT)

        def remove(self, name: str) -> bool:
            removed.append(name)
            return True

    async def leave() -> None:
        isolation = Isolation(Settings())
        isolation._cgroups = Slow({"unified": Path("/nowhere")})
        moving = asyncio.create_task(isolation.contain("late", 1, Plan(layers=frozenset({"cgroups"}))))
        await asyncio.to_thread(made.wait, LIMIT)
        isolation.left("late")
        assert removed == []
        may_go_on.set()
        assert await moving == ""
        assert removed == ["late"]
        isolation.close()

    asyncio.run(leave())


def test_a_command_that_there_is_not(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", SPAWN, extra=grants(subprocess=["no-such-command"]))
    [error] = run_hayhost("check", "--json", tmp_path / "p").json()["errors"]
    assert error == "permissions.subprocess: there is no command 'no-such-command' on this machine"


def test_python_as_a_program(serve: Serve, tmp_path: Path) -> None:
    source = routes(
        "import subprocess",
        run="def:\n return subprocess.run(['/usr/bin/env', 'python3', '-c', 'print(6 * 7)'], capture_output=True,"
        " text=True, check=True).stdout",
    )
    write_plugin(tmp_path / "p", source, extra=grants(subprocess=["/usr/bin/env", "python3"]))
    host = serve()
    assert host.get("/plugins/p/acme/run").body == b"42\n", host.log


LIMITS = routes(
    "HELD = []",
    memory="def:\n for _ in range(64): HELD.append(b'x' * (16 << 20))\n return 'got it'",
    descriptors="def:\n try:\n  while True: HELD.append(open('/dev/null'))\n finally: n = len(HELD); HELD.clear()",
    threads="""def:
        gate = threading.Event()
        started = []
        try:
            for _ in range(800):
                started.append(threading.Thread(target=gate.wait))
                started[-1].start()
        finally:
            gate.set()
    """,
    spin="async def:\n while True: pass",
    fill="def:\n open(os.environ['TMPDIR'] + '/big', 'wb').write(bytes(80 << 20))",
    pid="async def:\n return str(os.getpid())",
)


def crashed(host: HostProcess) -> str:
    """Why the worker of acme died last, once it has."""
    reason: str = wait_until(lambda: host.health("p", "acme")["lastError"], "the worker has died")
    return reason


def test_memory_is_limited_and_the_author_told(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", LIMITS, extra=grants(memory="64MiB"))
    host = serve()
    answer = host.get("/plugins/p/acme/memory")
    assert answer.status in (500, 502)
    if answer.status == 500:
        host.wait_for_log("permissions.memory in the manifest")
    else:
        wait_until(lambda: "permissions.memory" in crashed(host), "the reason is known")
    assert host.get("/plugins/p/acme/pid").status == 200


def test_descriptors_are_limited_and_the_author_told(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", LIMITS, extra=grants(files=64))
    host = serve()
    assert host.get("/plugins/p/acme/descriptors").status == 500
    host.wait_for_log("permissions.files in the manifest")
    assert host.get("/plugins/p/acme/pid").status == 200


def test_threads_are_limited_and_the_author_told(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", LIMITS, extra=grants(processes=32))
    host = serve()
    assert host.get("/plugins/p/acme/threads").status == 500
    host.wait_for_log("permissions.processes in the manifest")
    assert host.get("/plugins/p/acme/pid").status == 200


@pytest.mark.parametrize("level", [level for level in ("limited", "confined", "namespaced") if level in LEVELS])
def test_without_cgroups_the_front_looks_and_the_author_is_told(tmp_path: Path, level: str) -> None:
    many = """async def:
        for _ in range(40):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        await asyncio.sleep(600)
    """
    write_plugin(tmp_path / "p", routes("", many=many), extra=grants(processes=20))
    with hosting(tmp_path, "--isolation", level, "--require", "none") as host:
        assert host.get("/plugins/p/acme/many").status == 502
        error = wait_until(lambda: host.health("p", "acme")["lastError"], "its end is known")
        assert "processes and threads, more than its 20; permissions.processes in the manifest" in error


def test_processor_time_is_limited(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", LIMITS, extra=grants(cpu_seconds=1))
    host = serve()
    assert host.get("/plugins/p/acme/spin").status == 502
    wait_until(lambda: "permissions.cpu_seconds" in crashed(host), "the reason is known")
    assert host.get("/plugins/p/acme/pid").status == 200


def test_the_scratch_folder_is_limited(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", LIMITS)
    host = serve()
    assert host.get("/plugins/p/acme/fill").status == 500
    host.wait_for_log("a worker's scratch folder holds 64 MiB")
    assert host.get("/plugins/p/acme/pid").status == 200


HINTS = routes(
    "import tempfile",
    lock="def:\n import multiprocessing\n multiprocessing.Lock()",
    signal="def:\n os.kill(1, 0)",
    base="def:\n import sqlite3\n sqlite3.connect('/var/lib/no.db').execute('create table t (n)')",
    wrapped="def:\n try: open('/etc/passwd')\n except OSError as error: raise ValueError('no settings') from error",
    outside="def:\n os.chmod(__file__, 0o777)",
)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lock", "use threads"),
        ("signal", "the sandbox does not let plugins do this"),
        ("base", "tempfile.gettempdir() names"),
        ("wrapped", "ValueError: no settings (a plugin may read its own folder"),
        ("outside", "tempfile.gettempdir() names"),
    ],
)
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "limited"])
def test_the_author_is_told_what_to_do_instead(tmp_path: Path, level: str, name: str, told: str) -> None:
    write_plugin(tmp_path / "p", HINTS)
    with hosting(tmp_path, "--isolation", level, writable=False) as host:
        assert host.get(f"/plugins/p/acme/{name}").status == 500
        host.wait_for_log(told)


def test_what_writes_at_import_is_told_where_it_belongs(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", routes("import tempfile\ntempfile.mkdtemp()", a="def:\n return ''"))
    [error] = run_hayhost("check", "--json", tmp_path / "p").json()["errors"]
    assert "belongs into on_start or later" in error


# ---- strict sharing


def test_a_plugin_that_imports_numpy_is_forked_all_the_same(serve: Serve, tmp_path: Path) -> None:
    source = "import numpy\n" + routes("", sum="def:\n return str(numpy.arange(10).sum())")
    write_plugin(tmp_path / "p", source)
    host = serve()
    assert host.get("/plugins/p/acme/sum").body == b"45", host.log
    assert host.health("p", "acme")["sharing"] == "fork"


def test_strict_workers_are_programs_of_their_own(serve: Serve, tmp_path: Path) -> None:
    source = routes("", where="async def:\n return {'hash': hash('x'), 'address': id(sys), 'pid': os.getpid()}")
    write_plugin(tmp_path / "p", source, extra='sharing = "strict"\n')
    host = serve()
    first, second = (host.get(f"/plugins/p/{org}/where").json() for org in ("a", "b"))
    assert first["hash"] != second["hash"]
    assert first["address"] != second["address"]
    health = host.health("p", "a")
    assert (health["sharing"], health["sharingReason"]) == ("strict", 'its manifest says sharing = "strict"')


# ---- the scratch folder


SCRATCH = routes(
    "",
    leave="def:\n open(os.environ['TMPDIR'] + '/left', 'w').write(req.ctx.org.id)",
    look="def:\n return {'own': os.listdir(os.environ['TMPDIR']), 'folder': os.environ['TMPDIR']}",
    die="async def:\n os._exit(3)",
)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "limited"])
def test_a_scratch_folder_is_the_workers_own_and_goes_with_it(tmp_path: Path, level: str) -> None:
    write_plugin(tmp_path / "p", SCRATCH)
    with hosting(tmp_path, "--isolation", level, writable=False) as host:
        for org in ("a", "b"):
            assert host.get(f"/plugins/p/{org}/leave").status == 204
        first, second = (host.get(f"/plugins/p/{org}/look").json() for org in ("a", "b"))
        assert first["own"] == second["own"] == ["left"]
        assert first["folder"] != second["folder"]
        assert host.get("/plugins/p/a/die").status == 502
        again = host.get("/plugins/p/a/look").json()
        assert again["own"] == []
        assert again["folder"] != first["folder"]
        wait_until(lambda: not os.path.exists(first["folder"]), "the folder of the dead worker is gone")
        base = Path(second["folder"]).parent
        host.stop()
        assert not base.exists() or base == Path("/scratch")


def test_the_folders_of_a_killed_host_are_removed_by_the_next(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", SCRATCH)
    folders = []
    for _ in range(2):
        with hosting(tmp_path, "--isolation", "confined") as host:
            assert host.get("/plugins/p/a/leave").status == 204
            folders.append(Path(host.get("/plugins/p/a/look").json()["folder"]).parent.parent)
            assert [folder.exists() for folder in folders] == [False, True][-len(folders) :]
            host.kill()
    shutil.rmtree(folders[-1])


SEEKER = """
import sys
frame, plan = sys._getframe(), None
while frame is not None and plan is None:
    plan = next((value.plan for value in frame.f_locals.values() if hasattr(value, "plan")), None)
    frame = frame.f_back
FOUND = []
for folder in {plan.scratch, os.path.dirname(plan.scratch)}:
    try:
        FOUND += [os.path.join(base, file) for base, _, files in os.walk(folder) for file in files]
        open(folder + "/left", "w").close()
        FOUND.append(folder)
    except OSError:
        pass
"""


def test_a_zygote_reaches_no_scratch_folder_of_another_plugin(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", SCRATCH)
    with hosting(tmp_path, "--isolation", "confined", writable=False) as host:
        assert host.get("/plugins/p/a/leave").status == 204
        own = Path(host.get("/plugins/p/a/look").json()["folder"])
        write_plugin(tmp_path / "seeker", routes(SEEKER, found="def:\n return FOUND"))
        wait_until(lambda: host.get("/plugins/seeker/a/found").status == 200, "the other plugin is loaded")
        [found] = host.get("/plugins/seeker/a/found").json()
        assert Path(found).parent == own.parent.parent
        assert found != str(own.parent)


def test_a_folder_that_cannot_be_measured_is_too_large_and_is_removed_all_the_same(tmp_path: Path) -> None:
    folders = Folders()
    (deep := tmp_path / "deep").mkdir()
    assert folders.size(str(deep)) == 0
    inside = os.open(deep, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=inside)
        inside, outside = os.open("d" * 200, os.O_RDONLY, dir_fd=inside), inside
        os.close(outside)
    os.close(inside)
    assert folders.size(str(deep)) == math.inf
    (hidden := tmp_path / "hidden" / "below").mkdir(parents=True)
    (hidden / "file").touch()
    hidden.chmod(0o300)
    for folder in (deep, hidden.parent):
        scratch._remove(str(folder))
        assert not folder.exists()


LEAVES_A_PROCESS = """
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 100)
    time.sleep(600)
    os._exit(0)
"""
DOES_NOT_LEAVE = """
import sandbox.zygote
sandbox.zygote._Zygote.serve = lambda self, plugin: time.sleep(600)
"""


def _named(host: HostProcess, name: str) -> list[int]:
    return [pid for pid in host.pids() if _name_of(pid) == name]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""  # gone meanwhile


@pytest.mark.parametrize(
    ("level", "source", "count"),
    [("confined", DOES_NOT_LEAVE, 1), ("namespaced", DOES_NOT_LEAVE, 1), ("namespaced", LEAVES_A_PROCESS, 2)],
    ids=["zygote", "zygote-in-namespaces", "child"],
)
def test_what_an_import_leaves_goes_with_the_plugin(tmp_path: Path, level: str, source: str, count: int) -> None:
    if level not in LEVELS:
        pytest.skip(f"this machine is not {level}")
    write_plugin(tmp_path / "stays", routes("", pid="def:\n return str(os.getpid())"))
    write_plugin(tmp_path / "goes", routes(source))
    with hosting(tmp_path, "--isolation", level) as host:
        assert len(_named(host, "hay:goes")) == count
        shutil.rmtree(tmp_path / "goes")
        wait_until(lambda: not _named(host, "hay:goes"), "its processes are gone")
        assert host.get("/plugins/stays/a/pid").status == 200


def test_workers_of_a_version_that_is_replaced_finish_what_they_do(tmp_path: Path) -> None:
    source = routes("", slow="async def:\n await asyncio.sleep(3)\n return 'done'")
    write_plugin(tmp_path / "p", source)
    with hosting(tmp_path) as host, ThreadPoolExecutor(1) as pool:
        assert host.get("/plugins/p/a/health").status == 200
        answer = pool.submit(host.get, "/plugins/p/a/slow")
        wait_until(lambda: host.health("p", "a")["state"] == "ready", "it has started")
        write_plugin(tmp_path / "p", source.replace("done", "new"))
        assert answer.result().body in (b"done", b"new")


hardened = pytest.mark.skipif("hardened" not in LEVELS, reason="cgroups are for root")


def _outside(host: HostProcess, pids: list[int]) -> list[int]:
    """Those of ``pids`` that are in the host's own group, for one controller at least."""
    own = Path(f"/proc/{host.pid}/cgroup").read_text().splitlines()
    return [pid for pid in pids if set(own) & set(_limited(Path(f"/proc/{pid}/cgroup").read_text().splitlines()))]


def _limited(groups: list[str]) -> list[str]:
    return [line for line in groups if {"memory", "pids", "cpu"} & set(line.split(":")[1].split(","))] or groups


@hardened
def test_what_a_worker_starts_at_once_is_in_its_cgroup(tmp_path: Path) -> None:
    source = routes("", pids="def:\n return [os.getpid(), self.child]")
    source += "\n    def on_start(self, ctx):\n        self.child = os.fork()\n"
    source += "        if not self.child:\n            time.sleep(600)\n"
    write_plugin(tmp_path / "p", source, extra=grants(subprocess=["true"]))
    options = ["--isolation", "hardened", "--spares", "0"]  # a spare may be on its way just now
    with hosting(tmp_path, *options) as host, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda number: host.get(f"/plugins/p/org{number}/pids").status, range(24)))
        assert answers == [200] * 24
        assert _outside(host, _named(host, "hay:p")) == []

        def of_the_zygote() -> int:  # a spare that has just been forked is still with it, and without an org
            with contextlib.suppress(FileNotFoundError):
                return sum("/zygote-" in Path(f"/proc/{pid}/cgroup").read_text() for pid in _named(host, "hay:p"))
            return -1

        wait_until(lambda: of_the_zygote() == 1, "only the zygote is in the zygote's group")


@hardened
def test_what_is_started_at_import_is_bounded(tmp_path: Path) -> None:
    source = """
    import os, time
    started = 0
    try:
        while started < 600:
            if not os.fork():
                time.sleep(600)
            started += 1
    except OSError:
        pass
    """
    write_plugin(tmp_path / "p", textwrap.dedent(source) + routes("", started="def:\n return str(started)"))
    with hosting(tmp_path, "--isolation", "hardened") as host:
        assert len(_named(host, "hay:p")) < 300
        assert _outside(host, _named(host, "hay:p")) == []


LIES = """
import ctypes, struct
from sandbox.confinement import seccomp
Filter, fork = seccomp.Filter, os.fork
seccomp.Filter = lambda program: Filter(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
import sandbox.zygote
sandbox.zygote._Zygote._sweep = lambda self: setattr(self, "_sweep_at", None)
"""


@hardened
def test_what_the_worker_of_a_zygote_that_lies_leaves_goes_with_it(tmp_path: Path) -> None:
    leave = "def:\n if not fork():\n  os.setsid()\n  time.sleep(600)\n return 'left'"
    write_plugin(tmp_path / "p", routes(LIES, leave=leave, die="async def:\n os._exit(3)", start="async def:\n pass"))
    with hosting(tmp_path, "--isolation", "hardened") as host:
        assert host.get("/plugins/p/a/start").status == 204
        worker = host.health("p", "a")["pid"]
        groups = Path(f"/proc/{worker}/cgroup")
        wait_until(lambda: "/zygote-" not in groups.read_text(), "it is in its own cgroup")
        assert host.get("/plugins/p/a/leave").body == b"left"
        threads = Path(f"/proc/{worker}/task").glob("*/children")
        left = [int(pid) for children in threads for pid in children.read_text().split()]
        assert len(left) == 1
        assert host.get("/plugins/p/a/die").status == 502
        wait_until(lambda: all_gone(left), "what it left is gone")


# ---- doctor


def test_doctor_says_what_there_is() -> None:
    done = run_hayhost("doctor", "--json")
    report: dict[str, Any] = done.json()
    assert (done.code, report["ok"], report["level"]) == (0, True, LEVELS[-1])
    assert {layer["layer"] for layer in report["layers"]} >= {"landlock", "seccomp", "namespaces", "cgroups", "uid"}
    assert len(report["canaries"]) >= 8
    assert all(canary["refused"] for canary in report["canaries"])


def test_doctor_fails_if_a_worker_can_do_what_it_must_not() -> None:
    done = run_hayhost("doctor", "--json", "--layers", "limits,landlock", "--require", "none")
    succeeded = {canary["attempt"] for canary in done.json()["canaries"] if not canary["refused"]}
    assert {"make a user namespace", "watch files of the machine"} <= succeeded
    done = run_hayhost("doctor", "--layers", "limits,landlock", "--require", "none")
    assert "succeeded" in done.out


@pytest.mark.skipif(not os.geteuid(), reason="root has every level")
def test_doctor_says_what_is_missing_for_a_level() -> None:
    done = run_hayhost("doctor", "--isolation", "hardened")
    assert done.code == 1
    assert f"isolation: {LEVELS[-1]} (required: hardened)" in done.out
    assert "only root can give each plugin a user of its own" in done.out
    assert "\\n" not in done.out


def test_doctor_says_what_was_not_asked_for() -> None:
    done = run_hayhost("doctor", "--json", "--isolation", "limited")
    problems = {layer["layer"]: layer["problem"] for layer in done.json()["layers"]}
    assert (problems["limits"], problems["seccomp"]) == (None, PROBLEMS["seccomp"] or "not asked for")


def test_doctor_for_people() -> None:
    done = run_hayhost("doctor")
    assert done.code == 0
    assert f"isolation: {LEVELS[-1]} (required: confined)" in done.out
    assert done.out.splitlines()[-1] == "ok"
    assert (
        subprocess.run([sys.executable, "-m", "hayhost", "doctor", "--require", "magic"], check=False).returncode == 2
    )
