"""What it costs that a broker connects: a dial, a round trip and throughput, beside a plain socket in the same run.

python -m benchmarks.egress --json benchmarks/results/egress.json
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hayhost import logs
from hayhost.bench.figures import machine, summary
from hayhost.egress import Egress
from sandbox import network

MESSAGE = 64
BLOCK = bytes(64 << 10)
RUNS = 5
BATCH = 500


class Server:
    """Echoes small messages; after a first byte of ``D`` it only takes, and says at the end that it has."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._socket.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = sock.recv(MESSAGE)
            if data[:1] == b"D":
                while sock.recv(1 << 20):
                    pass
                sock.sendall(b"!")
                return
            while data:
                sock.sendall(data)
                data = sock.recv(MESSAGE)


def dials(host: str, port: int, rounds: int) -> list[float]:
    """Milliseconds from the name to a connected socket."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        sock = socket.create_connection((host, port))
        taken.append((time.perf_counter() - begun) * 1000)
        sock.close()
        time.sleep(0.055)  # not faster than an org may
    return taken


def round_trip(sock: socket.socket) -> float:
    """Microseconds for a small message there and back."""
    begun = time.perf_counter()
    sock.sendall(bytes(MESSAGE))
    sock.recv(MESSAGE)
    return (time.perf_counter() - begun) * 1e6


def throughput(sock: socket.socket, blocks: int) -> float:
    """MiB per second, one way, until the other side has all of it. Closes the socket."""
    with sock:
        begun = time.perf_counter()
        sock.sendall(b"D")
        for _ in range(blocks):
            sock.sendall(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return blocks * len(BLOCK) / (1 << 20) / (time.perf_counter() - begun)


def measure(descriptor: int, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, of plain sockets and of those that the broker behind ``descriptor`` connects, taken in turns."""
    place = ("localhost", port)
    plain_dials = dials(*place, options.dials)
    plain = [socket.create_connection(place) for _ in range(1 + RUNS)]
    network.install()
    network.use(descriptor)
    brokered_dials = dials(*place, options.dials)
    brokered = [socket.create_connection(place) for _ in range(1 + RUNS)]
    ways = {"plain": plain, "through the broker": brokered}
    trips: dict[str, list[float]] = {name: [] for name in ways}
    for sock in (plain[0], brokered[0]):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(options.trips // BATCH):
        for name, socks in ways.items():
            trips[name] += [round_trip(socks[0]) for _ in range(BATCH)]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(RUNS):
        for name, socks in ways.items():
            rates[name].append(throughput(socks[1 + at], options.blocks))
    return {
        "plain": {"dials": plain_dials, "round trips": trips["plain"], "throughput": rates["plain"]},
        "through the broker": {
            "dials": brokered_dials,
            "round trips": trips["through the broker"],
            "throughput": rates["through the broker"],
        },
    }


def in_child(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns in a fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(run()).encode())
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    result: dict[str, Any] = json.loads(data)
    return result


async def broker(options: argparse.Namespace, port: int, parent: socket.socket) -> None:
    """Serve a broker until the parent has closed its end."""
    logs.configure("json", "error")
    egress = Egress(allow=["127.0.0.0/8", "::1/128"])
    await egress.start()
    egress.attach(parent.detach(), "p", "acme", [f"localhost:{port}"])
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await egress.stop()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dials", type=int, default=200, help="connections to time (200)")
    parser.add_argument("--trips", type=int, default=20_000, help="round trips to time (20000)")
    parser.add_argument("--blocks", type=int, default=16_384, help="blocks of 64 KiB to send, five times (16384)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()

    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port_reader, port_writer = os.pipe()
    server = os.fork()  # before there are threads
    if server == 0:
        os.write(port_writer, str(Server().port).encode())
        threading.Event().wait()
    port = int(os.read(port_reader, 16))
    stop_reader, stop_writer = os.pipe()
    front = os.fork()
    if front == 0:
        os.close(stop_writer)
        ours.close()
        sys.stdin = os.fdopen(stop_reader)
        asyncio.run(broker(options, port, theirs))
        os._exit(0)
    theirs.close()
    ways = in_child(lambda: measure(ours.detach(), port, options))
    os.close(stop_writer)
    os.waitpid(front, 0)
    os.kill(server, 9)
    os.waitpid(server, 0)

    median = {name: {what: statistics.median(values) for what, values in way.items()} for name, way in ways.items()}
    result = {
        "machine": machine(),
        "dial ms": {name: summary(way["dials"]) for name, way in ways.items()},
        "round trip us": {name: summary(way["round trips"]) for name, way in ways.items()},
        "throughput MiB/s": {name: [round(value) for value in way["throughput"]] for name, way in ways.items()},
        "broker to plain": {
            what: round(median["through the broker"][what] / median["plain"][what], 2) for what in median["plain"]
        },
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
