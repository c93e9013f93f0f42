"""Libraries in a worker that can make no socket: all of them, unchanged, through a real broker to real servers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import wait_until
from .networking import Bench, Network, bench, run_code, start_code

API = "api.test:{port}"
PLAIN = "api.test:{plain}"

GREETED = {"path": "/x"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("network")) as made:
        yield made


# ---- libraries

SYNC = {
    "urllib": """
        import ssl, urllib.request
        context = ssl.create_default_context(cafile=CA)
        def get(url):
            with urllib.request.urlopen(url, timeout=20, context=context) as response:
                return json.load(response)
    """,
    "http.client": """
        import http.client, ssl, urllib.parse
        context = ssl.create_default_context(cafile=CA)
        def get(url):
            parts = urllib.parse.urlsplit(url)
            connection = http.client.HTTPSConnection(parts.netloc, context=context)
            connection.request("GET", parts.path)
            response = json.load(connection.getresponse())
            connection.close()
            return response
    """,
    "urllib3": """
        import urllib3
        pool = urllib3.PoolManager(ca_certs=CA, timeout=20, retries=False)
        def get(url):
            return pool.request("GET", url).json()
    """,
    "requests": """
        import requests
        session = requests.Session()
        def get(url):
            return session.get(url, timeout=20, verify=CA).json()
    """,
    "httpx": """
        import httpx, ssl
        client = httpx.Client(verify=ssl.create_default_context(cafile=CA), trust_env=False)
        def get(url):
            return client.get(url).json()
    """,
    "ssl, wrapped before it connects": """
        import socket, ssl, urllib.parse
        context = ssl.create_default_context(cafile=CA)
        def get(url):
            parts = urllib.parse.urlsplit(url)
            with context.wrap_socket(socket.socket(), server_hostname=parts.hostname) as sock:
                sock.settimeout(20)
                sock.connect((parts.hostname, parts.port))
                sock.sendall(f"GET {parts.path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
                with sock.makefile("rb") as file:
                    return json.loads(file.read().partition(b"\\r\\n\\r\\n")[2])
    """,
}
ASYNC = {
    "asyncio streams": """
        import asyncio, ssl, urllib.parse
        context = ssl.create_default_context(cafile=CA)
        async def get(url):
            parts = urllib.parse.urlsplit(url)
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
            writer.write(f"GET {parts.path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
            data = await reader.read()
            writer.close()
            await writer.wait_closed()
            return json.loads(data.partition(b"\\r\\n\\r\\n")[2])
    """,
    "asyncio, happy eyeballs": """
        import asyncio, ssl, urllib.parse
        context = ssl.create_default_context(cafile=CA)
        async def get(url):
            parts = urllib.parse.urlsplit(url)
            options = {"ssl": context, "happy_eyeballs_delay": 0.25} if RUNNER != "uvloop" else {"ssl": context}
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, **options)
            writer.write(f"GET {parts.path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
            data = await reader.read()
            writer.close()
            return json.loads(data.partition(b"\\r\\n\\r\\n")[2])
    """,
    "httpx": """
        import httpx, ssl
        async def get(url):
            context = ssl.create_default_context(cafile=CA)
            async with httpx.AsyncClient(verify=context, trust_env=False) as client:
                return (await client.get(url)).json()
    """,
    "aiohttp": """
        import aiohttp, ssl
        async def get(url):
            context = ssl.create_default_context(cafile=CA)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
                async with session.get(url) as response:
                    return await response.json()
    """,
    "anyio": """
        import anyio, ssl, urllib.parse
        async def get(url):
            parts = urllib.parse.urlsplit(url)
            context = ssl.create_default_context(cafile=CA)
            async with await anyio.connect_tcp(parts.hostname, parts.port, ssl_context=context,
                                               tls_standard_compatible=False) as stream:
                await stream.send(f"GET {parts.path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
                data = b""
                try:
                    while True:
                        data += await stream.receive()
                except anyio.EndOfStream:
                    return json.loads(data.partition(b"\\r\\n\\r\\n")[2])
    """,
    "tornado": """
        import ssl
        from tornado.httpclient import AsyncHTTPClient
        async def get(url):
            response = await AsyncHTTPClient().fetch(url, ca_certs=CA)
            return json.loads(response.body)
    """,
}
RUNNERS = {
    "asyncio": "import asyncio\nrun = lambda main: asyncio.run(main())",
    "uvloop": "import uvloop\nrun = lambda main: uvloop.run(main())",
    "trio": "import trio\nrun = lambda main: trio.run(main)",
}
TRIO = ("httpx", "anyio")


def dedent(text: str) -> str:
    return "\n".join(line.removeprefix("        ") for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("library", SYNC)
def test_a_synchronous_library_connects_and_is_refused_with_the_reason(made: Bench, library: str) -> None:
    code = dedent(SYNC[library])
    code += """
print(json.dumps([get(f"https://api.test:{PORT}/x"), get(f"https://api.test:{PORT}/x"),
                  attempt(get, f"https://other.test:{PORT}/x"), attempt(get, f"https://api.test:1/x"),
                  attempt(get, f"https://127.0.0.1:{PORT}/x")]))
"""
    first, second, name, port, address = made.run(code, [API])
    assert first["path"] == second["path"] == "/x"
    assert "other.test:" in name
    assert "is not in permissions.network; add" in name
    assert "api.test:1 is not in permissions.network; add" in port
    assert "127.0.0.1 is an address; permissions.network permits names" in address


@pytest.mark.parametrize(
    ("library", "runner"),
    [(library, runner) for library in ASYNC for runner in RUNNERS if runner != "trio" or library in TRIO],
)
def test_an_asynchronous_library_connects_and_is_refused_with_the_reason(
    made: Bench, library: str, runner: str
) -> None:
    code = f"RUNNER = {runner!r}\n{RUNNERS[runner]}\n{dedent(ASYNC[library])}"
    code += """
def reasons(error):
    found = [f"{type(error).__name__}: {error}"]
    for inner in (*getattr(error, "exceptions", ()), error.__cause__, error.__context__):
        if inner is not None:
            found += reasons(inner)
    return found

async def fails(url):
    try:
        return await get(url)
    except Exception as error:
        return "; ".join(reasons(error))

async def main():
    print(json.dumps([await get(f"https://api.test:{PORT}/x"), await fails(f"https://other.test:{PORT}/x"),
                      await fails(f"https://127.0.0.1:{PORT}/x")]))
run(main)
"""
    got, name, address = made.run(code, [API])
    assert got["path"] == "/x"
    assert "other.test:" in name
    assert "is not in permissions.network; add" in name
    assert "127.0.0.1 is an address; permissions.network permits names" in address


def test_a_certificate_of_another_name_is_refused_and_the_name_asked_for_is_sent(made: Bench) -> None:
    made.network.sni.clear()
    code = """
import ssl, urllib.request
context = ssl.create_default_context(cafile=CA)
get = lambda host: urllib.request.urlopen(f"https://{host}:{PORT}/x", timeout=20, context=context).status
print(json.dumps([attempt(get, "API.Test."), attempt(get, "a.wild.test"), attempt(get, "other.test")]))
"""
    good, wild, other = made.run(code, [API, "*.wild.test:{port}", "other.test:{port}"])
    assert wild == 200
    assert "Hostname mismatch" in other
    assert good == 200 or "Hostname mismatch" in good  # a final dot is for the library to strip
    assert {"a.wild.test", "other.test"} <= set(made.network.sni)


# ---- without permission


def test_without_permission_every_way_out_names_the_permission(made: Bench) -> None:
    code = """
import asyncio, socket, urllib.request
async def stream():
    await asyncio.open_connection("api.test", PORT)
print(json.dumps([
    attempt(socket.getaddrinfo, "api.test", 443), attempt(socket.gethostbyname, "api.test"),
    attempt(socket.create_connection, ("127.0.0.1", PORT)), attempt(socket.socket().connect_ex, ("127.0.0.1", PORT)),
    attempt(urllib.request.urlopen, f"http://api.test:{PORT}"), attempt(lambda: asyncio.run(stream())),
]))
"""
    for text in made.run(code, None):
        assert 'this plugin has no network access: declare it in the manifest, permissions.network = ["' in text


def test_while_the_plugin_loads_there_is_none(made: Bench) -> None:
    code = """
import socket
network.install()
print(json.dumps(attempt(socket.create_connection, ("api.test", PORT))))
"""
    assert "a plugin has no network while it loads (import and on_initialize)" in made.run(code, [API])


def test_what_is_not_possible_is_said_in_so_many_words(made: Bench) -> None:
    code = """
import asyncio, socket
async def serve():
    await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
async def udp():
    await asyncio.get_running_loop().create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=("api.test", PORT))
tcp = socket.socket()
print(json.dumps([
    attempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM), attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW),
    attempt(socket.socket, socket.AF_UNIX), attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
    attempt(tcp.bind, ("127.0.0.1", 0)), attempt(tcp.bind, ("", 8080)), attempt(tcp.listen), attempt(tcp.bind, ("", 0)),
    attempt(socket.create_server, ("", 0)), attempt(lambda: asyncio.run(serve())), attempt(lambda: asyncio.run(udp())),
]))
"""
    said = made.run(code, [API])
    bound = said.pop(7)
    assert bound is None  # as clients do to choose a source
    for text in said:
        assert text.startswith("PermissionError: [Errno 1] ")
        assert "a plugin " in text
    assert "TCP only" in said[0]
    assert "cannot listen" in said[6]


def test_libraries_that_resolve_or_connect_in_c_are_refused_at_their_import(made: Bench) -> None:
    code = """
