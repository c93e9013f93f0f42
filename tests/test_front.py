"""Connections that only wait."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from hayhost import front
from hayhost.answers import NotYetError
from hayhost.host import Host
from hayhost.installs import TestInstalls
from hayhost.settings import Settings

from .conftest import LIMIT

IDLE = 0.5
Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


async def with_connection(client: Client, **settings: Any) -> None:
    async with asyncio.timeout(LIMIT), Host(Settings(port=0, mode="test", **settings), TestInstalls()) as host:
        port = host.listen(host.site())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await client(reader, writer)
        writer.close()
        await writer.wait_closed()
        assert host.front is not None
        for _ in range(200):  # and what it was known by is forgotten
            if not host.front._idle:
                break
            await asyncio.sleep(0.01)
        assert not host.front._idle


async def answered(reader: asyncio.StreamReader) -> bool:
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readuntil(b"}")
    return head.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", HEALTH])
def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(front, "_IDLE_CONNECTION", IDLE)

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        begun = asyncio.get_running_loop().time()
        data = await reader.read()  # to its end
        assert data.startswith(b"HTTP/1.1 200 ") is (sent is HEALTH)
        assert asyncio.get_running_loop().time() - begun >= IDLE / 2  # the host has counted since it accepted

    asyncio.run(with_connection(wait))


def test_a_connection_with_a_request_under_way_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_IDLE_CONNECTION", IDLE)

    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 20\r\n\r\n")
        for _ in range(20):  # longer than an idle connection may last
            await asyncio.sleep(IDLE / 8)
            writer.write(b"x")
        assert await answered(reader)
        writer.write(HEALTH)
        assert await answered(reader)

    asyncio.run(with_connection(dawdle))


def test_a_client_is_not_blamed_for_what_the_host_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request needs is fetched one after the other, and each may take as long as a request's limit."""
    route, missing = front.Front.route, 4

    def route_later(self: front.Front, *arguments: Any) -> None:
        nonlocal missing
        missing -= 1
        if missing >= 0:
            raise NotYetError(lambda: asyncio.sleep(0.5), "it is not there")
        route(self, *arguments)

    monkeypatch.setattr(front.Front, "route", route_later)

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEALTH)
        assert await answered(reader)

    asyncio.run(with_connection(ask, request_timeout=1.0))
