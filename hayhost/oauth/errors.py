"""What can go wrong with OAuth2; each message is one line, and none has a secret in it."""

from hayhost.errors import RequestError

__all__ = ["NotConfiguredError", "OAuthError", "ProviderError", "RefusedError"]


class OAuthError(RequestError):
    """An authorization that is not what it should be."""

    status = 400


class NotConfiguredError(OAuthError):
    """Something is missing on this side: the client id, or the plugin's auth method."""

    status = 409


class ProviderError(OAuthError):
    """The provider cannot be reached, may not be reached, or answers what is not OAuth2."""

    status = 502


class RefusedError(OAuthError):
    """The provider said no. ``code`` is its word for why, such as ``access_denied``."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