print(json.dumps([attempt(__import__, name) for name in ("aiodns", "pycares", "pycurl")]))
"""
    assert all("does not work in a plugin" in text for text in made.run(code, [API]))


# ---- sockets


def test_an_unconnected_socket_looks_like_one(made: Bench) -> None:
    code = """
import socket, struct
sock = socket.socket()
one = [sock.family, sock.type, sock.proto, sock.getsockname(), attempt(sock.getpeername), attempt(sock.send, b"x")]
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7))
two = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
       sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)]
number = sock.fileno()
sock.settimeout(20)
sock.connect(("api.test", PLAIN))
three = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) > 0,
         sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) > 0,
         struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)), sock.gettimeout(),
         sock.fileno() == number, os.get_inheritable(number), sock.getpeername(), sock.getsockname()[1] > 0,
         attempt(sock.connect, ("api.test", PLAIN)), sock.connect_ex(("api.test", PLAIN))]
sock.close()
print(json.dumps([one, two, three]))
"""
    one, two, three = made.run(code, [PLAIN])
    assert one[:4] == [2, 1, 0, ["0.0.0.0", 0]]
    assert "Transport endpoint is not connected" in one[4]
    assert "Broken pipe" in one[5]
    assert two == [1, 0, 1]
    assert three[:7] == [True, True, [1, 7], 20.0, True, False, ["127.0.0.1", made.network.plain]]
    assert three[7] is True
    assert "already connected" in three[8]
    assert three[9] == 106


def test_a_connect_that_does_not_block_becomes_writable_with_the_result(made: Bench) -> None:
    made.network.names.set("closed.test", "127.0.0.1")
    made.network.names.set("private.test", "10.0.0.1")
    code = """
