"""``hayhost doctor``: what isolation this machine gives, tried for real, and what to do about the rest."""

import asyncio
import dataclasses
import os
import platform
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
from tornado.httpclient import AsyncHTTPClient, HTTPClientError

import hayhost
from hayhost.doctor import ABOUT, REMEDIES
from hayhost.errors import HostError
from hayhost.host import Host
from hayhost.installs import TestInstalls
from hayhost.logs import configure, escape
from hayhost.manifest import read_manifest
from hayhost.settings import Settings
from sandbox.confinement import LAYERS, Level, landlock

from .output import paint

__all__ = ["doctor"]

_CANARY: Final = Path(hayhost.__file__).parent / "canary"


def doctor(settings: Settings, as_json: bool) -> int:
    """Print what there is; 1 if it is below the required level or a worker could do what it must not."""
    configure("auto", "error")
    report = asyncio.run(_report(settings))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        _print(report)
    return 0 if report["ok"] else 1


async def _report(settings: Settings) -> dict[str, Any]:
    required = settings.require if settings.isolation == "auto" else settings.isolation
    settings = dataclasses.replace(settings, require="none", mode="test", port=0, host="127.0.0.1")
    host = Host(settings, TestInstalls())
    report: dict[str, Any] = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "user": "root" if not os.geteuid() else "ordinary user",
        "landlockAbi": landlock.abi(),
        "required": required,
        "level": Level.NONE.label,
        "ok": False,
        "layers": [],
        "programsOffline": None,
        "canaries": [],
        "error": None,
    }
    try:
        async with host:
            report["canaries"] = await _canaries(host)
    except HostError as error:
        report["error"] = str(error)
    if report["error"] is None or host.isolation.layers:
        report |= {"level": host.isolation.level.label, "layers": [_layer(layer, host) for layer in LAYERS]}
        report["programsOffline"] = host.isolation.unproxied or None
    escaped = [canary for canary in report["canaries"] if canary["refused"] is None]
    enough = Level[report["level"].upper()] >= Level[required.upper()]
    confined = Level[report["level"].upper()] >= Level.CONFINED
    report["ok"] = report["error"] is None and enough and not (confined and escaped)
    return report


def _layer(layer: str, host: Host) -> dict[str, Any]:
    problem = host.isolation.problems.get(layer)
    in_force = layer in host.isolation.layers
    return {
        "layer": layer,
        "about": ABOUT[layer],
        "inForce": in_force,
        "problem": problem or (None if in_force else "not asked for"),
        "remedy": REMEDIES.get(layer) if problem else None,
    }


async def _canaries(host: Host) -> list[dict[str, Any]]:
    """What a worker tried, and what refused it."""
    plugin = host.add(read_manifest(_CANARY))
    await plugin.load()
    port = host.listen(host.site())
    url = f"http://127.0.0.1:{port}/plugins/{plugin.name}/doctor/?port={port}&pid={os.getpid()}"
    try:
        answer = await AsyncHTTPClient().fetch(url, request_timeout=30)
    except (HTTPClientError, OSError) as error:
        raise HostError(f"the worker of the canary plugin does not answer: {error}") from None
    return msgspec.json.decode(answer.body, type=list[dict[str, Any]])


def _print(report: dict[str, Any]) -> None:
    yes, no = paint("32", "yes"), paint("31", "no ")
    print(f"Linux {report['kernel']} on {report['machine']}, Python {report['python']}, {report['user']}")
    print(f"isolation: {paint('1', report['level'])} (required: {report['required']})\n")
    for layer in report["layers"]:
        print(f"  {yes if layer['inForce'] else no}  {layer['layer']:<11} {layer['about']}")
        if layer["problem"]:
            print(f"       {'':<11} {escape(layer['problem'])}")
        if layer["remedy"]:
            print(f"       {'':<11} {layer['remedy']}")
    if report["programsOffline"]:
        print(f"\nprograms that plugins start have no network: {report['programsOffline']}")
    if report["canaries"]:
        print("\nwhat a worker could do when it tried to:\n")
    for canary in report["canaries"]:
        refused = canary["refused"]
        print(
            f"  {paint('32', f'refused ({refused})') if refused else paint('31', 'succeeded'):<20} {canary['attempt']}"
        )
    if report["error"]:
        print(f"\n{paint('31', 'error:')} " + "\n".join(map(escape, report["error"].splitlines())))
    print("\n" + (paint("32", "ok") if report["ok"] else paint("31", "not ok")))
