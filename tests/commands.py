"""The ``hayhost`` commands as a shell runs them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from .conftest import LIMIT


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of hayhost's, and with ``env``."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("HAY")}, **(env or {})}


def run_hayhost(
    *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, stdin: str | None = None
) -> Done:
    """Run ``hayhost`` with ``arguments`` to its end, in a folder of its own unless ``cwd`` is another."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "hayhost", *map(str, arguments)],
            env=environment(env),
            cwd=cwd or empty,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    return Done(done.returncode, done.stdout, done.stderr)
