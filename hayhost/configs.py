"""An org's settings as they come from outside and go back there: checked against the plugin's schema, and masked."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET

from .errors import InvalidError
from .installs import Auth, Installation
from .logs import MASK, secrets_in
from .metadata import ApiKey, ConfigField, Metadata
from .version import Version

__all__ = [
    "MASK",
    "MAX_CONFIG",
    "Masked",
    "check_auth",
    "check_config",
    "masked",
    "secrets_of",
    "sensitive_fields",
    "without_nulls",
]

MAX_CONFIG: Final = 256 << 10
"""Bytes of config, and of credentials: they go to the worker in one frame, perhaps twice."""

_TYPES: Final = {"string": "a string", "number": "a finite number", "boolean": "true or false", "json": "JSON"}


class Masked(msgspec.Struct, frozen=True):
    """What may be shown of an installation's settings."""

    config: dict[str, Any]
    auth: Auth | None


def sensitive_fields(metadata: Metadata) -> frozenset[str]:
    """The names of the fields that are encrypted in the store and masked in answers."""
    return frozenset(name for name, field in metadata.config_schema.items() if field.sensitive is True)


def secrets_of(version: Version, config: Mapping[str, Any], auth: Auth | None) -> list[str]:
    """What a worker of ``version`` knows with these settings and must not tell: sensitive fields, which may be given
    by the environment, and everything in the credentials."""
    sensitive = sensitive_fields(version.metadata)
    secrets = [text for name in sensitive for text in secrets_in(config.get(name))]
    schema = version.metadata.config_schema
    secrets += [text for name in sensitive if (text := version.env.get(str(schema[name].env))) is not None]
    return [*secrets, *secrets_in(auth.credentials if auth is not None else None)]


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what counts as unset."""
    return {name: value for name, value in config.items() if value is not None}


def masked(installation: Installation, sensitive: Collection[str]) -> Masked:
    """The settings without secrets: those of ``sensitive`` fields, and everything in the credentials."""
    config = {name: MASK if name in sensitive else value for name, value in installation.config.items()}
    auth = installation.auth
    shown = None if auth is None else Auth(auth.method_id, dict.fromkeys(auth.credentials, MASK))
    return Masked(config, shown)


def unmask(given: Mapping[str, Any], stored: Mapping[str, Any], secret: Iterable[str]) -> dict[str, Any]:
    """``given`` with the stored value wherever a secret is only the mask of one, as answers have it."""
    whole = dict(given)
    for name in secret:
        if whole.get(name) == MASK and name in stored:
            whole[name] = stored[name]
    return whole


def check_config(version: Version, config: Mapping[str, Any], before: Installation | None) -> dict[str, Any]:
    """``config`` as it is to be stored. Raises ``InvalidError`` with every problem by its field.

    Fields that the plugin does not register any more may stay as they are.
    """
    schema = version.metadata.config_schema
    stored = before.config if before is not None else {}
    whole = without_nulls(unmask(config, stored, sensitive_fields(version.metadata)))
    problems: dict[str, str] = {}
    for name, value in whole.items():
        field = schema.get(name)
        if field is None:
            if stored.get(name, UNSET) != value:
                known = ", ".join(schema) or "none"
                problems[f"config.{name[:100]}"] = f"there is no such field; there are: {known[:300]}"
        elif not _fits(field, value):
            problems[f"config.{name}"] = f"must be {_TYPES[field.type]}, not {_kind(value)}"
        elif field.sensitive is True and value == MASK:
            problems[f"config.{name}"] = "is masked, and nothing is stored that it could stand for"
    given_by_auth = {method.config_field for method in version.metadata.auth_methods if isinstance(method, ApiKey)}
    for name, field in schema.items():
        if (
            field.required is True
            and name not in whole
            and field.default is UNSET
            and field.env not in version.env
            and name not in given_by_auth
        ):
            problems.setdefault(f"config.{name}", "is required")
    if problems:
        raise InvalidError(problems)
    return whole


def check_auth(version: Version, auth: Auth, before: Installation | None) -> Auth:
    """``auth`` as it is to be stored. Raises ``InvalidError``."""
    methods = [method.id for method in version.metadata.auth_methods]
    if auth.method_id not in methods:
        known = ", ".join(methods) or "none"
        raise InvalidError({"auth.methodId": f"there is no such auth method; there are: {known[:300]}"})
    stored = before.auth if before is not None else None
    if stored is not None and stored.method_id == auth.method_id:
        auth = Auth(auth.method_id, unmask(auth.credentials, stored.credentials, auth.credentials))
    problems = {
        f"auth.credentials.{name[:100]}": "is masked, and nothing is stored that it could stand for"
        for name, value in auth.credentials.items()
        if value == MASK
    }
    if not auth.credentials:
        problems["auth.credentials"] = "must not be empty; null removes the credentials"
    if problems:
        raise InvalidError(problems)
    return auth


def _fits(field: ConfigField, value: Any) -> bool:
    match field.type:
        case "string":
            return isinstance(value, str)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "boolean":
            return isinstance(value, bool)
        case "json":
            return True


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
