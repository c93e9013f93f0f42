"""Config as a plugin reads it: one org's values, or, before any org is known, references to fields."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ._checks import checked
from ._registry import Registry
from .errors import ConfigError, RegistrationError
from .types import ConfigFieldDescriptor, ConfigFieldReference, ConfigFieldType

__all__ = ["ConfigFields", "OrgConfig"]

_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no", ""})
Warn = Callable[[str], None]


def parse_env(kind: ConfigFieldType, text: str) -> Any:
    """Read an environment variable's text as a value of ``kind``. Raises ``ValueError`` or the like if it is none."""
    match kind:
        case "string":
            return text
        case "number":
            number: int | float
            try:
                number = int(text.strip())
            except ValueError:
                number = float(text.strip())
            if not math.isfinite(number):
                raise ValueError("not a finite number")
            return number
        case "boolean":
            word = text.strip().lower()
            if word in _TRUE:
                return True
            if word in _FALSE:
                return False
            raise ValueError("not one of true, 1, yes, false, 0, no or empty")
        case "json":
            return msgspec.json.decode(text.encode())


class ConfigFields:
    """``ctx.config`` before any org is known: fields, not values."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @checked
    def field(self, name: str) -> ConfigFieldReference:
        """A reference to a registered field. Raises ``RegistrationError`` if there is none of that name."""
        if name not in self._registry.config:
            raise RegistrationError(f"config field {name!r} is not registered; call register.config first")
        return ConfigFieldReference(name)


class OrgConfig:
    """``ctx.config`` of one org: stored values, with the field's environment variable and default behind them.

    ``env`` holds the allow-listed variables that are set on the host, and nothing else of its environment.
    """

    def __init__(
        self,
        schema: Mapping[str, ConfigFieldDescriptor],
        values: Mapping[str, Any],
        env: Mapping[str, str],
        warn: Warn,
    ) -> None:
        self._schema = schema
        self._values = values
        self._env = env
        self._warn = warn

    @checked
    def get(self, key: str) -> Any:
        """The value of ``key``: stored, else from its environment variable, else its default, else ``None``.

        Raises ``ConfigError`` if the field is ``required`` and none of these gives a value.
        """
        value = self.get_optional(key)
        if value is None and (descriptor := self._schema.get(key)) is not None and descriptor.get("required"):
            raise ConfigError(key)
        return value

    @checked
    def get_optional(self, key: str) -> Any:
        """As ``get``, but ``None`` where ``get`` raises."""
        stored = self._values.get(key)
        if stored is not None:
            return stored
        descriptor = self._schema.get(key)
        if descriptor is None:
            self._warn(f"config field {key!r} is not registered and has no stored value")
            return None
        name = descriptor.get("env")
        if name is not None and name in self._env:
            try:
                return parse_env(descriptor["type"], self._env[name])
            except (ValueError, OverflowError, RecursionError):
                # The text itself may be a secret: say which variable, never what is in it.
                self._warn(f"environment variable {name} for config field {key!r} is not a valid {descriptor['type']}")
        return descriptor.get("default")

    def keys(self) -> list[str]:
        """All registered fields, then stored keys that no field names."""
        return [*self._schema, *(key for key in self._values if key not in self._schema)]

    @checked
    def to_env(self, mapping: Mapping[str, str]) -> dict[str, str]:
        """Render fields for a child process: ``{field: ENV_NAME}`` to ``{ENV_NAME: text}``, unset ones left out."""
        result: dict[str, str] = {}
        for key, name in mapping.items():
            value = self.get_optional(key)
            if value is None:
                continue
            if isinstance(value, str):
                result[name] = value
            else:  # true, 1.5, {"a": 1}: JSON's spelling is what other runtimes read back
                result[name] = msgspec.json.encode(value).decode()
        return result
