"""``hayhost install``, ``uninstall`` and ``config``."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import UNSET

from hayhost.api.orgs import installation_view
from hayhost.errors import HostError, NotFoundError
from hayhost.installs import Change
from hayhost.management import Outcome
from hayhost.settings import Settings
from hayhost.store import Installed, Store
from hayhost.version import Version

from .opening import actor, hosting, loaded, opened
from .orgs import confirm
from .output import print_json, print_table, tell, warn, warn_of_hooks
from .values import Sources, typed

__all__ = ["get_config", "install", "set_config", "uninstall"]


class Wanted(msgspec.Struct, frozen=True):
    """An installation as the arguments of a command have it."""

    plugin: str
    org: str
    pairs: Sequence[str] = ()
    values: str | None = None
    auth: str | None = None


async def install(settings: Settings, plugins: Path | None, wanted: Wanted, enabled: bool, as_json: bool) -> None:
    """Install a plugin for an org, or change it. Raises ``HostError``, and nothing is changed then."""
    sources = Sources()
    whole, texts, auth = sources.values(wanted.values), sources.pairs(wanted.pairs), sources.auth(wanted.auth)
    async with (
        opened(settings, make=True) as store,
        hosting(settings, store, plugins, [wanted.plugin]) as (host, bad),
    ):
        plugin = await loaded(host, wanted.plugin, bad, plugins)
        given = typed(_version(plugin.current).metadata.config_schema, texts, sources.shown)
        config = {**(whole or {}), **given} if whole is not None or given else UNSET
        change = Change(config, auth=auth or UNSET, enabled=enabled, new_org=True)
        try:
            await store.orgs.get(wanted.org)
        except NotFoundError:
            tell(f"there is no org {wanted.org} yet: it is made")
        outcome = await host.management.put(plugin, wanted.org, change, actor=actor())
        await _report(store, wanted, outcome, as_json, "was installed" if outcome.created else "was changed")


async def set_config(
    settings: Settings, plugins: Path | None, wanted: Wanted, unset: Collection[str], as_json: bool
) -> None:
    """Change some fields of an installation's config. Raises ``HostError``, and nothing is changed then."""
    sources = Sources()
    whole, texts = sources.values(wanted.values), sources.pairs(wanted.pairs)
    if both := sorted({*unset} & {*texts}):
        raise HostError(f"{both[0]} is both set and unset")
    if whole is None and not texts and not unset:
        raise HostError("nothing to set: give KEY=VALUE, --unset KEY or --values FILE")
    async with opened(settings) as store:
        before = await store.installations.get(wanted.plugin, wanted.org)
        if missing := [key for key in unset if key not in before.config]:
            tell(f"{', '.join(missing)}: not set anyway")
        async with hosting(settings, store, plugins, [wanted.plugin]) as (host, bad):
            plugin = await loaded(host, wanted.plugin, bad, plugins)
            given: dict[str, Any] = typed(_version(plugin.current).metadata.config_schema, texts, sources.shown)
            config = {**(whole or {}), **dict.fromkeys(unset), **given}
            outcome = await host.management.put(plugin, wanted.org, Change(config), actor=actor(), patch=True)
            await _report(store, wanted, outcome, as_json, "was changed")


async def uninstall(settings: Settings, plugins: Path | None, name: str, org: str, yes: bool) -> None:
    """Uninstall a plugin for an org; its ``on_disable`` runs if it is enabled. Raises ``HostError``."""
    async with opened(settings) as store:
        await store.installations.get(name, org)
        if not yes:
            confirm(f"Uninstall {name} for {org}? Its config and credentials are removed.")
        async with hosting(settings, store, plugins, [name]) as (host, _bad):
            await host.load()
            if (plugin := host.plugins.get(name)) is None:
                warn(f"{name} is not in the folder of plugins: it is uninstalled without its on_disable")
                await store.installations.delete(name, org, actor=actor())
            else:
                warn_of_hooks(name, await host.management.remove(plugin, org, actor=actor()))
    click.echo(f"{name} was uninstalled for {org}")


async def get_config(settings: Settings, plugin: str, org: str, key: str | None, as_json: bool) -> None:
    """The settings of an installation, without secrets; or just the value of one field."""
    async with opened(settings) as store:
        found = await store.installations.get(plugin, org)
    view = installation_view(found, (), found.state or "stopped", found.error)
    if key is not None and key not in view.config:
        raise NotFoundError(f"{plugin} of {org} has no {key} in its config")
    if as_json:
        print_json(view if key is None else view.config[key])
        return
    if key is not None:
        click.echo(_text(view.config[key]))
        return
    rows = [(f"config.{field}", _text(value)) for field, value in sorted(view.config.items())]
    rows.append(("auth", "-" if view.auth is None else f"{view.auth.method_id} ({view.auth_validity})"))
    rows.append(("status", "enabled" if view.enabled else "disabled"))
    print_table(("SETTING", "VALUE"), rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _version(version: Version | None) -> Version:
    assert version is not None  # or it would not have loaded
    return version


async def _report(store: Store, wanted: Wanted, outcome: Outcome, as_json: bool, done: str) -> None:
    warn_of_hooks(wanted.plugin, outcome.hooks)
    kept: Installed = await store.installations.get(wanted.plugin, wanted.org)
    if kept.auth_validity == "invalid":
        warn(f"{wanted.plugin} does not accept the credentials; they are kept all the same")
    if as_json:
        print_json(installation_view(kept, (), kept.state or "stopped", kept.error, outcome.hooks))
    else:
        off = "" if kept.enabled else ", and is disabled"
        click.echo(f"{wanted.plugin} {done} for {wanted.org}{off}")
