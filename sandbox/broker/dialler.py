"""Connecting: one name to the first of its addresses that may be connected to and answers."""

import asyncio
import errno
import os
import socket
from collections import deque
from typing import Final

from .addresses import Policy
from .names import literal
from .resolver import Resolver, Share

__all__ = ["DIAL_TIMEOUT", "DialError", "Dialler"]

DIAL_TIMEOUT: Final = 15.0
_ATTEMPT_TIMEOUT: Final = 8.0
_STAGGER: Final = 0.25  # after which the next address is tried beside the one that has not answered (RFC 8305)


class DialError(Exception):
    """No connection. ``number`` is an errno, or below 0 an error of getaddrinfo; ``policy`` says it was refused."""

    def __init__(self, number: int, text: str, *, policy: bool = False) -> None:
        super().__init__(text)
        self.number = number
        self.text = text
        self.policy = policy


class Dialler:
    """Resolves once, judges every address, and dials addresses, never names: what was judged is what is dialled."""

    def __init__(self, resolver: Resolver, policy: Policy) -> None:
        self._resolver = resolver
        self._policy = policy

    async def dial(self, host: str, port: int, share: Share) -> tuple[socket.socket, str]:
        """A connected socket and the address it is connected to. Raises ``DialError``."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                addresses = await self.addresses(host, share)
                return await self._first(addresses, host, port)
        except TimeoutError:
            raise DialError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None

    async def addresses(self, host: str, share: Share) -> list[bytes]:
        """Those of its addresses that may be connected to, at least one. Raises ``DialError``."""
        if packed := literal(host):
            found = [packed]
        else:
            try:
                found = await self._resolver.addresses(host, share)
            except socket.gaierror as error:
                raise DialError(error.errno or socket.EAI_FAIL, f"{host}: {error.strerror}") from None
            except TimeoutError:
                raise DialError(socket.EAI_AGAIN, f"{host} was not resolved in time") from None
            except (OSError, UnicodeError):
                raise DialError(socket.EAI_FAIL, f"{host} cannot be resolved") from None
        judged = {packed: self._policy.refusal(packed) for packed in found}
        if addresses := [packed for packed, refused in judged.items() if not refused]:
            return addresses
        what = next((refused for refused in judged.values() if refused), "no address")
        raise DialError(errno.EPERM, f"{host} is {what}, which no plugin may connect to", policy=True)

    async def _first(self, addresses: list[bytes], host: str, port: int) -> tuple[socket.socket, str]:
        waiting = deque(addresses)
        attempts: set[asyncio.Task[socket.socket]] = set()
        connected: socket.socket | None = None
        failed: OSError | DialError | None = None
        try:
            while connected is None and (waiting or attempts):
                if waiting:
                    attempts.add(asyncio.create_task(self._attempt(waiting.popleft(), port)))
                pause = _STAGGER if waiting else None
                done, _ = await asyncio.wait(attempts, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        connected = task.result()
                        break
                    attempts.discard(task)
                    if not isinstance(error, OSError | DialError):
                        raise error
                    failed = failed or error
        finally:
            for task in attempts:
                task.cancel()
            for result in await asyncio.gather(*attempts, return_exceptions=True):
                if isinstance(result, socket.socket) and result is not connected:
                    result.close()
        if connected is not None:
            return connected, connected.getpeername()[0]
        if isinstance(failed, DialError):
            raise failed
        number = (failed and failed.errno) or errno.ETIMEDOUT
        raise DialError(number, os.strerror(number))

    async def _attempt(self, packed: bytes, port: int) -> socket.socket:
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(_ATTEMPT_TIMEOUT):
                await asyncio.get_running_loop().sock_connect(sock, (socket.inet_ntop(family, packed), port))
            # Only this machine is its own peer: the address may have become its own after it was judged.
            if sock.getsockname()[0] == sock.getpeername()[0] and not self._policy.allows(packed):
                raise DialError(errno.EPERM, "this host itself, which no plugin may connect to", policy=True)
        except BaseException:
            sock.close()
            raise
        return sock
