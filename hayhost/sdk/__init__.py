"""What plugin authors import, and all they may import, from hayhost."""

from .config import ConfigFields, OrgConfig
from .contexts import (
    HayAuthValidationContext,
    HayConfigUpdateContext,
    HayDisableContext,
    HayEnableContext,
    HayGlobalContext,
    HayStartContext,
)
from .definition import HOOKS, HayPlugin, define_hay_plugin
from .errors import (
    BadRequestError,
    CapabilityError,
    ConfigError,
    DefinitionError,
    HTTPError,
    PluginError,
    RegistrationError,
    TypeCheckError,
)
from .http import FormFile, Headers, Request, Response
from .logger import Logger
from .mcp import AuthReader, Mcp, McpInitContext
from .types import AuthState, ConfigFieldDescriptor, ConfigFieldReference, McpTool, Org

__all__ = [
    "HOOKS",
    "AuthReader",
    "AuthState",
    "BadRequestError",
    "CapabilityError",
    "ConfigError",
    "ConfigFieldDescriptor",
    "ConfigFieldReference",
    "ConfigFields",
    "DefinitionError",
    "FormFile",
    "HTTPError",
    "HayAuthValidationContext",
    "HayConfigUpdateContext",
    "HayDisableContext",
    "HayEnableContext",
    "HayGlobalContext",
    "HayPlugin",
    "HayStartContext",
    "Headers",
    "Logger",
    "Mcp",
    "McpInitContext",
    "McpTool",
    "Org",
    "OrgConfig",
    "PluginError",
    "RegistrationError",
    "Request",
    "Response",
    "TypeCheckError",
    "define_hay_plugin",
]
