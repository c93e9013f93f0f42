"""A plugin's manifest, read from a folder that nobody vouches for: it is right, or every error in it is named."""

import difflib
import json
import keyword
import os
import re
import reprlib
import stat
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from .errors import ManifestError
from .names import PLUGIN_NAME

__all__ = ["CAPABILITIES", "CATEGORIES", "Manifest", "Permissions", "is_plugin_folder", "read_manifest"]

T = TypeVar("T")
CATEGORIES = ("integration", "channel", "tool", "analytics")
SHARING = ("fork", "strict")
CAPABILITIES = ("routes", "mcp", "auth", "config", "ui")
_KEYS = ("entry", "displayName", "category", "capabilities", "env", "permissions", "sharing")
_PERMISSIONS = ("network", "subprocess", "memory", "cpu_seconds", "processes", "files")

_MAX_FILE, _MAX_TEXT, _MAX_VERSION, _MAX_ITEMS, _MAX_UNKNOWN = 256 << 10, 1024, 64, 256, 20
_MIN_MEMORY, _MAX_MEMORY, _MAX_NUMBER = 16 << 20, 1 << 40, 2**31 - 1
# tomllib takes quadratic time for dotted keys: minutes for a hostile file of the allowed size, 0.5 s with this.
_MAX_TOML_WORK = 5_000_000

_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNITS = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MEMORY = re.compile(rf"([0-9]{{1,15}}) ?({'|'.join(_UNITS)})")
_ENDPOINT = re.compile(r"(.*):([1-9][0-9]{0,4})")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# Resolvers read a host that ends in a number, such as 127.1 or 0x7f000001, as an address.
_ADDRESS = re.compile(r"\[.*|[0-9a-f:.]*:[0-9a-f:.]*(%.*)?|(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", re.IGNORECASE)
# Control characters, line separators and halves of surrogate pairs: they forge log lines or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_TEXT_RULE = "a non-empty string of at most {} characters, none of them a control character"
_NAME_RULE = "1 to 64 letters, digits and -, not beginning with -; no npm scope, underscores or dots"
_ENTRY_RULE = '"./file.py", "./file.py:attribute" or "package.module:attribute", of a file inside the plugin\'s folder'
_ENV_RULE = "a name of letters, digits and _ that begins with neither a digit nor HAY_ nor HAYHOST_"
_HOST_RULE = '"host:port" with a DNS name such as api.example.com or *.example.com and a port from 1 to 65535'
_MEMORY_RULE = 'bytes as a whole number or as "256MiB", "1GiB", "100MB"; from 16 MiB to 1 TiB'

