"""``hayhost check``: load a plugin as the host would, and say everything about it."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from hayhost.catalog import Plugin
from hayhost.errors import HostError, ManifestError, PluginLoadError
from hayhost.isolation import Isolation
from hayhost.logs import configure, escape
from hayhost.manifest import read_manifest
from hayhost.processes import Nursery
from hayhost.settings import Settings

from .output import paint

__all__ = ["check"]


def check(plugin_dir: Path, settings: Settings, as_json: bool) -> int:
    """Print what is known of the plugin; 1 if it has an error."""
    configure("auto", "warning")
    report = asyncio.run(_report(plugin_dir, settings))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        _print(report)
    return 0 if report["ok"] else 1


async def _report(plugin_dir: Path, settings: Settings) -> dict[str, Any]:
    folder = os.fsencode(plugin_dir).decode(errors="backslashreplace")  # the name of a file may be no UTF-8
    report: dict[str, Any] = {"ok": False, "folder": folder, "errors": [], "warnings": []}
    try:
        manifest = read_manifest(plugin_dir)
    except ManifestError as error:
        return {**report, "errors": error.problems}
    report |= {
        "name": manifest.name,
        "version": manifest.version,
        "displayName": manifest.display_name,
        "category": manifest.category,
        "capabilities": list(manifest.capabilities),
        "warnings": list(manifest.warnings),
    }
    nursery = Nursery(lambda: None)
    isolation = Isolation(settings)
    plugin = Plugin(manifest, nursery, isolation, hook_timeout=settings.hook_timeout)
    try:
        await nursery.start()
        await isolation.start(nursery)
        await plugin.load()
        version = plugin.current
        assert version is not None
        strict = f"sharing is strict, so starts are slower: {version.strict_reason}"
        report |= {
            "ok": True,
            "warnings": [*version.warnings, *([strict] if version.strict else [])],
            "hooks": sorted(version.hooks),
            "sharing": "strict" if version.strict else "fork",
            "isolation": version.level.label,
            "metadata": msgspec.to_builtins(version.metadata),
        }
    except PluginLoadError as error:
        report |= {"errors": [str(error)], "traceback": error.traceback}
    except HostError as error:
        report |= {"errors": [str(error)]}
    finally:
        plugin.close()
        await nursery.stop()
        await isolation.stop()
    return report


def _print(report: dict[str, Any]) -> None:
    def line(label: str, value: object) -> None:
        print(f"  {label:<14}{escape(str(value))}")

    print(escape(f"{report.get('name', report['folder'])} {report.get('version', '')}".rstrip()))
    for key in ("displayName", "category", "sharing", "isolation"):
        if key in report:
            line(key, report[key])
    if "capabilities" in report:
        line("capabilities", ", ".join(report["capabilities"]) or "none")
    if "hooks" in report:
        line("hooks", ", ".join(report["hooks"]) or "none")
    metadata = report.get("metadata", {})
    for route in metadata.get("routes", ()):
        line("route", f"{route['method']:<7}{route['path']}")
    for name, field in metadata.get("configSchema", {}).items():
        traits = [key for key in ("required", "sensitive") if field.get(key)]
        traits += [f"env {field['env']}"] if "env" in field else []
        line("config", f"{name}: {', '.join([field['type'], *traits])}")
    for method in metadata.get("authMethods", ()):
        line("auth", f"{method['id']} ({method['type']}): {method['label']}")
    for page in metadata.get("pages", ()):
        line("page", f"{page['id']}: {page['title']}")
    for extension in metadata.get("uiExtensions", ()):
        line("ui", f"{extension['slot']}: {extension['component']}")
    for warning in report["warnings"]:
        print(paint("33", "warning: ") + escape(warning))
    for error in report["errors"]:
        print(paint("31", "error: ") + escape(error))
    for text in report.get("traceback", "").splitlines():
        print(f"    | {escape(text)}")
    if report["ok"]:
        print(paint("32", "ok"))
