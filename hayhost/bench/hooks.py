"""Round trips of hooks, from the front that calls to the front that knows the result."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Final

from hayhost.host import Host
from hayhost.installs import Installation, TestInstalls
from hayhost.logs import configure
from hayhost.manifest import Manifest
from hayhost.settings import Settings
from hayhost.version import Version
from hayhost.worker import Worker

__all__ = ["hook_times"]

_WARM_UP: Final = 20
_LIMIT: Final = 30.0
# These a live worker can run again and again; the others begin or end its life.
_REPEATED: Final[tuple[str, ...]] = ("on_validate_auth", "on_config_update", "on_enable")
_ENDING: Final[tuple[str, ...]] = ("on_disable", "on_stop")


def hook_times(
    manifest: Manifest, settings: Settings, rounds: int, step: Callable[[], None]
) -> tuple[dict[str, list[float]], set[str]]:
    """Milliseconds of each hook that the plugin has, ``rounds`` times, and which of them raised.

    ``on_initialize``, which runs in the zygote once per version, has one value. ``step`` is called ``rounds`` times.
    Raises ``HostError``.
    """
    with open(os.devnull, "w") as nowhere:  # hooks may fail: there are no settings and credentials
        configure("json", "error", nowhere)
        settings = dataclasses.replace(settings, mode="test", host="127.0.0.1", port=0, spares=0)
        return asyncio.run(_measure(manifest, settings, rounds, step))


async def _measure(
    manifest: Manifest, settings: Settings, rounds: int, step: Callable[[], None]
) -> tuple[dict[str, list[float]], set[str]]:
    raised: set[str] = set()
    async with Host(settings, TestInstalls()) as host:
        plugin = host.add(manifest)
        await plugin.load()
        version = await plugin.ready_version()
        times: dict[str, list[float]] = {hook: [] for hook in version.hooks}
        if "on_initialize" in times:
            times["on_initialize"] = [_initialize(version)]
        ending = [hook for hook in _ENDING if hook in times] or [""]
        for number in range(rounds * len(ending)):
            worker = await host.pool.take(plugin)
            begun = time.monotonic_ns()
            worker.start(Installation(f"org{number}", "Bench"), serve=True, hook_timeout=_LIMIT)
            if await worker.ready(_LIMIT):
                raised.add("on_start")
            if "on_start" in times:
                times["on_start"].append((time.monotonic_ns() - begun) / 1e6)
            if number == 0:
                await _repeat(worker, times, rounds, raised)
            hook = ending[number % len(ending)]
            begun = time.monotonic_ns()
            await worker.stop(hook, 0.0, _LIMIT)
            if hook:
                times[hook].append((worker.hook_times[hook][1] - begun) / 1e6)
            if hook == ending[-1]:
                step()
        return {hook: values for hook, values in times.items() if values}, raised


def _initialize(version: Version) -> float:
    before = 0
    for phase, ended in version.zygote.stamps:
        if phase == "on_initialize":
            return (ended - before) / 1e6
        before = ended
    return 0.0


async def _repeat(worker: Worker, times: dict[str, list[float]], rounds: int, raised: set[str]) -> None:
    for hook in _REPEATED:
        if hook not in times:
            continue
        for number in range(_WARM_UP + rounds):
            begun = time.monotonic_ns()
            if (await worker.hook(hook, {}, None, _LIMIT)).error:
                raised.add(hook)
            if number >= _WARM_UP:
                times[hook].append((time.monotonic_ns() - begun) / 1e6)