import errno, select, socket
results = []
for host, port in (("api.test", PLAIN), ("closed.test", 1), ("missing.test", 1), ("private.test", 1)):
    for kind in ("poll", "select", "epoll"):
        sock = socket.socket()
        sock.setblocking(False)
        first = sock.connect_ex((host, port))
        if kind == "select":
            events = bool(select.select([], [sock], [], 20)[1])
        elif kind == "poll":
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            events = bool(poll.poll(20_000))
        else:
            with select.epoll() as epoll:
                epoll.register(sock, select.EPOLLOUT)
                events = bool(epoll.poll(20))
        result = attempt(sock.getsockopt, socket.SOL_SOCKET, socket.SO_ERROR)
        results.append([first == errno.EINPROGRESS, events, result])
        if host == "api.test":
            sock.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
        sock.close()
print(json.dumps(results))
"""
    results = made.run(code, [PLAIN, "closed.test:1", "missing.test:1", "private.test:1"], org="writable")
    assert all(begun and writable for begun, writable, _ in results)
    said = [result for *_, result in results]
    assert said[:6] == [0, 0, 0, 111, 111, 111]
    assert all("missing.test: Name or service not known" in text for text in said[6:9])
    assert all("private.test is a private address, which no plugin may connect to" in text for text in said[9:])


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_what_the_broker_refuses_reaches_an_event_loop_with_the_reason(made: Bench, runner: str) -> None:
    made.network.names.set("private.test", "10.0.0.1")
    code = f"""
{RUNNERS[runner]}
import asyncio
async def main():
    for host in ("private.test", "missing.test"):
        try:
            await asyncio.open_connection(host, 1)
        except OSError as error:
            print(json.dumps(f"{{type(error).__name__}}: {{error}}"), end="," if host == "private.test" else "]")
