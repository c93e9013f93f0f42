"""``python -m tests.fuzz --frames N --requests N --seed N``: ends with an error and its seed if there is one."""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from tests.conftest import write_plugin
from tests.hosting import hosting
from tests.managing import managed

from . import frames, http, inputs

_PART = 20_000
"""So much is done between two lines of progress, from a seed of its own."""


def _in_parts(name: str, count: int, seed: int, run: Callable[[int, int], object]) -> None:
    done, began = 0, time.monotonic()
    while done < count:
        part = min(_PART, count - done)
        came = run(part, seed + done)
        done += part
        print(f"{name}: {done} of {count} after {time.monotonic() - began:.0f} s, the last {part}: {came}", flush=True)


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=50_000, help="manifests, and metadata of zygotes")
    parser.add_argument("--settings", type=int, default=1_000, help="changes of settings")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    given = parser.parse_args()
    seed = given.seed
    print(f"seed {seed}", flush=True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    try:
        # Most go to the decoders alone: what they take is soon known, and the handles behind them are slower.
        _in_parts("frames for decoders", given.frames * 94 // 100, seed, frames.decode)
        _in_parts("frames for handles of workers", given.frames * 4 // 100, seed, frames.workers)
        _in_parts("frames for handles of zygotes", given.frames * 2 // 100, seed, frames.zygotes)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            _in_parts("metadata", given.documents, seed, inputs.metadata)
            (folder / "m").mkdir()
            _in_parts("manifests", given.documents, seed, lambda count, s: inputs.manifests(count, s, folder / "m"))
            write_plugin(folder / "plugins" / "p", http.MIRROR)
            with hosting(folder / "plugins", "--request-timeout", "5", writable=False) as host:
                _in_parts("requests", given.requests, seed, lambda count, s: dict(http.fuzz(host, count, s)))
            (folder / "managed").mkdir()
            (folder / "managed").chmod(0o755)
            with managed(folder / "managed", "--spares", 0) as manager:
                _in_parts("settings", given.settings, seed, lambda count, s: dict(inputs.settings(manager, count, s)))
    except BaseException:
        print(f"again: python -m tests.fuzz {' '.join(sys.argv[1:])} --seed {seed}", flush=True)
        raise


if __name__ == "__main__":
    main()