_MISSING = object()
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlevel = 2


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the plugin may do; nothing unless said. A limit that is ``None`` is the host's default."""

    network: bool | tuple[str, ...] = False
    subprocess: tuple[str, ...] = ()
    memory: int | None = None
    cpu_seconds: int | None = None
    processes: int | None = None
    files: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest without errors. ``folder`` is resolved; ``entry`` is ``dir/file.py`` or ``package.module``."""

    folder: Path
    file: Path
    name: str
    version: str
    entry: str
    attribute: str | None
    display_name: str
    category: str
    capabilities: tuple[str, ...]
    env: tuple[str, ...]
    permissions: Permissions
    sharing: str
    """``fork``, or ``strict``: each worker is a program of its own, and shares no memory with another."""
    warnings: tuple[str, ...]


def is_plugin_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest, right or wrong; names with a leading ``.`` or ``_`` are not."""
    if path.name.startswith((".", "_")) or not os.path.isdir(path):
        return False
    try:
        return any(_load(os.path.realpath(path), form) for form in _FORMS)
    except ValueError:
        return True


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the plugin in ``folder``. Raises ``ManifestError`` with all that is wrong."""
    if not os.path.isdir(folder):
        raise ManifestError([f"{_plain(str(folder))}: found no folder; allowed: a plugin's folder with a manifest"])
    shown, root = _plain(os.path.basename(os.path.abspath(folder))), os.path.realpath(folder)
    (form, document, values), warnings = _choose(shown, root)
    problems: list[str] = []
    table = _Table(f"{shown}/{form.file}", ".".join(form.plugin), values, problems)
    name, version = _read_project(document, form, table, warnings)
    table.only(_KEYS)
    nowhere: tuple[str, str | None] = ("", None)
    entry, attribute = table.take("entry", _ENTRY_RULE, lambda value: _entry(_text(value), root), nowhere)
    manifest = Manifest(
        folder=Path(root),
        file=Path(root, form.file),
        name=name,
        version=version,
        entry=entry,
        attribute=attribute,
        display_name=table.take("displayName", _TEXT_RULE.format(_MAX_TEXT), _text, ""),
        category=table.take("category", "one of " + ", ".join(CATEGORIES), _one_of(CATEGORIES), ""),
        capabilities=table.strings("capabilities", "one of " + ", ".join(CAPABILITIES), _one_of(CAPABILITIES)),
        env=table.strings("env", _ENV_RULE, _env, optional=True),
        permissions=_read_permissions(table),
        sharing=table.take("sharing", "one of " + ", ".join(SHARING), _one_of(SHARING), "fork", optional=True),
        warnings=tuple(warnings),
    )
    if problems:
        raise ManifestError(problems)
    return manifest


def _show(value: object) -> str:
    """What was found, on one line of some 80 characters, whatever it is."""
    if value is _MISSING:
        return "nothing"
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python will print
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(text: str) -> str:
    """A name as it is, but short and without what a log cannot show."""
    return _show(text)[1:-1]


def _text(value: object, limit: int = _MAX_TEXT) -> str:
    """``value``, if it is a string fit for use; otherwise raises ``ValueError``."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("" if value is _MISSING else "not a non-empty string")
    if len(value) > limit:
        raise ValueError(f"longer than {limit} characters")
    if _UNPRINTABLE.search(value):
        raise ValueError("it has a control character")
    return value


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of the manifest, at ``key`` of ``file``; what is wrong in it is added to ``problems``."""

    file: str
    key: str
    values: dict[str, object]
    problems: list[str]

    def refuse(self, key: str, found: object, allowed: str, why: str = "") -> None:
        where = f"{self.file}: {self.key}.{key}" if self.key else f"{self.file}: {key}"
        self.problems.append(f"{where}: found {_show(found)}{why and f' ({why})'}; allowed: {allowed}")

    def only(self, allowed: tuple[str, ...]) -> None:
        """Refuse every key but ``allowed``."""
        unknown = [key for key in self.values if key not in allowed]
        for key in unknown[:_MAX_UNKNOWN]:
            close = difflib.get_close_matches(key[:32], allowed, 1)
            why = f"unknown key; did you mean {close[0]}?" if close else "unknown key"
            self.refuse(_plain(key), self.values[key], "the keys " + ", ".join(allowed), why)
        if more := len(unknown[_MAX_UNKNOWN:]):
            self.problems.append(f"{self.file}: {self.key}: found {more} more unknown keys; allowed: none")

    def take(self, key: str, allowed: str, parse: Callable[[object], T], default: T, optional: bool = False) -> T:
        """What ``parse`` makes of the value at ``key``; it raises ``ValueError``, saying why, to refuse it."""
        value = self.values.get(key, _MISSING)
        if optional and value is _MISSING:
            return default
        try:
            return parse(value)
        except ValueError as error:
            self.refuse(key, value, allowed, str(error))
            return default

    def strings(self, key: str, allowed: str, parse: Callable[[str], str], optional: bool = False) -> tuple[str, ...]:
        """The list at ``key`` of strings that ``parse`` accepts, all different."""
        value = self.values.get(key, [] if optional else _MISSING)
        if not isinstance(value, list) or len(value) > _MAX_ITEMS:
            self.refuse(key, value, f"a list of at most {_MAX_ITEMS} strings, each {allowed}")
            return ()
        items: list[str] = []
        for position, item in enumerate(value):
            try:
                parsed = parse(_text(item))
                if parsed in items:
                    raise ValueError("listed twice")
                items.append(parsed)
            except ValueError as error:
                self.refuse(f"{key}[{position}]", item, allowed, str(error))
        return tuple(items)


def _parse_toml(text: str) -> object:
    lines = text.split("\n")
    most_dots = max(line.count(".") for line in lines)
    if most_dots * (len(lines) + text.count(".")) > _MAX_TOML_WORK:
        raise ValueError(f"too many dots: {most_dots} of them on one line")
    return tomllib.loads(text)


def _parse_json(text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {_show(key)} twice in one object")
        return dict(pairs)

    def constant(word: str) -> object:
        raise ValueError(f"{word}, which is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=constant)


class _Form(NamedTuple):
    """One of the two files: the keys of the tables that matter, and how it is parsed."""

    file: str
    plugin: tuple[str, ...]
    project: tuple[str, ...]
    parse: Callable[[str], object]


_Source = tuple[_Form, object, dict[str, object]]  # a form, its parsed document, and the plugin table in that
_FORMS = (
    _Form("pyproject.toml", ("tool", "hay-plugin"), ("project",), _parse_toml),
    _Form("package.json", ("hay-plugin",), (), _parse_json),
)


def _choose(shown: str, root: str) -> tuple[_Source, list[str]]:
    """The file that counts, and warnings about the other. Raises ``ManifestError`` if there is none."""
    sources: list[_Source] = []
    malformed: list[str] = []
    for form in _FORMS:
        try:
            if source := _load(root, form):
                sources.append(source)
        except ValueError as error:
            malformed.append(f"{shown}/{form.file}: {error}")
    if not sources or (malformed and sources[0][0] is not _FORMS[0]):
        allowed = "[tool.hay-plugin] in pyproject.toml, or the key hay-plugin in package.json"
        raise ManifestError(malformed or [f"{shown}: found neither of the plugin tables; allowed: {allowed}"])
    ignored = malformed or [f"{shown}/{form.file}: hay-plugin" for form, *_ in sources[1:]]
    return sources[0], [f"{what}: ignored, because pyproject.toml has [tool.hay-plugin]" for what in ignored]


def _load(root: str, form: _Form) -> _Source | None:
    """The file and its plugin table, ``None`` if either is absent. Raises ``ValueError``, a message, if malformed."""
    try:
        text = _read(root, form.file)
    except (OSError, ValueError) as error:
        allowed = f"a regular UTF-8 file of at most {_MAX_FILE >> 10} KiB inside the plugin's folder"
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}; allowed: {allowed}") from None
    if text is None:
        return None
    try:
        document = form.parse(text)
    except (ValueError, RecursionError) as error:
        found = "values nested too deeply" if isinstance(error, RecursionError) else _plain(str(error))
        raise ValueError(f"found {found}; allowed: valid {'TOML' if form is _FORMS[0] else 'JSON'}") from None
    table = _descend(document, form.plugin)
    return None if table is None else (form, document, table)


def _read(root: str, name: str) -> str | None:
    """The text of a manifest file, ``None`` if there is none. Raises ``ValueError`` or ``OSError``; never blocks."""
    try:
        os.lstat(os.path.join(root, name))
    except FileNotFoundError:
        return None
    # The file may be exchanged for a symlink or a FIFO between the look and the open.
    flags = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
    path = os.path.join(root, _inside(root, name))
    with open(path, "rb", opener=lambda path, mode: os.open(path, mode | flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ValueError(f"it is larger than {_MAX_FILE >> 10} KiB")
    return data.decode("utf-8-sig")


def _inside(root: str, relative: str) -> str:
    """The path below ``root`` of a regular file, symlinks resolved. Raises ``ValueError`` saying why it is none."""
    path = os.path.join(root, relative)
    try:
        mode = os.stat(path).st_mode  # first: it fails on long chains of symlinks, where realpath recurses
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        raise ValueError(getattr(error, "strerror", None) or "not a path") from None
    if not real.startswith(os.path.join(root, "")):
        raise ValueError("it is outside of the plugin's folder")
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")
    return os.path.relpath(real, root)


def _descend(document: object, keys: tuple[str, ...], where: str = "") -> dict[str, object] | None:
    """The table at ``keys``, ``None`` if there is none. Raises ``ValueError`` if something else is there."""
    if not isinstance(document, dict):
        raise ValueError(f"{where or 'top level'}: found {_show(document)}; allowed: a table of keys and values")
    if keys and keys[0] in document:
        return _descend(document[keys[0]], keys[1:], f"{where}.{keys[0]}".lstrip("."))
    return None if keys else document


def _read_project(document: object, form: _Form, table: _Table, warnings: list[str]) -> tuple[str, str]:
    """The plugin's name and version, which are not in its ``table`` but in that of the project."""
    try:
        values = _descend(document, form.project) or {}
    except ValueError as error:
        table.problems.append(f"{table.file}: {error}")
        return "", ""
    project = _Table(table.file, ".".join(form.project), values, table.problems)
    name = project.take("name", _NAME_RULE, _name, "")
    if "version" not in values:
        warnings.append(f'{table.file}: {".".join((*form.project, "version"))}: found nothing; "0.0.0" is used')
        return name, "0.0.0"
    rule = _TEXT_RULE.format(_MAX_VERSION)
    return name, project.take("version", rule, lambda value: _text(value, _MAX_VERSION), "")


