"""Many at once, limits, deaths under load, and what is left behind afterwards."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .bystanders import bystanders
from .conftest import LIMIT, HostProcess, Serve, all_gone, descriptors_of, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, logged

# What is tried here needs processes, files and sockets that the sandbox would refuse; see the attacks for that.
ISOLATION = "limited"

SERVED = """
@route("GET", "/pid")
async def pid(req):
    return {"pid": os.getpid(), "org": req.ctx.org.id}

@route("GET", "/until/{file}")
async def until(req):
    print("begun")
    while not os.path.exists(os.path.join("/tmp", req.params["file"])):
        await asyncio.sleep(0.01)
    return {"pid": os.getpid()}

@route("GET", "/stream-until/{file}")
async def stream_until(req):
    yield b"begun "
    while not os.path.exists(os.path.join("/tmp", req.params["file"])):
        await asyncio.sleep(0.01)
    yield b" ended"

@route("GET", "/die")
async def die(req):
    os._exit(1)

@route("GET", "/large")
async def large(req):
    print("large")
    return b"x" * 200_000
"""
STARTS = """
@define_hay_plugin
class Plugin:
    name = "starts"

    def on_initialize(self, ctx):
        register(ctx)

    async def on_start(self, ctx):
        print("starting", ctx.org.id)
        await asyncio.sleep(0.3)

    def on_stop(self, ctx):
        print("stopping", ctx.org.id)
"""
BROKEN_START = """
@define_hay_plugin
class Plugin:
    name = "broken"

    def on_initialize(self, ctx):
        register(ctx)

    def on_start(self, ctx):
        if not os.path.exists(os.path.join("/tmp", ctx.org.id)):
            os._exit(7)
"""


class Got(NamedTuple):
    """A status, the headers and the body."""

    status: int
    headers: dict[str, str]
    body: bytes


async def _get(port: int, path: str, together: asyncio.Semaphore) -> Got:
    async with together:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        line, *headers = head.decode().split("\r\n")
        return Got(int(line.split()[1]), dict(header.split(": ", 1) for header in headers), body)


def burst(host: HostProcess, paths: list[str], together: int = 2000) -> list[Got]:
    """Ask for all ``paths`` at once, at most ``together`` at the same time."""

    async def run() -> list[Got]:
        limit = asyncio.Semaphore(together)
        async with asyncio.timeout(LIMIT):
            return await asyncio.gather(*(_get(host.port, path, limit) for path in paths))

    return asyncio.run(run())


def statuses(answers: list[Got]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


def pid_of(host: HostProcess, org: str, plugin: str = "p") -> int:
    answer = host.get(f"/plugins/{plugin}/{org}/pid")
    assert answer.status == 200
    pid: int = answer.json()["pid"]
    return pid


def workers(host: HostProcess) -> list[int]:
    """Everything below the host but the nursery, the watcher and the zygotes."""
    zygotes = {"hay-nursery"}
    return [pid for pid in host.pids() if comm(pid) not in zygotes and parent(pid) not in (nursery(host), host.pid)]


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def nursery(host: HostProcess) -> int:
    """The nursery's pid, 0 while there is none."""
    return next((pid for pid in host.pids() if comm(pid) == "hay-nursery"), 0)


def zygotes(host: HostProcess) -> list[int]:
    below = nursery(host)
    return [pid for pid in host.pids() if parent(pid) == below]


def open_descriptors(host: HostProcess) -> int:
    return descriptors_of(host.pid)


@pytest.fixture
def flag() -> Iterator[Path]:
    """A file that handlers wait for."""
    file = Path("/tmp") / f"hayhost-load-{os.getpid()}-{threading.get_ident()}"
    file.unlink(missing_ok=True)
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    write_plugin(tmp_path / "p", PREAMBLE + SERVED + PLUGIN)
    write_plugin(tmp_path / "q", PREAMBLE + SERVED + PLUGIN)
    write_plugin(tmp_path / "starts", PREAMBLE + SERVED + STARTS)
    write_plugin(tmp_path / "broken", PREAMBLE + SERVED + BROKEN_START)
    return tmp_path


# ---- many at once