print("[", end="")
run(main)
"""
    private, missing = made.run(code, ["private.test:1", "missing.test:1"])
    assert private.startswith("PermissionError: [Errno 1] private.test is a private address")
    assert missing == "gaierror: [Errno -2] missing.test: Name or service not known"


def test_a_registration_outlives_the_exchange_of_the_descriptor(made: Bench) -> None:
    code = """
import selectors, socket
with selectors.DefaultSelector() as selector, socket.socket() as sock:
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)  # before it connects, and left as it is
    sock.connect_ex(("api.test", PLAIN))
    while not any(events & selectors.EVENT_WRITE for _, events in selector.select(20)) or not sock.getsockname()[1]:
        pass
    sock.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
    selector.modify(sock, selectors.EVENT_READ)
    selector.select(20)
    print(json.dumps(sock.recv(17).decode()))
"""
    assert "200 OK" in made.run(code, [PLAIN], org="selector")


def test_time_limits_are_kept(made: Bench) -> None:
    made.network.names.set("silent.test", "127.0.0.1")
    made.network.names.silent.add("silent.test")
    code = """
import asyncio, socket, time
def timed(call, *arguments, **options):
    begun = time.monotonic()
    return [attempt(call, *arguments, **options), time.monotonic() - begun]
async def main():
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1
    task = asyncio.create_task(tick())
    try:
        async with asyncio.timeout(0.5):
            await asyncio.open_connection("silent.test", 1)
    except TimeoutError:
        task.cancel()
        return ticks
print(json.dumps([timed(socket.create_connection, ("silent.test", 1), timeout=0.3), asyncio.run(main()),
                  timed(socket.create_connection, ("silent.test", 1))]))
"""
    (short, took), ticks, (long, whole) = made.run(code, ["silent.test:1"])
    assert short == "TimeoutError: timed out"
    assert 0.25 < took < 3
    assert ticks > 10  # the loop went on
    assert "Temporary failure in name resolution" in long or "was not resolved in time" in long
    assert 3 < whole < 14
    made.network.names.silent.discard("silent.test")


def test_a_hundred_connections_at_once(made: Bench) -> None:
    code = """
import asyncio, concurrent.futures, socket
async def one():
    reader, writer = await asyncio.open_connection("api.test", PLAIN)
    writer.write(b"GET /x HTTP/1.0\\r\\n\\r\\n")
    data = await reader.read()
    writer.close()
    return b"200 OK" in data
async def main():
    return sum(await asyncio.gather(*[one() for _ in range(100)]))
def thread(_):
    with socket.create_connection(("api.test", PLAIN)) as sock:
        sock.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
        return sock.makefile("rb").readline().endswith(b"OK\\r\\n")
with concurrent.futures.ThreadPoolExecutor(50) as pool:
    print(json.dumps([asyncio.run(main()), sum(pool.map(thread, range(100)))]))
"""
    assert made.run(code, [PLAIN], org="hundred") == [100, 100]


def test_a_fork_of_a_worker_connects_by_itself(made: Bench) -> None:
    code = """
import socket
kept = socket.create_connection(("api.test", PLAIN))
reader, writer = os.pipe()
if os.fork() == 0:
    with socket.create_connection(("api.test", PLAIN)) as sock:
        sock.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
        os.write(writer, sock.recv(17))
    os._exit(0)
