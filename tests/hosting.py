"""Hosts that a whole test module shares, and plugins with routes by decorator."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hayhost.installs import Auth
from hayhost.store import Keyring, Store

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
    """A ready ``hayhost serve`` on ``folder`` with ``options``, in test mode unless they name a store.

    Plugins may write to ``folder`` if it is ``writable``.
    """
    mode = () if "--store" in options else ("--mode", "test")
    arguments = ["serve", folder, *mode, "--port", "0", "--log-format", "json", *options]
    host = HostProcess([str(argument) for argument in arguments], env, writable=folder if writable else None)
    try:
        yield host.wait_ready()
    finally:
        host.kill()


def stored(
    file: Path, orgs: Mapping[str, Mapping[str, Mapping[str, Any]]], environ: Mapping[str, str] | None = None
) -> Path:
    """A file for ``--store``: org id -> plugin -> ``config``, ``auth``, ``enabled``, unchecked."""

    async def fill() -> None:
        async with Store(str(file), Keyring.load(file.with_suffix(".key"), environ or {})) as store:
            for org, plugins in orgs.items():
                await store.orgs.create(org, actor="test")
                for plugin, install in plugins.items():
                    auth = msgspec.convert(install.get("auth"), Auth | None)
                    config, enabled = install.get("config", {}), install.get("enabled", True)
                    change = {"config": config, "auth": auth, "enabled": enabled}
                    await store.installations.put(plugin, org, if_revision=0, actor="test", **change)

    asyncio.run(fill())
    return file


def logged(host: HostProcess, /, *, count: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """Wait for at least ``count`` records of the log that have all of ``fields``, and return all there are."""

    def found() -> list[dict[str, Any]]:
        records = [record for record in host.records() if fields.items() <= record.items()]
        return records if len(records) >= count else []

    records: list[dict[str, Any]] = wait_until(found, f"{count} x {fields} in the log")
    return records
