"""Requests of commands to a running host."""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from hayhost.errors import HostError

__all__ = ["Asking", "NoHostError"]

_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,200}")
_VARIABLE: Final = "HAYHOST_TOKEN"


class NoHostError(HostError):
    """No host answers."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A host sends nobody elsewhere, and a token is for it alone."""


class Asking:
    """Asks the host at ``url``, with the token in ``token_file`` or the environment if there is one."""

    def __init__(self, url: str, token_file: Path | None) -> None:
        """Raises ``HostError`` if what should be a token is none."""
        self._url = url
        self._authorization = _authorization(token_file)
        # Without proxies, as the host is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)

    def open(self, method: str, path: str, *, timeout: float, headers: dict[str, str] | None = None) -> Any:
        """The answer, to be read and closed. Raises ``NoHostError``, and ``HostError`` if the host refuses."""
        body = b"" if method == "POST" else None
        try:
            request = urllib.request.Request(
                self._url.rstrip("/") + path, body, {**self._authorization, **(headers or {})}, method=method
            )
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            try:
                message = json.load(error)["error"]
            except (ValueError, KeyError, TypeError):
                message = f"the host answered {error.code}"
            needs = error.code == 401 and not self._authorization
            raise HostError(message + (f"; set {_VARIABLE}, or give --token-file" if needs else "")) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NoHostError(f"no host answers at {self._url}: {reason}") from None

    def json(self, method: str, path: str, *, timeout: float) -> Any:
        """The JSON of an answer. Raises as ``open``."""
        with self.open(method, path, timeout=timeout) as answer:
            try:
                return json.load(answer)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise NoHostError(f"no host answers at {self._url}: {error}") from None


def _authorization(token_file: Path | None) -> dict[str, str]:
    token, source = os.environ.get(_VARIABLE, ""), _VARIABLE
    if token_file is not None:
        source = str(token_file)
        try:
            token = token_file.read_text()
        except OSError as error:
            raise HostError(f"{token_file}: cannot be read: {error.strerror}") from None
        except ValueError:
            token = "\0"
    elif not token:
        return {}
    if not _TOKEN.fullmatch(token.strip()):
        raise HostError(f"{source}: is not a token")
    return {"Authorization": f"Bearer {token.strip()}"}
