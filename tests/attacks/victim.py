"""The process that attacks aim at: it listens in every way, has a secret everywhere, and tells what was done to it.

Run as a program with a folder and a secret. Says where it is to be found in one line of JSON, and then, for every line
that it reads, what has happened so far in another.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGIO, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGURG)


def main(folder: Path, secret: str) -> None:
    """Be the victim until the standard input ends."""
    memory = ctypes.create_string_buffer(secret.encode())
    cell = ctypes.create_string_buffer(b"untouched")
    secret_file = folder / "secret-of-the-victim"
    secret_file.write_text(secret)
    descriptor = os.open(secret_file, os.O_RDWR | os.O_APPEND)
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for number in SIGNALS:
        signal.signal(number, lambda *_: count("signal"))
    abstract = f"hayattack-victim-{os.getpid()}"
    listeners: dict[str, tuple[int, int, Any]] = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "stream")),
        "unix_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "datagram")),
        "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
        "abstract_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{abstract}-datagram"),
    }
    selector = selectors.DefaultSelector()
    places: dict[str, Any] = {}
    for name, (family, kind, address) in listeners.items():
        sock = socket.socket(family, kind)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, name)
        at = sock.getsockname()
        places[name] = at[1] if isinstance(at, tuple) else at.decode()[1:] if isinstance(at, bytes) else at
    for name in ("unix", "unix_datagram"):
        os.chmod(places[name], 0o777)
    selector.register(sys.stdin, selectors.EVENT_READ, "")
    places |= {
        "pid": os.getpid(),
        "address": ctypes.addressof(memory),
        "length": len(secret),
        "cell": ctypes.addressof(cell),
        "fd": descriptor,
    }
    print(json.dumps(places), flush=True)
    while True:
        asked = False
        for key, _ in selector.select():
            if not key.data:
                asked = True
                continue
            sock = key.fileobj  # type: ignore[assignment]
            count(key.data)
            if sock.type == socket.SOCK_STREAM:
                sock.accept()[0].close()
            else:
                sock.recv(1 << 16)
        if asked and selector.select(0) == [(selector.get_key(sys.stdin), selectors.EVENT_READ)]:
            if not sys.stdin.readline():
                return
            told = {**counts, "cell": cell.value.decode(errors="replace"), "file": secret_file.read_text()}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
