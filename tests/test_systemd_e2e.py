"""The host as systemd starts and watches it: a real notify socket, listening descriptors that are really passed."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hayhost.errors import HostError
from hayhost.systemd import Service, passed_sockets

from .conftest import LIMIT, HostProcess, all_gone, routes, wait_until, write_plugin

DEPLOY = Path(__file__).parent.parent / "deploy"
PLUGIN = routes("", hello="def: return 'hello'", environ="def: return dict(os.environ)")

# Becomes the host, with a listening socket as its descriptor 3: "Activate ADDRESS WHOSE-PID COMMAND...".
ACTIVATE = """
import os, socket, sys
address, pid, *command = sys.argv[1:]
sock = socket.create_server((address, 0))
if sock.fileno() != 3:
    os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=pid or str(os.getpid()), LISTEN_FDNAMES="http")
print('{"port":%d}' % socket.socket(fileno=os.dup(3)).getsockname()[1], flush=True)
os.execv(command[0], command)
"""


class Manager:
    """What systemd is to the service: the socket that it reads states from."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.states: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._sock.settimeout(LIMIT)

    def read(self) -> str:
        """The next state that is told, signs of life among them."""
        self.states.append(self._sock.recv(4096).decode())
        return self.states[-1]

    def read_until(self, state: str) -> list[str]:
        """The states up to the first that says ``state``."""
        while state not in self.read():
            pass
        return self.states

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for ``seconds``, once what was on its way has been read."""
        self._sock.settimeout(seconds)
        try:
            self.read()
        except TimeoutError:
            return True
        finally:
            self._sock.settimeout(LIMIT)
        return False

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    manager = Manager(f"@hayhost-test-{secrets.token_hex(8)}" if abstract else str(tmp_path / "notify"))
    yield manager
    manager.close()


def arguments(folder: Path, *options: str) -> list[str]:
    return ["serve", str(folder), "--mode", "test", "--port", "0", "--log-format", "json", *options]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file is not there, the plugin in ``tmp_path`` does not load."""
    gate = tmp_path / "p" / "gate"
    waiting = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    write_plugin(tmp_path / "p", waiting + PLUGIN)
    return gate


def test_it_is_ready_when_plugins_are_loaded_and_not_before(
    start: Callable[..., HostProcess], gate: Path, manager: Manager
) -> None:
    host = start(*arguments(gate.parent.parent), env={"NOTIFY_SOCKET": manager.address})
    assert manager.read() == "STATUS=Loading 1 plugins"
    host.wait_for_log('"event":"listening"')
    host.port = next(int(record["url"].rpartition(":")[2]) for record in host.records() if "url" in record)
    assert host.get("/readyz").status == 503
    gate.touch()
    assert manager.read() == f"READY=1\nSTATUS=Serving 1 of 1 plugins at http://127.0.0.1:{host.port}"
    assert host.get("/readyz").status == 200
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    assert manager.read().startswith("STOPPING=1\n")
    assert host.process.wait(LIMIT) == 0
    wait_until(lambda: all_gone(pids))
    assert len(manager.states) == 3


def test_a_host_that_is_stopped_before_it_is_ready_never_says_so(
    start: Callable[..., HostProcess], gate: Path, manager: Manager
) -> None:
    host = start(*arguments(gate.parent.parent), env={"NOTIFY_SOCKET": manager.address})
    manager.read_until("Loading")
    host.process.send_signal(signal.SIGTERM)
    assert not any("READY=1" in state for state in manager.read_until("STOPPING=1"))
    assert host.process.wait(LIMIT) == 0


