"""Errors that plugin authors raise or catch, one class per condition."""

from typeguard import TypeCheckError

__all__ = [
    "BadRequestError",
    "CapabilityError",
    "ConfigError",
    "DefinitionError",
    "HTTPError",
    "PluginError",
    "RegistrationError",
    "TypeCheckError",
]


class PluginError(Exception):
    """Something in the plugin's own code or configuration that its author can mend."""


class DefinitionError(PluginError):
    """The entry module does not export one well-formed ``define_hay_plugin(...)``."""


class RegistrationError(PluginError, ValueError):
    """A ``register`` call was given something that the contract does not allow."""


class CapabilityError(PluginError):
    """A call needs a capability that the manifest does not declare."""


class ConfigError(PluginError):
    """A required config field has no value; ``field`` names it."""

    def __init__(self, field: str, message: str | None = None) -> None:
        super().__init__(message or f"required config field {field!r} is not set for this organisation")
        self.field = field


class HTTPError(Exception):
    """Answer the request with ``status`` and ``{"error": message}``.

    Raises ``ValueError`` if ``status`` is not an error status (400 to 599).
    """

    def __init__(self, status: int, message: str) -> None:
        if not isinstance(status, int) or isinstance(status, bool) or not 400 <= status <= 599:
            raise ValueError(f"HTTPError status must be an integer from 400 to 599, not {status!r}")
        super().__init__(message)
        self.status = status
        self.message = str(message)


class BadRequestError(HTTPError, ValueError):
    """The request's body is not what the handler asked for; answers 400 unless it is caught."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)
