"""The network of programs that a plugin starts, through the real host: by the broker's proxy, and by nothing else."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.confinement import landlock

from . import nodejs
from .commands import run_hayhost
from .conftest import LIMIT, HostProcess, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting, logged
from .networking import Network
from .test_egress_e2e import LIBRARIES, ask
from .test_egress_e2e import plugin as networked
from .test_isolation_e2e import LEVELS
from .test_mcp_runtime import program
from .test_mcp_servers_e2e import call, permissions, starting

SOURCE = (
    PREAMBLE
    + """
import ctypes, socket, subprocess

@route("POST", "/run")
def run(req):
    asked = req.json()
    done = subprocess.run(asked["args"], capture_output=True, text=True, timeout=25, env=asked.get("env"))
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

@route("POST", "/hold")
def hold(req):
    subprocess.Popen(req.json()["args"])
    return {}

def connect(libc, descriptor, family, host, port):
    address = family.to_bytes(2, "little") + port.to_bytes(2, "big") + socket.inet_aton(host) + bytes(8)
    return ctypes.get_errno() if libc.connect(descriptor, address, len(address)) else 0

@route("POST", "/redirect")
def redirect(req):
    asked = req.json()
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.create_connection((asked["host"], asked["port"]), 20) as sock:
        undone = connect(libc, sock.fileno(), 0, "0.0.0.0", 0)
        return {"undone": undone, "again": [connect(libc, sock.fileno(), 2, host, port) for host, port in asked["to"]]}
"""
    + PLUGIN
)
TRIES = """
import errno, json, os, socket, sys
def tried(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"
def listen():
    sock = socket.socket()
    sock.listen()
def udp(host, port):
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (host, port))
def six(port):
    socket.socket(socket.AF_INET6).connect(("::1", port))
port, more = int(sys.argv[1]), [int(port) for port in sys.argv[2:]]
own = int(os.environ["HTTPS_PROXY"].rpartition(":")[2])
print(json.dumps({
    "tcp": [tried(lambda: socket.create_connection(("127.0.0.1", at), 5)) for at in (port, *more)],
    "elsewhere": [tried(lambda: socket.create_connection((host, at), 5))
                  for host in ("192.0.2.1", "169.254.169.254", "8.8.8.8", "10.0.0.1") for at in (80, own)],
    "udp": tried(lambda: udp("127.0.0.1", port)),
    "six": tried(lambda: six(port)),
    "bind": tried(lambda: socket.socket().bind(("127.0.0.1", 0))),
    "listen": tried(listen),
    "own": tried(lambda: socket.create_connection(("127.0.0.1", own), 5)),
}))
"""
FETCH = """
import os, ssl, sys, urllib.request
context = ssl.create_default_context(cafile=os.environ.get("CA"))
print(urllib.request.urlopen(sys.argv[1], context=context, timeout=20).read().decode())
"""
SERVER = """
    import ssl, urllib.request
    def tools(params):
        return [{"name": "fetch"}]
    def call(id, name, arguments, meta):
        try:
            context = ssl.create_default_context(cafile=os.path.join(os.getcwd(), "ca.pem"))
            text = urllib.request.urlopen(arguments["url"], context=context, timeout=20).read().decode()
        except OSError as error:
            text = str(error)
        say(id=id, result={"content": [{"type": "text", "text": text}]})
"""
PROXIED = [level for level in ("namespaced", "hardened") if level in LEVELS]
pytestmark = pytest.mark.skipif(
    not PROXIED or landlock.abi() < landlock.CONNECT_GOVERNED,
    reason="NOT RUN: this machine cannot confine programs to a proxy (namespaces, and Landlock of Linux 6.7)",
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Names and servers on loopback."""
    made = Network(tmp_path_factory.mktemp("network"))
    made.names.set("private.test", "10.1.2.3")
    made.names.set("metadata.test", "169.254.169.254")
    made.names.set("mapped.test", "::ffff:127.0.0.2")
    made.names.set("changes.test", "127.0.0.1", "127.0.0.2")
    made.names.set("held.test", "127.0.0.1")
    yield made
    made.close()


def options(network: Network) -> list[str]:
    return ["--egress-allow", "127.0.0.1/32", "--egress-nameserver", f"127.0.0.1:{network.names.port}"]