def test_a_thousand_first_requests_share_one_start(serve: Serve, plugins: Path) -> None:
    host = serve(plugins)
    answers = burst(host, ["/plugins/starts/acme/pid"] * 1000)
    assert statuses(answers) == {200: 1000}
    assert len({answer.body for answer in answers}) == 1
    assert len(logged(host, event="starting acme")) == 1


def test_three_hundred_orgs_at_once(serve: Serve, plugins: Path) -> None:
    host = serve(plugins)
    answers = burst(host, [f"/plugins/p/org{number}/pid" for number in range(300)] * 2)
    assert statuses(answers) == {200: 600}
    pids = {answer.body for answer in answers}
    assert len(pids) == 300  # one worker each, for both of its requests
    before = host.pids()
    assert host.stop() == 0
    wait_until(lambda: all_gone(before), "all workers are gone")


# ---- the queue


def test_a_full_queue_is_503_and_what_had_a_place_is_answered(serve: Serve, plugins: Path, flag: Path) -> None:
    host = serve(plugins, "--max-requests", "2", "--max-queue", "3")
    pid_of(host, "acme")
    with bystanders(host, "/plugins/p/other/pid", "/plugins/q/acme/pid"), ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(host.get, f"/plugins/p/acme/until/{flag.name}") for _ in range(20)]
        wait_until(lambda: sum(answer.done() for answer in answers) == 15, "all without a place are refused")
        for answer in answers:
            if answer.done():
                assert (answer.result().status, list(answer.result().json())) == (503, ["error"])
                assert int(answer.result().headers["Retry-After"]) >= 1
        flag.touch()
        assert Counter(answer.result(LIMIT).status for answer in answers) == {503: 15, 200: 5}
    assert pid_of(host, "acme")


def test_a_client_that_leaves_gives_up_its_place(serve: Serve, plugins: Path, flag: Path) -> None:
    host = serve(plugins, "--max-requests", "1", "--max-queue", "1")
    pid_of(host, "acme")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(host.get, f"/plugins/p/acme/until/{flag.name}")
        logged(host, event="begun")
        for _ in range(3):
            leaving = host.connect()
            leaving.request("GET", "/plugins/p/acme/pid")
            wait_until(lambda: host.get("/plugins/p/acme/pid").status == 503, "its place is taken")
            leaving.close()
        flag.touch()
        assert running.result(LIMIT).status == 200
    assert pid_of(host, "acme")


# ---- the number of workers


def state(host: HostProcess, org: str) -> str:
    found: str = host.health("p", org)["state"]
    return found


def test_over_the_limit_the_longest_idle_one_leaves(serve: Serve, plugins: Path) -> None:
    host = serve(plugins, "--max-workers", "3", "--spares", "0")
    pids = {org: pid_of(host, org) for org in "abc"}
    assert pid_of(host, "a") == pids["a"]  # b is now the one that was used the longest ago
    pids["d"] = pid_of(host, "d")
    assert [state(host, org) for org in "abcd"] == ["ready", "stopped", "ready", "ready"]
    pids["b"] = pid_of(host, "b")
    assert [state(host, org) for org in "abcd"] == ["ready", "ready", "stopped", "ready"]
    for org in "abcdefghij" * 2:
        pid_of(host, org)
    assert [org for org in "abcdefghij" if state(host, org) == "ready"] == ["h", "i", "j"]
    wait_until(lambda: len(workers(host)) == 3, "the others are gone")


def test_a_spare_leaves_before_a_worker_does(serve: Serve, plugins: Path) -> None:
    host = serve(plugins, "--max-workers", "3", "--spares", "1")
    pids = [pid_of(host, "a")]
    wait_until(lambda: len(workers(host)) == 2, "there is a spare")
    pids.append(pid_of(host, "b"))
    wait_until(lambda: len(workers(host)) == 3, "there is a spare again")
    assert host.get("/plugins/q/c/pid").status == 200  # of another plugin, for which that spare is none
    assert [pid_of(host, org) for org in "ab"] == pids


@pytest.mark.parametrize("spares", ["0", "2"])
def test_more_orgs_than_workers_at_once_are_all_answered(serve: Serve, plugins: Path, spares: str) -> None:
    host = serve(plugins, "--max-workers", "3", "--spares", spares)
    for _ in range(3):
        answers = burst(host, [f"/plugins/p/org{number % 10}/pid" for number in range(100)])
        assert statuses(answers) == {200: 100}
        wait_until(lambda: len(workers(host)) <= 3, "there are no more than may be")


