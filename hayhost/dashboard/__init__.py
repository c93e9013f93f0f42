"""The dashboard: pages for a browser, without a build step, which speak to the management API as any client does.

Nothing but the files in ``static`` is served, each by a path that is known in advance. What the browser runs is only
them: no inline script or style, nothing from elsewhere, and no way from text to markup.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from hayhost.answers import Answer

__all__ = ["FILES", "POLICY", "StaticFile"]

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What a browser may load and run for the dashboard."""

_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    # The window of a provider, for OAuth2, is opened by the dashboard and closed by it.
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304
}
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class StaticFile(msgspec.Struct, frozen=True):
    """A file as it is sent. ``tag`` is its entity tag."""

    body: bytes
    type: str
    tag: str

    def answer(self, known: str) -> Answer:
        """The file, unless its tag is among those of the ``If-None-Match`` that the client has ``known``."""
        headers = {**_HEADERS, "Content-Type": self.type, "ETag": self.tag}
        if self.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Answer(304, None, headers)
        return Answer(200, self.body, headers)


def _read() -> dict[str, StaticFile]:
    files: dict[str, StaticFile] = {}
    for path in sorted((Path(__file__).parent / "static").iterdir()):
        body = path.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        files["/" if path.name == "index.html" else f"/dashboard/{path.name}"] = StaticFile(
            body, _TYPES[path.suffix], tag
        )
    return files


FILES: Final = _read()
"""What is served, by path."""
