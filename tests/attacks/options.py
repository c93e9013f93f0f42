"""How to have a host with other isolation than it would choose."""

import functools
import subprocess
import sys
from collections.abc import Sequence

from .catalogue import LAYERS

__all__ = ["CONFIGURATIONS", "options_for", "supported"]

CONFIGURATIONS = ("none", *LAYERS, "all", *(f"without-{layer}" for layer in LAYERS))


@functools.cache
def supported() -> bool:
    """Whether this host can confine workers at all."""
    arguments = [sys.executable, "-P", "-m", "hayhost", "serve", "--help"]
    return "--isolation" in subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def options_for(configuration: str, available: Sequence[str] = LAYERS) -> tuple[str, ...]:
    """Options of ``hayhost serve``: ``none``, ``all``, one layer alone, or ``without-LAYER``, of those available."""
    if configuration == "all" or not supported():
        return ()
    if configuration == "none":
        return ("--isolation", "none", "--require", "none")
    without = configuration.removeprefix("without-")
    layers = [layer for layer in available if layer != without] if without != configuration else [configuration]
    return ("--layers", ",".join(layers), "--require", "none")
