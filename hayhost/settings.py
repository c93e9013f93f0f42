"""The host's settings: one table, from which flags, ``HAYHOST_*`` variables and the configuration file follow."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import SettingsError

__all__ = ["FIELDS", "Settings", "load", "parse_size"]

Mode = Literal["production", "test"]
IsolationChoice = Literal["auto", "none", "limited", "confined", "namespaced", "hardened"]
RequiredLevel = Literal["none", "limited", "confined", "namespaced", "hardened"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})")
_SIZE = re.compile(r"(\d+)\s*(B|[kKMG]i?B?)?")
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes from ``"10MiB"``, ``"512k"`` or ``"4096"``; units are powers of 1,024. Raises ``ValueError``."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"not a size such as 10MiB: {text!r}")
    return int(found[1]) * _UNITS[(found[2] or "")[:1].upper()]


def _setting(
    default: Any, help: str, *, least: float = 0, size: bool = False, most: float = 1e9, kind: str = ""
) -> Any:
    limits = {"help": help, "least": least, "most": most, "size": size, "kind": kind}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, checked. Times are in seconds, sizes in bytes."""

    host: str = _setting("127.0.0.1", "Address to listen on; must be a loopback address.")
    port: int = _setting(8000, "Port to listen on; 0 picks a free one.", most=65535)
    mode: Mode = _setting("production", "In test mode every org is known, with an empty config.")
    store: str = _setting(
        "auto",
        "Where orgs and settings are kept: FILE or postgresql://...; auto is hayhost.db here, in test mode none.",
    )
    key_file: str = _setting("auto", "File with the keys that encrypt secrets; auto is one beside the store.")
    orgs: Path | None = _setting(None, "TOML file with orgs, their plugins, config and credentials, to be applied.")
    allowed_hosts: tuple[str, ...] = _setting(
        (), "Further names by which the host may be managed; by comma.", kind="name"
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (), "Networks of reverse proxies whose X-Forwarded-* headers are believed; by comma.", kind="network"
    )
    route_tokens: bool = _setting(False, "Plugins' own routes need a bearer token, too.")
    org_rate: str = _setting(
        "none", "Requests that each org's plugin may get, e.g. 100/second; more are 429.", kind="rate"
    )
    plugin_rate: str = _setting("none", "Requests for each plugin, of all orgs together.", kind="rate")
    max_workers: int = _setting(1000, "Worker processes at most; over it the longest-idle one leaves.", least=1)
    spares: int = _setting(1, "Workers without an org that wait ready, per plugin in use.", most=64)
    max_requests: int = _setting(128, "Requests that one worker handles at once; more wait.", least=1)
    max_queue: int = _setting(1024, "Requests per org that may wait for its worker; more are answered 503.", least=1)
    max_body: int = _setting(10 << 20, "Size of a request's body at most, e.g. 10MiB.", least=1, size=True)
    request_timeout: float = _setting(30.0, "Time for a handler to begin its answer, else 504.", least=0.01)
    hook_timeout: float = _setting(30.0, "Time for one lifecycle hook.", least=0.01)
    idle_timeout: float = _setting(300.0, "A worker without requests for this long is stopped.", least=0.01)
    drain_timeout: float = _setting(10.0, "Time for requests in flight when a worker or the host stops.")
    ping_timeout: float = _setting(
        10.0, "A busy worker that does not answer a ping for this long is replaced.", least=0.1
    )
    mcp_timeout: float = _setting(
        60.0, "Time for a request to an MCP server, unless the tool or the server has its own.", least=0.01
    )
    mcp_requests: int = _setting(32, "Requests of one org to MCP servers at once; more wait.", least=1)
    mcp_sessions: int = _setting(100, "MCP sessions of one credential at one endpoint.", least=1)
    mcp_session_timeout: float = _setting(1800.0, "An MCP session without requests for this long ends.", least=0.01)
    isolation: IsolationChoice = _setting("auto", "How workers are isolated; auto takes all that the machine gives.")
    require: RequiredLevel = _setting("confined", "Refuse to start if auto gives less than this level of isolation.")
    layers: str = _setting("auto", "Apply just these layers of isolation (by comma), to find out what each one stops.")
    writable: tuple[str, ...] = _setting((), "Folders that all plugins may write to, besides their own; by colon.")
    egress_allow: tuple[str, ...] = _setting(
        (),
        "Networks that plugins with permissions.network may reach although they are not public; by comma.",
        kind="network",
    )
    egress_nameserver: str = _setting(
        "system", "DNS server that the names of plugins are asked from, as ADDRESS:PORT.", kind="nameserver"
    )
    reload: bool = _setting(True, "Serve changed plugins without a restart.")
    poll: bool = _setting(False, "Look for changes instead of waiting for events, for file systems without them.")
    debounce: float = _setting(0.1, "Changed files must be quiet for this long before they are loaded.", most=60)
    tracing: bool = _setting(False, "Export traces with OpenTelemetry; where to, the OTEL_* variables say.")
    metrics_orgs: bool = _setting(False, "Metrics by org, too: some series for each org that has a worker.")
    log_format: LogFormat = _setting("auto", "How log lines look; auto is console on a terminal, else json.")
    log_level: LogLevel = _setting("info", "The least level that is logged.")
    log_file: Path | None = _setting(
        None, "File that the log is written to as well, as lines of JSON.", kind="new file"
    )
    log_file_size: int = _setting(10 << 20, "Size at which another log file is begun.", least=1 << 10, size=True)
    log_files: int = _setting(5, "Log files that are kept, the one that is written included.", least=1, most=1000)
    log_memory: int = _setting(
        64 << 20, "Size of the last log lines that are kept in memory, of all workers.", least=1 << 20, size=True
    )
    log_records: int = _setting(1000, "Log lines of each worker that are kept in memory, at most.", least=1)


