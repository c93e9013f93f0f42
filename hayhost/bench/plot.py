"""The picture of a report."""

from pathlib import Path
from typing import Any

from hayhost.errors import HostError

from .figures import YARDSTICK, Figure, Report

__all__ = ["check_plot", "plot"]

_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")


def check_plot(file: Path) -> None:
    """Raises ``HostError`` if ``file`` cannot be drawn: better before the measurement than after it."""
    if file.suffix not in (".svg", ".png"):
        raise HostError(f"--plot {file}: give a file that ends in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise HostError("--plot needs matplotlib: pip install 'hayhost[bench]'") from None


def plot(report: Report, file: Path) -> None:
    """Draw the parts that were measured into ``file``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hayhost"  # the same report is the same file
    from matplotlib import pyplot

    draw = [part for part in (_cold_starts, _routes, _memory, _hooks) if part(None, report.figures)]
    figure, axes = pyplot.subplots(1, max(1, len(draw)), figsize=(4 * max(1, len(draw)), 3.4), squeeze=False)
    for part, place in zip(draw, axes[0], strict=False):
        part(place, report.figures)
        place.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report.plugin} {report.version}, {report.isolation}, hayhost {report.hayhost}; {report.machine['cpu']}",
        fontsize=9,
    )
    figure.tight_layout()
    metadata: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {}
    figure.savefig(file, metadata=metadata)
    pyplot.close(figure)


def _cold_starts(axes: Any, figures: list[Figure]) -> bool:
    groups = [group for group in ("cold start", "cold start with a spare") if any(f.group == group for f in figures)]
    if axes is None:
        return bool(groups)
    colours: dict[str, str] = {}
    for row, group in enumerate(groups):
        left = 0.0
        for figure in figures:
            if figure.group == group and figure.name != "first answer":
                new = figure.name not in colours
                colour = colours.setdefault(figure.name, _COLOURS[len(colours) % len(_COLOURS)])
                axes.barh(row, figure.median, left=left, color=colour, label=figure.name if new else None)
                left += figure.median
    axes.set(yticks=range(len(groups)), xlabel="ms (medians)", title="First request to an org", ylim=(-0.6, 3.2))
    axes.set_yticklabels([group.removeprefix("cold start").strip() or "no spare" for group in groups])
    axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper left")
    return True


def _routes(axes: Any, figures: list[Figure]) -> bool:
    ours = [figure for figure in figures if figure.name == "throughput"]
    theirs = [figure for figure in figures if figure.name == f"throughput {YARDSTICK}"]
    if axes is None or not ours:
        return bool(ours)
    for offset, name, group in ((-0.2, "hayhost", ours), (0.2, "Tornado, in-process", theirs)):
        places = [place + offset for place in range(len(group))]
        spread = [[f.median - f.spread[0] for f in group], [f.spread[1] - f.median for f in group]]
        colour = _COLOURS[0] if offset < 0 else "#bbbbbb"
        axes.bar(places, [f.median for f in group], 0.4, yerr=spread, label=name, color=colour, capsize=2)
    axes.set(xticks=range(len(ours)), ylabel="requests per second", title="Throughput")
    axes.set_xticklabels([figure.group.removeprefix("route, ") for figure in ours], fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return True


def _memory(axes: Any, figures: list[Figure]) -> bool:
    found = [figure for figure in figures if figure.group.startswith("memory at ")]
    if axes is None or not found:
        return bool(found)
    for colour, name in zip(_COLOURS, ("RSS", "PSS", "private dirty"), strict=False):
        points = [(int(figure.group.split()[2]), figure.median) for figure in found if figure.name == name]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    axes.set(xscale="log", xlabel="orgs", ylabel="MB per worker", title="Memory of an idle worker", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)
    return True


def _hooks(axes: Any, figures: list[Figure]) -> bool:
    found = [figure for figure in figures if figure.group == "hooks" and figure.name != "on_initialize"]
    if axes is None or not found:
        return bool(found)
    axes.boxplot([figure.values for figure in found], orientation="horizontal", showfliers=False)
    axes.set(xlabel="ms", title="Hook round trips", xlim=(0, None))
    axes.set_yticklabels([figure.name for figure in found], fontsize=8)
    return True
