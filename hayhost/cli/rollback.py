"""``hayhost rollback``: have a running host serve the version of a plugin before the one that it serves."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

import click

from hayhost.errors import HostError

__all__ = ["rollback"]

_TIMEOUT = 120.0


def rollback(plugin: str, url: str) -> None:
    """Ask the host at ``url``. Raises ``HostError`` if it cannot be reached or refuses."""
    path = f"/api/v1/plugins/{urllib.parse.quote(plugin, safe='')}/rollback"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the host is on this machine
    try:
        request = urllib.request.Request(url.rstrip("/") + path, b"", method="POST")
        with opener.open(request, timeout=_TIMEOUT) as answer:
            current = json.load(answer)["current"]
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"the host answered {error.code}"
        raise HostError(f"{plugin}: {message}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HostError(f"no host answers at {url}: {getattr(error, 'reason', error)}") from None
    click.echo(f"{plugin}: serves version {current['version']} again (content {current['digest'][:12]})")
