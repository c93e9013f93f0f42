"""Requests to MCP servers: within limits, past breakers, and never twice unless a tool says that twice is as once."""

import asyncio
import math
from typing import Any, Final, Protocol

from hayhost.errors import RequestError, WorkerLostError
from hayhost.pool import Pool

from .calls import Call, ServerError
from .listings import Served, Shelf

__all__ = ["NOT_AVAILABLE", "TIMED_OUT", "Client", "Requests", "refusal"]

NOT_AVAILABLE: Final = -32000
TIMED_OUT: Final = -32001

_WAITING: Final = 4
"""Requests of an org that may wait, per one that may be under way."""
_QUESTIONS: Final = 16  # of a server to its client, at once


def refusal(error: RequestError) -> ServerError:
    """What a client is told of a request that the host refuses for now."""
    retry = error.headers.get("Retry-After")
    return ServerError(NOT_AVAILABLE, error.message, {"retryAfter": int(retry)} if retry else None)


class Client(Protocol):
    """Who made a request, as far as the server may talk to it before it answers."""

    wants_progress: bool

    async def progress(self, params: dict[str, Any]) -> None:
        """Pass a progress notification on."""

    async def log(self, params: dict[str, Any]) -> None:
        """Pass a log message on."""

    async def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The client's answer to a request of the server's. Raises ``ServerError``."""
        ...


class _Gate:
    """Lets so many through at once, in the order in which they came."""

    def __init__(self, places: int) -> None:
        self.semaphore = asyncio.Semaphore(places)
        self.waiting = 0


class Requests:
    """Puts requests to servers. ``most`` is how many of one org are under way at once."""

    def __init__(self, pool: Pool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._gates: dict[str, _Gate] = {}

    async def put(
        self,
        shelf: Shelf,
        served: Served,
        method: str,
        params: dict[str, Any],
        client: Client,
        *,
        timeout: float,
        id: str,
        idempotent: bool = False,
    ) -> dict[str, Any]:
        """The result of a request to a server, whose worker is started if it has none.

        Raises ``ServerError``: the server's, or one of the host's with code ``TIMED_OUT`` or ``NOT_AVAILABLE``.
        """
        loop, breaker = self._pool.loop, shelf.breaker(served.id)
        if (wait := breaker.refuses_for(loop.time())) > 0:
            raise ServerError(
                NOT_AVAILABLE,
                f"The MCP server {served.id} is given a rest: {breaker.reason}",
                {"retryAfter": math.ceil(wait)},
            )
        request = {"server": served.id, "method": method, "params": params, "timeout": timeout}
        if client.wants_progress:
            request["progressToken"] = 1
        reached = False
        try:
            async with asyncio.timeout(timeout) as limit, _Place(self, shelf.org_id):
                for attempt in (1, 2):
                    call = Call(request, id)
                    try:
                        call.submit(self._pool.slot(shelf.plugin, shelf.org_id))
                        result = await self._listen(call, served, client)
                        breaker.succeeded()
                        return result
                    except WorkerLostError:
                        if attempt == 2 or not idempotent:
                            raise
                    finally:
                        reached = reached or call.worker is not None
                        call.close()
        except TimeoutError:
            if not limit.expired():
                raise
            if reached:
                breaker.failed(loop.time(), f"it did not answer within {timeout:g} s")
            raise ServerError(TIMED_OUT, f"There was no answer within {timeout:g} s") from None
        except RequestError as error:
            if isinstance(error, WorkerLostError):
                breaker.failed(loop.time(), error.message)
            raise refusal(error) from None
        except ServerError as error:
            if error.code in (NOT_AVAILABLE, TIMED_OUT) and reached:
                breaker.failed(loop.time(), str(error)[:200])
            elif reached:
                breaker.succeeded()
            raise
        raise AssertionError  # unreachable: the last attempt returns or raises

    async def _listen(self, call: Call, served: Served, client: Client) -> dict[str, Any]:
        questions: set[asyncio.Task[None]] = set()
        try:
            async for message in call:
                params = message.get("params")
                params = params if isinstance(params, dict) else {}
                if "id" in message:
                    question = self._answer(call, served, client, message, params, busy=len(questions) >= _QUESTIONS)
                    task = asyncio.create_task(question)
                    questions.add(task)
                    task.add_done_callback(questions.discard)
                elif message["method"] == "notifications/progress":
                    await client.progress(params)
                elif message["method"] == "notifications/message":
                    await client.log(params)
        finally:
            for task in questions:
                task.cancel()
        assert call.result is not None
        return call.result

    async def _answer(
        self, call: Call, served: Served, client: Client, message: dict[str, Any], params: dict[str, Any], *, busy: bool
    ) -> None:
        """Have the client answer a request of the server's."""
        answer: dict[str, Any]
        try:
            if busy:
                raise ServerError(NOT_AVAILABLE, "Too many requests wait for the client")
            answer = {"result": await client.ask(message["method"], params)}
        except ServerError as error:
            answer = {"error": {"code": error.code, "message": str(error)}}
        if call.worker is None or call.worker.exit.done():
            return
        reply = Call({"server": served.id, "reply": message["id"], **answer}, "")
        try:
            reply.begin(call.worker)
            async for _ in reply:
                pass
        except (ServerError, RequestError):
            pass  # it waits no more
        finally:
            reply.close()


class _Place:
    """A place among the requests of an org that may be under way at once."""

    def __init__(self, requests: Requests, org_id: str) -> None:
        self._gates = requests._gates
        self._most = requests._most
        self._org_id = org_id

    async def __aenter__(self) -> None:
        gate = self._gates.setdefault(self._org_id, _Gate(self._most))
        if gate.waiting >= self._most * (1 + _WAITING):
            raise ServerError(NOT_AVAILABLE, "Too many requests of this organisation are under way", {"retryAfter": 1})
        gate.waiting += 1
        try:
            await gate.semaphore.acquire()
        except BaseException:
            self._leave(gate)
            raise

    async def __aexit__(self, *_: object) -> None:
        gate = self._gates[self._org_id]
        gate.semaphore.release()
        self._leave(gate)

    def _leave(self, gate: _Gate) -> None:
        gate.waiting -= 1
        if not gate.waiting:
            self._gates.pop(self._org_id, None)