def programs() -> list[str]:
    return ["python3", *(["curl"] if shutil.which("curl") else []), str(nodejs.node())]


def plugins(folder: Path, network: Network) -> None:
    """``listed`` and ``any`` run programs; ``both`` and ``none`` use the network from Python; ``server`` by MCP."""
    listed = [f"api.test:{network.port}"]
    for name, rules in (("listed", listed), ("any", True)):
        write_plugin(folder / name, SOURCE, extra=permissions(network=rules, subprocess=programs()))
    write_plugin(folder / "offline", SOURCE, extra=permissions(subprocess=programs()))
    networked(folder / "both", network, listed)
    with (folder / "both" / "pyproject.toml").open("a") as manifest:
        manifest.write('subprocess = ["python3"]\n')
    start = "start_local_stdio(id='own', command='python3', args=['own.py'])"
    extra = permissions(network=listed, subprocess=["python3"])
    write_plugin(folder / "server", starting(start), files={"own.py": program(SERVER)}, extra=extra)
    for name in ("listed", "any", "server"):
        shutil.copy(network.ca, folder / name / "ca.pem")


@pytest.fixture(scope="module", params=PROXIED)
def host(
    network: Network, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostProcess]:
    """A host of each level at which programs have a proxy; 127.0.0.1 counts as public."""
    folder = tmp_path_factory.mktemp("plugins")
    plugins(folder, network)
    with hosting(folder, "--isolation", request.param, *options(network), writable=False) as host:
        host.folder_of_plugins = folder  # type: ignore[attr-defined]
        yield host


def ca(host: HostProcess) -> str:
    return str(host.folder_of_plugins / "listed" / "ca.pem")  # type: ignore[attr-defined]


def run(host: HostProcess, plugin: str, *args: str, org: str = "acme", env: dict[str, str] | None = None) -> Any:
    """What the program ``args`` of the plugin wrote, and its exit code."""
    answer = host.post(f"/plugins/{plugin}/{org}/run", json_body={"args": args, "env": env})
    assert answer.status == 200, (answer.body, host.log)
    return answer.json()


def fetch(host: HostProcess, url: str, plugin: str = "listed", org: str = "acme", **env: str) -> Any:
    place = str(host.folder_of_plugins / plugin / "ca.pem")  # type: ignore[attr-defined]
    return run(host, plugin, "python3", "-c", FETCH, url, org=org, env={"CA": place, **env})


# ---- what is listed


@pytest.mark.skipif(not shutil.which("curl"), reason="NOT RUN: there is no curl here; scripts/packages installs it")
def test_curl_reaches_what_is_listed_with_tls(host: HostProcess, network: Network) -> None:
    said = run(host, "listed", "curl", "-sS", "--cacert", ca(host), f"https://api.test:{network.port}/x")
    assert json.loads(said["out"])["path"] == "/x", (said, host.log)
    refused = run(host, "listed", "curl", "-sSv", "--cacert", ca(host), f"https://other.test:{network.port}/x")
    assert refused["code"]
    assert f"403 other.test:{network.port} is not in permissions.network" in refused["err"]
    plain = run(host, "listed", "curl", "-sS", f"http://api.test:{network.plain}/")
    assert "speaks CONNECT only" in plain["out"]


@pytest.mark.parametrize(
    "code",
    [
        "fetch(process.argv[1]).then(r => r.text()).then(console.log, console.error)",
        "require('https').get(process.argv[1], r => r.on('data', d => console.log('' + d))).on('error', console.log)",
    ],
)
def test_node_reaches_what_is_listed_with_tls(host: HostProcess, network: Network, code: str) -> None:
    node, url = str(nodejs.node()), f"https://api.test:{network.port}/x"
    said = run(host, "listed", node, "-e", code, url, env={"NODE_EXTRA_CA_CERTS": ca(host)})
    assert json.loads(said["out"])["path"] == "/x", said


def test_python_reaches_what_is_listed_with_tls_and_it_is_logged_and_counted(
    host: HostProcess, network: Network
) -> None:
    said = fetch(host, f"https://api.test:{network.port}/x", org="counted")
    assert json.loads(said["out"])["path"] == "/x", said
    assert logged(host, event="connected", org="counted", host="api.test", address="127.0.0.1")
    closed = logged(host, event="connection closed", org="counted", host="api.test", source="broker")[0]
    assert closed["received"] > 500