def test_with_all_workers_busy_others_wait_and_then_are_told(serve: Serve, plugins: Path, flag: Path) -> None:
    host = serve(plugins, "--max-workers", "2", "--spares", "0", "--request-timeout", "1")
    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(host.get, f"/plugins/p/{org}/stream-until/{flag.name}") for org in "ab"]
        wait_until(lambda: [state(host, org) for org in "ab"] == ["ready", "ready"])
        answer = host.get("/plugins/p/c/pid")
        assert (answer.status, list(answer.json())) == (503, ["error"])
        assert int(answer.headers["Retry-After"]) >= 1
        flag.touch()
        assert all(answer.result(LIMIT).status == 200 for answer in busy)
    assert pid_of(host, "c")


def test_an_idle_worker_stops_and_comes_back(serve: Serve, plugins: Path) -> None:
    host = serve(plugins, "--idle-timeout", "0.3", "--spares", "0")
    before = pid_of(host, "acme", "starts")
    logged(host, event="stopping acme")
    wait_until(lambda: all_gone([before]), "it has stopped")
    health = host.health("starts", "acme")
    assert (health["status"], health["state"], health["pid"]) == ("healthy", "stopped", None)
    assert pid_of(host, "acme", "starts") != before


# ---- crashes and failed starts


def test_a_crash_loop_is_slowed_down_and_concerns_nobody_else(serve: Serve, plugins: Path) -> None:
    host = serve(plugins)
    with bystanders(host, "/plugins/p/other/pid", "/plugins/q/acme/pid"):
        died = []
        for _ in range(6):
            assert host.get("/plugins/p/acme/die").status == 502  # having waited for a worker, if need be
            died.append(time.monotonic())
        assert died[5] - died[0] > 1.2  # 0.1 s, 0.2 s, 0.4 s and 0.8 s, less what an answer may take
        assert died[5] - died[4] > 0.5
        assert pid_of(host, "acme")
    assert len(logged(host, event="a worker died", org="acme", count=6)) == 6


