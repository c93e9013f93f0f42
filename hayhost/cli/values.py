"""Config and credentials as a command line gives them: secrets come from files, standard input or a prompt."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from hayhost.api.decoding import parse_json
from hayhost.errors import HostError, InvalidError
from hayhost.installs import Auth
from hayhost.metadata import ConfigField

from .output import tell, warn

__all__ = ["Sources", "typed"]

_MOST: Final = 1 << 20
_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Sources:
    """Reads what arguments refer to. Standard input can be read once."""

    def __init__(self) -> None:
        self._taken_by = ""
        self.shown: list[str] = []
        """Keys whose values were on the command line itself, where everybody on the machine can see them."""

    def pairs(self, pairs: Iterable[str]) -> dict[str, str]:
        """``KEY=VALUE``, ``KEY=@FILE`` and ``KEY=-`` as text by key; ``@@`` begins a value with ``@``.

        Raises ``HostError``.
        """
        values: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise HostError(f"{pair!r} is not KEY=VALUE, KEY=@FILE or KEY=-")
            if key in values:
                raise HostError(f"{key} is given twice")
            if value == "-":
                values[key] = self._secret(key)
            elif value.startswith("@") and not value.startswith("@@"):
                values[key] = _text(self._file(value[1:], key), key)
            else:
                values[key] = value.removeprefix("@") if value.startswith("@@") else value
                self.shown.append(key)
        return values

    def values(self, file: str | None) -> dict[str, Any] | None:
        """A JSON object with config. Raises ``HostError``."""
        if file is None:
            return None
        value = self._json(file, "--values")
        if not isinstance(value, dict):
            raise HostError("--values: must be a JSON object, of fields and their values")
        return value

    def auth(self, file: str | None) -> Auth | None:
        """A JSON object with credentials. Raises ``HostError``."""
        if file is None:
            return None
        value = self._json(file, "--auth")
        try:
            return msgspec.convert(value, Auth)
        except msgspec.ValidationError as error:
            form = '{"methodId": "...", "credentials": {...}}'
            raise HostError(f"--auth: is not of the form {form}: {error}") from None

    def _json(self, file: str, option: str) -> Any:
        try:
            return parse_json(self._standard_input(option) if file == "-" else self._file(file, option))
        except ValueError as error:
            raise HostError(f"{option}: {file} {error}") from None

    def _secret(self, key: str) -> str:
        if sys.stdin.isatty():
            answer: str = click.prompt(f"{key} (is not shown)", hide_input=True, err=True)
            return answer
        return _text(self._standard_input(key), key)

    def _standard_input(self, taker: str) -> bytes:
        if self._taken_by:
            raise HostError(f"standard input is for {self._taken_by} already, and {taker} wants it, too")
        self._taken_by = taker
        if sys.stdin.isatty():
            tell(f"{taker}: type JSON, then Ctrl-D")
        return _bounded(sys.stdin.buffer.read(_MOST + 1), taker)

    def _file(self, file: str, taker: str) -> bytes:
        try:
            with Path(file).open("rb") as opened:
                return _bounded(opened.read(_MOST + 1), taker)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise HostError(f"{taker}: {file}: cannot be read: {reason}") from None


def _bounded(data: bytes, taker: str) -> bytes:
    if len(data) > _MOST:
        raise HostError(f"{taker}: is larger than {_MOST} bytes")
    return data


def _text(data: bytes, taker: str) -> str:
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise HostError(f"{taker}: is not UTF-8") from None


def typed(schema: Mapping[str, ConfigField], texts: Mapping[str, str], shown: Iterable[str] = ()) -> dict[str, Any]:
    """Each text as a value of its field's type, or as it is, for ``check_config`` to say what is wrong with it.

    Warns of secrets among those that were ``shown``. Raises ``InvalidError`` for what is no JSON.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, text in texts.items():
        field = schema.get(key)
        if field is None or field.type == "string":
            values[key] = text
        elif field.type == "boolean":
            values[key] = _BOOLEANS.get(text.lower(), text)
        else:
            try:
                values[key] = parse_json(text.encode())
            except ValueError as error:
                if field.type == "json":
                    problems[f"config.{key}"] = str(error)
                values[key] = text
    if problems:
        raise InvalidError(problems)
    for key in shown:
        if (field := schema.get(key)) is not None and field.sensitive is True:
            warn(f"{key} is a secret, and others can see what is on a command line; {key}=@FILE and {key}=- hide it")
    return values
