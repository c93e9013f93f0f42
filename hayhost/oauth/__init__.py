"""OAuth2: authorizations, and tokens that are refreshed before they expire."""

from .authorization import Authorizations
from .errors import NotConfiguredError, OAuthError, ProviderError, RefusedError
from .outbound import Outbound
from .provider import Described, Provider
from .refresher import Refresher

__all__ = [
    "Authorizations",
    "Described",
    "NotConfiguredError",
    "OAuthError",
    "Outbound",
    "Provider",
    "ProviderError",
    "Refresher",
    "RefusedError",
]
