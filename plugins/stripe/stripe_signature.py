"""Stripe's webhook signatures, as documented at https://docs.stripe.com/webhooks#verify-manually."""

import hashlib
import hmac


class SignatureError(Exception):
    """The signature is malformed, is not of this body and secret, or is of another time."""


def verify(header: str, body: bytes, secret: str, *, tolerance: float, now: float) -> None:
    """Check ``header``, the value of ``Stripe-Signature``: ``t=<seconds since 1970>,v1=<hex>[,v1=<hex>…]``.

    One good ``v1`` is enough: while a secret is rolled, Stripe signs with the old and the new one. Other schemes, such
    as the test ``v0``, count for nothing. A time that differs by more than ``tolerance`` seconds from ``now``, either
    way, is refused, so that a request that was overheard is of no use later. Raises ``SignatureError``.
    """
    pairs = [part.strip().partition("=") for part in header.split(",")]
    times = [value for key, _, value in pairs if key == "t"]
    signatures = [value for key, _, value in pairs if key == "v1"]
    if len(times) != 1 or not signatures or not (times[0].isascii() and times[0].isdecimal() and len(times[0]) <= 16):
        raise SignatureError("Malformed Stripe-Signature header")
    expected = _digest(body, secret, times[0]).encode()
    # In constant time; as bytes, because compare_digest refuses text that is not ASCII.
    if not any(hmac.compare_digest(expected, signature.encode()) for signature in signatures):
        raise SignatureError("No signature matches the body")
    if abs(now - int(times[0])) > tolerance:
        raise SignatureError("The signature's time is too far from now")


def sign(body: bytes, secret: str, now: int) -> str:
    """The header with which Stripe would send ``body`` at ``now``, for tests and for trying it out."""
    return f"t={now},v1={_digest(body, secret, str(now))}"


def _digest(body: bytes, secret: str, time: str) -> str:
    return hmac.new(secret.encode(), time.encode() + b"." + body, hashlib.sha256).hexdigest()
