"""What a zygote says its plugin registered, checked field by field: a zygote is the plugin author's process."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from .errors import PluginLoadError
from .manifest import Manifest

__all__ = ["ApiKey", "ConfigField", "Metadata", "OAuth2", "Page", "Route", "UiExtension", "read_metadata"]

Text = Annotated[str, msgspec.Meta(max_length=4_096)]
NonEmpty = Annotated[str, msgspec.Meta(min_length=1, max_length=4_096)]
Path = Annotated[str, msgspec.Meta(max_length=4_096, pattern=r"^/[^\x00-\x20\x7f?#]*\Z")]
_Many = msgspec.Meta(max_length=1_000)


class _Checked(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    pass


class ConfigField(_Checked):
    """One field of ``configSchema``; what the author did not give stays unset and is not shown."""

    type: Literal["string", "number", "boolean", "json"]
    label: Text | UnsetType = UNSET
    description: Text | UnsetType = UNSET
    placeholder: Text | UnsetType = UNSET
    required: bool | UnsetType = UNSET
    env: NonEmpty | UnsetType = UNSET
    sensitive: bool | UnsetType = UNSET
    default: Any = UNSET


class ApiKey(_Checked, tag_field="type", tag="apiKey"):
    """An auth method with a key in a config field."""

    id: NonEmpty
    label: NonEmpty
    config_field: NonEmpty


class OAuth2(_Checked, tag_field="type", tag="oauth2"):
    """An auth method with an OAuth 2 authorization-code flow."""

    id: NonEmpty
    label: NonEmpty
    authorization_url: NonEmpty
    token_url: NonEmpty
    scopes: Annotated[list[NonEmpty], _Many]
    client_id: NonEmpty
    client_secret: NonEmpty


class UiExtension(_Checked):
    """A component in a slot of the product's interface."""

    slot: NonEmpty
    component: NonEmpty


class Page(_Checked):
    """A page of the plugin's own."""

    id: NonEmpty
    title: NonEmpty
    component: NonEmpty
    icon: Text | UnsetType = UNSET
    slot: Literal["standalone", "after-settings", "before-settings"] | UnsetType = UNSET
    requires_setup: bool | UnsetType = UNSET


class Route(_Checked):
    """An HTTP route."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: Path


class Metadata(_Checked):
    """The static part of ``GET /metadata``."""

    config_schema: Annotated[dict[NonEmpty, ConfigField], _Many] = {}
    auth_methods: Annotated[list[ApiKey | OAuth2], _Many] = []
    ui_extensions: Annotated[list[UiExtension], _Many] = []
    pages: Annotated[list[Page], _Many] = []
    routes: Annotated[list[Route], _Many] = []


_decoder = msgspec.json.Decoder(Metadata)


def read_metadata(encoded: bytes, manifest: Manifest) -> Metadata:
    """Decode what a zygote sent. Raises ``PluginLoadError`` if it is not metadata that ``manifest`` allows."""
    try:
        metadata = _decoder.decode(encoded)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PluginLoadError(f"the plugin's metadata is malformed: {error}") from None
    for name, field in metadata.config_schema.items():
        if field.env is not UNSET and field.env not in manifest.env:
            raise PluginLoadError(f"config field {name!r}: {field.env!r} is not in the manifest's `env` list")
    return metadata
