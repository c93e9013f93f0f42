"""``hayhost token``, ``keys`` and ``audit``."""

import contextlib
import datetime as dt
import re
import sys
from typing import Final

import click
import msgspec

from hayhost.api.records import audit_view, token_view
from hayhost.api.views import TokenMade
from hayhost.errors import HostError
from hayhost.settings import Settings
from hayhost.store import AuditEntry, Token

from .opening import actor, opened
from .orgs import everything
from .output import print_json, print_table, shown_time, tell

__all__ = ["create_token", "list_keys", "list_tokens", "read_audit", "revoke_token", "rotate_keys"]

_PAGE: Final = 1_000
_AGE: Final = re.compile(r"(\d{1,6})([mhdw])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def expiry(text: str, now: dt.datetime) -> dt.datetime:
    """When ``90d`` or ``2027-01-31`` is, in UTC unless it says otherwise. Raises ``HostError``."""
    try:
        if found := _AGE.fullmatch(text):
            at = now + dt.timedelta(**{_UNITS[found[2]]: int(found[1])})
        else:
            at = dt.datetime.fromisoformat(text)
            at = at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)
        at = at.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise HostError(f"--expires: {text!r} is neither an age such as 90d, 12h or 2w nor a date") from None
    if at <= now:
        raise HostError(f"--expires: {text} has passed already")
    return at


async def create_token(settings: Settings, name: str, org: str | None, expires: str | None, as_json: bool) -> None:
    """Make a token; its secret is all that goes to standard output."""
    until = None if expires is None else expiry(expires, dt.datetime.now(dt.UTC))
    async with opened(settings, make=True) as store:
        is_first = not await store.tokens.exist()
        token, secret = await store.tokens.create(name, actor=actor(), org=org, expires=until)
    if is_first:
        tell("this is the first token: from now on, whoever manages a host of this store needs one")
    whose = "an admin's" if org is None else f"good for {org} only"
    tell(f"token {token.id} is {whose}{f', until {shown_time(until)}' if until else ''}; it is not shown again")
    if as_json:
        print_json(TokenMade(token=token_view(token), secret=secret))
    else:
        click.echo(secret)


async def list_tokens(settings: Settings, org: str | None, as_json: bool) -> None:
    """All tokens, or those of an org, without their secrets."""
    async with opened(settings) as store:
        found = [each async for each in everything(lambda after, most: store.tokens.list(after, most, org=org))]
    if as_json:
        print_json([token_view(token) for token in found])
    else:
        headings = ("TOKEN", "NAME", "ORG", "STATUS", "CREATED", "LAST USED", "EXPIRES")
        print_table(headings, map(_token_row, found))


def _token_row(token: Token) -> tuple[str, ...]:
    good = token.is_good(dt.datetime.now(dt.UTC))
    return (
        token.id,
        token.name,
        token.org_id or "-",
        "good" if good else "expired" if token.revoked is None else "revoked",
        *map(shown_time, (token.created, token.last_used, token.expires)),
    )


async def revoke_token(settings: Settings, token: str) -> None:
    """Have a token good for nothing."""
    async with opened(settings) as store:
        await store.tokens.revoke(token, actor=actor())
    click.echo(f"{token} was revoked")


async def list_keys(settings: Settings, as_json: bool) -> None:
    """The given keys, and what they are used for."""
    async with opened(settings) as store:
        keys = await store.keys()
    if as_json:
        print_json(keys)
        return
    uses = ("encrypts" if key.encrypts else "decrypts" if key.since is not None else "not needed" for key in keys)
    rows = ((key.id, use, str(key.rows), shown_time(key.since)) for key, use in zip(keys, uses, strict=True))
    print_table(("KEY", "USE", "ENCRYPTED ROWS", "IN USE SINCE"), rows)


async def rotate_keys(settings: Settings, as_json: bool) -> None:
    """Encrypt everything with the first key."""
    async with opened(settings) as store:
        first, *others = await store.keys()
        due = sum(key.rows for key in others)
        with contextlib.ExitStack() as stack:
            bar = None
            if due and sys.stderr.isatty():
                bar = stack.enter_context(click.progressbar(length=due, label="encrypting", file=sys.stderr))
            rewritten = await store.rotate(actor=actor(), progress=bar.update if bar is not None else lambda rows: None)
    if as_json:
        print_json({"key": first.id, "rewritten": rewritten, "retired": [key.id for key in others]})
        return
    click.echo(f"everything is encrypted with the key {first.id} ({rewritten} rows rewritten)")
    if others:
        tell(f"not needed any more, once no backup is either: {', '.join(key.id for key in others)}")
    elif not rewritten:
        tell("there is one key only; to exchange it, give a new one (`hayhost keys new`) before it")


async def read_audit(
    settings: Settings,
    org: str | None,
    plugin: str | None,
    actor: str | None,
    action: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """What was done, the latest first."""
    found: list[AuditEntry] = []
    before: str | None = None
    async with opened(settings) as store:
        while len(found) < limit:
            most = min(_PAGE, limit - len(found))
            page = await store.audit.list(before, most, org=org, plugin=plugin, actor=actor, action=action)
            found += page.items
            if (before := page.next) is None:
                break
    if as_json:
        print_json([audit_view(entry) for entry in found])
    else:
        print_table(("WHEN", "WHO", "WHAT", "ORG", "PLUGIN", "OUTCOME", "DETAILS"), map(_audit_row, found))


def _audit_row(entry: AuditEntry) -> tuple[str, ...]:
    details = msgspec.json.encode(entry.details).decode() if entry.details else "-"
    where = entry.org_id or "-", entry.plugin or "-"
    return shown_time(entry.at), entry.actor, entry.action, *where, entry.outcome, details
