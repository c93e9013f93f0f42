"""Names to addresses, within a time limit, and so that one org's hanging names keep no other org waiting."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures.thread import ThreadPoolExecutor
from typing import Any, Final

__all__ = ["RESOLVING_PER_ORG", "Resolver", "Share"]

RESOLVE_TIMEOUT: Final = 5.0
RESOLVING_PER_ORG: Final = 4
# A name that hangs in the C library keeps its thread for longer than anyone waits. So each org may have one that nobody
# can take from it, as long as no more orgs than that have such names; for its further ones all orgs share the rest.
_ORGS: Final = 192
_SHARED: Final = 64
_MOST: Final = 16  # addresses of one name that are looked at


class Share:
    """What one org may have resolved at once."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(RESOLVING_PER_ORG)
        self.running = 0


class Resolver:
    """Asks the system's resolver on threads, or the DNS server ``address:port``.

    Raises ``ValueError`` if ``nameserver`` is not of that form.
    """

    def __init__(self, nameserver: str = "") -> None:
        self._server = _server(nameserver) if nameserver else None
        self._pool = ThreadPoolExecutor(_ORGS + _SHARED, "resolve")
        self._shared = asyncio.Semaphore(_SHARED)

    async def addresses(self, name: str, share: Share) -> list[bytes]:
        """The packed addresses of ``name``; ``share`` is the org's. Raises ``gaierror``; ``TimeoutError``."""
        async with asyncio.timeout(RESOLVE_TIMEOUT):
            if self._server is not None:
                async with share.slots:
                    return (await self._server(name))[:_MOST]
            infos = await asyncio.shield(await self._look_up(name, share))
        # An address with a zone is judged without it, as the link-local one that it is.
        return [socket.inet_pton(info[0], str(info[4][0]).partition("%")[0]) for info in infos][:_MOST]

    async def _look_up(self, name: str, share: Share) -> "asyncio.Future[list[Any]]":
        """Have a thread ask, once there is one. It is taken until that has its answer, whoever still waits for it."""
        with contextlib.ExitStack() as held:
            await share.slots.acquire()
            held.callback(share.slots.release)
            if share.running:
                await self._shared.acquire()
                held.callback(self._shared.release)
            share.running += 1
            look_up = functools.partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
            work = asyncio.get_running_loop().run_in_executor(self._pool, look_up)
            taken = held.pop_all()

        def release(_: Any) -> None:
            taken.close()
            share.running -= 1
            if not work.cancelled():
                work.exception()

        work.add_done_callback(release)
        return work


def _server(nameserver: str) -> Callable[[str], Awaitable[list[bytes]]]:
    import dns.asyncresolver
    import dns.exception
    import dns.rdtypes.ANY.CNAME
    import dns.rdtypes.ANY.OPT
    import dns.rdtypes.ANY.SOA
    import dns.rdtypes.IN.A
    import dns.rdtypes.IN.AAAA  # all here: after the uid is dropped there may be nothing to import from
    import dns.resolver

    host, _, port = nameserver.rpartition(":")
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [host.strip("[]")]
    resolver.port = int(port)
    resolver.lifetime = RESOLVE_TIMEOUT - 1  # so that one kind of record counts when the other is never answered

    async def ask(name: str, kind: str, family: socket.AddressFamily) -> list[bytes]:
        answer = await resolver.resolve(f"{name}.", kind, raise_on_no_answer=False, search=False)
        return [socket.inet_pton(family, record.address) for record in answer.rrset or ()]

    async def look_up(name: str) -> list[bytes]:
        answers = await asyncio.gather(
            ask(name, "AAAA", socket.AF_INET6), ask(name, "A", socket.AF_INET), return_exceptions=True
        )
        found = [packed for answer in answers if isinstance(answer, list) for packed in answer]
        if found:
            return found
        for error in answers:
            if isinstance(error, dns.resolver.NXDOMAIN):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            if isinstance(error, dns.exception.DNSException | OSError):
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            if isinstance(error, BaseException):
                raise error
        raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")

    return look_up
