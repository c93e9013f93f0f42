"""``hayhost rollback``: have a running host serve the version of a plugin before the one that it serves."""

import urllib.parse
from pathlib import Path
from typing import Final

import click

from hayhost.errors import HostError

from .asking import Asking, NoHostError

__all__ = ["rollback"]

_TIMEOUT: Final = 120.0


def rollback(plugin: str, url: str, token_file: Path | None = None) -> None:
    """Ask the host at ``url``. Raises ``HostError`` if it cannot be reached or refuses."""
    path = f"/api/v1/plugins/{urllib.parse.quote(plugin, safe='')}/rollback"
    asking = Asking(url, token_file)
    try:
        current = asking.json("POST", path, timeout=_TIMEOUT)["current"]
    except NoHostError:
        raise
    except HostError as error:
        raise HostError(f"{plugin}: {error}") from None
    except (TypeError, KeyError):
        raise NoHostError(f"no host answers at {url}, but somebody else") from None
    click.echo(f"{plugin}: serves version {current['version']} again (content {current['digest'][:12]})")
