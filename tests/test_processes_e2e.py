"""Processes seen from outside: what is started when, and what happens when something is killed."""

import os
import signal
import threading
from pathlib import Path

from .conftest import LIMIT, Answer, Serve, all_gone, routes, wait_until, write_plugin

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"

PLUGIN = routes(
    "",
    pid="async def: return {'pid': os.getpid(), 'parent': os.getppid()}",
    sleep="async def:\n print('sleeping')\n await asyncio.sleep(60)",
    spin="async def:\n while True: pass",
)


def test_metadata_and_health_start_no_worker(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    before = host.pids()
    assert host.get("/plugins/p/acme/metadata").status == 200
    health = host.health("p", "acme")
    assert (health["status"], health["state"], health["pid"]) == ("healthy", "stopped", None)
    assert host.pids() == before


def test_a_worker_is_shared_by_requests_and_not_by_orgs(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    pids = [host.get(f"/plugins/p/{org}/pid").json()["pid"] for org in ("a", "b", "a", "b")]
    assert pids[:2] == pids[2:]
    assert pids[0] != pids[1]
    assert host.health("p", "a")["pid"] == pids[0]


def test_killed_worker_mid_request_is_502_at_once_and_the_next_request_is_served(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    pid = host.get("/plugins/p/acme/pid").json()["pid"]
    answers: list[Answer] = []
    waiting = threading.Thread(target=lambda: answers.append(host.get("/plugins/p/acme/sleep", timeout=20)))
    waiting.start()
    host.wait_for_log("sleeping")
    os.kill(pid, signal.SIGKILL)
    waiting.join(LIMIT)
    assert answers[0].status == 502
    assert "error" in answers[0].json()
    second = host.get("/plugins/p/acme/pid")
    assert second.status == 200
    assert second.json()["pid"] != pid


def test_killed_zygote_leaves_its_workers_and_comes_back(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve(None, "--spares", "0")
    worker, zygote = host.get("/plugins/p/acme/pid").json().values()
    os.kill(zygote, signal.SIGKILL)
    host.wait_for_log("zygote died")
    assert host.get("/plugins/p/acme/pid").json()["pid"] == worker
    other = host.get("/plugins/p/beta/pid").json()
    assert other["parent"] != zygote
    assert all_gone([zygote])


def test_killed_nursery_is_started_anew_without_a_lost_request(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    worker = host.get("/plugins/p/acme/pid").json()["pid"]
    nursery = next(pid for pid in host.pids() if os.path.basename(_comm(pid)) == "hay-nursery")
    os.kill(nursery, signal.SIGKILL)
    while host.get("/plugins/p/acme/pid").json()["pid"] == worker:  # every answer on the way is a 200
        pass
    assert host.get("/plugins/p/beta/pid").status == 200
    assert wait_until(lambda: all_gone([worker]))


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_no_process_outlives_a_killed_host(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    host.get("/plugins/p/idle/pid")
    host.get("/plugins/p/busy/pid")
    busy = threading.Thread(target=lambda: _ignore(lambda: host.get("/plugins/p/busy/spin", timeout=20)))
    busy.start()
    pids = host.pids()
    assert len(pids) >= 4
    os.kill(host.pid, signal.SIGKILL)
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)
    busy.join(LIMIT)


def _ignore(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except OSError:
        pass


def test_stop_is_clean(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve()
    host.get("/plugins/p/acme/pid")
    pids = host.pids()
    assert host.stop() == 0
    wait_until(lambda: all_gone(pids))
