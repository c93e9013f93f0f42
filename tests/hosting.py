"""Hosts that a whole test module shares, and plugins with routes by decorator."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .conftest import HostProcess, wait_until

PREAMBLE = """\
from hayhost.sdk import *
import asyncio, json, logging, os, signal, sys, threading, time

ROUTES = []

def route(method, path):
    def add(handler):
        ROUTES.append((method, path, handler))
        return handler
    return add

def register(ctx):
    for method, path, handler in ROUTES:
        ctx.register.route(method, path, handler)

"""
"""Begin a plugin with this, decorate its handlers with ``@route(method, path)``, and ``register(ctx)`` them."""

PLUGIN = """\

@define_hay_plugin
class Plugin:
    name = "test"

    def on_initialize(self, ctx):
        register(ctx)
"""
"""End a plugin that has no more to it than its routes with this."""


@contextlib.contextmanager
def hosting(
    folder: Path, *options: object, env: dict[str, str] | None = None, writable: bool = True
) -> Iterator[HostProcess]:
    """A ready ``hayhost serve`` on ``folder`` with ``options``, in test mode unless they name a file of orgs.

    Plugins may write to ``folder`` if it is ``writable``.
    """
    mode = () if "--orgs" in options else ("--mode", "test")
    arguments = ["serve", folder, *mode, "--port", "0", "--log-format", "json", *options]
    host = HostProcess([str(argument) for argument in arguments], env, writable=folder if writable else None)
    try:
        yield host.wait_ready()
    finally:
        host.kill()


def write_orgs(file: Path, orgs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """A file for ``--orgs``: org id -> plugin -> ``config``, ``auth``, ``enabled``, ``name`` of the org."""
    lines = []
    for org, plugins in orgs.items():
        for plugin, install in plugins.items():
            lines.append(f"[orgs.{org}.plugins.{plugin}]")
            lines += [f"{key} = {_toml(value)}" for key, value in install.items()]
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o600)
    return file


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)


def logged(host: HostProcess, /, *, count: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """Wait for at least ``count`` records of the log that have all of ``fields``, and return all there are."""

    def found() -> list[dict[str, Any]]:
        records = [record for record in host.records() if fields.items() <= record.items()]
        return records if len(records) >= count else []

    records: list[dict[str, Any]] = wait_until(found, f"{count} x {fields} in the log")
    return records
