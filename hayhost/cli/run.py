"""``hayhost run``: one plugin for one org, as Hay Core starts it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec

from hayhost.errors import HostError, PluginLoadError, SettingsError
from hayhost.host import Host, url_of
from hayhost.installs import Auth, Installation, SingleInstall
from hayhost.layout import OneOrg
from hayhost.logs import configure_log, escape, get_logger
from hayhost.manifest import read_manifest
from hayhost.names import ORG_ID
from hayhost.settings import Settings

__all__ = ["installation_from_environment", "run"]

_CONFIG = "HAY_ORG_CONFIG"
_AUTH = "HAY_ORG_AUTH"


class _Org(msgspec.Struct):
    id: str
    name: str | None = None


class _OrgConfig(msgspec.Struct):
    org: _Org
    config: dict[str, Any] | None = None


def installation_from_environment(org_id: str) -> Installation:
    """The org as ``HAY_ORG_CONFIG`` and ``HAY_ORG_AUTH`` describe it; both are taken out of the environment.

    What is missing or malformed becomes the installation's ``problem``; no value of either is ever part of it.
    """
    config_text, auth_text = os.environ.pop(_CONFIG, None), os.environ.pop(_AUTH, None)
    problems = []
    given, other_org = _OrgConfig(_Org(org_id)), False
    if config_text is None:
        problems.append(f"{_CONFIG} is not set")
    else:
        try:
            given = msgspec.json.decode(config_text, type=_OrgConfig)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            problems.append(f'{_CONFIG} is not of the form {{"org": {{"id": "...", "name": "..."}}, "config": {{}}}}')
        else:
            if given.org.id != org_id:
                problems.append(f"{_CONFIG} is for another org than --org-id {org_id}; neither it nor {_AUTH} is used")
                given, other_org = _OrgConfig(_Org(org_id)), True
    auth = None
    if auth_text:
        try:
            if (decoded := msgspec.json.decode(auth_text)) != {}:
                auth = msgspec.convert(decoded, Auth)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            problems.append(f'{_AUTH} is not of the form {{"methodId": "...", "credentials": {{}}}}')
    if other_org:
        auth = None  # it came along with the config of somebody else
    return Installation(org_id, given.org.name or org_id, given.config or {}, auth, problem="; ".join(problems))


def run(plugin_path: str, org_id: str, settings: Settings) -> int:
    """Serve until a signal; the exit code. Raises ``HostError`` for bad arguments, manifests and plugins."""
    configure_log(settings)
    if not plugin_path:  # which is no other way to say "here"
        raise SettingsError("--plugin-path: '' is not a folder")
    if not ORG_ID.fullmatch(org_id):
        raise SettingsError(f"--org-id: {org_id!r} is not an org id: letters, digits and _ . - only, at most 128")
    if settings.mode == "test":
        installation = Installation(org_id, f"Test Org {org_id}")
    else:
        installation = installation_from_environment(org_id)
    return asyncio.run(_run(Path(plugin_path), settings, installation))


async def _run(plugin_path: Path, settings: Settings, installation: Installation) -> int:
    log = get_logger()
    manifest = read_manifest(plugin_path)
    installs = SingleInstall(installation)
    if installation.problem:
        log.error("the worker will be degraded", org=installation.org_id, reason=installation.problem)
    host = Host(settings, installs)
    await host.access.check_listening()
    host.stop_hook = "on_disable"
    host.handle_signals()
    async with host:
        if host.is_stopping:
            return 0
        plugin = host.add(manifest)
        try:
            if not await host.unless_stopped(plugin.load()):
                return 0
        except PluginLoadError as error:
            if error.traceback:
                log.error("the plugin did not load", plugin=plugin.name, reason=str(error), traceback=error.traceback)
            raise HostError(f"{plugin.name}: {escape(str(error))}") from None
        for warning in plugin.current.warnings if plugin.current else ():
            log.warning(warning, plugin=plugin.name)
        host.pool.keep_idle = True
        port = host.listen(OneOrg(plugin, installation.org_id, installs))
        log.info("listening", url=url_of(settings.host, port), plugin=plugin.name, org=installation.org_id)
        if not host.is_stopping:
            host.pool.slot(plugin, installation.org_id).ensure_starting()
        await host.stopped()
    return 0
