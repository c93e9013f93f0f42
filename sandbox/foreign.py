"""Libraries that open sockets in C, past Python's: uvloop is adapted when it is imported, others are refused."""

import asyncio
import functools
import importlib.abc
import importlib.machinery
import socket
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

__all__ = ["install"]

# Raised as an ImportError, since libraries that can do without them then do.
_IMPOSSIBLE: Final = {
    "aiodns": "it resolves names by itself; aiohttp does without it",
    "pycares": "it resolves names by itself",
    "pycurl": "it opens its own sockets; use httpx, requests or aiohttp",
}


def install() -> None:
    """Adapt what is imported already, and what is imported later."""
    if "uvloop" in sys.modules:
        _adapt_uvloop(sys.modules["uvloop"])
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in _IMPOSSIBLE:
            raise ImportError(f"{name} does not work in a plugin: {_IMPOSSIBLE[name]}", name=name)
        if name != "uvloop":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run = spec.loader.exec_module
                setattr(spec.loader, "exec_module", functools.partial(_run_uvloop, run))  # noqa: B010
                return spec
        return None


def _run_uvloop(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    run(module)
    _adapt_uvloop(module)


def _adapt_uvloop(module: ModuleType) -> None:
    loop: Any = module.Loop
    create_connection = loop.create_connection

    async def connect(
        self: Any,
        protocol_factory: Any,
        host: Any = None,
        port: Any = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        sock: Any = None,
        local_addr: Any = None,
        server_hostname: str | None = None,
        ssl: Any = None,
        **options: Any,
    ) -> Any:
        if sock is None and (host is not None or port is not None):
            infos = await self.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags)
            sock = await _first(self, infos)
            if ssl and server_hostname is None:
                server_hostname = host
        try:
            return await create_connection(
                self, protocol_factory, sock=sock, ssl=ssl, server_hostname=server_hostname, **options
            )
        except BaseException:
            if sock is not None:
                sock.close()
            raise

    async def getaddrinfo(
        self: Any, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        return await self.run_in_executor(None, socket.getaddrinfo, host, port, family, type, proto, flags)

    async def getnameinfo(self: Any, address: Any, flags: int = 0) -> Any:
        return await self.run_in_executor(None, socket.getnameinfo, address, flags)

    for name, method in {
        "create_connection": connect,
        "getaddrinfo": getaddrinfo,
        "getnameinfo": getnameinfo,
        "sock_connect": _sock_connect,
    }.items():
        setattr(loop, name, method)


async def _first(loop: Any, infos: Any) -> socket.socket:
    failed: OSError | None = None
    for family, kind, proto, _, address in infos:
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failed = failed or error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed or OSError("getaddrinfo() returned empty list")


async def _sock_connect(loop: Any, sock: Any, address: Any) -> None:
    try:
        sock.connect(address)
    except BlockingIOError:
        pass
    else:
        return
    writable: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(sock, ready)
    try:
        await writable
    finally:
        # Before the descriptor is exchanged: libuv does not notice that it has another one.
        loop.remove_writer(sock)
    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(number, f"Connect call failed {address}")
