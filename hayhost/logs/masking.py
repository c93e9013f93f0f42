"""Known secrets in somebody else's text, replaced wherever they are found."""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, quote_plus

__all__ = ["MASK", "Masker", "secrets_in"]

MASK: Final = "********"
"""Stands for a secret wherever one is shown."""

# What is shorter is found in too much that is no secret.
_LEAST: Final = 6
# Of long credentials such as keys, lines may be printed one by one.
_LEAST_LINE: Final = 16
# Each is looked for in all that a worker says; the longest count, as short ones are found by chance.
_MOST: Final = 100
# Long texts are cut where they come from, perhaps within a secret: its beginning is masked, too.
_MAY_BE_CUT: Final = 480
_MAX_DEPTH: Final = 64
# A bearer token of a host's.
_TOKEN: Final = re.compile(r"hay_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")


def secrets_in(value: Any) -> Iterator[str]:
    """All text and all numbers in a JSON value."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case bool() | None:
                pass
            case str() as text:
                yield text
            case int() | float() as number:
                yield str(number)
            case dict() as mapping:
                waiting.extend(mapping.values())
            case list() as items:
                waiting.extend(items)


class Masker:
    """Replaces secrets, as they are and as they look in JSON, in Python's own notation, in URLs and in base64."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._forms: list[str] = []

    def add(self, secrets: Iterable[str]) -> None:
        """Look for these, too. What is shorter than six characters is not looked for."""
        parts = {
            part for secret in secrets for part in (secret, secret.strip(), *_lines(secret)) if len(part) >= _LEAST
        }
        if parts <= self._known:
            return
        self._known |= parts - {MASK}
        chosen = sorted(self._known, key=len, reverse=True)[:_MOST]
        self._forms = sorted({form for secret in chosen for form in _forms(secret)}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """``text`` without secrets; also without the beginning of one at its end, where it may have been cut."""
        if "hay_" in text:
            text = _TOKEN.sub(MASK, text)
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return self._without_end(text) if len(text) >= _MAY_BE_CUT else text

    def _without_end(self, text: str) -> str:
        rest, cut, told = text.rpartition("… (")
        if not cut or not told.endswith(" more characters)"):
            rest, told = text, ""
        for form in self._forms:
            start = form[:_LEAST]
            if (at := rest.rfind(start, max(0, len(rest) - len(form)))) >= 0 and form.startswith(rest[at:]):
                return rest[:at] + MASK + cut + told
        return text

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A JSON object without secrets, in names and in what they stand for. Raises ``ValueError`` for a deep one."""
        return {self.text(name): self._value(value, _MAX_DEPTH) for name, value in fields.items()}

    def _value(self, value: Any, levels: int) -> Any:
        if not levels:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(name): self._value(item, levels - 1) for name, item in value.items()}
            case list():
                return [self._value(item, levels - 1) for item in value]
            case int() | float() if not isinstance(value, bool) and str(value) in self._known:
                return MASK
            case _:
                return value


def _lines(secret: str) -> list[str]:
    lines = secret.splitlines()
    return [line.strip() for line in lines if len(line.strip()) >= _LEAST_LINE] if len(lines) > 1 else []


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield secret.replace("'", "\\'")
    data = secret.encode(errors="surrogatepass")
    yield quote(data, safe="")
    yield quote(data)
    yield quote_plus(data)
    for before in range(3):  # bytes in front of it, as of a user's name, move where its groups begin
        encoded = base64.b64encode(b"\0" * before + data).decode().rstrip("=")
        whole = encoded[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
        if len(whole) >= _LEAST:
            yield whole
            yield whole.replace("+", "-").replace("/", "_")