os.wait()
kept.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
print(json.dumps([os.read(reader, 100).decode(), kept.recv(17).decode()]))
"""
    child, parent = made.run(code, [PLAIN])
    assert child == parent
    assert "200 OK" in child


def test_pairs_existing_descriptors_and_detaching_work_as_ever(made: Bench) -> None:
    code = """
import socket
a, b = socket.socketpair()
a.sendall(b"pair")
again = socket.socket(fileno=os.dup(b.fileno()))
got = [again.recv(9).decode(), again.family, attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)]
sock = socket.socket()
moved = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
moved.connect(("api.test", PLAIN))
moved.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
got.append(moved.recv(17).decode())
print(json.dumps(got))
"""
    pair, family, datagram, moved = made.run(code, [PLAIN])
    assert (pair, family) == ("pair", 1)
    assert "PermissionError" in datagram
    assert "200 OK" in moved


def test_names_have_addresses_of_their_own_which_lead_back(made: Bench) -> None:
    code = """
import socket
one = socket.getaddrinfo("api.test", PLAIN, type=socket.SOCK_STREAM)
six = socket.getaddrinfo("API.test.", str(PLAIN), socket.AF_INET6, socket.SOCK_STREAM)
address = one[0][4][0]
with socket.create_connection(six[0][4][:2]) as sock:
    peer = sock.getpeername()
print(json.dumps([one, six, socket.gethostbyname("api.test") == address, socket.gethostbyaddr(address),
    socket.getnameinfo((address, 80), 0), socket.getaddrinfo("127.0.0.1", 80, flags=socket.AI_NUMERICHOST)[0],
    attempt(socket.getaddrinfo, "api.test", 80, flags=socket.AI_NUMERICHOST), attempt(socket.getaddrinfo, "127.1", 80),
    attempt(socket.getaddrinfo, "\\uff11\\uff12\\uff17.0.0.1", 80), attempt(socket.getaddrinfo, "a\\0.test", 80),
    socket.getaddrinfo(None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE), socket.getfqdn(), peer]))
"""
    one, six, same, reverse, info, numeric, name, short, wide, nul, passive, _, peer = made.run(code, [PLAIN])
    assert one[0][:4] == [2, 1, 6, ""]
    assert one[0][4][0].startswith("198.18.")
    assert six[0][4][0] == f"::ffff:{one[0][4][0]}"
    assert same
    assert reverse[0] == info[0] == "api.test"
    assert numeric[4] == ["127.0.0.1", 80]
    assert "Name or service not known" in name
    assert "an IP address in an unusual spelling" in short
    assert "an IP address in an unusual spelling" in wide
    assert "gaierror" in nul
    assert passive[0][4] == ["0.0.0.0", 0]
    assert peer == ["127.0.0.1", made.network.plain]


def test_an_address_that_only_ipv6_has(tmp_path: Path) -> None:
    with bench(tmp_path, allow=("::1/128",)) as made:
        import socket

        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
            made.network.names.set("six.test", "::1")
            code = f"""
import asyncio, socket
with socket.create_connection(("six.test", {port})) as sock:
    one = [sock.family, sock.getpeername(), sock.getsockname()[0], sock.gettimeout()]
async def main():
    reader, writer = await asyncio.open_connection("six.test", {port})
    return writer.get_extra_info("peername")
print(json.dumps([one, asyncio.run(main())]))
"""
            one, peer = made.run(code, [f"six.test:{port}"])
    assert one == [10, ["::1", port, 0, 0], "::1", None]
    assert peer == ["::1", port, 0, 0]


# ---- the broker from a worker's side


def test_figures_of_a_connection_are_the_workers_say(made: Bench) -> None:
    code = """
import socket
with socket.create_connection(("api.test", PLAIN)) as sock:
    sock.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
    print(json.dumps(len(sock.makefile("rb").read())))
"""
    received = made.run(code, [PLAIN], org="figures", plugin="counted")
    record = made.wait_for("connection closed", org="figures")
    assert record["source"] == "worker"
    assert (record["sent"], record["received"], record["host"]) == (19, received, "api.test")
    counters = made.egress.counters["counted", "figures"]
    assert (counters.connected, counters.closed, counters.sent, counters.received) == (1, 1, 19, received)
    assert made.records("connected", org="figures", plugin="counted", address="127.0.0.1")


def test_a_broker_that_dies_is_replaced_and_its_workers_are_told(tmp_path: Path) -> None:
    with bench(tmp_path) as made, made.worker([PLAIN]) as end:
        code = """
