"""``hayhost org``."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from hayhost.api.orgs import installation_view, org_view
from hayhost.declared import apply, read_declared
from hayhost.errors import HostError
from hayhost.installs import ToolLists
from hayhost.management import remove_org
from hayhost.settings import Settings
from hayhost.store import Installed, Page

from .opening import actor, bad_line, hosting, opened
from .output import print_json, print_table, shown_time, tell, warn, warn_of_hooks

__all__ = ["add", "apply_file", "confirm", "everything", "list_orgs", "remove", "rename", "show", "tools"]

T = TypeVar("T")

_PAGE = 1_000


async def everything(page: Callable[[str, int], Awaitable[Page[T]]]) -> AsyncIterator[T]:
    """The items of all pages."""
    after: str | None = ""
    while after is not None:
        found = await page(after, _PAGE)
        for item in found.items:
            yield item
        after = found.next


def confirm(question: str) -> None:
    """Ask on a terminal. Raises ``HostError`` without one, and if the answer is no."""
    if not sys.stdin.isatty():
        raise HostError("this cannot be undone: give --yes")
    if not click.confirm(question, err=True):
        raise HostError("nothing was changed")


async def list_orgs(settings: Settings, as_json: bool) -> None:
    """All orgs, by id."""
    async with opened(settings) as store:
        found = [org async for org in everything(store.orgs.list)]
    if as_json:
        print_json([org_view(org) for org in found])
    else:
        print_table(("ORG", "NAME", "SINCE"), ((org.id, org.name, shown_time(org.created)) for org in found))


async def add(settings: Settings, org: str, name: str | None, as_json: bool) -> None:
    """Make an org."""
    async with opened(settings, make=True) as store:
        made = await store.orgs.create(org, name, actor=actor())
    print_json(org_view(made)) if as_json else click.echo(f"{made.id} was added")


async def rename(settings: Settings, org: str, name: str, as_json: bool) -> None:
    """Change what an org is called."""
    async with opened(settings) as store:
        renamed = await store.orgs.rename(org, name, actor=actor())
    print_json(org_view(renamed)) if as_json else click.echo(f"{org} is called {name}")


async def show(settings: Settings, org: str, as_json: bool) -> None:
    """An org, and what it has installed."""
    async with opened(settings) as store:
        found = await store.orgs.get(org)
        installed = [
            each async for each in everything(lambda after, most: store.installations.of_org(org, after, most))
        ]
    if as_json:
        views = [installation_view(each, (), each.state or "stopped", each.error) for each in installed]
        print_json({"org": org_view(found), "plugins": views})
        return
    tell(f"{found.id} ({found.name}), since {shown_time(found.created)}")
    headings = ("PLUGIN", "STATUS", "CREDENTIALS", "WORKER", "CHANGED", "LAST ERROR")
    print_table(headings, map(_row, installed))


async def tools(
    settings: Settings, org: str, allow: tuple[str, ...], deny: tuple[str, ...], clear: bool, as_json: bool
) -> None:
    """Which tools an org's MCP clients may use; changed first, if anything is given."""
    async with opened(settings) as store:
        before = await store.tools.get(org)
        base = ToolLists() if clear else before
        lists = ToolLists(allow or base.allow, deny or base.deny)
        if lists != before:
            await store.tools.put(org, lists, actor=actor(), if_lists=before)
    if as_json:
        print_json(lists)
        return
    rows = [(kind, entry) for kind, entries in (("allow", lists.allow), ("deny", lists.deny)) for entry in entries]
    if rows:
        print_table(("LIST", "TOOLS"), rows)
    else:
        tell("all tools may be used")


def _row(each: Installed) -> tuple[str, ...]:
    return (
        each.plugin,
        "enabled" if each.enabled else "disabled",
        each.auth_validity if each.auth_method is not None else "-",
        each.state or "stopped",
        shown_time(each.updated),
        each.error,
    )


async def remove(settings: Settings, org: str, plugins: Path | None, yes: bool) -> None:
    """Uninstall all that an org has, and remove it."""
    async with opened(settings) as store:
        await store.orgs.get(org)
        names = [
            each.plugin async for each in everything(lambda after, most: store.installations.of_org(org, after, most))
        ]
        if not yes:
            confirm(f"Remove {org} with its tokens and {', '.join(names) or 'no plugin'}?")
        if not names:
            await store.orgs.delete(org, actor=actor())
        else:
            async with hosting(settings, store, plugins, names) as (host, _bad):
                await host.load()
                for name in sorted({*names} - {*host.plugins}):
                    warn(f"{name} is not in the folder of plugins: it is uninstalled without its on_disable")
                failed = await remove_org(store, host.management, host.plugins, org, actor=actor())
            for name, hooks in failed.items():
                warn_of_hooks(name, hooks)
    click.echo(f"{org} was removed")


async def apply_file(settings: Settings, file: Path, plugins: Path | None, dry_run: bool, as_json: bool) -> None:
    """Have the store as a file declares it. Raises ``HostError`` if some of it cannot be."""
    declared = read_declared(file)
    for warning in declared.warnings:
        warn(warning)
    names = {name for org in declared.orgs.values() for name in org.plugins}
    async with opened(settings, make=not dry_run) as store, hosting(settings, store, plugins, names) as (host, bad):
        for entry in bad:
            warn(bad_line(entry))
        await host.load()
        report = await apply(declared, store, host.management, host.plugins, actor=actor(), dry_run=dry_run)
    if as_json:
        print_json(report)
    else:
        for change in report.changes:
            click.echo(change)
        if not report.changes:
            tell("nothing to change")
    if report.problems:
        raise HostError("\n".join(report.problems))
