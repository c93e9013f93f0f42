"""``hayhost bench``: how fast and how small a plugin is on this machine."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from hayhost import __version__
from hayhost.bench.figures import Change, Figure, Report, compare, machine, read_report
from hayhost.bench.hooks import hook_times
from hayhost.bench.measure import CONNECTIONS, ORG_COUNTS, Subject, cold_starts, memory, reloads, routes
from hayhost.bench.plot import check_plot, plot
from hayhost.digest import content_files
from hayhost.errors import HostError
from hayhost.logs import escape
from hayhost.manifest import Manifest, read_manifest
from hayhost.settings import Settings

__all__ = ["Options", "bench"]

_ROUTE_ROUNDS: Final = 7


class Options(msgspec.Struct, frozen=True):
    """What to measure, and where the result goes."""

    only: tuple[str, ...]
    rounds: int
    seconds: float
    orgs: int
    route: str
    body: str
    json: Path | None
    plot: Path | None
    compare: Path | None


def bench(plugin_dir: Path, settings: Settings, options: Options) -> None:
    """Measure, print, keep. Raises ``HostError``."""
    if options.plot:
        check_plot(options.plot)
    old = read_report(options.compare) if options.compare else None
    manifest = read_manifest(plugin_dir)
    with tempfile.TemporaryDirectory(prefix="hayhost-bench-") as directory:
        report = _measure(_copy(manifest, Path(directory)), settings, options)
    _print(report)
    if old is not None:
        _print_changes(old, report)
    if options.json:
        _keep(options.json, report.encode())
    if options.plot:
        plot(report, options.plot)


def _keep(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise HostError(f"{file}: cannot be written: {error.strerror}") from None


def _copy(manifest: Manifest, directory: Path) -> Manifest:
    """The plugin in a folder of its own, so that it alone is served and can be changed."""
    directory.chmod(0o755)
    folder = directory / "plugins" / manifest.folder.name
    try:
        for name, _ in content_files(manifest.folder):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(manifest.folder / name, file)
            file.chmod(0o644)
    except OSError as error:
        raise HostError(f"the plugin cannot be copied: {error}") from None
    return read_manifest(folder)


def _measure(manifest: Manifest, settings: Settings, options: Options) -> Report:
    host_options = ("--isolation", settings.isolation, "--require", settings.require, "--layers", settings.layers)
    entry = manifest.folder / manifest.entry
    subject = Subject(manifest.folder.parent, manifest.name, entry, "GET", "/metadata", b"", host_options)
    with subject.serve("--no-reload", "--spares", "0") as host:
        base = f"/plugins/{manifest.name}/org0"
        metadata, health = host.json(f"{base}/metadata"), host.json(f"{base}/health")
    method, path = _route(options.route, metadata["routes"])
    subject = msgspec.structs.replace(
        subject, method=method, path=path, body=b"" if method in ("GET", "DELETE") else options.body.encode()
    )
    figures: list[Figure] = []
    notes: list[str] = []

    def cold(step: Callable[[], None]) -> None:
        figures.extend(cold_starts(subject, options.rounds, step))

    def hooks(step: Callable[[], None]) -> None:
        times, raised = hook_times(manifest, settings, options.rounds, step)
        figures.extend(Figure("hooks", name, "ms", "lower", values) for name, values in sorted(times.items()))
        notes.extend(f"{name} raised: there are no settings and credentials here" for name in sorted(raised))

    def route(step: Callable[[], None]) -> None:
        figures.extend(routes(subject, _ROUTE_ROUNDS, options.seconds, step))

    def memories(step: Callable[[], None]) -> None:
        found, why = memory(subject, options.orgs, step)
        figures.extend(found)
        notes.extend(why)

    def reload(step: Callable[[], None]) -> None:
        figures.extend(reloads(subject, max(4, options.rounds // 2), step))

    parts: dict[str, tuple[str, int, Callable[[Callable[[], None]], None]]] = {
        "cold": ("cold starts", options.rounds, cold),
        "hooks": ("hooks", options.rounds, hooks),
        "routes": ("routes", _ROUTE_ROUNDS * len(CONNECTIONS), route),
        "memory": ("memory", max(count for count in ORG_COUNTS if count <= options.orgs), memories),
        "reload": ("reloads", max(4, options.rounds // 2), reload),
    }
    if not method:
        notes.append("the plugin has no route: only hooks were measured")
        parts = {"hooks": parts["hooks"]}
    for part, (label, steps, run) in parts.items():
        if options.only and part not in options.only:
            continue
        with click.progressbar(length=steps, label=f"{label:<12}", file=sys.stderr) as bar:
            run(lambda bar=bar: bar.update(1))  # type: ignore[misc]
    return Report(
        hayhost=__version__,
        machine=machine(),
        plugin=manifest.name,
        version=manifest.version,
        isolation=health["isolation"],
        sharing=health["sharing"],
        route=f"{method} {path}".strip(),
        figures=figures,
        notes=notes,
    )


def _route(wanted: str, registered: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Method and path to ask for; empty if the plugin has none. Raises ``HostError``."""
    if wanted:
        method, _, path = wanted.partition(" ")
        if method not in ("GET", "POST", "PUT", "PATCH", "DELETE") or not path.startswith("/"):
            raise HostError(f"--route {wanted!r}: give a method and a path, such as 'POST /echo'")
        return method, path
    without = [route for route in registered if "{" not in route["path"]]
    gets = [route for route in without if route["method"] == "GET"]
    for route in [*gets, *without, *registered]:
        return route["method"], _filled(route["path"])
    return "", ""


