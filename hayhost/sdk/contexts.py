"""The one argument of each hook. A context has what its hook may use and nothing else."""

from typing import Any, NoReturn

from ._registry import Register, Registry
from .config import ConfigFields, OrgConfig
from .logger import Logger
from .mcp import AuthReader, Mcp
from .types import Org

__all__ = [
    "HayAuthValidationContext",
    "HayConfigUpdateContext",
    "HayDisableContext",
    "HayEnableContext",
    "HayGlobalContext",
    "HayStartContext",
]

# Which hooks have an attribute that authors look for: the text of the error where it is missing.
_WHERE = {
    "register": "on_initialize (HayGlobalContext): routes, config, auth and UI are registered once per plugin",
    "org": "every hook but on_initialize, which knows no org",
    "auth": "on_start (HayStartContext) and on_validate_auth (HayAuthValidationContext)",
    "mcp": "on_start (HayStartContext)",
    "state": "on_start (HayStartContext)",
    "config": "on_initialize, on_start, on_validate_auth, on_config_update and on_enable",
}


class _Context:
    def __getattr__(self, name: str) -> NoReturn:
        where = _WHERE.get(name)
        hint = f"; it is in {where}" if where else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}", name=name, obj=self)


class HayGlobalContext(_Context):
    """For ``on_initialize`` and plugin factories: knows no org."""

    def __init__(self, registry: Registry, logger: Logger) -> None:
        self.register = Register(registry)
        self.config = ConfigFields(registry)
        self.logger = logger


class HayStartContext(_Context):
    """For ``on_start`` and, as ``request.ctx``, for route handlers.

    ``state`` is a dict of the worker's own, in memory; it survives a hot reload.
    """

    def __init__(
        self, org: Org, config: OrgConfig, auth: AuthReader, mcp: Mcp, state: dict[str, Any], logger: Logger
    ) -> None:
        self.org = org
        self.config = config
        self.auth = auth
        self.mcp = mcp
        self.state = state
        self.logger = logger


class HayAuthValidationContext(_Context):
    """For ``on_validate_auth``: config and auth are the ones under validation."""

    def __init__(self, org: Org, config: OrgConfig, auth: AuthReader, logger: Logger) -> None:
        self.org = org
        self.config = config
        self.auth = auth
        self.logger = logger


class HayConfigUpdateContext(_Context):
    """For ``on_config_update``: config is the new one."""

    def __init__(self, org: Org, config: OrgConfig, logger: Logger) -> None:
        self.org = org
        self.config = config
        self.logger = logger


class HayEnableContext(HayConfigUpdateContext):
    """For ``on_enable``: the plugin was installed or enabled again for this org."""


class HayDisableContext(_Context):
    """For ``on_disable`` and ``on_stop``."""

    def __init__(self, org: Org, logger: Logger) -> None:
        self.org = org
        self.logger = logger