@pytest.fixture(scope="module")
def open_breaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A host with an org whose worker does not start. Made at once, so that its breaker has had its time in the end."""
    folder = tmp_path_factory.mktemp("broken")
    write_plugin(folder / "broken", PREAMBLE + SERVED + BROKEN_START)
    write_plugin(folder / "p", PREAMBLE + SERVED + PLUGIN)
    host = HostProcess(["serve", str(folder), "--mode", "test", "--port", "0", "--log-format", "json"])
    try:
        host.wait_ready()
        with bystanders(host, "/plugins/p/acme/pid"):
            for _ in range(5):
                answer = host.get(f"/plugins/broken/{BROKEN_ORG}/pid")
                assert (answer.status, list(answer.json())) == (503, ["error"])
                assert "died before it was ready" in answer.json()["error"]
        yield host
    finally:
        host.kill()
        Path("/tmp", BROKEN_ORG).unlink(missing_ok=True)


BROKEN_ORG = f"hayhost-broken-{os.getpid()}"
FAILED: dict[str, Any] = {"event": "a worker did not start", "org": BROKEN_ORG}


def test_after_too_many_failed_starts_there_are_no_more(open_breaker: HostProcess) -> None:
    host = open_breaker
    assert len(logged(host, **FAILED)) == 5
    answers = burst(host, [f"/plugins/broken/{BROKEN_ORG}/pid"] * 50)
    assert statuses(answers) == {503: 50}
    for answer in answers:
        assert b"does not start: " in answer.body
        assert 1 <= int(answer.headers["Retry-After"]) <= 10
    assert len(logged(host, **FAILED)) == 5
    health = host.get(f"/plugins/broken/{BROKEN_ORG}/health")
    assert (health.status, health.json()["status"], health.json()["state"]) == (503, "unhealthy", "error")
    assert "died before it was ready" in health.json()["lastError"]
    assert host.get("/plugins/p/acme/pid").status == 200


# ---- the end of the host


def test_a_stop_lets_what_is_in_flight_finish(serve: Serve, plugins: Path, flag: Path) -> None:
    host = serve(plugins, "--max-requests", "2")
    pid_of(host, "acme")
    with ThreadPoolExecutor(4) as pool, contextlib.closing(host.connect()) as kept:
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        path = f"/plugins/p/acme/until/{flag.name}"
        running = [pool.submit(host.get, path) for _ in range(4)]  # two of them in the queue
        logged(host, event="begun", count=2)
        wait_until(lambda: host.get("/healthz").status == 200)
        host.process.send_signal(signal.SIGTERM)
        host.wait_for_log("SIGTERM received")
        with pytest.raises(ConnectionRefusedError):
            wait_until(lambda: host.get("/healthz").status != 200)
        kept.request("GET", "/plugins/p/acme/pid")
        answer = kept.getresponse()
        assert (answer.status, "stopping" in answer.read().decode()) == (503, True)
        host.process.send_signal(signal.SIGTERM)  # which is only warned about
        flag.touch()
        assert [one.result(LIMIT).status for one in running] == [200] * 4
    assert host.process.wait(LIMIT) == 0


def test_a_stop_waits_for_a_client_that_still_takes_its_answer(serve: Serve, plugins: Path) -> None:
    host = serve(plugins)
    with socket.create_connection(("127.0.0.1", host.port), timeout=LIMIT) as sock:
        sock.sendall(b"GET /plugins/p/acme/large HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        logged(host, event="large")
        answered = wait_until_steady(lambda: host.log.count('"large"'))
        assert answered < 200  # as it reads none of them, one is stuck in the front's buffer, and others wait behind it
        host.process.send_signal(signal.SIGTERM)
        host.wait_for_log("SIGTERM received")
        with pytest.raises(AssertionError):
            wait_until(lambda: host.process.poll() is not None, limit=0.3)
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 20):
                data += piece
    complete = data.count(b"HTTP/1.1 200 OK")
    assert complete >= answered
    assert data.count(b"x" * 200_000) == complete
    assert host.process.wait(LIMIT) == 0


def test_a_stop_does_not_wait_for_ever(serve: Serve, plugins: Path) -> None:
    host = serve(plugins, "--drain-timeout", "0.5")
    with ThreadPoolExecutor(2) as pool:
        endless = pool.submit(host.get, "/plugins/p/acme/until/never")
        logged(host, event="begun")
        pids = host.pids()
        assert host.stop() == 0
        assert endless.exception(LIMIT) is not None or endless.result().status in (502, 503)
    wait_until(lambda: all_gone(pids), "all processes are gone")


# ---- deaths under load


class Load:
    """Requests for some orgs of two plugins, without a break."""

    def __init__(self, host: HostProcess) -> None:
        self.seen: Counter[int] = Counter()
        self.broken_off = 0
        self.troubles: list[str] = []
        self._host = host
        self._stop = threading.Event()

    async def _client(self, number: int) -> None:
        path = f"/plugins/{'pq'[number % 2]}/org{number % 5}/{'large' if number % 3 else 'pid'}"
        once = asyncio.Semaphore(1)
        while not self._stop.is_set():
            try:
                answer = await _get(self._host.port, path, once)
            except (OSError, IndexError) as error:
                self.troubles.append(f"{path}: {error!r}")
            else:
                if len(answer.body) < int(answer.headers["Content-Length"]):
                    self.broken_off += 1  # its worker died in the middle of it, and the client can tell
                    continue
                self.seen[answer.status] += 1
                if answer.status == 200 and path.endswith("large") and answer.body != b"x" * 200_000:
                    self.troubles.append(f"{path}: {len(answer.body)} bytes")

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(10)))

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def goes_on(self) -> None:
        """Wait until some more have been answered with 200."""
        wanted = self.seen[200] + 20
        wait_until(lambda: self.seen[200] >= wanted, "requests are answered")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


VICTIMS: dict[str, Callable[[HostProcess], list[int]]] = {
    "workers": workers,
    "zygotes": zygotes,
    "nursery": lambda host: [nursery(host)],
}


@pytest.mark.parametrize("victims", VICTIMS)
def test_deaths_under_load_are_only_502_or_503_and_leave_nothing_behind(
    serve: Serve, plugins: Path, victims: str
) -> None:
    host = serve(plugins, "--spares", "1")
    load = Load(host)
    killed: set[int] = set()
    with load.running():
        for _ in range(6):
            load.goes_on()
            wait_until(lambda: VICTIMS[victims](host) and nursery(host), "there is something to kill")
            found = VICTIMS[victims](host)
            killed.update(found)
            for pid in found[:4]:
                kill(pid)
        load.goes_on()
        everyone = host.pids()
    assert load.troubles == []
    assert set(load.seen) <= {200, 502, 503}
    for plugin, number in itertools.product("pq", range(5)):
        wait_until(lambda: host.get(f"/plugins/{plugin}/org{number}/pid").status == 200, "all recover")  # noqa: B023
    assert host.stop() == 0
    wait_until(lambda: all_gone([*killed, *everyone]), "nothing is left")


def test_deaths_leak_nothing_in_the_host(serve: Serve, plugins: Path) -> None:
    host = serve(plugins, "--spares", "0")

    def round_of_deaths() -> tuple[int, int]:
        """Descriptors of the host, and processes below it, when all is quiet again."""
        before = nursery(host)
        for victims in (workers, zygotes, VICTIMS["nursery"]):
            for org in "abc":
                wait_until(lambda: host.get(f"/plugins/p/{org}/pid").status == 200, "it is served")  # noqa: B023
            for pid in victims(host):
                kill(pid)
        wait_until(lambda: nursery(host) not in (0, before), "there is another nursery")
        for org in "abc":
            wait_until(lambda: host.get(f"/plugins/p/{org}/pid").status == 200, "it is served")  # noqa: B023
        expected = 1 + 1 + 4 + 3  # the nursery, the watcher, a zygote for each plugin, and the workers
        wait_until(lambda: len(host.pids()) == expected and len(workers(host)) == 3, "all others are gone")
        return wait_until_steady(lambda: open_descriptors(host)), len(host.pids())

    first = round_of_deaths()
    for _ in range(3):
        assert round_of_deaths() == first


COUNTS_WORKERS = """
import gc, signal, sys
from hayhost.worker import Worker

