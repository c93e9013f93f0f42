"""The environment of every child, fixed: nothing of the host's gets in, whatever the host was started with."""

from typing import Final

__all__ = ["MINIMAL_ENVIRONMENT"]

MINIMAL_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "USER": "plugin",  # its user has no name in any file, so getpass.getuser() would raise
    "LOGNAME": "plugin",
    "TMPDIR": "/tmp",
}
