"""uvicorn workers of orgs, started when they are first asked for."""

import asyncio
import socket
import sys

__all__ = ["Workers", "listen"]


def listen() -> socket.socket:
    """A listening socket. Its protocol is named, or asyncio leaves Nagle's algorithm on in what it accepts."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    return sock


class Workers:
    """Ports of the workers by org."""

    def __init__(self) -> None:
        self._ports: dict[str, asyncio.Task[int]] = {}
        self._processes: list[asyncio.subprocess.Process] = []

    async def port(self, org: str) -> int:
        """The port of an org's worker; concurrent first requests share its start."""
        if org not in self._ports:
            self._ports[org] = asyncio.create_task(self._start(org))
        return await self._ports[org]

    async def _start(self, org: str) -> int:
        command = [sys.executable, "-m", "benchmarks.peer_servers.uvicorn_worker", org]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout
        return int(await process.stdout.readline())  # it listens by then: no polling

    def end(self) -> None:
        """End them all."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
