"""A small client of Stripe's API, on the standard library."""

import json
import re
import time
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlencode

TIMEOUT_SECONDS = 10.0
MAX_RESPONSE_BYTES = 4 << 20  # a full page of charges is well below 1 MiB


class StripeError(Exception):
    """Stripe refused a call, or could not be asked; ``status`` is that of its answer, ``None`` if there is none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Hands back every answer: no exception for an error, whose body we want, and no redirect to follow with a key."""

    def http_response(self, request: urllib.request.Request, response: HTTPResponse) -> HTTPResponse:
        return response

    https_response = http_response


class StripeApi:
    """Calls the API with one org's key. Every method blocks, at most for a time limit, and raises ``StripeError``."""

    def __init__(self, key: str, base: str) -> None:
        if not re.fullmatch(r"[\x21-\x7e]+", key):  # else http.client would raise with the key in its message
            raise StripeError("The API key has characters that no key has", 401)
        if not base.startswith(("https://", "http://")):  # urllib would open file:// as well
            raise StripeError("The API address must start with https://")
        self._key = key
        self._base = base.rstrip("/")
        self._opener = urllib.request.build_opener(_EveryAnswer)

    def account(self) -> dict[str, Any]:
        """The account that the key belongs to."""
        return self._call("GET", "/v1/account")

    def customer(self, customer: str) -> dict[str, Any]:
        """One customer."""
        return self._call("GET", f"/v1/customers/{_id(customer)}")

    def charges(self, customer: str | None, limit: int) -> list[dict[str, Any]]:
        """The latest charges, of one customer or of all."""
        query = {"limit": limit, **({"customer": _id(customer)} if customer else {})}
        data: list[dict[str, Any]] = self._call("GET", f"/v1/charges?{urlencode(query)}").get("data", [])
        return data

    def refund(self, charge: str, amount: int | None) -> dict[str, Any]:
        """Refund a charge, or ``amount`` of it in the currency's smallest unit."""
        return self._call("POST", "/v1/refunds", {"charge": _id(charge), **({"amount": amount} if amount else {})})

    def _call(self, method: str, path: str, form: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            self._base + path,
            method=method,
            data=urlencode(form).encode() if form else None,
            headers={"Authorization": f"Bearer {self._key}"},
        )
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                status, body = response.status, _read(response, deadline)
        except (OSError, HTTPException) as error:  # URLError and TimeoutError are OSErrors
            raise StripeError(self._redact(f"Stripe could not be asked: {error}")) from None
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == 200 and isinstance(answer, dict):
            return answer
        detail = answer.get("error") if isinstance(answer, dict) else None
        message = detail.get("message") if isinstance(detail, dict) else None
        raise StripeError(
            self._redact(str(message or f"Stripe answered {status} with something else than JSON of its own")), status
        )

    def _redact(self, text: str) -> str:
        """Messages end in logs and in answers of tools: the key must not, even if the provider repeats it."""
        return text.replace(self._key, "[key]")


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The body, within a size and a time: urllib's own limit is per read, which a slow sender never exceeds."""
    body = bytearray()
    while chunk := response.read1(64 << 10):
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise OSError(f"its answer is longer than {MAX_RESPONSE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"its answer took longer than {TIMEOUT_SECONDS:g} s")
    return bytes(body)


def _id(value: str) -> str:
    """``value``, if it can be the id of an object: it comes from a model, and must not lead to another path."""
    if not re.fullmatch(r"[A-Za-z0-9_]{1,255}", value):
        raise StripeError(f"{value[:80]!r} is not the id of an object at Stripe")
    return value
