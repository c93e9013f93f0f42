"""What is said to have changed from one version to the next."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hayhost.errors import PluginLoadError
from hayhost.manifest import Manifest, Permissions
from hayhost.metadata import read_metadata
from hayhost.processes import Zygote
from hayhost.version import Version, differences, spec_of
from sandbox import wire
from sandbox.confinement import UNCONFINED

MANIFEST = Manifest(
    folder=Path("/plugins/p"),
    file=Path("/plugins/p/pyproject.toml"),
    name="p",
    version="1.0",
    entry="plugin.py",
    attribute=None,
    display_name="P",
    category="tool",
    capabilities=("routes",),
    env=("TOKEN",),
    permissions=Permissions(),
    sharing="fork",
    warnings=("from the manifest",),
)


class _Zygote:
    """As much of a zygote as a version looks at."""

    def __init__(self, loaded: wire.Loaded, threads: int) -> None:
        self.threads = threads
        self.loaded = SimpleNamespace(result=lambda: loaded)
        self.alive = True


def _version(
    metadata: dict[str, Any] | None = None, *, hooks: tuple[str, ...] = (), threads: int = 1, version: str = "1.0"
) -> Version:
    manifest = replace(MANIFEST, version=version)
    encoded = json.dumps(metadata or {}).encode()
    zygote = _Zygote(wire.Loaded(encoded, ["from the load"], list(hooks), []), threads)
    return Version(manifest, "digest", cast(Zygote, zygote), read_metadata(encoded, manifest))


def _routes(*paths: str) -> dict[str, Any]:
    return {"routes": [{"method": path.split()[0], "path": path.split()[1]} for path in paths]}


def _config(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"configSchema": {name: {"type": "string", **field} for name, field in fields.items()}}


def _key(label: str, field: str = "key") -> dict[str, Any]:
    return {"authMethods": [{"type": "apiKey", "id": "key", "label": label, "configField": field}]}


def _page(title: str) -> dict[str, Any]:
    return {"pages": [{"id": "main", "title": title, "component": "x.tsx"}]}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {}, []),
        (_routes("GET /a"), _routes("GET /a"), []),
        (_routes("GET /a", "GET /b"), _routes("GET /b", "GET /a"), []),
        (_routes("GET /a", "GET /b"), _routes("GET /b", "POST /a"), ["route -GET /a", "route +POST /a"]),
        (_config(a={}), _config(b={}), ["config field -a", "config field +b"]),
        (_config(a={}), _config(a={"required": True}), ["config field ~a"]),
        (_config(a={}, b={}), _config(b={}, a={}), []),
        ({}, _key("Key"), ["auth method +key"]),
        (_key("Key"), _key("Another name"), ["auth method ~key"]),
        (_key("Key"), _key("Key", "other"), ["auth method ~key"]),
        (_page("One"), _page("Two"), ["page ~main"]),
        (
            {"uiExtensions": [{"slot": "top", "component": "a.tsx"}]},
            {"uiExtensions": [{"slot": "top", "component": "b.tsx"}]},
            ["UI extension -top: a.tsx", "UI extension +top: b.tsx"],
        ),
        (_routes("GET /a"), {**_config(a={}), **_key("Key")}, ["route -GET /a", "config field +a", "auth method +key"]),
    ],
)
def test_differences(before: dict[str, Any], after: dict[str, Any], told: list[str]) -> None:
    assert differences(_version(before), _version(after)) == told


def test_differences_of_hooks_and_of_the_version() -> None:
    old, new = _version(hooks=("on_start",)), _version(hooks=("on_stop",), version="2.0")
    assert differences(old, new) == ["hook -on_start", "hook +on_stop", "version 1.0 -> 2.0"]


def test_the_secrets_of_a_config_default_are_not_told() -> None:
    (told,) = differences(_version(_config(a={})), _version(_config(a={"default": "hunter2"})))
    assert "hunter2" not in told


def test_a_version_that_left_threads_is_strict_and_says_why() -> None:
    assert not _version(threads=1).strict
    strict = _version(threads=3)
    assert strict.strict
    assert "2 thread(s)" in strict.strict_reason


def test_a_manifest_can_ask_for_strict_sharing() -> None:
    encoded = b"{}"
    manifest = replace(MANIFEST, sharing="strict")
    zygote = cast(Zygote, _Zygote(wire.Loaded(encoded, [], [], []), 1))
    assert "sharing" in Version(manifest, "digest", zygote, read_metadata(encoded, manifest)).strict_reason


def test_a_version_has_the_warnings_and_the_environment_of_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("OTHER", "secret")
    version = _version(_config(a={"env": "TOKEN"}))
    assert version.warnings == ["from the manifest", "from the load"]
    assert version.env == {"TOKEN": "secret"}


def test_the_spec_has_what_a_zygote_needs_and_no_more() -> None:
    spec = spec_of(MANIFEST, UNCONFINED, hook_timeout=3, instrument=True)
    assert (spec.folder, spec.entry, spec.name, spec.hook_timeout, spec.instrument) == (
        "/plugins/p",
        "plugin.py",
        "p",
        3,
        True,
    )
    assert not spec_of(MANIFEST, UNCONFINED, hook_timeout=3, instrument=False).instrument


@pytest.mark.parametrize(
    "said", [b"", b"\xff", b'{"configSchema": {"\xff": {"type": "string"}}}', b"[" * 100_000, b'{"x": 1}']
)
def test_metadata_that_is_none_is_a_plugin_that_does_not_load(said: bytes) -> None:
    with pytest.raises(PluginLoadError, match="metadata is malformed"):
        read_metadata(said, cast(Any, None))
