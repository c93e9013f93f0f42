"""Handlers that do what they should not: one clear outcome each, and nobody else notices."""

import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .bystanders import Bystanders, bystanders
from .conftest import HostProcess, all_gone, descriptors_of, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting, logged

# What is tried here needs processes, files and sockets that the sandbox would refuse; see the attacks for that.
ISOLATION = "limited"

HOSTILE = """
import ctypes, gc, socket, subprocess
from sandbox import wire

@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid(), "parent": os.getppid()}

def our_sockets():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                sock = socket.socket(fileno=os.dup(int(name)))
                if sock.type == socket.SOCK_STREAM and sock.getpeername() == "":
                    found.append(int(name))
                sock.close()
        except OSError:
            pass
    loop = asyncio.get_running_loop()
    return [fd for fd in found if fd not in (loop._ssock.fileno(), loop._csock.fileno())]

def say(*what):
    [fd] = our_sockets()
    os.set_blocking(fd, True)
    for part in what:
        os.write(fd, part if isinstance(part, bytes) else wire.encode(part))

class Odd(BaseException):
    pass

class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no")
    __repr__ = __str__

def attack(handler):
    route("GET", "/" + handler.__name__.replace("_", "-"))(handler)
    return handler

# ---- ends in an error

def throw(error):
    raise error

ERRORS = {
    "exception": lambda: throw(Exception("secret of the plugin")),
    "base-exception": lambda: throw(Odd("secret of the plugin")),
    "keyboard-interrupt": lambda: throw(KeyboardInterrupt()),
    "system-exit": lambda: sys.exit(0),
    "system-exit-text": lambda: sys.exit("secret of the plugin"),
    "generator-exit": lambda: throw(GeneratorExit()),
    "stop-iteration": lambda: next(iter([])),
    "stop-async-iteration": lambda: throw(StopAsyncIteration()),
    "cancelled-error": lambda: throw(asyncio.CancelledError()),
    "timeout-error": lambda: throw(TimeoutError()),
    "blocking": lambda: throw(BlockingIOError(11, "again")),
    "unspeakable": lambda: throw(Unspeakable()),
    "group": lambda: throw(BaseExceptionGroup("group", [Odd(), SystemExit(1)])),
    "recursion": lambda: ERRORS["recursion"](),
    "deep-json": lambda: deep(100_000),
    "memory": lambda: bytearray(1 << 62),
    "memory-error": lambda: throw(MemoryError()),
    "object": lambda: object(),
    "number": lambda: 42,
    "a-class": lambda: Odd,
    "keys": lambda: {object(): 1},
    "nan-status": lambda: Response("x", status=float("nan")),
    "itself": lambda: cyclic(),
    "coroutine-of-nothing": lambda: [asyncio.sleep],
}

def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value

def cyclic():
    value = {}
    value["self"] = value
    return value

def add_error(name, call):
    @route("GET", f"/sync/{name}")
    def sync(req):
        return call()
    @route("GET", f"/async/{name}")
    async def coroutine(req):
        return call()

for name, call in ERRORS.items():
    add_error(name, call)

@attack
async def cancels_itself(req):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)

@attack
async def cancels_itself_late(req):
    asyncio.current_task().cancel()
    return {"too": "late"}

@attack
async def cancels_everybody(req):
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0)

# ---- lives on

@attack
def noise(req):
    for number in range(300):
        print("noise", number)
        logging.error("noise %d", number)
        req.ctx.logger.info("noise", {"number": number})
        sys.stderr.write("noise\\n")
    os.write(2, b"raw noise\\n" * 1_000)
    return "quiet"

@attack
def forged(req):
    print('\\x1b[2J\\n{"time":"now","level":"error","event":"forged by the plugin"}\\r\\u2028\\u202e')
    os.write(1, b'\\n{"time":"now","level":"error","event":"forged in the raw"}\\n')
    return "done"

@attack
def exits_in_a_thread(req):
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()
    return "still here"

@attack
def closes_its_streams(req):
    sys.stdout.close()
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    return "still here"

@attack
def many_threads(req):
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(50)]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join()
    return "still here"

@attack
async def many_tasks(req):
    for _ in range(10_000):
        asyncio.get_running_loop().create_task(asyncio.sleep(3600))
    return "still here"

@attack
async def failing_tasks(req):
    async def fail():
        raise ValueError("in the background")
    task = asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0)
    del task
    gc.collect()
    asyncio.get_running_loop().call_soon(lambda: throw(ValueError("in a callback")))
    await asyncio.sleep(0)
    return "still here"

@attack
def shrinks_the_stack(req):
    sys.setrecursionlimit(60)
    return "still here"

@attack
def interrupts_itself(req):
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"

# ---- dies

@attack
def exits_sync(req):
    os._exit(0)

@attack
async def exits_async(req):
    os._exit(3)

for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1):
    def add_signal(number):
        @route("GET", f"/signal/{number.name}")
        async def raises_signal(req):
            signal.raise_signal(number)
            await asyncio.sleep(3600)
    add_signal(number)

@attack
def aborts(req):
    os.abort()

@attack
def null_pointer(req):
    ctypes.string_at(0)

@attack
async def exits_in_a_task(req):
    async def leave():
        sys.exit(7)
    await asyncio.wait({asyncio.get_running_loop().create_task(leave())})

@attack
async def exits_in_a_callback(req):
    asyncio.get_running_loop().call_soon(sys.exit, 7)
    await asyncio.sleep(3600)

@attack
async def stops_the_loop(req):
    asyncio.get_event_loop().stop()
    await asyncio.sleep(3600)

@attack
async def closes_all(req):
    os.closerange(0, 4096)
    return "what?"

@attack
async def closes_its_socket(req):
    os.close(our_sockets()[0])
    return "what?"

@attack
async def replaces_its_socket(req):
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, our_sockets()[0])
    return "what?"

@attack
async def shuts_its_socket(req):
    sock = socket.socket(fileno=our_sockets()[0])
    sock.shutdown(socket.SHUT_RDWR)
    await asyncio.sleep(3600)

@attack
async def shuts_for_writing(req):
    sock = socket.socket(fileno=our_sockets()[0])
    sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(3600)

@attack
async def becomes_another_program(req):
    os.execv("/bin/sleep", ["sleep", "3600"])

@attack
async def speaks_garbage(req):
    say(b"\\xff" * 100)
    await asyncio.sleep(3600)

@attack
async def answers_a_stranger(req):
    say(wire.ResponseHead(4711, 200, [], b"", True))
    await asyncio.sleep(3600)

@attack
async def answers_as_the_nursery(req):
    say(wire.LoadFailed("why", "not"))
    await asyncio.sleep(3600)

@attack
async def is_ready_twice(req):
    say(wire.Ready("", []))
    await asyncio.sleep(3600)

# ---- speaks the protocol itself; the stream's number is in the path

def add_frames(name, frames):
    @route("GET", f"/frames/{name}/{{id}}")
    async def speaks(req):
        say(*frames(int(req.params["id"])))
        await asyncio.sleep(3600)

FRAMES = {
    "injects": lambda id: [wire.ResponseHead(id, 200, [("x", "a\\r\\nset-cookie: b=c")], b"", True)],
    "injects-name": lambda id: [wire.ResponseHead(id, 200, [("x\\r\\ny", "a")], b"", True)],
    "not-latin": lambda id: [wire.ResponseHead(id, 200, [("x", "\\u20ac")], b"", True)],
    "two-lengths": lambda id: [
        wire.ResponseHead(id, 200, [("content-length", "1"), ("content-length", "2")], b"", False)
    ],
    "body-first": lambda id: [wire.Body(id, b"x", False)],
    "body-and-end-first": lambda id: [wire.Body(id, b"x", True)],
    "abort": lambda id: [wire.Abort(id)],
    "too-much-room": lambda id: [wire.Window(id, wire.WINDOW)],
}
BROKEN = {
    "two-heads": lambda id: [wire.ResponseHead(id, 200, [], b"a", False)] * 2,
    "overrun-at-once": lambda id: [wire.ResponseHead(id, 200, [], b"x" * 400_000, False)],
    "overrun-and-end": lambda id: [
        wire.ResponseHead(id, 200, [], b"", False), wire.Body(id, b"x" * 400_000, True)
    ],
    "longer-than-told": lambda id: [
        wire.ResponseHead(id, 200, [("content-length", "3")], b"", False), wire.Body(id, b"1234", True)
    ],
    "shorter-than-told": lambda id: [
        wire.ResponseHead(id, 200, [("content-length", "3")], b"", False), wire.Body(id, b"12", True)
    ],
    "aborts-late": lambda id: [wire.ResponseHead(id, 200, [], b"a", False), wire.Abort(id)],
}
STRANGE = {
    "spaces": lambda id: [wire.ResponseHead(id, 200, [("x-a", " \\t padded\\t "), ("etag", "\\t ")], b"ok", True)],
    "empty": lambda id: [wire.ResponseHead(id, 200, [("x-a", ""), ("content-type", "")], b"ok", True)],
    "latin": lambda id: [wire.ResponseHead(id, 200, [("x-a", "\\xff\\x85"), ("set-cookie", "\\xa0")], b"ok", True)],
    "connection": lambda id: [
        wire.ResponseHead(id, 200, [("connection", "upgrade"), ("transfer-encoding", "gzip")], b"ok", True)
    ],
    "length-of-another": lambda id: [wire.ResponseHead(id, 200, [("content-length", "999")], b"ok", True)],
}
for kind in (FRAMES, BROKEN, STRANGE):
    for name, frames in kind.items():
        add_frames(name, frames)

# ---- hangs

@attack
async def waits(req):
    await asyncio.sleep(3600)

@attack
async def spins_async(req):
    while True:
        pass

@attack
def sleeps(req):
    time.sleep(3600)

@attack
def spins_sync(req):
    while True:
        pass

@attack
async def swallows(req):
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            print("swallowed it")

@attack
async def stops_itself(req):
    signal.raise_signal(signal.SIGSTOP)
    await asyncio.sleep(3600)

@attack
async def stops_its_parent(req):
    os.kill(os.getppid(), signal.SIGSTOP)
    return "done"

@route("GET", "/until/{file}")
async def until(req):
    yield b"begun "
    while not os.path.exists(os.path.join("/tmp", req.params["file"])):
        await asyncio.sleep(0.01)
    yield str(os.getpid()).encode()

# ---- streams

@attack
async def endless_async(req):
    while True:
        yield b"x" * 50_000

@attack
def endless_sync(req):
    while True:
        yield b"x" * 50_000

@attack
async def endless_crumbs(req):
    while True:
        yield b"x"

@attack
async def endless_nothing(req):
    while True:
        yield b""

# ---- forks

@attack
def forks(req):
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(3600)
    return {"child": child, "pid": os.getpid()}

@attack
def spawns(req):
    child = subprocess.Popen(["sleep", "3600"])
    return {"child": child.pid, "pid": os.getpid()}

@attack
def daemonizes(req):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        child = os.fork()
        if child:
            os.write(writer, str(child).encode())
            os._exit(0)
        while True:
            time.sleep(3600)
    os.wait()
    return {"child": int(os.read(reader, 20)), "pid": os.getpid()}

@attack
async def forks_and_both_answer(req):
    os.fork()
    return {"pid": os.getpid()}
"""

