"""Requests in a worker: each stream ends with one final frame, whenever its client leaves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from hayhost.sdk import Request
from sandbox import wire
from sandbox.dispatch import Caller, Dispatcher


class FakeLink:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: wire.Message, *, now: bool = False) -> None:
        wire.encode(message)  # as it would have to be
        self.sent.append(message)

    @property
    def finals(self) -> list[Any]:
        return [message for message in self.sent if isinstance(message, wire.Abort) or getattr(message, "end", False)]


class Rig:
    """A dispatcher with one handler."""

    def __init__(self, handler: Callable[[Request], Any]) -> None:
        self.link = FakeLink()
        self.errors: list[str] = []
        loop = asyncio.get_running_loop()
        none = cast(Any, None)
        self.dispatcher = Dispatcher(
            cast(Any, self.link),
            loop,
            [handler],
            none,
            Caller(loop),
            none,
            lambda what, error: self.errors.append(f"{what}: {error!r}"),
        )

    def ask(self, id: int = 1, *, body: bytes = b"", end: bool = True) -> None:
        self.dispatcher.request(wire.Request(id, 0, "GET", "/", "", [], [], "", body, end))

    def leave(self, id: int = 1) -> None:
        self.dispatcher.cancel(wire.Cancel(id))

    async def end(self) -> Any:
        """Let the loop turn until there is a final frame, and a while longer; it must be the only one."""
        async with asyncio.timeout(10):
            while not self.link.finals:  # noqa: ASYNC110  # it is the turns of the loop that are waited for
                await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        (final,) = self.link.finals
        assert not self.dispatcher._exchanges
        return final


async def wait(_request: Request) -> None:
    await asyncio.sleep(3600)


async def answer(_request: Request) -> str:
    return "done"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("handler", [wait, answer])
def test_a_client_that_leaves_at_any_moment_is_one_end(handler: Callable[[Request], Any], turns: int) -> None:
    async def test() -> None:
        rig = Rig(handler)
        rig.ask()
        for _ in range(turns):
            await asyncio.sleep(0)
        rig.leave()
        rig.leave()
        final = await rig.end()
        assert isinstance(final, wire.Abort) or (handler is answer and final.status == 200)
        rig.leave()
        assert rig.link.finals == [final]
        assert rig.errors == []

    run(test)


@pytest.mark.parametrize("pieces", range(3))
def test_a_client_that_leaves_in_its_upload_is_one_end(pieces: int) -> None:
    async def test() -> None:
        rig = Rig(answer)
        rig.ask(end=False)
        for _ in range(pieces):
            rig.dispatcher.body(wire.Body(1, b"piece", False))
        rig.leave()
        rig.dispatcher.body(wire.Body(1, b"late", True))
        assert isinstance(await rig.end(), wire.Abort)

    run(test)


def test_what_comes_for_a_stream_that_is_over_is_ignored() -> None:
    async def test() -> None:
        rig = Rig(answer)
        rig.ask()
        final = await rig.end()
        rig.dispatcher.body(wire.Body(1, b"late", True))
        rig.dispatcher.window(wire.Window(1, 1))
        rig.leave()
        rig.leave(99)
        await asyncio.sleep(0)
        assert rig.link.sent == [final]

    run(test)


def test_a_handler_that_cancels_itself_has_failed() -> None:
    async def cancel(_request: Request) -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        await asyncio.sleep(0)

    async def test() -> None:
        rig = Rig(cancel)
        rig.ask()
        assert (await rig.end()).status == 500
        assert len(rig.errors) == 1

    run(test)


def test_a_handler_that_goes_on_keeps_its_stream_open() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def stubborn(_request: Request) -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    pass

        rig = Rig(stubborn)
        rig.ask()
        await asyncio.sleep(0)
        rig.leave()
        for _ in range(20):
            await asyncio.sleep(0)
        assert rig.link.finals == []
        release.set()
        await rig.end()

    run(test)


@pytest.mark.parametrize("item", [b"", b"x", "x"])
def test_a_stream_that_never_waits_leaves_the_loop_to_others(item: bytes | str) -> None:
    async def endless(_request: Request) -> AsyncIterator[bytes | str]:
        while True:
            yield item

    async def test() -> None:
        rig = Rig(endless)
        rig.ask()
        for _ in range(20):  # each of these would not come back
            await asyncio.sleep(0)
        rig.leave()
        assert isinstance(await rig.end(), wire.Abort)

    run(test)