def test_signs_of_life_stop_while_the_loop_hangs(serve: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    manager = Manager(str(tmp_path / "notify"))
    host = serve(tmp_path, env={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000"})
    manager.read_until("READY=1")
    for _ in range(5):
        manager.read_until("WATCHDOG=1")
    os.kill(host.pid, signal.SIGSTOP)  # the loop turns no more, whatever it is that keeps it
    try:
        wait_until(lambda: manager.is_silent(0.6), "there are no more signs of life")
    finally:
        os.kill(host.pid, signal.SIGCONT)
    manager.read_until("WATCHDOG=1")
    host.process.send_signal(signal.SIGTERM)
    manager.read_until("STOPPING=1")
    assert host.process.wait(LIMIT) == 0
    manager.close()


def test_the_watchdog_of_another_process_is_not_fed(serve: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    manager = Manager(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    host = serve(tmp_path, env=env)
    assert host.stop() == 0
    assert not any("WATCHDOG" in state for state in manager.read_until("STOPPING=1"))
    manager.close()


def test_a_manager_that_has_gone_stops_no_host(serve: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = serve(tmp_path, env={"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "50000"})
    assert host.get("/plugins/p/acme/hello").body == b"hello"
    assert host.log.count("systemd could not be told") == 1
    assert host.stop() == 0


@pytest.fixture
def activate(tmp_path: Path) -> Iterator[Callable[..., HostProcess]]:
    """A host that is given a listening socket on ``address``, for the process ``pid``: its own unless that is given."""
    hosts: list[HostProcess] = []

    def begin(
        *options: str, address: str = "127.0.0.1", pid: str = "", env: dict[str, str] | None = None
    ) -> HostProcess:
        prefix = [sys.executable, "-c", ACTIVATE, address, pid]
        hosts.append(HostProcess(arguments(tmp_path, *options), env, prefix, writable=tmp_path))
        return hosts[-1]

    yield begin
    for host in hosts:
        host.kill()


def passed_port(host: HostProcess) -> int:
    host.wait_for_log('{"port":')
    return int(host.records()[0]["port"])


def test_a_passed_socket_is_served_and_what_came_before_is_answered(
    activate: Callable[..., HostProcess], tmp_path: Path
) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = activate()
    host.port = port = passed_port(host)
    assert host.get("/plugins/p/acme/hello").body == b"hello"  # asked before anybody accepts
    assert f"http://127.0.0.1:{port}" in host.wait_for_log('"event":"ready"')
    environ = host.get("/plugins/p/acme/environ").json()
    assert not [name for name in environ if name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_"))]
    assert host.stop() == 0


def test_no_child_of_the_host_has_the_socket_or_hears_of_it(
    activate: Callable[..., HostProcess], tmp_path: Path
) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    manager = Manager(str(tmp_path / "notify"))
    host = activate("--isolation", "none", env={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "60000000"})
    host.port = passed_port(host)
    host.wait_for_log('"event":"ready"')
    assert host.get("/plugins/p/acme/hello").status == 200
    children = [pid for pid in host.pids() if pid != host.pid]
    assert len(children) >= 4  # nursery, zygote, worker and watcher
    for pid in children:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert not [name for name in (b"LISTEN_", b"NOTIFY_SOCKET", b"WATCHDOG_") if name in environ], pid
    inode = f"socket:[{_inode_of(host.port)}]"
    for pid in children:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
        assert inode not in links
    assert host.stop() == 0
    manager.close()


def _inode_of(port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            return fields[9]
    raise AssertionError(f"nobody listens on {port}")


def test_variables_for_another_process_are_not_used(activate: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = activate(pid="1").wait_ready()
    assert host.port != passed_port(host)
    assert host.get("/plugins/p/acme/hello").status == 200


def test_a_passed_socket_that_all_can_reach_needs_a_token(activate: Callable[..., HostProcess], tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", PLUGIN)
    host = activate(address="0.0.0.0")
    assert host.process.wait(LIMIT) == 1
    assert "hayhost: 0.0.0.0 is not a loopback address, and without a token" in host.log
    assert "Traceback" not in host.log


def as_descriptor_3(sock: socket.socket | None) -> str:
    """What a process with ``sock`` as its descriptor 3 says about it."""
    source = (
        "import os; from hayhost.systemd import passed_sockets; from hayhost.errors import HostError\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='web')\n"
        "try: print(passed_sockets())\nexcept HostError as error: print(error)\n"
    )
    script = "exec 3<&-" if sock is None else f"exec 3<&{sock.fileno()}"
    command = ["bash", "-c", f'{script}; exec "$@"', "-", sys.executable, "-c", source]
    done = subprocess.run(command, pass_fds=[] if sock is None else [sock.fileno()], capture_output=True, timeout=LIMIT)
    assert not done.stderr, done.stderr
    return done.stdout.decode()


def test_what_is_passed_is_checked() -> None:
    what = "descriptor 3 (web), which LISTEN_FDS passes,"
    assert f"{what} is not open" in as_descriptor_3(None)
    for family, kind, problem in (
        (socket.AF_INET, socket.SOCK_STREAM, "does not listen: Accept= must be no"),
        (socket.AF_INET, socket.SOCK_DGRAM, "is not a TCP socket"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "is not a TCP socket"),
    ):
        with socket.socket(family, kind) as sock:
            assert f"{what} {problem}" in as_descriptor_3(sock)


@pytest.mark.parametrize("count", ["-1", "many", "65", "٣", "1e1"])
def test_a_number_of_descriptors_that_is_none(count: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "x"}
    with pytest.raises(HostError, match="LISTEN_FDS"):
        passed_sockets(environ)
    assert environ == {}


@pytest.mark.parametrize(
    "environ", [{}, {"NOTIFY_SOCKET": "vsock:2:1234"}, {"NOTIFY_SOCKET": "@"}, {"WATCHDOG_USEC": "x"}]
)
def test_without_a_manager_nothing_is_told(environ: dict[str, str]) -> None:
    service = Service.from_environment(environ)
    service.watch()  # needs no loop: there is nothing to send
    service.ready("Serving")
    service.close()
    assert environ == {}


# ---- the unit files


@pytest.fixture(scope="module")
def systemd_analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("there is no systemd-analyze here to check the unit files with")
    return found


def test_the_unit_files_are_valid(systemd_analyze: str, tmp_path: Path) -> None:
    for name in ("hayhost.service", "hayhost.socket"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/hayhost/bin/hayhost", "/bin/true"))
    done = subprocess.run(
        [systemd_analyze, "verify", "--man=no", tmp_path / "hayhost.service", tmp_path / "hayhost.socket"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if "hayhost" in line]
    assert told == []
    assert done.returncode == 0, done.stderr


def test_the_service_is_as_closed_as_its_sandbox_allows(systemd_analyze: str, tmp_path: Path) -> None:
    (tmp_path / "hayhost.service").write_text((DEPLOY / "hayhost.service").read_text())
    command = [systemd_analyze, "security", "--offline=yes", "--threshold=35", str(tmp_path / "hayhost.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge a unit file that is not loaded (it can from systemd 250 on)")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_a_stop_reaches_the_host_alone() -> None:
    """All processes of the service are in its cgroup: a signal to each of them would end workers in their requests."""
    lines = (DEPLOY / "hayhost.service").read_text().splitlines()
    assert {"KillMode=mixed", "Delegate=cpu memory pids", "Type=notify", "NotifyAccess=main"} <= set(lines)
    assert not [line for line in lines if line.startswith(("RestrictNamespaces=", "ProtectControlGroups=yes"))]
