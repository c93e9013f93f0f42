"""What the programs that a worker starts find in their environment, and the worker itself does not.

Python's own sockets get to the broker without a proxy (``network``), and libraries that saw one in ``os.environ`` would
go there instead. So C's environment has it, which a program inherits, and ``subprocess`` adds it where an environment
is given.
"""

import functools
import os
import subprocess
from typing import Any, Final

__all__ = ["proxy_variables", "use_proxy"]

_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")


def proxy_variables(url: str) -> dict[str, str]:
    """What has programs use the proxy at ``url``, credentials included, for every host: curl, git, pip, Python, Node,
    and what is made with Go."""
    lower = dict.fromkeys(_PROXIES, url) | {"no_proxy": ""}
    return lower | {name.upper(): value for name, value in lower.items()} | {"NODE_USE_ENV_PROXY": "1"}


def use_proxy(url: str) -> None:
    """Give ``proxy_variables`` to all programs that this process starts from now on. Called once."""
    variables = proxy_variables(url)
    for name, value in variables.items():
        os.putenv(name, value)  # for C, and not seen in os.environ
    original = subprocess.Popen.__init__

    @functools.wraps(original)
    def start(self: Any, *args: Any, **options: Any) -> None:
        if options.get("env") is not None:
            options["env"] = {**variables, **options["env"]}
        original(self, *args, **options)

    setattr(subprocess.Popen, "__init__", start)  # noqa: B010  # not for a type checker's eyes
