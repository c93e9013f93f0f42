"""``hayhost new``: a plugin that runs, with its test."""

import re
from importlib.resources import files
from pathlib import Path

import click

from hayhost.errors import SettingsError
from hayhost.names import PLUGIN_NAME

__all__ = ["new", "render"]

_TEMPLATE = "template"
# Class names that the template cannot have: those that Python or the template itself uses.
_TAKEN = ("Any", "False", "HayGlobalContext", "None", "Request", "True")


def render(name: str) -> dict[str, str]:
    """The files of a new plugin called ``name``: file name to content."""
    title = name.replace("-", " ").title()
    class_name = re.sub(r"\W", "", title)
    if not class_name[:1].isalpha() or class_name in _TAKEN:
        class_name = f"Plugin{class_name}"
    words = {"__name__": name, "__title__": title, "__Class__": class_name}
    result = {}
    for file in sorted(files("hayhost").joinpath("cli", _TEMPLATE).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".in"):  # so that no tool takes the template for code
            text = file.read_text()
            for word, value in words.items():
                text = text.replace(word, value)
            result[file.name.removesuffix(".in")] = text
    return result


def new(name: str, directory: Path) -> None:
    """Write the files. Raises ``SettingsError`` for a bad name or a folder that is there already."""
    if not PLUGIN_NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is not a plugin name: a-z, 0-9 and - only, at most 64, not beginning with -")
    folder = directory / name
    try:
        folder.mkdir()
        for file, text in render(name).items():
            (folder / file).write_text(text)
    except FileExistsError:
        raise SettingsError(f"{folder} exists already; choose another name") from None
    except OSError as error:
        raise SettingsError(f"{folder}: {error.strerror}") from None
    click.echo(f"made {folder}")
    click.echo(f"  hayhost check {folder}        see what it registers")
    click.echo(f"  hayhost dev {directory}        serve it: http://127.0.0.1:8000/plugins/{name}/my-org/hello/you")
    click.echo(f"  pytest {folder}        run its test")