def _name(value: object) -> str:
    name = _text(value)
    # Lower-casing turns some letters outside of ASCII into ASCII ones.
    if not name.isascii() or not PLUGIN_NAME.fullmatch(name.lower()):
        raise ValueError("not a plugin's name")
    return name.lower()


def _entry(text: str, root: str) -> tuple[str, str | None]:
    """The entry and the attribute that ``text`` names. Raises ``ValueError`` saying why it names none."""
    place, colon, attribute = text.partition(":")
    is_file = place.startswith("./")
    names = ([] if is_file else place.split(".")) + ([attribute] if colon or not is_file else [])
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        raise ValueError("none of these forms")
    if is_file:
        file = _text(_inside(root, place))
        if not file.endswith(".py"):
            raise ValueError("it is not a .py file")
        return file, attribute or None
    if place.endswith(".py"):
        raise ValueError("a file begins with ./")
    base = place.replace(".", "/")
    for file in (f"{base}/__init__.py", f"{base}.py"):  # in the order in which Python looks for them
        if os.path.lexists(os.path.join(root, file)):
            _inside(root, file)
            return place, attribute
    raise ValueError(f"no {_plain(base)}.py in the plugin's folder")


def _one_of(options: tuple[str, ...]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in options:
            raise ValueError
        return str(value)

    return parse


def _env(text: str) -> str:
    if not _ENV.fullmatch(text):
        raise ValueError("not the name of an environment variable")
    if text.startswith(("HAY_", "HAYHOST_")):
        raise ValueError("variables that begin with HAY_ or HAYHOST_ are the host's own secrets")
    return text


def _endpoint(text: str) -> str:
    match = _ENDPOINT.fullmatch(text)
    if _ADDRESS.fullmatch(match[1] if match else text):
        raise ValueError("an IP address; hosts are allowed by name only")
    if not match or int(match[2]) > 65535:
        raise ValueError("no port from 1 to 65535 after the host")
    labels = match[1].removeprefix("*.").lower().split(".")
    if not text.isascii() or len(match[1]) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("the host is not a DNS name in ASCII")
    if match[1].startswith("*.") and len(labels) < 2:
        raise ValueError("a wildcard needs at least two labels after it, as in *.example.com")
    return text.lower()


def _number(value: object, least: int = 1, most: int = _MAX_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError
    return value


def _memory(value: object) -> int:
    match = _MEMORY.fullmatch(value) if isinstance(value, str) else None
    return _number(int(match[1]) * _UNITS[match[2]] if match else value, _MIN_MEMORY, _MAX_MEMORY)


def _read_permissions(table: _Table) -> Permissions:
    values = table.values.get("permissions", {})
    if not isinstance(values, dict):
        table.refuse("permissions", values, "a table with the keys " + ", ".join(_PERMISSIONS))
        return Permissions()
    granted = _Table(table.file, f"{table.key}.permissions", values, table.problems)
    granted.only(_PERMISSIONS)
    network = values.get("network", False)
    if isinstance(network, list):
        network = granted.strings("network", _HOST_RULE, _endpoint) or False
    elif not isinstance(network, bool):
        granted.refuse("network", network, f"false, true or a list of {_HOST_RULE}")
    limits: dict[str, int | None] = {"memory": granted.take("memory", _MEMORY_RULE, _memory, None, optional=True)}
    for key in ("cpu_seconds", "processes", "files"):
        limits[key] = granted.take(key, f"a whole number from 1 to {_MAX_NUMBER}", _number, None, optional=True)
    return Permissions(network, granted.strings("subprocess", "a command's name or path", str, optional=True), **limits)