CALM = """
@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid()}
"""

ERRORS = [
    "exception",
    "base-exception",
    "keyboard-interrupt",
    "system-exit",
    "system-exit-text",
    "generator-exit",
    "stop-iteration",
    "stop-async-iteration",
    "cancelled-error",
    "timeout-error",
    "blocking",
    "unspeakable",
    "group",
    "recursion",
    "deep-json",
    "memory",
    "memory-error",
    "object",
    "number",
    "a-class",
    "keys",
    "nan-status",
    "itself",
    "coroutine-of-nothing",
]


BAD_LOADS = {
    "hangs-at-import": ("while True: pass\n", "did not finish within"),
    "sleeps-at-import": ("time.sleep(3600)\n", "did not finish within"),
    "hangs-stubbornly": ("while True:\n    try:\n        time.sleep(3600)\n    except Exception:\n        pass\n", ""),
    "exits-at-import": ("sys.exit('bye')\n", "sys.exit"),
    "leaves-at-import": ("os._exit(0)\n", "while it was loading"),
    "kills-itself-at-import": ("signal.raise_signal(signal.SIGKILL)\n", "while it was loading"),
    "raises-at-import": ("raise RuntimeError('no way')\n", "no way"),
    "raises-oddly-at-import": ("class Odd(BaseException): pass\nraise Odd('no way')\n", "no way"),
    "surrogate-at-import": ("raise RuntimeError('no \\ud800 way')\n", "no "),
    "recursion-at-import": ("def f(): f()\nf()\n", "RecursionError"),
    "closes-all-at-import": ("os.closerange(3, 4096)\n", "while it was loading"),
    "hangs-at-initialize": (None, "did not finish within"),
    "exits-at-initialize": (None, "sys.exit"),
    "leaves-at-initialize": (None, "while it was loading"),
    "raises-at-initialize": (None, "no way"),
    "waits-at-initialize": (None, "did not finish within"),
}
INITIALIZE = {
    "hangs-at-initialize": "def on_initialize(self, ctx):\n        while True: pass",
    "exits-at-initialize": "def on_initialize(self, ctx): sys.exit(1)",
    "leaves-at-initialize": "def on_initialize(self, ctx): os._exit(1)",
    "raises-at-initialize": "def on_initialize(self, ctx): raise RuntimeError('no way')",
    "waits-at-initialize": "async def on_initialize(self, ctx): await asyncio.sleep(3600)",
}
THREADED = """
stop = threading.Event()
threading.Thread(target=stop.wait, daemon=True).start()
"""


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A host with plugins that do not load. It is given its time: the most stubborn one takes more than 10 s."""
    folder = tmp_path_factory.mktemp("loading")
    for name, (source, _) in BAD_LOADS.items():
        if source is None:
            hook = f"\n@define_hay_plugin\nclass Plugin:\n    name = 'test'\n    {INITIALIZE[name]}\n"
            write_plugin(folder / name, PREAMBLE + hook)
        else:
            write_plugin(folder / name, PREAMBLE + source + PLUGIN)
    write_plugin(folder / "threaded", PREAMBLE + THREADED + CALM + PLUGIN)
    write_plugin(folder / "zz-calm", PREAMBLE + CALM + PLUGIN)  # the last one in order
    options = ("--mode", "test", "--port", "0", "--log-format", "json", "--hook-timeout", "0.5")
    process = HostProcess(["serve", str(folder), *options, "--request-timeout", "20"])
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, loading: HostProcess) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("plugins")
    write_plugin(folder / "hostile", PREAMBLE + HOSTILE + PLUGIN)
    write_plugin(folder / "stopping", PREAMBLE + HOSTILE + PLUGIN)
    write_plugin(folder / "calm", PREAMBLE + CALM + PLUGIN)
    limits = ("--request-timeout", "1", "--ping-timeout", "2", "--hook-timeout", "1", "--drain-timeout", "20")
    with hosting(folder, *limits) as process:
        yield process


@pytest.fixture(scope="module")
def others(host: HostProcess) -> Iterator[Bystanders]:
    """Another org of the same plugin, and another plugin: they are served during all of this."""
    with bystanders(host, "/plugins/hostile/calm/pid", "/plugins/calm/calm/pid") as some:
        yield some


@pytest.fixture(autouse=True)
def nobody_notices(others: Bystanders) -> Iterator[None]:
    before = len(others.troubles)
    yield
    others.round()
    assert others.troubles[before:] == []


def pid_of(host: HostProcess, org: str, plugin: str = "hostile") -> int:
    answer = host.get(f"/plugins/{plugin}/{org}/pid")
    assert answer.status == 200
    pid: int = answer.json()["pid"]
    return pid


# ---- errors


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("way", ["sync", "async"])
def test_an_error_is_one_500_and_no_more(host: HostProcess, way: str, name: str) -> None:
    before = pid_of(host, "errors")
    answer = host.get(f"/plugins/hostile/errors/{way}/{name}")
    assert (answer.status, answer.json()) == (500, {"error": "Internal server error"})
    assert pid_of(host, "errors") == before


def test_every_error_is_tried(host: HostProcess) -> None:
    registered = {route["path"] for route in host.get("/plugins/hostile/x/metadata").json()["routes"]}
    assert {path.removeprefix("/sync/") for path in registered if path.startswith("/sync/")} == set(ERRORS)


@pytest.mark.parametrize("name", ["cancels-itself", "cancels-everybody"])
def test_a_handler_that_cancels_itself_has_failed(host: HostProcess, name: str) -> None:
    before = pid_of(host, name)
    assert host.get(f"/plugins/hostile/{name}/{name}").status == 500
    assert pid_of(host, name) == before


def test_a_handler_that_cancels_itself_too_late_has_answered(host: HostProcess) -> None:
    answer = host.get("/plugins/hostile/late/cancels-itself-late")
    assert (answer.status, answer.json()) == (200, {"too": "late"})


# ---- what a worker survives


@pytest.mark.parametrize(
    "name",
    [
        "exits-in-a-thread",
        "closes-its-streams",
        "many-threads",
        "many-tasks",
        "failing-tasks",
        "shrinks-the-stack",
        "interrupts-itself",
    ],
)
def test_a_worker_survives_it(host: HostProcess, name: str) -> None:
    before = pid_of(host, name)
    assert host.get(f"/plugins/hostile/{name}/{name}").status == 200
    assert pid_of(host, name) == before
    assert host.get(f"/plugins/hostile/{name}/sync/exception").status == 500
    assert pid_of(host, name) == before


def test_noise_is_limited_and_counted(host: HostProcess) -> None:
    before = len(host.log)
    for _ in range(10):
        assert host.get("/plugins/hostile/noise/noise").body == b"quiet"
    answer = host.get("/plugins/hostile/noise/sync/exception")
    assert answer.status == 500, answer.body
    wait_until(lambda: any(r.get("dropped", 0) > 1000 for r in host.records() if r.get("org") == "noise"), "a count")
    assert len(host.log) - before < 2_000_000
    assert sum(record.get("org") == "noise" for record in host.records()) < 4_000


def test_a_plugin_cannot_forge_a_line_of_the_log(host: HostProcess) -> None:
    assert host.get("/plugins/hostile/forger/forged").status == 200
    host.wait_for_log("forged by the plugin")
    host.wait_for_log("forged in the raw")
    assert not [record for record in host.records() if record["event"].startswith("forged")]
    assert "\x1b" not in host.log
    assert "\u202e" not in host.log
    for record in host.records():
        if "forged" in record["event"]:
            assert record["source"] == "plugin"


# ---- what a worker dies of

DEATHS = [
    "exits-sync",
    "exits-async",
    "signal/SIGTERM",
    "signal/SIGKILL",
    "signal/SIGSEGV",
    "signal/SIGHUP",
    "signal/SIGALRM",
    "signal/SIGUSR1",
    "aborts",
    "null-pointer",
    "exits-in-a-task",
    "exits-in-a-callback",
    "stops-the-loop",
    "closes-all",
    "closes-its-socket",
    "replaces-its-socket",
    "shuts-its-socket",
    "shuts-for-writing",
    "becomes-another-program",
    "speaks-garbage",
    "answers-a-stranger",
    "answers-as-the-nursery",
    "is-ready-twice",
]


@pytest.mark.parametrize("path", DEATHS)
def test_a_worker_that_dies_is_a_502_and_the_next_request_is_served_by_another(host: HostProcess, path: str) -> None:
    org = path.replace("/", ".")
    before = pid_of(host, org)
    answer = host.get(f"/plugins/hostile/{org}/{path}")
    assert (answer.status, list(answer.json())) == (502, ["error"])
    assert pid_of(host, org) != before
    wait_until(lambda: all_gone([before]), "the worker is gone")
    [record] = logged(host, event="a worker died", org=org)
    assert record["reason"]


def test_a_fork_that_answers_too_is_one_answer_and_the_end_of_both(host: HostProcess) -> None:
    before = set(host.pids())
    answer = host.get("/plugins/hostile/twins/forks-and-both-answer")
    assert answer.status in (200, 502)
    logged(host, event="a worker died", org="twins")
    assert pid_of(host, "twins")
    if answer.status == 200:
        assert wait_until(lambda: all_gone([answer.json()["pid"]]))
    wait_until(lambda: len(set(host.pids()) - before) <= 2, "both are gone, and a worker and a spare are there")


# ---- workers that speak the protocol themselves


def speak(host: HostProcess, org: str, name: str) -> tuple[int, bytes]:
    """Have a fresh worker send its own frames on the stream of a request, its second one; its pid, and what came."""
    pid = pid_of(host, org)
    sock = socket.create_connection(("127.0.0.1", host.port), timeout=30)
    target = f"/plugins/hostile/{org}/frames/{name}/2"
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return pid, read_to_end(sock)


def read_to_end(sock: socket.socket) -> bytes:
    found = []
    with sock, contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found.append(data)
    return b"".join(found)


@pytest.mark.parametrize(
    "name",
    [
        "injects",
        "injects-name",
        "not-latin",
        "two-lengths",
        "body-first",
        "body-and-end-first",
        "abort",
        "too-much-room",
    ],
)
def test_an_answer_that_is_none_is_502(host: HostProcess, name: str) -> None:
    org = f"frames-{name}"
    pid_of(host, org)
    answer = host.get(f"/plugins/hostile/{org}/frames/{name}/2")
    assert (answer.status, list(answer.json())) == (502, ["error"])
    assert "Set-Cookie" not in answer.headers
    assert pid_of(host, org)


@pytest.mark.parametrize(
    "name",
    [
        "two-heads",
        "overrun-at-once",
        "overrun-and-end",
        "longer-than-told",
        "shorter-than-told",
        "aborts-late",
    ],
)
def test_an_answer_that_goes_wrong_later_is_broken_off(host: HostProcess, name: str) -> None:
    org = f"frames-{name}"
    _, data = speak(host, org, name)
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"200 OK" in head or not data  # closed before anything had left
    assert not body.endswith(b"0\r\n\r\n")
    assert len(body) < 1_000_000
    if b"Content-Length: 3" in head:
        assert len(body) < 3
    assert pid_of(host, org)


@pytest.mark.parametrize("name", ["two-heads", "overrun-at-once", "overrun-and-end", "longer-than-told"])
def test_a_worker_that_overruns_is_cut_off(host: HostProcess, name: str) -> None:
    org = f"cut-{name}"
    before, _ = speak(host, org, name)
    assert pid_of(host, org) != before
    [record] = logged(host, event="a worker died", org=org)
    assert record["reason"].startswith("protocol error: ")


@pytest.mark.parametrize("name", ["spaces", "empty", "latin", "connection", "length-of-another"])
def test_an_answer_that_is_only_strange_is_an_answer(host: HostProcess, name: str) -> None:
    org = f"frames-{name}"
    pid_of(host, org)
    answer = host.get(f"/plugins/hostile/{org}/frames/{name}/2")
    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.headers["Content-Length"] == "2"
    assert answer.headers["Connection"] is None
    assert answer.headers["Transfer-Encoding"] is None


# ---- what hangs


@pytest.fixture
def flag() -> Iterator[Path]:
    """A file that handlers wait for."""
    file = Path("/tmp") / f"hayhost-test-{os.getpid()}-{threading.get_ident()}"
    yield file
    file.unlink(missing_ok=True)


def answers_anew(host: HostProcess, org: str, before: int, plugin: str = "hostile") -> bool:
    """Whether there is another worker than ``before``, which may not answer at all if it is there still."""
    answer = host.get(f"/plugins/{plugin}/{org}/pid")
    assert answer.status in (200, 502, 504)
    return answer.status == 200 and answer.json()["pid"] != before


def test_what_hangs_is_504_and_its_worker_is_replaced(host: HostProcess, flag: Path) -> None:
    """All at once, as each takes seconds: the limit of the request, and then of the patience with its handler."""
    replaced = ["spins-async", "sleeps", "spins-sync", "swallows", "stops-itself"]
    before = {name: pid_of(host, name) for name in ["waits", "left", "crowd", *replaced]}
    with ThreadPoolExecutor(60) as pool:
        finishing = {
            name: pool.submit(host.get, f"/plugins/hostile/{name}/until/{flag.name}") for name in ["sleeps", "swallows"]
        }
        wait_until(lambda: all(host.health("hostile", name)["state"] == "ready" for name in finishing))
        answers = {name: pool.submit(host.get, f"/plugins/hostile/{name}/{name}") for name in ["waits", *replaced]}
        with socket.create_connection(("127.0.0.1", host.port)) as leaving:
            leaving.sendall(b"GET /plugins/hostile/left/swallows HTTP/1.1\r\nHost: x\r\n\r\n")
            pid_of(host, "left")
        # More handlers on threads than there are threads: what runs on the loop is answered all the same.
        crowd = [pool.submit(host.get, "/plugins/hostile/crowd/sleeps") for _ in range(40)]
        wait_until(lambda: pid_of(host, "crowd") == before["crowd"])
        for name, answer in answers.items():
            assert (answer.result().status, list(answer.result().json())) == (504, ["error"]), name
        assert {answer.result().status for answer in crowd} == {504}
        for name in [*replaced, "left", "crowd"]:
            wait_until(functools.partial(answers_anew, host, name, before[name]), f"{name} is replaced")
        assert pid_of(host, "waits") == before["waits"]  # it could be cancelled
        flag.touch()
        for name, answer in finishing.items():
            assert answer.result().body == f"begun {before[name]}".encode(), name
    wait_until(lambda: all_gone([before[name] for name in [*replaced, "left", "crowd"]]), "the old workers are gone")


def test_a_zygote_that_hangs_is_replaced(host: HostProcess) -> None:
    zygote = host.get("/plugins/stopping/acme/pid").json()["parent"]
    assert host.get("/plugins/stopping/acme/stops-its-parent").status == 200
    statuses: list[int] = []

    def another_org() -> bool:
        statuses.append(host.get(f"/plugins/stopping/org{len(statuses)}/pid").status)
        return statuses[-1] == 200 and all_gone([zygote])

    wait_until(another_org, "orgs are served again")
    assert set(statuses) <= {200, 503}
    assert pid_of(host, "acme", "stopping")


# ---- streams without an end


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_descriptors(pid: int) -> int:
    return descriptors_of(pid)


@pytest.mark.parametrize("name", ["endless-async", "endless-sync", "endless-crumbs", "endless-nothing"])
def test_an_endless_answer_ends_with_its_client(host: HostProcess, name: str) -> None:
    before = pid_of(host, name)
    memory = resident(host.pid)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", host.port), timeout=30) as sock:
            sock.sendall(f"GET /plugins/hostile/{name}/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            got = 0
            enough = {"endless-crumbs": 20_000, "endless-nothing": 1}.get(name, 5_000_000)
            while got < enough:
                got += len(sock.recv(1 << 20))
    assert pid_of(host, name) == before
    assert resident(host.pid) - memory < 32 << 20


def test_a_client_that_does_not_read_costs_little_and_is_cut_off(host: HostProcess) -> None:
    before, memory, descriptors = pid_of(host, "slow-readers"), resident(host.pid), open_descriptors(host.pid)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(12):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", host.port), timeout=30))
            sock.sendall(b"GET /plugins/hostile/slow-readers/endless-async HTTP/1.1\r\nHost: x\r\n\r\n")
            clients.append(sock)
        for sock in clients:
            assert sock.recv(10).startswith(b"HTTP/1.1 ")
        assert pid_of(host, "slow-readers") == before  # which is not held up by them
        assert resident(host.pid) - memory < 32 << 20
        wait_until(lambda: open_descriptors(host.pid) < descriptors + 6, "they are cut off")
    assert pid_of(host, "slow-readers") == before


# ---- children


@pytest.mark.parametrize("name", ["forks", "spawns", "daemonizes"])
@pytest.mark.parametrize("end", ["disable", "kill"])
def test_no_child_outlives_its_worker(host: HostProcess, name: str, end: str) -> None:
    org = f"{name}-{end}"
    child, pid = host.get(f"/plugins/hostile/{org}/{name}").json().values()
    assert not all_gone([child])
    if end == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        assert host.post(f"/plugins/hostile/{org}/disable").status == 200
    wait_until(lambda: all_gone([child, pid]), "the child is gone", limit=10)


# ---- loading and initialising


@pytest.mark.parametrize("name", BAD_LOADS)
def test_a_plugin_that_does_not_load_is_an_error(loading: HostProcess, name: str) -> None:
    loading.wait_ready()
    answer = loading.get(f"/plugins/{name}/acme/pid")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    health = loading.get(f"/plugins/{name}/acme/health")
    assert health.status == 503
    assert (health.json()["status"], health.json()["state"]) == ("unhealthy", "error")
    assert BAD_LOADS[name][1] in health.json()["lastError"]


def test_plugins_beside_those_that_do_not_load_are_served(loading: HostProcess) -> None:
    loading.wait_ready()
    assert pid_of(loading, "acme", "zz-calm") == pid_of(loading, "acme", "zz-calm")


def test_a_plugin_that_leaves_a_thread_is_never_forked_and_works(loading: HostProcess) -> None:
    loading.wait_ready()
    pids = [pid_of(loading, org, "threaded") for org in ("a", "b", "a")]
    assert pids[0] == pids[2] != pids[1]
    health = loading.health("threaded", "a")
    assert (health["status"], health["sharing"]) == ("healthy", "strict")
    assert "thread" in health["sharingReason"]
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: answers_anew(loading, "a", pids[0], "threaded"), "it has started again")
    assert pid_of(loading, "b", "threaded") == pids[1]


def test_plugins_that_hang_while_they_load_do_not_hold_up_the_others(
    start: Callable[..., HostProcess], tmp_path: Path
) -> None:
    for number in range(4):
        write_plugin(tmp_path / f"hangs{number}", PREAMBLE + "time.sleep(3600)\n" + PLUGIN)
    write_plugin(tmp_path / "zz-calm", PREAMBLE + CALM + PLUGIN)
    options = ("--mode", "test", "--port", "0", "--log-format", "json", "--hook-timeout", "25")
    host = start("serve", tmp_path, *options)
    host.wait_for_log('"event":"listening"')
    host.port = int(next(record["url"] for record in host.records() if record["event"] == "listening").split(":")[-1])
    assert pid_of(host, "acme", "zz-calm")
    assert '"event":"ready"' not in host.log
    assert host.get("/readyz").status == 503
