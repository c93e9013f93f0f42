"""``define_hay_plugin``: how an entry module says what its plugin is."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .contexts import HayGlobalContext
from .errors import DefinitionError

__all__ = ["HOOKS", "HayPlugin", "Hook", "define_hay_plugin"]

Hook = Callable[[Any], Any]

HOOKS = (
    "on_initialize",
    "on_start",
    "on_validate_auth",
    "on_config_update",
    "on_disable",
    "on_stop",
    "on_enable",
)
"""Every hook that a definition may have."""


class HayPlugin:
    """What ``define_hay_plugin`` returns: the marker that the host looks for in the entry module."""

    def __init__(self, source: Callable[..., Any]) -> None:
        self._source = source
        self.__doc__ = source.__doc__
        self.__name__ = getattr(source, "__name__", type(source).__name__)

    @property
    def wrapped(self) -> Callable[..., Any]:
        """The class or factory that was given."""
        return self._source

    def create(self, ctx: HayGlobalContext) -> tuple[str, dict[str, Hook]]:
        """Build the definition and return its name and its hooks.

        Raises ``DefinitionError`` listing everything that is wrong with it; whatever the author's own constructor or
        factory raises goes through unchanged.
        """
        definition = self._source() if inspect.isclass(self._source) else self._source(ctx)
        if inspect.isawaitable(definition):
            if inspect.iscoroutine(definition):
                definition.close()
            raise DefinitionError(f"the factory {self.__name__}() must be a plain function, not async")
        if definition is None:
            raise DefinitionError(f"the factory {self.__name__}() returned None, not a definition")

        def member(name: str) -> Any:
            return definition.get(name) if isinstance(definition, Mapping) else getattr(definition, name, None)

        errors = []
        name = member("name")
        if not isinstance(name, str) or not name.strip():
            errors.append(f"`name` must be a non-empty string, not {name!r}")
        hooks: dict[str, Hook] = {}
        for hook in HOOKS:
            function = member(hook)
            if function is None:
                continue
            if problem := _hook_problem(function):
                errors.append(f"`{hook}` {problem}")
            else:
                hooks[hook] = function
        if errors:
            raise DefinitionError(f"the plugin definition {self.__name__}: " + "; ".join(errors))
        return name, hooks


def _hook_problem(function: object) -> str | None:
    if not callable(function):
        return f"must be callable, not {type(function).__name__}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "has no readable signature; it must take exactly its one context"
    try:
        signature.bind(object())
    except TypeError:
        return f"must take exactly its one context, not {signature}"
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 1:
        return f"must take exactly its one context, not {signature}"
    return None


def define_hay_plugin(plugin: Callable[..., Any]) -> HayPlugin:
    """Mark a class, or a factory ``(ctx: HayGlobalContext) -> definition``, as the plugin of its module.

    The definition, an instance of the class or what the factory returns, is an object or mapping with ``name: str``
    and any of the hooks in ``HOOKS``, sync or async. Raises ``DefinitionError`` for anything else.
    """
    if isinstance(plugin, HayPlugin):
        raise DefinitionError("define_hay_plugin was applied twice")
    if not callable(plugin):
        raise DefinitionError(f"define_hay_plugin takes a class or a factory, not {type(plugin).__name__}")
    try:
        signature = inspect.signature(plugin)
    except (TypeError, ValueError):
        raise DefinitionError("define_hay_plugin takes a class or a factory with a readable signature") from None
    try:
        if inspect.isclass(plugin):
            signature.bind()
        else:
            signature.bind(object())
    except TypeError:
        wanted = "no arguments" if inspect.isclass(plugin) else "exactly one, its HayGlobalContext"
        name = getattr(plugin, "__name__", plugin)
        raise DefinitionError(f"define_hay_plugin: {name}{signature} must be callable with {wanted}") from None
    return HayPlugin(plugin)
