"""Random documents: manifests, what a zygote says of its plugin, and settings sent to a real host."""

import json
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec

from hayhost.errors import ManifestError, PluginLoadError
from hayhost.manifest import Manifest, read_manifest
from hayhost.metadata import read_metadata
from hayhost.routes import Match, RouteTable
from tests.managing import Manager

__all__ = ["manifests", "metadata", "settings"]

_LIMIT: Final = 2.0
"""Seconds of the processor that one document may cost: far more than any does, far less than harm."""
_VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    " ",
    "\0",
    "a/b",
    "../..",
    "ö",
    "\U0001f600",
    "x" * 5000,
    "\u202e",
    "\x1b[31m",
    "{}",
    "/x",
    "/{id}",
    "/{",
    "/{a}/{a}",
    "//",
    "STRIPE_API_KEY",
    "LD_PRELOAD",
    [],
    {},
    [None],
    [[[[]]]],
    {"": ""},
    {"a": {"b": []}},
    ["x"] * 50,
    "string",
    "number",
    "json",
    "oauth2",
    "apiKey",
    "GET",
    "get",
    "__proto__",
    "********",
)
_GOOD_METADATA: Final = {
    "configSchema": {
        "apiKey": {"type": "string", "label": "Key", "env": "KEY", "sensitive": True, "default": "x"},
        "n": {"type": "number"},
    },
    "authMethods": [{"type": "apiKey", "id": "k", "label": "K", "configField": "apiKey"}],
    "uiExtensions": [{"slot": "after-settings", "component": "x.vue"}],
    "pages": [{"id": "p", "title": "P", "component": "x.vue", "slot": "standalone", "requiresSetup": False}],
    "routes": [{"method": "GET", "path": "/items/{id}"}, {"method": "POST", "path": "/items"}],
}
_GOOD_MANIFEST: Final = {
    "name": "p",
    "version": "1.0",
    "hay-plugin": {
        "entry": "./plugin.py",
        "displayName": "P",
        "category": "tool",
        "capabilities": ["routes"],
        "env": ["KEY"],
        "sharing": "fork",
        "permissions": {
            "network": ["api.stripe.com:443"],
            "subprocess": ["node"],
            "memory": "256MiB",
            "cpu_seconds": 5,
            "processes": 2,
            "files": 9,
        },
    },
}


def _changed(value: Any, chance: random.Random) -> Any:
    """``value`` with something in it exchanged, added or left out."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        made = dict(value)
        key = chance.choice(list(made))
        match chance.randrange(6):
            case 0:
                del made[key]
            case 1:
                made[str(chance.choice(_VALUES))[:50]] = chance.choice(_VALUES)
            case _:
                made[key] = _changed(made[key], chance)
        return made
    if isinstance(value, list) and value and chance.random() < 0.85:
        made_list = list(value)
        at = chance.randrange(len(made_list))
        match chance.randrange(4):
            case 0:
                made_list += [made_list[at]] * chance.choice([1, 2, 1100])
            case 1:
                made_list[at:at] = [chance.choice(_VALUES)]
            case _:
                made_list[at] = _changed(made_list[at], chance)
        return made_list
    return chance.choice(_VALUES)


def _damaged(good: Any, chance: random.Random) -> bytes:
    """A JSON document that is changed, and sometimes no JSON any more."""
    for _ in range(chance.randrange(1, 5)):
        good = _changed(good, chance)
    data = json.dumps(good).encode()
    match chance.randrange(12):
        case 0:
            at = chance.randrange(len(data))
            data = (
                data[:at]
                + chance.choice([b"", b"\x00", b"\xff", b"\\ud800", b"NaN", b"1e999", b"[" * 3000])
                + data[at + 1 :]
            )
        case 1:
            data = data[: chance.randrange(len(data))]
    return data


def metadata(count: int, seed: int) -> int:
    """Read what ``count`` zygotes might say of their plugins; how many were believed.

    Each is refused with a reason, or can be shown, and its routes can be asked for.
    """
    chance, believed = random.Random(seed), 0
    manifest = cast(Manifest, SimpleNamespace(env=("KEY",)))
    for _ in range(count):
        data = _damaged(_GOOD_METADATA, chance)
        began = time.process_time()
        try:
            read = read_metadata(data, manifest)
        except PluginLoadError as error:
            refused = str(error)
        else:
            refused = "not"
            believed += 1
            shown = msgspec.to_builtins(read)
            assert msgspec.json.decode(msgspec.json.encode(shown)) == shown, data
            routes = RouteTable((route.method, route.path) for route in read.routes)
            for path in ("/items/1", "/", "//", "/x" * 100, *(route.path for route in read.routes)):
                assert isinstance(routes.match("GET", path), Match | frozenset)
        assert refused, data[:1000]
        assert time.process_time() - began < _LIMIT, data[:1000]
    return believed


def manifests(count: int, seed: int, folder: Path) -> int:
    """Read ``count`` manifests in ``folder``; how many were good. Each other one has problems, each of one line."""
    chance, good = random.Random(seed), 0
    (folder / "plugin.py").touch()
    for _ in range(count):
        (folder / "package.json").write_bytes(data := _damaged(_GOOD_MANIFEST, chance))
        began = time.process_time()
        problems = ["not refused"]
        try:
            read_manifest(folder)
            good += 1
        except ManifestError as error:
            problems = error.problems
        assert problems, data[:1000]
        assert all(problem.isprintable() and len(problem) < 1000 for problem in problems), data[:1000]
        assert time.process_time() - began < _LIMIT, data[:1000]
    return good


def settings(manager: Manager, count: int, seed: int) -> Counter[int]:
    """Send ``count`` changes of the recorder's settings; how many were answered with which status.

    What is taken is kept and served as it was sent, what is not changes nothing.
    """
    chance, statuses = random.Random(seed), Counter[int]()
    one = "/orgs/acme/plugins/recorder"
    good: dict[str, Any] = {"config": {"value": "x", "count": 1, "flag": True, "extra": {"a": [1]}}}
    before = manager.put("acme", **good)["config"]
    for _ in range(count):
        data = _damaged(good, chance)
        answer = manager.host.request("PUT", f"/api/v1{one}", data, {"Content-Type": "application/json"})
        statuses[answer.status] += 1
        kept = manager.get(one)["config"]
        if answer.status == 200:
            sent = json.loads(data or b"{}")
            if "config" in sent:
                wanted = {key: value for key, value in sent["config"].items() if value is not None}
                shown = {key: value for key, value in kept.items() if value != "********"}
                assert shown == {key: value for key, value in wanted.items() if key in shown}, (data, kept)
                assert set(wanted) == set(kept), (data, kept)
            before = kept
        else:
            assert answer.status in (400, 413, 422), (data, answer)
            assert isinstance(answer.json()["error"], str)
            assert kept == before, data
    assert "an internal error" not in manager.host.log
    return statuses
