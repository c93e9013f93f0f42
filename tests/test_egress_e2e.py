"""The network of plugins, through the real host: what the manifest lists, with the libraries that plugins use."""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayhost.egress import Egress

from .conftest import HostProcess, routes, wait_until, write_plugin
from .hosting import hosting, logged
from .networking import Network

HANDLERS = {
    "urllib": """def:
        import urllib.request
        with urllib.request.urlopen(url(req), context=tls(), timeout=20) as answer:
            return answer.read()
    """,
    "requests": """def:
        import requests
        return requests.get(url(req), verify=CA, timeout=20).content
    """,
    "httpx": """def:
        import httpx
        return httpx.get(url(req), verify=tls(), timeout=20, follow_redirects=True).content
    """,
    "httpx-async": """async def:
        import httpx
        async with httpx.AsyncClient(verify=tls(), timeout=20) as client:
            return (await client.get(url(req))).content
    """,
    "aiohttp": """async def:
        import aiohttp
        async with aiohttp.ClientSession() as session, session.get(url(req), ssl=tls()) as answer:
            return await answer.read()
    """,
    "streams": """async def:
        host, port = where(req)
        reader, writer = await asyncio.open_connection(host, port, ssl=tls())
        writer.write(f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
        answer = await reader.read()
        writer.close()
        return answer.partition(b"\\r\\n\\r\\n")[2]
    """,
}
LIBRARIES = tuple(HANDLERS)
SOURCE = """
import ssl
CA = __file__.replace("plugin.py", "ca.pem")

def tls():
    return ssl.create_default_context(cafile=CA)

def where(req):
    return req.query["host"][0], int(req.query["port"][0])

def url(req):
    host, port = where(req)
    return f"{req.query.get('scheme', ['https'])[0]}://{host}:{port}{req.query.get('path', ['/'])[0]}"
"""


def plugin(folder: Path, network: Network, permission: object) -> None:
    """A plugin that asks for what it is told, with each library."""
    handlers = {name.replace("-", "_"): text for name, text in HANDLERS.items()}
    extra = f"[tool.hay-plugin.permissions]\nnetwork = {json.dumps(permission)}\n"
    write_plugin(folder, routes(SOURCE, **handlers), extra=extra)
    shutil.copy(network.ca, folder / "ca.pem")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Names and servers on loopback."""
    made = Network(tmp_path_factory.mktemp("network"))
    for name in ("local.test", "loop.test"):
        made.names.set(name, "127.0.0.1")
    made.names.set("private.test", "10.1.2.3")
    made.names.set("metadata.test", "169.254.169.254")
    made.names.set("mapped.test", "::ffff:127.0.0.2")
    made.names.set("changes.test", "127.0.0.1", "127.0.0.2")
    yield made
    made.close()


@pytest.fixture(scope="module")
def host(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A host with plugins ``listed``, ``any`` and ``none``; 127.0.0.1 counts as public."""
    folder = tmp_path_factory.mktemp("plugins")
    plugin(folder / "listed", network, [f"api.test:{network.port}", f"*.wild.test:{network.port}"])
    plugin(folder / "any", network, True)
    plugin(folder / "none", network, False)
    options = ["--egress-allow", "127.0.0.1/32", "--egress-nameserver", f"127.0.0.1:{network.names.port}"]
    with hosting(folder, *options) as host:
        yield host


def ask(host: HostProcess, plugin: str, library: str, name: str, port: int, **query: str) -> Any:
    """What the plugin got, or the status of its failure."""
    extra = "".join(f"&{key}={value}" for key, value in query.items())
    path = f"/plugins/{plugin}/acme/{library.replace('-', '_')}?host={name}&port={port}{extra}"
    answer = host.get(path)
    return answer.json() if answer.status == 200 else answer.status


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["api.test", "a.wild.test"])
def test_what_is_listed_is_reached_with_tls(host: HostProcess, network: Network, library: str, name: str) -> None:
    answer = ask(host, "listed", library, name, network.port)
    assert answer["host"].partition(":")[0] == name, host.log


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["other.test", "127.0.0.1", "a.b.wild.test"])
def test_another_name_is_refused_and_the_author_told(
    host: HostProcess, network: Network, library: str, name: str
) -> None:
    assert ask(host, "listed", library, name, network.port) == 500
    wait_until(lambda: f'add \\"{name}:{network.port}\\"' in host.log or "permissions.network" in host.log)