def test_an_mcp_server_fetches_what_is_listed(host: HostProcess, network: Network) -> None:
    answer = call(host, "server", "fetch", url=f"https://api.test:{network.port}/tool").json()
    assert json.loads(answer["content"][0]["text"])["path"] == "/tool"
    answer = call(host, "server", "fetch", url=f"https://other.test:{network.port}/").json()
    assert "is not in permissions.network" in answer["content"][0]["text"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_plugins_own_libraries_work_as_before(host: HostProcess, network: Network, library: str) -> None:
    answer = ask(host, "both", library, "api.test", network.port)
    assert answer["host"].partition(":")[0] == "api.test", host.log
    assert ask(host, "both", library, "other.test", network.port) == 500


# ---- what is not


@pytest.mark.parametrize(
    "url",
    [
        "https://other.test:{port}/",
        "https://api.test:{plain}/",
        "https://api.test/",
        "https://127.0.0.1:{port}/",
        "https://[::1]:{port}/",
        "https://localhost:{port}/",
    ],
)
def test_nothing_else_is_reached(host: HostProcess, network: Network, url: str) -> None:
    said = fetch(host, url.format(port=network.port, plain=network.plain))
    assert said["code"]
    assert "Tunnel connection failed: 403" in said["err"]


@pytest.mark.parametrize("name", ["private.test", "metadata.test", "mapped.test", "127.0.0.2", "10.1.2.3", "[::1]"])
def test_no_special_address_is_reached_by_whoever_may_reach_any_host(
    host: HostProcess, network: Network, name: str
) -> None:
    said = fetch(host, f"https://{name}:{network.port}/", plugin="any")
    assert "Tunnel connection failed: 403" in said["err"]
    assert "which no plugin may connect to" in said["err"]


def test_no_redirect_leads_there(host: HostProcess, network: Network) -> None:
    said = fetch(host, f"https://api.test:{network.port}/to/https://127.0.0.2:{network.port}/", plugin="any")
    assert "which no plugin may connect to" in said["err"]


def test_a_name_that_changes_its_address_is_dialled_where_it_was_judged(host: HostProcess, network: Network) -> None:
    network.names.set("changes.test", "127.0.0.1", "127.0.0.2")
    url = f"https://changes.test:{network.port}/"
    assert "CERTIFICATE_VERIFY_FAILED" in fetch(host, url, plugin="any")["err"]  # it was reached, and is another
    assert "which no plugin may connect to" in fetch(host, url, plugin="any")["err"]


def test_there_is_no_way_but_the_proxy(host: HostProcess, network: Network) -> None:
    said = run(host, "any", "python3", "-c", TRIES, *map(str, (network.port, network.plain, host.port, 22)))
    tried = json.loads(said["out"])
    assert tried["own"] == "done"
    assert set(tried["tcp"]) == {"EACCES"}
    assert set(tried["elsewhere"]) <= {"EACCES", "ENETUNREACH"}
    assert [tried[what] for what in ("udp", "six", "bind", "listen")] == ["EPERM"] * 4


def test_what_a_worker_was_passed_leads_nowhere_else(host: HostProcess, network: Network) -> None:
    places = [("127.0.0.1", network.plain), ("127.0.0.1", host.port), ("169.254.169.254", 80)]
    own = run(host, "any", "python3", "-c", "import os; print(os.environ['HTTPS_PROXY'].rpartition(':')[2])")
    places += [(place, int(own["out"])) for place in ("192.0.2.1", "169.254.169.254", "10.0.0.1")]
    asked = {"host": "api.test", "port": network.port, "to": places}
    answer = host.post("/plugins/any/acme/redirect", json_body=asked).json()
    assert answer["undone"] == 0
    assert set(answer["again"]) <= {13, 101}  # EACCES, ENETUNREACH: in a network where there is nothing


def test_nobody_uses_another_orgs_proxy(host: HostProcess, network: Network) -> None:
    show = "import os; print(os.environ['HTTPS_PROXY'])"
    theirs, ours = (run(host, "listed", "python3", "-c", show, org=org)["out"].strip() for org in ("victim", "thief"))
    assert theirs != ours
    assert theirs.partition("@")[0] != ours.partition("@")[0]
    url = f"https://api.test:{network.port}/x"
    said = fetch(host, url, org="thief", HTTPS_PROXY=theirs, https_proxy=theirs)
    assert "Permission denied" in said["err"]
    mixed = f"{theirs.partition('@')[0]}@{ours.partition('@')[2]}"
    said = fetch(host, url, org="thief", HTTPS_PROXY=mixed, https_proxy=mixed)
    assert "407 wrong credentials" in said["err"]
    assert theirs.partition("@")[0] not in host.log
    bare = f"http://{ours.partition('@')[2]}"
    assert "407" in fetch(host, url, org="thief", HTTPS_PROXY=bare, https_proxy=bare)["err"]
    assert json.loads(fetch(host, url, org="victim")["out"])["path"] == "/x"


def test_without_the_permission_there_is_no_proxy(host: HostProcess) -> None:
    code = "import os, socket\nprint({n for n in os.environ if 'proxy' in n.lower()})\nsocket.socket()"
    said = run(host, "offline", "python3", "-c", code)
    assert said["out"].strip() == "set()"
    assert "Operation not permitted" in said["err"]


# ---- lives


def test_the_connections_of_programs_end_with_the_worker(host: HostProcess) -> None:
    code = """
import base64, os, socket, sys, urllib.parse
proxy = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"])
sock = socket.create_connection((proxy.hostname, proxy.port))
login = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
to = f"held.test:{sys.argv[1]}"
sock.sendall(f"CONNECT {to} HTTP/1.1\\r\\nHost: {to}\\r\\nProxy-Authorization: Basic {login}\\r\\n\\r\\n".encode())
sock.recv(1000)
sock.sendall(b"here")
sock.recv(1000)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT)
        port = str(server.getsockname()[1])
        host.post("/plugins/any/held/hold", json_body={"args": ["python3", "-c", code, port]})
        peer, _ = server.accept()
        with peer:
            peer.settimeout(LIMIT)
            assert peer.recv(4) == b"here"
            os.kill(host.health("any", "held")["pid"], signal.SIGKILL)
            assert peer.recv(100) == b""


def test_programs_of_the_next_worker_use_the_next_broker(host: HostProcess, network: Network) -> None:
    url = f"https://api.test:{network.port}/x"
    assert fetch(host, url, org="again")["code"] == 0
    before = host.health("listed", "again")["pid"]
    [broker] = [pid for pid in host.pids() if b"sandbox.broker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: host.health("listed", "again")["pid"] != before, "the worker is replaced")
    assert json.loads(fetch(host, url, org="again")["out"])["path"] == "/x"


def test_where_the_kernel_cannot_confine_them_programs_have_nothing(network: Network, tmp_path: Path) -> None:
    plugins(tmp_path, network)
    with hosting(tmp_path, "--isolation", "confined", *options(network), writable=False) as host:
        record = logged(host, event="the programs of the plugin have no network", plugin="listed")[0]
        assert "namespaces" in record["reason"]
        code = "import os, socket\nprint({n for n in os.environ if 'proxy' in n.lower()})\nsocket.socket()"
        said = run(host, "listed", "python3", "-c", code)
        assert said["out"].strip() == "set()"
        assert "Operation not permitted" in said["err"]
        assert ask(host, "both", "urllib", "api.test", network.port)["host"].startswith("api.test")


def test_doctor_says_whether_programs_can_have_a_network() -> None:
    assert run_hayhost("doctor", "--json").json()["programsOffline"] is None
    done = run_hayhost("doctor", "--isolation", "confined")
    assert "programs that plugins start have no network: that needs isolation by namespaces" in done.out


def test_a_worker_of_its_own_process_has_a_proxy_as_well(network: Network, tmp_path: Path) -> None:
    extra = permissions(network=[f"api.test:{network.port}"], subprocess=["python3"])
    write_plugin(tmp_path / "listed", SOURCE, extra=f'sharing = "strict"\n{extra}')
    shutil.copy(network.ca, tmp_path / "listed" / "ca.pem")
    with hosting(tmp_path, "--isolation", PROXIED[0], *options(network), writable=False) as host:
        host.folder_of_plugins = tmp_path  # type: ignore[attr-defined]
        for org in ("one", "two"):
            said = fetch(host, f"https://api.test:{network.port}/{org}", org=org)
            assert json.loads(said["out"])["path"] == f"/{org}", said
        assert host.health("listed", "one")["sharing"] == "strict"
