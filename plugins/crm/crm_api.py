"""A small client of the CRM's API, on the standard library."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode

TIMEOUT_SECONDS = 10.0
MAX_RESPONSE_BYTES = 4 << 20
PAGE_SIZE = 50


class CrmError(Exception):
    """The CRM refused a call, or could not be asked; ``status`` is that of its answer, 502 if there is none."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class _EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Hands back every answer: errors for their body, redirects so that none is followed with a token."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class CrmApi:
    """Calls the API with one org's access token. Methods raise ``CrmError`` and, if not async, block."""

    def __init__(self, token: str, base: str) -> None:
        if not (token.isascii() and token.isprintable()):  # else the error of http.client would quote it
            raise CrmError("The access token has characters that no token has", 401)
        if not base.startswith(("https://", "http://")):  # urllib would open file:// as well
            raise CrmError("The API address must start with https://")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._base = base.rstrip("/")
        self._opener = urllib.request.build_opener(_EveryAnswer)

    def me(self) -> dict[str, Any]:
        """The user whose token it is."""
        return self._call("GET", "/me")

    def contact(self, id: str) -> dict[str, Any]:
        """One contact."""
        return self._call("GET", f"/contacts/{_segment(id)}")

    def update(self, id: str, fields: dict[str, str]) -> dict[str, Any]:
        """Change ``fields`` of a contact; the whole contact."""
        return self._call("PATCH", f"/contacts/{_segment(id)}", fields)

    def search(self, query: str, limit: int) -> list[Any]:
        """The contacts that fit best."""
        return _list(self._call("GET", f"/contacts/search?{urlencode({'q': query, 'limit': min(limit, PAGE_SIZE)})}"))

    async def pages(self, limit: int) -> AsyncIterator[list[Any]]:
        """All contacts, ``limit`` at most, page by page; the next one is fetched when it is asked for."""
        cursor = None
        while limit > 0:
            query = {"limit": min(limit, PAGE_SIZE), **({"after": cursor} if cursor else {})}
            answer = await asyncio.to_thread(self._call, "GET", f"/contacts?{urlencode(query)}")
            page = _list(answer)[:limit]
            yield page
            limit -= len(page)
            cursor = answer.get("next")
            if not page or not cursor:
                return

    def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, method=method, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                status: int = response.status
                answer = json.loads(response.read(MAX_RESPONSE_BYTES))  # a longer one is cut, and then not JSON
        except (OSError, HTTPException) as error:
            raise CrmError(f"The CRM could not be asked: {error}") from None
        except ValueError:
            raise CrmError("The CRM's answer is not JSON, or too long") from None
        if not isinstance(answer, dict):
            raise CrmError("The CRM's answer is not an object")
        if status != 200:
            raise CrmError(str(answer.get("message", f"The CRM answered {status}")), status)
        return answer


def _list(answer: dict[str, Any]) -> list[Any]:
    results = answer.get("results")
    return results if isinstance(results, list) else []


def _segment(id: str) -> str:
    """``id`` as one segment of a path, whatever characters it has."""
    if id in (".", ".."):
        raise CrmError("No such contact", 404)
    return quote(id, safe="")
