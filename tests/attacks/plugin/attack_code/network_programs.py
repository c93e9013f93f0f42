"""Network, from programs that a plugin starts and from beside them: where they have a proxy, they may connect to it."""

import base64
import ctypes
import json
import os
import socket
import subprocess
import urllib.parse

from .harness import Refused, Victims, attack, call, libc

_PROGRAM = """
import json, socket, sys
host, port, family, kind = json.loads(sys.argv[1])
try:
    sock = socket.socket(family, kind)
    sock.settimeout(5)
    sock.connect((host, port))
    sock.send(b"attacked")
except OSError as error:
    sys.exit(str(error))
print("sent")
"""
_LISTENER = """
import socket, sys
try:
    sock = socket.socket()
    sock.listen()
except OSError as error:
    sys.exit(str(error))
print(sock.getsockname())
"""


def _run(*arguments: str) -> str:
    done = subprocess.run(["python3", "-I", "-c", *arguments], capture_output=True, text=True, timeout=8)
    if done.returncode:
        raise Refused(done.stderr[-300:])
    return done.stdout


def _connect(host: str, port: int, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> str:
    return _run(_PROGRAM, json.dumps([host, port, family, kind]))


@attack("Has a program connect to a TCP port of the machine", harm="tcp", plugin="programs")
def program_tcp_connect(v: Victims) -> str:
    return _connect("127.0.0.1", v.tcp)


@attack("Has a program connect to it by an IPv6 address", harm="tcp", plugin="programs")
def program_tcp_connect_mapped(v: Victims) -> str:
    return _connect("::ffff:127.0.0.1", v.tcp, socket.AF_INET6)


@attack("Has a program send a datagram to a UDP port of the machine", harm="udp", plugin="programs")
def program_udp_send(v: Victims) -> str:
    return _connect("127.0.0.1", v.udp, kind=socket.SOCK_DGRAM)


@attack("Has a program listen on a TCP port", plugin="programs")
def program_tcp_listen(v: Victims) -> str:
    return _run(_LISTENER)


@attack("Connects to a TCP port of the machine from beside programs that may connect", harm="tcp", plugin="programs")
def connect_beside_broker(v: Victims) -> str:
    descriptor = call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
    try:
        address = socket.AF_INET.to_bytes(2, "little") + v.tcp.to_bytes(2, "big") + socket.inet_aton("127.0.0.1")
        if libc.connect(descriptor, address + bytes(8), 16) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return str(os.write(descriptor, b"attacked"))
    finally:
        os.close(descriptor)


@attack("Asks the proxy of its programs, if there is one, for a port of the machine", harm="tcp", plugin="programs")
def proxy_loopback(v: Victims) -> str:
    said = [_tunnel(host, v.tcp) for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1")]
    if "sent" not in said:
        raise Refused(", ".join(said))
    return "sent"


def _tunnel(host: str, port: int) -> str:
    libc.getenv.restype = ctypes.c_char_p  # os.environ does not have it
    proxy = urllib.parse.urlsplit((libc.getenv(b"HTTPS_PROXY") or b"").decode())
    to = (proxy.hostname, proxy.port) if proxy.hostname and proxy.port else ("127.0.0.1", port)
    login = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
    head = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    code = (
        "import socket, sys\nsock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n"
        "sock.sendall(sys.argv[3].encode())\nprint(sock.recv(200).decode('latin-1') if sys.argv[4] else '')\n"
        "sock.sendall(b'attacked')\n"
    )
    said = _run(code, *map(str, to), head, "x" if proxy.hostname else "")
    return said if proxy.hostname and " 200 " not in said else "sent"