def test_another_port_is_refused(host: HostProcess, network: Network) -> None:
    assert ask(host, "listed", "urllib", "api.test", network.plain, scheme="http") == 500


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_permission_nothing_is_reached(host: HostProcess, network: Network, library: str) -> None:
    assert ask(host, "none", library, "api.test", network.port) == 500
    host.wait_for_log("this plugin has no network access")


def test_any_public_host_is_any_public_host(host: HostProcess, network: Network) -> None:
    assert ask(host, "any", "httpx", "api.test", network.port)["host"].startswith("api.test")
    assert ask(host, "any", "urllib", "other.test", network.plain, scheme="http")["host"].startswith("other.test")


@pytest.mark.parametrize(
    "name",
    ["private.test", "metadata.test", "mapped.test", "127.0.0.2", "0x7f000002", "2130706434", "localhost", "[::1]"],
)
def test_no_special_address_is_reached(host: HostProcess, network: Network, name: str) -> None:
    assert ask(host, "any", "urllib", name, network.plain, scheme="http") == 500


def test_no_redirect_leads_there(host: HostProcess, network: Network) -> None:
    path = "/to/http://127.0.0.2:" + str(network.plain) + "/"
    assert ask(host, "any", "httpx", "api.test", network.plain, scheme="http", path=path) == 500


def test_a_name_that_changes_its_address_is_dialled_where_it_was_judged(host: HostProcess, network: Network) -> None:
    answer = ask(host, "any", "urllib", "changes.test", network.plain, scheme="http")
    assert answer["host"].startswith("changes.test")
    assert ask(host, "any", "urllib", "changes.test", network.plain, scheme="http") == 500


def test_the_hosts_own_port_is_not_reached(host: HostProcess, network: Network) -> None:
    names = {"127.0.0.2", "localhost", socket.gethostname()}
    for name in names:
        assert ask(host, "any", "urllib", name, host.port, scheme="http", path="/healthz") == 500


def test_connections_are_logged_with_their_org(host: HostProcess, network: Network) -> None:
    assert ask(host, "listed", "urllib", "api.test", network.port)["host"].startswith("api.test")
    record = logged(host, event="connected", plugin="listed", org="acme", host="api.test", port=network.port)[0]
    assert record["address"] == "127.0.0.1"
    closed = logged(host, event="connection closed", plugin="listed", org="acme")[0]
    assert closed["received"] > 0
    assert ask(host, "any", "urllib", "private.test", network.plain, scheme="http") == 500
    assert logged(host, event="connection refused", plugin="any", host="private.test")


def test_a_killed_broker_is_started_anew_and_its_workers_replaced(host: HostProcess, network: Network) -> None:
    assert ask(host, "listed", "urllib", "api.test", network.port)["host"].startswith("api.test")
    before = host.health("listed", "acme")["pid"]
    [broker] = [pid for pid in host.pids() if b"sandbox.broker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: host.health("listed", "acme")["pid"] != before, "the worker is replaced")
    assert ask(host, "listed", "urllib", "api.test", network.port)["host"].startswith("api.test")


def test_workers_that_end_while_there_is_no_broker_keep_no_descriptor() -> None:
    asyncio.run(_attach_and_end())


async def _attach_and_end() -> None:
    egress = Egress()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        egress.attach(ours.detach(), "p", "acme", True)
        theirs.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    await egress.stop()