def count(*_):
    print("workers in memory:", sum(isinstance(one, Worker) for one in gc.get_objects()), flush=True)

gc.disable()
signal.signal(signal.SIGUSR2, count)
sys.argv = sys.argv[4:]
from hayhost.cli import main
main()
"""


def test_what_has_ended_leaves_memory_at_once(plugins: Path) -> None:
    arguments = ["serve", str(plugins), "--mode", "test", "--port", "0", "--log-format", "json"]
    prefix = [sys.executable, "-P", "-c", COUNTS_WORKERS]
    host = HostProcess([*arguments, "--max-workers", "3", "--spares", "0"], prefix=prefix).wait_ready()
    try:
        for number in range(20):
            pid_of(host, f"org{number}")
        kill(pid_of(host, "org19"))
        wait_until(lambda: host.get("/plugins/p/org19/pid").status == 200, "it is served again")

        def counted() -> bool:
            before = host.log.count("workers in memory: ")
            os.kill(host.pid, signal.SIGUSR2)
            return host.wait_for_log("workers in memory: ", before + 1).endswith("workers in memory: 3\n")

        wait_until(counted, "there are no more in memory than there are")
    finally:
        host.kill()


def wait_until_steady(value: Callable[[], int]) -> int:
    """``value()``, once it has been the same for a while."""
    last = itertools.count()
    seen: list[int] = []

    def steady() -> bool:
        seen.append(value())
        next(last)
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_until(steady, "it comes to rest")
    return seen[-1]


# ---- last, as it has had its time


def test_a_breaker_half_opens_and_closes_when_a_start_works(open_breaker: HostProcess) -> None:
    host = open_breaker
    path = f"/plugins/broken/{BROKEN_ORG}/pid"
    Path("/tmp", BROKEN_ORG).touch()  # what on_start wants
    answers: list[Got] = []

    def served() -> bool:
        answers.extend(burst(host, [path] * 5))
        return 200 in statuses(answers)

    wait_until(served, "a start is tried")
    assert statuses(answers[-5:]) == {200: 5}  # one start for them all
    assert len({answer.body for answer in answers[-5:]}) == 1
    assert set(statuses(answers)) <= {200, 503}
    assert len(logged(host, **FAILED)) == 5
    health = host.health("broken", BROKEN_ORG)
    assert (health["status"], health["state"]) == ("healthy", "ready")
