"""Run-time type checks at the border between plugin and host."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from typeguard import CollectionCheckStrategy, ForwardRefPolicy, TypeCheckError, check_type

__all__ = ["check", "checked"]

P = ParamSpec("P")
R = TypeVar("R")


def _display(annotation: object) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def check(value: object, expected: Any, what: str) -> None:
    """Raise ``TypeCheckError`` naming ``what``, the expected type and the actual one, unless they agree."""
    try:
        check_type(
            value,
            expected,
            forward_ref_policy=ForwardRefPolicy.ERROR,
            collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
        )
    except TypeCheckError as error:
        actual = type(value).__name__
        raise TypeCheckError(f"{what}: expected {_display(expected)}, got {actual} ({error})") from None


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check every argument of ``function`` against its annotation on every call.

    Unlike ``typeguard.typechecked`` this needs no source and rewrites nothing, so it costs no start-up time.
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not hints:  # resolved at the first call: annotations may name classes defined further down
            hints.update(get_type_hints(function))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints:
                check(value, hints[name], f"argument {name!r} of {function.__qualname__}()")
        return function(*args, **kwargs)

    return wrapper
