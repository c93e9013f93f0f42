"""A plugin zygote that is executed rather than forked, for a plugin that shares no memory with any other process.

``python -I -m sandbox.strict SPEC CONTROL OUTPUT KEEPER``, all of them descriptors, from the nursery only.
"""

import os
import sys
from typing import NoReturn

from .nursery import preload
from .zygote import run

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of the executed process."""
    reader, control, output, keeper = map(int, sys.argv[1:])
    with open(reader, "rb") as pipe:
        spec = pipe.read()
    preload()
    run(spec, control, output, keeper)
    os._exit(0)


if __name__ == "__main__":
    main()
