"""What a plugin registers in ``on_initialize``, checked as it is registered."""

import inspect
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ._checks import checked
from .errors import CapabilityError, RegistrationError
from .types import (
    Capability,
    ConfigFieldDescriptor,
    ConfigFieldReference,
    ConfigFieldType,
    HTTPMethod,
    PageSlot,
)

__all__ = ["RESERVED_PATHS", "Register", "RegisterAuth", "Registry"]

Handler = Callable[..., Any]

RESERVED_PATHS = frozenset(
    {
        "/metadata",
        "/health",
        "/validate-auth",
        "/config-update",
        "/disable",
        "/mcp",
        "/mcp/list-tools",
        "/mcp/call-tool",
    }
)
"""Paths below a worker's root that the host itself answers."""

_DESCRIPTOR_KEYS = tuple(ConfigFieldDescriptor.__annotations__)
_PATH_SEGMENT = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z0-9._~!$&'()*+,;=:@%-]*")
# Bounds on what the host must hold per plugin: far above any real plugin, far below what hurts.
_MAX_ENTRIES = 1_000
_MAX_TEXT = 4_096


def _bounded(value: str, what: str, *, empty: bool = False) -> str:
    if not empty and not value.strip():
        raise RegistrationError(f"{what} must not be empty")
    if len(value) > _MAX_TEXT:
        raise RegistrationError(f"{what} is {len(value)} characters long; at most {_MAX_TEXT} are allowed")
    return value


def default_matches(kind: ConfigFieldType, value: object) -> bool:
    """Whether ``value`` is a value of the config type ``kind``; ``number`` refuses bool, NaN and infinities."""
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "number":
            try:
                return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            except OverflowError:  # an integer beyond what a number is in JSON's other readers
                return False
        case "json":
            try:
                msgspec.json.encode(value)
            except (TypeError, ValueError, RecursionError, OverflowError):
                return False
            return True


class Registry:
    """Everything one plugin registered, in the order it did; ``metadata()`` is its public form."""

    def __init__(self, capabilities: Iterable[str], env: Iterable[str]) -> None:
        self.capabilities = frozenset(capabilities)
        self.env = frozenset(env)
        self.config: dict[str, ConfigFieldDescriptor] = {}
        self.auth: list[dict[str, Any]] = []
        self.routes: list[tuple[str, str, Handler]] = []
        self.ui: list[dict[str, Any]] = []
        self.pages: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._frozen = False

    def need(self, capability: Capability, call: str) -> None:
        """Raise ``CapabilityError`` unless the manifest declares ``capability``."""
        if capability not in self.capabilities:
            raise CapabilityError(
                f"{call} needs the capability {capability!r}: add it to `capabilities` in the plugin's manifest"
            )

    def change(self, capability: Capability, call: str) -> None:
        """As ``need``, for calls that register something: only ``on_initialize`` may make them."""
        self.need(capability, call)
        if self._frozen:
            raise RegistrationError(f"{call} is only possible in on_initialize; the plugin is already loaded")

    def freeze(self) -> None:
        """Refuse every further registration."""
        self._frozen = True

    def metadata(self) -> dict[str, Any]:
        """The static part of ``GET /metadata``: what the author gave and nothing else."""
        schema: dict[str, dict[str, Any]] = {}
        for name, descriptor in self.config.items():
            # A default for a sensitive field is a secret in the code: it stays in the sandbox.
            hidden = ("default",) if descriptor.get("sensitive") else ()
            schema[name] = {key: value for key, value in descriptor.items() if key not in hidden}
        return {
            "configSchema": schema,
            "authMethods": self.auth,
            "uiExtensions": self.ui,
            "pages": self.pages,
            "routes": [{"method": method, "path": path} for method, path, _ in self.routes],
        }


