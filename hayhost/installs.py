"""Which org has which plugin, with which config and credentials."""

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from .errors import SettingsError

__all__ = ["Auth", "FileInstalls", "Installation", "Installs", "SingleInstall", "TestInstalls"]


class Auth(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """An org's credentials for one auth method; never shown in a ``repr``."""

    method_id: Annotated[str, msgspec.Meta(min_length=1)]
    credentials: dict[str, Any]

    def __repr__(self) -> str:
        return f"Auth(method_id={self.method_id!r})"


class Installation(msgspec.Struct, frozen=True):
    """One plugin of one org. ``problem`` says what is wrong with it, for workers to be degraded by."""

    org_id: str
    org_name: str
    config: dict[str, Any] = {}
    auth: Auth | None = None
    enabled: bool = True
    problem: str = ""

    def __repr__(self) -> str:
        return f"Installation(org_id={self.org_id!r}, enabled={self.enabled})"


class Installs(Protocol):
    """Where installations are looked up, and changed settings kept."""

    def find(self, plugin: str, org: str) -> Installation | None:
        """The installation of ``plugin`` for ``org``; ``None`` if there is none."""
        ...

    def save(self, plugin: str, installation: Installation) -> None:
        """Keep a changed installation."""
        ...


class TestInstalls:
    """Test mode: every org is known and has every plugin. Changes are kept in memory."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self) -> None:
        self._changed: dict[tuple[str, str], Installation] = {}

    def find(self, plugin: str, org: str) -> Installation | None:
        return self._changed.get((plugin, org)) or Installation(org, f"Test Org {org}")

    def save(self, plugin: str, installation: Installation) -> None:
        if installation.enabled:
            self._changed[plugin, installation.org_id] = installation
        else:  # there is no way to enable it again here but to use it
            self._changed.pop((plugin, installation.org_id), None)


class SingleInstall:
    """``hayhost run``: one org, and nothing else."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation

    def find(self, plugin: str, org: str) -> Installation | None:
        return self.installation if org == self.installation.org_id else None

    def save(self, plugin: str, installation: Installation) -> None:
        self.installation = installation


class _PluginTable(msgspec.Struct, forbid_unknown_fields=True):
    enabled: bool = True
    config: dict[str, Any] = {}
    auth: Auth | None = None


class _OrgTable(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    plugins: dict[str, _PluginTable] = {}


class FileInstalls:
    """``--orgs FILE.toml``: the orgs as a file declares them. Changes made while the host runs are kept in memory.

    ::

        [orgs.acme]
        name = "Acme Ltd"
        [orgs.acme.plugins.stripe]
        config = { toleranceSeconds = 60 }
        auth = { methodId = "apiKey", credentials = { apiKey = "sk_..." } }
    """

    def __init__(self, file: Path, valid_org: Any) -> None:
        """Read ``file``. Raises ``SettingsError`` naming everything that is wrong with it."""
        self.warnings: list[str] = []
        try:
            if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                self.warnings.append(f"{file} may hold credentials and is readable by others; use `chmod 600 {file}`")
            table = tomllib.loads(file.read_text())
        except OSError as error:
            raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{file}: not valid TOML: {error}") from None
        problems = [f"{file}: {key}: no such key; there is `orgs`" for key in table if key != "orgs"]
        self._installations: dict[tuple[str, str], Installation] = {}
        orgs = table.get("orgs", {})
        if not isinstance(orgs, Mapping):
            raise SettingsError(f"{file}: orgs: must be a table of orgs, [orgs.ID]")
        for org, given in orgs.items():
            if not valid_org(org):
                problems.append(f"{file}: orgs.{org}: not an org id: letters, digits and _ . - only, at most 128")
                continue
            try:
                entry = msgspec.convert(given, _OrgTable)
            except msgspec.ValidationError as error:
                problems.append(f"{file}: orgs.{org}: {error}")
                continue
            for plugin, install in entry.plugins.items():
                self._installations[plugin, org] = Installation(
                    org, entry.name or org, install.config, install.auth, install.enabled
                )
        if problems:
            raise SettingsError("\n".join(problems))

    def all(self) -> Mapping[tuple[str, str], Installation]:
        """Every installation by (plugin, org)."""
        return self._installations

    def find(self, plugin: str, org: str) -> Installation | None:
        return self._installations.get((plugin, org))

    def save(self, plugin: str, installation: Installation) -> None:
        self._installations[plugin, installation.org_id] = installation
