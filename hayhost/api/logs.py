"""The log: its last records, and new ones as they are made."""

import datetime as dt
import re
import time
from collections.abc import AsyncGenerator
from typing import Final

import msgspec
from msgspec import UNSET

from hayhost.access import Access
from hayhost.answers import Answer, Principal
from hayhost.errors import RequestError, StoreError
from hayhost.logs import LEVELS, Listener, Log, Record, Wanted, item

from .operations import Operation, Request
from .views import SINCE, LogPage, LogQuery, LogStreamQuery, LogView

__all__ = ["Logs", "moment"]

_AGE: Final = re.compile(r"(\d{1,9})(ms|s|m|h|d|w)")
_UNITS: Final = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# Whoever was away reads on in pieces of this many records.
_PAGE: Final = 500
# Something is sent this often, in seconds, so that proxies and clients know that the connection lives.
_QUIET: Final = 15.0
# A token is looked at again before records are sent, but not for each of them.
_CHECKED: Final = 1.0


def moment(text: str, now: float) -> int:
    """Microseconds since the epoch at which ``5m`` (ago) or ``2027-01-31T12:00:00Z`` is. Raises ``ValueError``."""
    if not re.fullmatch(SINCE, text):
        raise ValueError(f"{text!r} is neither an age such as 5m nor a time such as 2027-01-31T12:00:00Z")
    if found := _AGE.fullmatch(text):
        return max(0, int((now - int(found[1]) * _UNITS[found[2]]) * 1e6))
    # The 31st of a month that has 30 days is the 1st of the next.
    at = dt.datetime.fromisoformat(f"{text[:8]}01{text[10:]}")
    at = at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)
    return max(0, int((at.timestamp() + (int(text[8:10]) - 1) * 86400) * 1e6))


class Logs:
    """Answers for the log. An org's token sees what is of that org."""

    def __init__(self, log: Log, access: Access) -> None:
        self._log = log
        self._access = access

    def operations(self) -> list[Operation]:
        """What it answers."""
        return [
            Operation("listLogs", "GET", "/logs", "Read the log", "any", self._read, {200: LogPage}, LogQuery),
            Operation(
                "streamLogs",
                "GET",
                "/logs/stream",
                "Listen to the log",
                "any",
                self._stream,
                {200: bytes},
                LogStreamQuery,
                media="text/event-stream",
            ),
        ]

    async def _read(self, request: Request) -> Answer:
        query: LogQuery = request.query
        after = None if query.after is None else int(query.after)
        principal = request.call.principal
        records, more = await self._log.read(_wanted(query, principal), query.limit, after)
        following = str(records[-1].id) if more else None
        return Answer(200, LogPage(items=[_view(record, principal) for record in records], next=following))

    async def _stream(self, request: Request) -> Answer:
        query: LogStreamQuery = request.query
        wanted = _wanted(query, request.call.principal)
        last = request.call.headers.get("Last-Event-ID", "")
        after = int(last) if re.fullmatch(r"[0-9]{1,18}", last) else None if query.after is None else int(query.after)
        if after is None and query.since is not None:
            after = 0
        return Answer(200, self._send(request, wanted, after, query.limit), {"Content-Type": "text/event-stream"})

    async def _send(
        self, request: Request, wanted: Wanted, after: int | None, limit: int | None
    ) -> AsyncGenerator[bytes, None]:
        """What there is ``after`` a record, the latest ``limit`` of it, and then what comes."""
        principal = request.call.principal
        with self._log.listening(wanted) as listener:
            yield b": hello\n\n"
            if after is None and limit is not None:
                after = 0
            while after is not None:
                records, more = await self._log.read(wanted, limit or _PAGE, None if limit else after)
                records = [record for record in records if record.id > after]
                if records:
                    yield b"".join(_event(record, principal) for record in records)
                    after = records[-1].id
                if not more:
                    break
            async for news in self._news(request, listener, after or 0):
                yield news

    async def _news(self, request: Request, listener: Listener, after: int) -> AsyncGenerator[bytes, None]:
        """What ``listener`` gets that is not sent yet, until the token is not good any more."""
        principal = request.call.principal
        checked = time.monotonic()
        while True:
            records, lost = await listener.next(_QUIET)
            if listener.closed:
                return
            if (now := time.monotonic()) - checked > _CHECKED:
                checked = now
                try:
                    if await self._access.principal(request.call.headers) != principal:
                        return
                except (RequestError, StoreError):
                    return
            told = [_event(record, principal) for record in records if record.id > after]
            if lost:
                told.append(f'event: lost\ndata: {{"dropped":{lost}}}\n\n'.encode())
            yield b"".join(told) or b": still here\n\n"


def _wanted(query: LogQuery | LogStreamQuery, principal: Principal) -> Wanted:
    """What ``query`` asks for, of what ``principal`` may see. Raises ``RequestError``."""
    if query.org is not None and not principal.may(query.org):
        raise RequestError("The token is good for another organisation only", status=403)
    since = 0 if query.since is None else moment(query.since, time.time())
    org = query.org if principal.org_id is None else principal.org_id
    return Wanted(query.plugin, org, query.worker, LEVELS[query.level], since, query.request, query.q or "")


def _view(record: Record, principal: Principal) -> LogView:
    view = msgspec.convert(item(record), LogView, strict=False)
    if principal.org_id is not None and view.source == "host":  # orgs do not learn of the machine
        return msgspec.structs.replace(view, traceback=UNSET)
    return view


def _event(record: Record, principal: Principal) -> bytes:
    return b"id: %d\nevent: log\ndata: %s\n\n" % (record.id, msgspec.json.encode(_view(record, principal)))