def _filled(path: str) -> str:
    return "/".join("x" if segment.startswith("{") else segment for segment in path.split("/"))


# ---- for people


def _print(report: Report) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    print(paint("1", escape(f"{report.plugin} {report.version}")), end="")
    print(f"  {report.isolation}, sharing: {report.sharing}, {escape(report.route)}")
    print(f"{report.machine['cpu']}, Linux {report.machine['kernel']}, Python {report.machine['python']}\n")
    print(paint("2", f"  {'':<30}{'median':>11}{'p10':>11}{'p90':>11}   rounds"))
    for group, figures in _groups(report.figures):
        print(paint("1", group))
        for figure in figures:
            low, high = figure.spread
            numbers = "".join(f"{_number(value):>11}" for value in (figure.median, low, high))
            print(f"  {figure.name:<30}{numbers}   {len(figure.values):<5} {figure.unit}".rstrip())
    for note in report.notes:
        print(paint("33", "note: ") + escape(note))


def _print_changes(old: Report, new: Report) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = {"better": "32", "worse": "31"}
    print(f"\nsince {old.machine['date']} (hayhost {old.hayhost})")
    for what in ("cpu", "kernel", "python"):
        if old.machine.get(what) != new.machine.get(what):
            print(f"note: another {what} then: {escape(str(old.machine.get(what)))}")
    for name, a, b in (("plugin", old.plugin, new.plugin), ("route", old.route, new.route)):
        if a != b:
            print(f"note: another {name} then: {escape(a)}")
    if old.isolation != new.isolation:
        print(f"note: another isolation then: {escape(old.isolation)}")
    for group, changes in _groups(compare(old, new)):
        print(group)
        for change in changes:
            verdict = f"{change.verdict:<6}"
            if colour and change.verdict in colours:
                verdict = f"\x1b[{colours[change.verdict]}m{verdict}\x1b[0m"
            print(f"  {change.name:<30}{verdict} {change.by:+8.1%}   likely {change.low:+.1%} to {change.high:+.1%}")


def _groups(figures: "Iterable[Any]") -> "Iterable[tuple[str, list[Any]]]":
    groups: dict[str, list[Figure | Change]] = {}
    for figure in figures:
        groups.setdefault(figure.group, []).append(figure)
    return groups.items()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