_HINTS = get_type_hints(Settings)
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def load(
    flags: Mapping[str, Any], file: Path | None = None, environ: Mapping[str, str] | None = None, **defaults: Any
) -> Settings:
    """Settings from flags (``None`` is not given) over environment over file over ``defaults``.

    Raises ``SettingsError`` naming every wrong setting, where it was found and what is allowed.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    values = dict(defaults)
    sources = [
        (_from_file(file, problems), f"{file}: "),
        ({name: environ[_variable(name)] for name in FIELDS if _variable(name) in environ}, "environment: "),
        ({name: value for name, value in flags.items() if value is not None}, "--"),
    ]
    for source, where in sources:
        for name, value in source.items():
            shown = name.replace("_", "-") if where == "--" else _variable(name) if where == "environment: " else name
            try:
                values[name] = _convert(name, value)
            except ValueError as error:
                problems.append(f"{where}{shown}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**values)


def _variable(name: str) -> str:
    return f"HAYHOST_{name.upper()}"


def _from_file(file: Path | None, problems: list[str]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        problems.append(f"{file}: cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(f"{file}: not valid TOML: {error}")
        return {}
    for name in sorted(set(table) - set(FIELDS)):
        problems.append(f"{file}: {name}: no such setting; there are {', '.join(FIELDS)}")
    return {name: value for name, value in table.items() if name in FIELDS}


_LISTS = {"network": (",", "networks such as 10.1.0.0/16"), "name": (",", "host names")}


def _items(value: Any, kind: str) -> tuple[str, ...]:
    separator, what = _LISTS.get(kind, (":", "absolute paths"))
    items = [item.strip() for item in value.split(separator) if item.strip()] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{value!r} is not a list of {what}")
    try:
        if kind == "network":
            return tuple(str(ip_network(item)) for item in items)
    except ValueError as error:
        raise ValueError(f"{value!r} is not a list of {what}: {error}") from None
    if kind == "name":
        if not all(_NAME.fullmatch(item) for item in items):
            raise ValueError(f"{value!r} is not a list of {what}")
        return tuple(items)
    if not all(os.path.isabs(item) and "\0" not in item for item in items):
        raise ValueError(f"{value!r} is not a list of {what}")
    for item in items:
        if not os.path.isdir(item):
            raise ValueError(f"{item!r} {'is no folder' if os.path.exists(item) else 'does not exist'}")
    return tuple(map(os.path.realpath, items))


def _nameserver(value: Any) -> str:
    host, _, port = str(value).rpartition(":")
    try:
        ip_address(host.removeprefix("[").removesuffix("]"))
        if not 0 < int(port) < 1 << 16:
            raise ValueError
    except ValueError:
        raise ValueError(f"{value!r} is not ADDRESS:PORT, nor system") from None
    return str(value)


def _rate(value: Any) -> str:
    from limits import parse

    try:
        parse(str(value))
        return str(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a rate such as 100/second or 2000/minute, nor none") from None


def _convert(name: str, value: Any) -> Any:
    """``value`` as the type of the setting. Raises ``ValueError`` saying what is allowed."""
    hint, limits = _HINTS[name], FIELDS[name].metadata
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{value!r} is not one of {', '.join(get_args(hint))}")
        return value
    if hint == tuple[str, ...]:
        return _items(value, limits["kind"])
    if limits["kind"] == "nameserver" and value != "system":
        return _nameserver(value)
    if limits["kind"] == "rate" and value != "none":
        return _rate(value)
    if hint is str:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{value!r} is not a non-empty string")
        return value
    if hint == Path | None:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise ValueError(f"{value!r} is not a path")
        return Path(value)
    if hint is bool:
        word = str(value).lower()
        if word not in _BOOLEANS:
            raise ValueError(f"{value!r} is not one of {', '.join(_BOOLEANS)}")
        return _BOOLEANS[word]
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = parse_size(value) if limits["size"] and isinstance(value, str) else hint(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{value!r} is not a {'size such as 10MiB' if limits['size'] else 'number'}") from None
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value!r} is not a whole number")
    if not limits["least"] <= number <= limits["most"]:
        raise ValueError(f"{value!r} is not from {limits['least']:g} to {limits['most']:g}")
    return number