import socket
print(json.dumps(len(socket.create_connection(("api.test", PLAIN)).getpeername())), flush=True)
sys.stdin.readline()
print(json.dumps(attempt(socket.create_connection, ("api.test", PLAIN), timeout=20)))
"""
        process = start_code(made.network, code, end)
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == 2
            old = made.egress.pid
            import os
            import signal

            os.kill(old, signal.SIGKILL)
            wait_until(lambda: made.lost, "lost is called")
            assert made.lost == [{("p", "acme")}]
            assert made.egress.pid not in (0, old)
            output, _ = process.communicate(b"\n", timeout=60)
            assert "the host's network broker has ended; the host replaces this worker" in json.loads(output)
        finally:
            process.kill()
            process.wait()
        assert made.run(
            "import socket\nprint(socket.create_connection(('api.test', PLAIN)).fileno() > 0 and 1)", [PLAIN]
        )


def test_a_worker_without_an_org_waits_for_it(made: Bench) -> None:
    import os
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = """
import socket
print("1", flush=True)
print(json.dumps(len(socket.create_connection(("api.test", PLAIN)).getpeername())))
"""
    with theirs:
        process = start_code(made.network, code, theirs)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            descriptor = os.dup(ours.fileno())
            ours.close()
            made.call(lambda: made.egress.attach(descriptor, "p", "late", [made.fill(PLAIN)]))
            assert json.loads(process.communicate(timeout=60)[0]) == 2
        finally:
            process.kill()
            process.wait()


def test_a_redirect_to_the_host_itself_is_refused(made: Bench) -> None:
    code = """
import requests
get = lambda to: requests.get(f"http://api.test:{PLAIN}/to/{to}", timeout=20).status_code
print(json.dumps([attempt(get, to) for to in (
    "http://127.0.0.1:22/", "http://localhost:22/", "http://169.254.169.254/latest/meta-data",
    "http://2130706433/", "http://0x7f.1/", "http://metadata.google.internal/")]))
"""
    for text in made.run(code, [PLAIN]):
        assert "Error" in str(text)
        assert "permissions.network" in text or "unusual spelling" in text


def test_a_plugin_that_may_connect_anywhere_may_not_connect_inside(tmp_path: Path) -> None:
    with bench(tmp_path, allow=()) as made:
        made.network.names.set("me.test", "127.0.0.1")
        code = """
import socket
print(json.dumps([attempt(socket.create_connection, (host, PLAIN)) for host in (
    "me.test", "127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "198.18.0.200", "0.0.0.0", "")]))
"""
        for text in made.run(code, True):
            assert "which no plugin may connect to" in text
        assert made.egress.counters["p", "acme"].refused == 10  # an empty host is two addresses


def test_run_code_needs_no_bench_for_what_is_local(made: Bench) -> None:
    network: Network = made.network
    assert run_code(network, "import socket\nprint(json.dumps(socket.socket().fileno() > 2))", None)


def test_a_fork_of_a_zygote_is_given_its_descriptor_afterwards(made: Bench) -> None:
    code = """
import socket
end = os.dup(int(sys.argv[1]))
network.install()  # as in a zygote, from here on
import http.client
loading = attempt(socket.create_connection, ("api.test", PLAIN))
kept = socket.socket()  # made while loading, used in the worker
reader, writer = os.pipe()
for descriptor in (end, None):
    if os.fork() == 0:
        network.use(descriptor)
        os.write(writer, json.dumps(attempt(lambda: kept.connect(("api.test", PLAIN)) or kept.getpeername())).encode())
        os._exit(0)
    os.wait()
    os.write(writer, b"\\n")
print(json.dumps([loading, *map(json.loads, os.read(reader, 4096).splitlines())]))
"""
    loading, worker, undeclared = made.run(code, [PLAIN], org="zygote")
    assert "while it loads" in loading
    assert worker == ["127.0.0.1", made.network.plain]
    assert "this plugin has no network access" in undeclared
