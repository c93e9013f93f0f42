"""``hayhost rollback``: have a running host serve the version of a plugin before the one that it serves."""

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final

import click

from hayhost.errors import HostError

__all__ = ["rollback"]

_TIMEOUT: Final = 120.0
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,200}")
_VARIABLE: Final = "HAYHOST_TOKEN"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A host sends nobody elsewhere, and a token is for it alone."""


def rollback(plugin: str, url: str, token_file: Path | None = None) -> None:
    """Ask the host at ``url``. Raises ``HostError`` if it cannot be reached or refuses."""
    path = f"/api/v1/plugins/{urllib.parse.quote(plugin, safe='')}/rollback"
    headers = _authorization(token_file)
    # Without proxies, as the host is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
    try:
        request = urllib.request.Request(url.rstrip("/") + path, b"", headers, method="POST")
        with opener.open(request, timeout=_TIMEOUT) as answer:
            current = json.load(answer)["current"]
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"the host answered {error.code}"
        hint = f"; set {_VARIABLE}, or give --token-file" if error.code == 401 and not headers else ""
        raise HostError(f"{plugin}: {message}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HostError(f"no host answers at {url}: {getattr(error, 'reason', error)}") from None
    click.echo(f"{plugin}: serves version {current['version']} again (content {current['digest'][:12]})")


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
