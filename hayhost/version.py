"""One loaded version of a plugin: its zygote, and what that reported. It never changes once it is there."""

import os
import time
from typing import Any, Final

import msgspec

from sandbox.confinement import Level, Plan
from sandbox.spec import PluginSpec

from .errors import PluginLoadError
from .logs import PluginLog
from .manifest import Manifest
from .metadata import Metadata, read_metadata
from .processes import Nursery, Zygote
from .routes import RouteTable

__all__ = ["Version", "differences", "load_version", "spec_of"]

# A plugin that kills its nursery each time must not do so for ever.
_ATTEMPTS: Final = 3


class Version:
    """What a zygote said it has loaded from the content with ``digest``."""

    def __init__(self, manifest: Manifest, digest: str, zygote: Zygote, metadata: Metadata) -> None:
        loaded = zygote.loaded.result()
        self.manifest = manifest
        self.digest = digest
        self.zygote = zygote
        self.metadata = metadata
        self.warnings = [*manifest.warnings, *loaded.warnings]
        self.hooks = frozenset(loaded.hooks)
        self.routes = RouteTable((route.method, route.path) for route in metadata.routes)
        named = {field.env for field in metadata.config_schema.values() if isinstance(field.env, str)}
        self.env: dict[str, str] = {}
        for name in sorted(named & os.environ.keys()):
            text = os.environ[name]
            if text == text.encode(errors="replace").decode():
                self.env[name] = text
            else:  # bytes that are no UTF-8
                self.warnings.append(f"environment variable {name} is not UTF-8 text and counts as unset")
        self.loaded_at = time.time()
        self.strict_reason = (
            'its manifest says sharing = "strict"'
            if manifest.sharing == "strict"
            else f"its import left {zygote.threads - 1} thread(s) running, and a process with threads cannot be forked"
            if zygote.threads > 1
            else ""
        )
        """Why its workers are not forked from one zygote; empty if they are."""

    @property
    def strict(self) -> bool:
        """Whether each of its workers loads the plugin for itself."""
        return bool(self.strict_reason)

    @property
    def level(self) -> Level:
        """How much its processes are isolated."""
        return self.zygote.spec.plan.level

    @property
    def alive(self) -> bool:
        """Whether workers can be forked from it."""
        return self.zygote.alive

    def is_of(self, manifest: Manifest, digest: str) -> bool:
        """Whether it was loaded from just this."""
        return (self.manifest, self.digest) == (manifest, digest)

    def close(self) -> None:
        """Let its zygote exit; its workers live on. Closing twice is safe."""
        self.zygote.close()


def spec_of(
    manifest: Manifest, plan: Plan, *, hook_timeout: float, instrument: bool, tracing: bool = False
) -> PluginSpec:
    """What a zygote needs to load the plugin of ``manifest``, confined to ``plan``."""
    return PluginSpec(
        folder=str(manifest.folder),
        entry=manifest.entry,
        attribute=manifest.attribute,
        name=manifest.name,
        version=manifest.version,
        capabilities=manifest.capabilities,
        env=manifest.env,
        subprocess=tuple(manifest.permissions.subprocess),
        hook_timeout=hook_timeout,
        instrument=instrument,
        plan=plan,
        strict=manifest.sharing == "strict",
        tracing=tracing,
    )


async def load_version(
    nursery: Nursery, manifest: Manifest, digest: str, spec: PluginSpec, log: PluginLog, *, worker: bool = False
) -> Version:
    """Have a zygote load the plugin. Raises ``PluginLoadError`` if it does not load, ``HostError`` without a nursery.

    With ``worker`` it is to become a worker, and is executed anew if the manifest wants that. Cancelling it ends the
    zygote. One that lost its nursery meanwhile, and with it all that would end it with the host, is given up for
    another.
    """
    attempts = _ATTEMPTS
    while True:
        attempts -= 1
        zygote = await nursery.spawn(spec, log, execute=worker and spec.strict)
        try:
            loaded = await zygote.loaded
            if zygote.nursery == nursery.pid or not attempts:
                return Version(manifest, digest, zygote, read_metadata(loaded.metadata, manifest))
        except PluginLoadError:
            zygote.kill()
            if zygote.nursery == nursery.pid or not attempts:
                raise
        except BaseException:
            zygote.kill()
            raise
        zygote.kill()


def differences(old: Version, new: Version) -> list[str]:
    """What has changed in the metadata, for people: ``["route +GET /x", "config field -apiKey"]``."""
    changes = []
    for what, before, after in (
        ("route", _routes(old), _routes(new)),
        ("config field", _named(old.metadata.config_schema), _named(new.metadata.config_schema)),
        ("auth method", _by_id(old.metadata.auth_methods), _by_id(new.metadata.auth_methods)),
        ("page", _by_id(old.metadata.pages), _by_id(new.metadata.pages)),
        ("UI extension", _whole(old.metadata.ui_extensions), _whole(new.metadata.ui_extensions)),
        ("hook", dict.fromkeys(old.hooks), dict.fromkeys(new.hooks)),
    ):
        changes += [f"{what} -{key}" for key in before if key not in after]
        changes += [f"{what} +{key}" for key in after if key not in before]
        changes += [f"{what} ~{key}" for key in after if key in before and before[key] != after[key]]
    if old.manifest.version != new.manifest.version:
        changes.append(f"version {old.manifest.version} -> {new.manifest.version}")
    return changes


def _routes(version: Version) -> dict[str, Any]:
    return {f"{route.method} {route.path}": None for route in version.metadata.routes}


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: msgspec.to_builtins(field) for name, field in fields.items()}


def _by_id(entries: list[Any]) -> dict[str, Any]:
    return {entry.id: msgspec.to_builtins(entry) for entry in entries}


def _whole(entries: list[Any]) -> dict[str, Any]:
    return {f"{entry.slot}: {entry.component}": None for entry in entries}
