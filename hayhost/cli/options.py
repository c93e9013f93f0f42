"""Options that several commands have, made from the table of settings, and what completes their arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from hayhost.settings import FIELDS, Settings

__all__ = ["FILE", "FOLDER", "NEW_FILE", "complete_orgs", "complete_plugins", "complete_tokens", "only", "settings"]

F = TypeVar("F", bound=Callable[..., Any])

FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE: Final = click.Path(dir_okay=False, path_type=Path)
_METAVARS = {int: "N", float: "SECONDS", str: "TEXT", tuple[str, ...]: "FOLDERS"}
_KINDS = {"network": "NETWORKS", "nameserver": "ADDRESS:PORT", "name": "NAMES", "rate": "RATE"}


def settings(*without: str) -> Callable[[F], F]:
    """Add an option for each setting but those in ``without``, and ``--config``."""
    hints = get_type_hints(Settings)

    def decorate(function: F) -> F:
        for name, field in reversed(FIELDS.items()):
            if name in without:
                continue
            hint = hints[name]
            text = field.metadata["help"]
            if hint is bool:
                flag = name.replace("_", "-")
                switch = f"--{flag}/--no-{flag}"
                default = "on" if field.default else "off"
                function = click.option(switch, name, default=None, help=f"{text}  [default: {default}]")(function)
                continue
            kind: Any = str
            if get_origin(hint) is Literal:
                kind = click.Choice(get_args(hint))
            elif hint == Path | None:
                kind = NEW_FILE if field.metadata["kind"] == "new file" else FILE
            shown_default = _shown(field.default, field.metadata["size"])
            default = "" if field.default in (None, ()) else f"  [default: {shown_default}]"
            option = f"--{name.replace('_', '-')}"
            named = _KINDS.get(field.metadata["kind"])
            shown = None if kind is not str else "SIZE" if field.metadata["size"] else named or _METAVARS.get(hint)
            function = click.option(option, name, type=kind, default=None, metavar=shown, help=text + default)(function)
        return click.option(
            "--config",
            type=FILE,
            envvar="HAYHOST_CONFIG",
            help="TOML file with settings; flags and HAYHOST_* override it.",
        )(function)

    return decorate


def only(*names: str) -> Callable[[F], F]:
    """Add an option for each of these settings, and ``--config``."""
    return settings(*(name for name in FIELDS if name not in names))


def _shown(value: Any, size: bool) -> str:
    return f"{value >> 20}MiB" if size else f"{value:g}" if isinstance(value, float) else str(value)


# What goes wrong while a word is completed would be written over the line that somebody types.


def complete_orgs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of orgs, with their names."""
    return _stored(context, "orgs", incomplete)


def complete_tokens(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of tokens, with their names."""
    return _stored(context, "tokens", incomplete)


def _stored(context: click.Context, table: Literal["orgs", "tokens"], incomplete: str) -> list[CompletionItem]:
    try:
        from hayhost.settings import load

        from .completing import stored

        found = stored(load({"store": context.params.get("store")}, context.params.get("config")), table, incomplete)
    except Exception:
        return []
    return [CompletionItem(identifier, help=name) for identifier, name in found]


def complete_plugins(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the plugins in the folder."""
    try:
        from .completing import plugins

        return [
            CompletionItem(name, help=title)
            for name, title in plugins(context.params.get("plugins"))
            if name.startswith(incomplete)
        ]
    except Exception:
        return []
