"""``--orgs FILE.toml``: orgs and their plugins as a file declares them, compared with the store and applied to it."""

import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .catalog import Plugin
from .configs import without_nulls
from .errors import HostError, NotFoundError, RequestError, SettingsError
from .installs import Auth, Change, ToolLists
from .management import Management
from .names import ORG_ID

if TYPE_CHECKING:
    from .store import Installed, Store

__all__ = ["Declared", "Report", "apply", "read_declared"]


class _PluginTable(msgspec.Struct, forbid_unknown_fields=True):
    enabled: bool = True
    config: dict[str, Any] = {}
    auth: Auth | None = None

    def __repr__(self) -> str:
        return f"<enabled={self.enabled}>"


class _OrgTable(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    plugins: dict[str, _PluginTable] = {}
    tools: ToolLists | None = None


class Declared(msgspec.Struct, frozen=True):
    """Orgs as a file has them. What the file does not name stays as it is."""

    orgs: Mapping[str, _OrgTable]
    warnings: list[str]

    def __repr__(self) -> str:
        return f"Declared({len(self.orgs)} orgs)"


class Report(msgspec.Struct, frozen=True):
    """What was changed, or would be, in words without secrets; and what could not be."""

    changes: list[str]
    problems: list[str]


def read_declared(file: Path) -> Declared:
    """The orgs of ``file``. Raises ``SettingsError`` naming everything that is wrong with it.

    ::

        [orgs.acme]
        name = "Acme Ltd"
        [orgs.acme.plugins.stripe]
        config = { toleranceSeconds = 60 }
        auth = { methodId = "apiKey", credentials = { apiKey = "sk_..." } }
        [orgs.acme.tools]
        deny = ["stripe__create_*"]
    """
    warnings: list[str] = []
    try:
        if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            warnings.append(f"{file} may hold credentials and is readable by others; use `chmod 600 {file}`")
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
    problems = [f"{file}: {key}: no such key; there is `orgs`" for key in table if key != "orgs"]
    orgs = table.get("orgs", {})
    if not isinstance(orgs, Mapping):
        raise SettingsError(f"{file}: orgs: must be a table of orgs, [orgs.ID]")
    declared: dict[str, _OrgTable] = {}
    for org, given in orgs.items():
        if not ORG_ID.fullmatch(org):
            problems.append(f"{file}: orgs.{org}: not an org id: letters, digits and _ . - only, at most 128")
            continue
        try:
            declared[org] = msgspec.convert(given, _OrgTable)
        except msgspec.ValidationError as error:
            problems.append(f"{file}: orgs.{org}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return Declared(declared, warnings)


async def apply(
    declared: Declared,
    store: "Store",
    management: Management,
    plugins: Mapping[str, Plugin],
    *,
    actor: str,
    dry_run: bool = False,
) -> Report:
    """Make the store have what is declared; with ``dry_run`` only say what that would change.

    Each org and installation is changed by itself: what is wrong with one does not hold up the others. Raises
    ``StoreUnavailableError``.
    """
    report = Report([], [])
    for org, table in declared.orgs.items():
        lists = ToolLists()
        try:
            try:
                known, lists = await store.orgs.get(org), await store.tools.get(org)
            except NotFoundError:
                report.changes.append(f"+ org {org}")
                if not dry_run:
                    await store.orgs.create(org, table.name, actor=actor)
            else:
                if table.name is not None and known.name != table.name:
                    report.changes.append(f"~ org {org}: name")
                    if not dry_run:
                        await store.orgs.rename(org, table.name, actor=actor)
                if table.tools not in (None, lists):
                    report.changes.append(f"~ org {org}: tools")
            if table.tools is not None and table.tools != lists and not dry_run:
                await store.tools.put(org, table.tools, actor=actor)
        except HostError as error:
            report.problems.append(f"org {org}: {error}")
            continue
        for name, wanted in table.plugins.items():
            where = f"{org}/{name}"
            try:
                changed = _difference(await store.installations.find(name, org), wanted)
                if changed is None:
                    continue
                if (plugin := plugins.get(name)) is None:
                    report.problems.append(f"{where}: there is no plugin of this name")
                    continue
                change = Change(wanted.config, auth=wanted.auth, enabled=wanted.enabled)
                if dry_run:
                    await management.check(plugin, org, change)
                else:
                    outcome = await management.put(plugin, org, change, actor=actor)
                    report.problems.extend(f"{where}: {hook}: {why}" for hook, why in outcome.hooks.items())
                report.changes.append(f"{'~' if changed else '+'} {where}{': ' if changed else ''}{', '.join(changed)}")
            except HostError as error:
                report.problems.extend(f"{where}: {line}" for line in str(error).splitlines())
            except RequestError as error:
                report.problems.append(f"{where}: {error.message}")
    return report


def _difference(stored: "Installed | None", wanted: _PluginTable) -> list[str] | None:
    """The names of what is different; empty if it is not installed, ``None`` if it is as it should be."""
    if stored is None:
        return []

    def differences() -> Iterator[str]:
        config = without_nulls(wanted.config)
        for field in sorted({*config, *stored.config}):
            if config.get(field) != stored.config.get(field):
                yield f"config.{field}"
        if stored.auth != wanted.auth:
            yield "auth"
        if stored.enabled != wanted.enabled:
            yield "enabled" if wanted.enabled else "disabled"

    return list(differences()) or None
