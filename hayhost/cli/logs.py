"""``hayhost logs``: the log of a running host, or of its file."""

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from hayhost.api.logs import moment
from hayhost.errors import HostError
from hayhost.logs import LEVELS, Wanted, console, item
from hayhost.logs.file import find
from hayhost.logs.lines import as_json

from .asking import Asking, NoHostError
from .output import colours, tell

__all__ = ["Asked", "logs"]

_TIMEOUT: Final = 30.0
# The host says something more often than this, also when there is nothing to tell.
_SILENCE: Final = 45.0
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 5.0
_PAGE: Final = 1_000

Item = Mapping[str, Any]


class Asked(msgspec.Struct, frozen=True):
    """Which lines somebody wants to see."""

    plugin: str | None
    org: str | None
    level: str
    since: str | None
    text: str | None
    request: str | None
    count: int


def logs(asked: Asked, url: str, token_file: Path | None, file: Path | None, *, follow: bool, programs: bool) -> None:
    """Print the last lines that are ``asked`` for, and with ``follow`` those that come; as JSON for ``programs``.

    Raises ``HostError``.
    """
    show = as_json if programs else _for_people()
    try:
        since = 0 if asked.since is None else moment(asked.since, time.time())
    except ValueError as error:
        raise HostError(f"--since: {error}") from None
    if file is not None:
        if follow:
            raise HostError("--follow asks a running host; it cannot be given with --file")
        _print(_in_file(asked, since, file), show)
        return
    asking = Asking(url, token_file)
    last = _print(_pages(asking, asked), show)
    if follow:
        _follow(asking, asked, last, show)


def _print(items: Iterable[Item], show: Any) -> int:
    """Print them; the id of the last."""
    last = 0
    for one in items:
        click.echo(show(one))
        last = one["id"]
    return last


def _in_file(asked: Asked, since: int, file: Path) -> list[Item]:
    try:
        wanted = Wanted(asked.plugin, asked.org, None, LEVELS[asked.level], since, asked.request, asked.text or "")
        return [item(record) for record in find(file, wanted, asked.count)]
    except OSError as error:
        raise HostError(f"{file}: cannot be read: {error.strerror}") from None


def _query(asked: Asked, **more: Any) -> str:
    given = {"plugin": asked.plugin, "org": asked.org, "level": asked.level, "since": asked.since}
    given |= {"q": asked.text, "request": asked.request, **more}
    return urllib.parse.urlencode({name: value for name, value in given.items() if value is not None})


def _pages(asking: Asking, asked: Asked) -> Iterator[Item]:
    if asked.count == 0:
        return
    page = asking.json("GET", f"/api/v1/logs?{_query(asked, limit=asked.count)}", timeout=_TIMEOUT)
    try:
        yield from page["items"]
    except (TypeError, KeyError):
        raise NoHostError("somebody else than a host answers there") from None


def _follow(asking: Asking, asked: Asked, last: int, show: Any) -> None:
    """Print what comes, for ever; when the host is gone, wait for it."""
    pause, away = _FIRST_PAUSE, False
    while True:
        headers = {"Last-Event-ID": str(last)} if last else {}
        try:
            with asking.open(
                "GET", f"/api/v1/logs/stream?{_query(asked)}", timeout=_SILENCE, headers=headers
            ) as stream:
                if away:
                    tell("the host is there again")
                pause, away = _FIRST_PAUSE, False
                for kind, data in _events(stream):
                    if kind == "lost":
                        tell(f"{data['dropped']} lines are left out: they came faster than they could be sent")
                    else:
                        last = data["id"]
                        click.echo(show(data))
        except NoHostError as error:
            if not away:
                tell(f"{error}; waiting for it")
            away = True
        except (OSError, ValueError, http.client.HTTPException):
            pass  # it is tried again
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _events(stream: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in stream:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def _for_people() -> Any:
    render = console(colours())

    def show(one: Item) -> str:
        flat = {key: value for key, value in one.items() if key not in ("meta", "source", "version")}
        if one.get("source") == "plugin":
            return render({**flat, **({"meta": one["meta"]} if "meta" in one else {})})
        return render({**one.get("meta", {}), **flat})

    return show