class RegisterAuth:
    """``ctx.register.auth``: the ways in which an org can connect its account."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def _add(self, descriptor: dict[str, Any]) -> None:
        if any(known["id"] == descriptor["id"] for known in self._registry.auth):
            raise RegistrationError(f"auth method id {descriptor['id']!r} is registered twice; ids are unique")
        self._registry.auth.append(descriptor)

    def _field(self, name: str, call: str) -> str:
        if name not in self._registry.config:
            raise RegistrationError(
                f"{call} refers to config field {name!r}, which is not registered; call register.config first"
            )
        return name

    @checked
    def api_key(self, *, id: str, label: str, config_field: str) -> None:
        """Offer a key that the org's admin pastes into ``config_field``.

        Raises ``CapabilityError`` without the capability ``auth``, ``RegistrationError`` for an unknown field or a
        repeated id.
        """
        self._registry.change("auth", "register.auth.api_key()")
        self._add(
            {
                "type": "apiKey",
                "id": _bounded(id, "id"),
                "label": _bounded(label, "label"),
                "configField": self._field(config_field, "register.auth.api_key()"),
            }
        )

    @checked
    def oauth2(
        self,
        *,
        id: str,
        label: str,
        authorization_url: str,
        token_url: str,
        scopes: Sequence[str] = (),
        client_id: ConfigFieldReference,
        client_secret: ConfigFieldReference,
    ) -> None:
        """Offer an OAuth 2 authorization-code flow (RFC 6749); client id and secret come from config fields.

        Raises ``CapabilityError`` without the capability ``auth``, ``RegistrationError`` for an unknown field, a
        repeated id or an address that is not an absolute http(s) URL.
        """
        call = "register.auth.oauth2()"
        self._registry.change("auth", call)
        for what, url in (("authorization_url", authorization_url), ("token_url", token_url)):
            try:
                parts = urlsplit(url)
            except ValueError:
                parts = None
            if parts is None or parts.scheme not in ("https", "http") or not parts.hostname:
                raise RegistrationError(f"{call}: {what} must be an absolute http(s) URL, not {url!r}")
            _bounded(url, what)
        if isinstance(scopes, str):
            raise RegistrationError(f"{call}: scopes must be a list of strings, not one string")
        self._add(
            {
                "type": "oauth2",
                "id": _bounded(id, "id"),
                "label": _bounded(label, "label"),
                "authorizationUrl": authorization_url,
                "tokenUrl": token_url,
                "scopes": [_bounded(scope, "scope") for scope in scopes],
                "clientId": self._field(client_id.name, call),
                "clientSecret": self._field(client_secret.name, call),
            }
        )


class Register:
    """``ctx.register``: everything a plugin may declare, in ``on_initialize`` only."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.auth = RegisterAuth(registry)

    @checked
    def config(self, schema: Mapping[str, ConfigFieldDescriptor]) -> None:
        """Add config fields: ``{name: descriptor}``. Several calls merge; a field is registered once.

        Raises ``TypeCheckError`` for a descriptor of the wrong shape and ``RegistrationError`` for an ``env`` that the
        manifest does not list, a ``default`` of another type, or a field registered before.
        """
        self._registry.change("config", "register.config()")
        for name, descriptor in schema.items():
            what = f"config field {_bounded(name, 'a config field name')!r}"
            if name in self._registry.config:
                raise RegistrationError(f"{what} is registered twice")
            unknown = sorted(set(descriptor) - set(_DESCRIPTOR_KEYS))
            if unknown:
                raise RegistrationError(f"{what}: unknown key {unknown[0]!r}; allowed: {', '.join(_DESCRIPTOR_KEYS)}")
            kind = descriptor["type"]
            env = descriptor.get("env")
            if env is not None and env not in self._registry.env:
                listed = ", ".join(sorted(self._registry.env)) or "nothing"
                raise RegistrationError(
                    f"{what}: environment variable {env!r} is not in the manifest's `env` list (it lists {listed})"
                )
            default = descriptor.get("default")
            if default is not None and not default_matches(kind, default):
                raise RegistrationError(f"{what}: default {reprlib.repr(default)} is not a valid {kind}")
            for key in ("label", "description", "placeholder"):
                _bounded(str(descriptor.get(key, "")), f"{what}: {key}", empty=True)
            self._room(self._registry.config, "config fields")
            self._registry.config[name] = descriptor

    @checked
    def route(self, method: HTTPMethod, path: str, handler: Handler) -> None:
        """Serve ``method path`` with ``handler(request)``; ``{name}`` in the path is one segment, given in ``params``.

        Raises ``RegistrationError`` for a malformed path or a (method, path) registered before. A path of the host's
        own is kept but never reached, and a warning says so.
        """
        self._registry.change("routes", "register.route()")
        _bounded(path, "a route's path")
        if not path.startswith("/"):
            raise RegistrationError(f"route path {path!r} must start with '/'")
        segments = path[1:].split("/")
        try:
            inspect.signature(handler).bind(object())
        except (TypeError, ValueError):
            name = getattr(handler, "__qualname__", repr(handler))
            raise RegistrationError(f"the handler of {method} {path}, {name}, must take exactly one Request") from None
        names = [segment[1:-1] for segment in segments if segment.startswith("{")]
        for segment in segments:
            if not _PATH_SEGMENT.fullmatch(segment):
                raise RegistrationError(
                    f"route path {path!r}: segment {segment!r} is neither plain URL characters nor one {{parameter}}"
                )
        if len(set(names)) != len(names):
            raise RegistrationError(f"route path {path!r} names a parameter twice")
        shape = [segment if not segment.startswith("{") else "{}" for segment in segments]
        for known_method, known_path, _ in self._registry.routes:
            known = [s if not s.startswith("{") else "{}" for s in known_path[1:].split("/")]
            if known_method == method and known == shape:
                raise RegistrationError(f"route {method} {path} is registered twice (as {known_path})")
        if path in RESERVED_PATHS:
            self._registry.warnings.append(
                f"route {method} {path} is never reached: the host answers {path} itself; choose another path"
            )
        self._room(self._registry.routes, "routes")
        self._registry.routes.append((method, path, handler))

    @checked
    def ui(self, *, slot: str, component: str) -> None:
        """Show ``component`` (a path inside the plugin's folder) in a ``slot`` of the product's interface."""
        self._registry.change("ui", "register.ui()")
        self._room(self._registry.ui, "UI extensions")
        self._registry.ui.append({"slot": _bounded(slot, "slot"), "component": _bounded(component, "component")})

    @checked
    def page(
        self,
        *,
        id: str,
        title: str,
        component: str,
        icon: str | None = None,
        slot: PageSlot | None = None,
        requires_setup: bool | None = None,
    ) -> None:
        """Add a page; ids are unique. Only what is given appears in the metadata."""
        self._registry.change("ui", "register.page()")
        if any(page["id"] == id for page in self._registry.pages):
            raise RegistrationError(f"page id {id!r} is registered twice; ids are unique")
        page: dict[str, Any] = {
            "id": _bounded(id, "id"),
            "title": _bounded(title, "title"),
            "component": _bounded(component, "component"),
        }
        optional = {"icon": icon, "slot": slot, "requiresSetup": requires_setup}
        page.update({key: value for key, value in optional.items() if value is not None})
        self._room(self._registry.pages, "pages")
        self._registry.pages.append(page)

    def _room(self, entries: Sequence[Any] | Mapping[str, Any], what: str) -> None:
        if len(entries) >= _MAX_ENTRIES:
            raise RegistrationError(f"more than {_MAX_ENTRIES} {what} are registered")
