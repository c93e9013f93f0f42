"""The environment of every child, fixed: nothing of the host's gets in, whatever the host was started with."""

import os
import sys
from typing import Final

__all__ = ["MINIMAL_ENVIRONMENT", "program_path"]

MINIMAL_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "USER": "plugin",  # its user has no name in any file, so getpass.getuser() would raise
    "LOGNAME": "plugin",
    "TMPDIR": "/tmp",
}


def program_path() -> str:
    """Where the programs are that a plugin's manifest names: those that came with packages of this Python first."""
    return os.pathsep.join((os.path.dirname(sys.executable), MINIMAL_ENVIRONMENT["PATH"]))
