"""Measured values, what they amount to, and whether they differ from those of another run by more than noise."""

import os
import platform
import random
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from hayhost.errors import HostError

__all__ = ["YARDSTICK", "Change", "Figure", "Report", "compare", "machine", "percentile", "read_report", "summary"]

_PACKAGES: Final = ("tornado", "msgspec", "watchdog", "dill", "multiprocess", "typeguard")

YARDSTICK: Final = "of Tornado alone"
"""What the name of a figure ends in that is measured without hayhost: how fast the machine was during the run."""

# Changes below this are never called one: two runs of the same code differ by that, however many rounds they have.
_LEAST_CHANGE: Final = 0.05
_RESAMPLES: Final = 2_000
_CONFIDENCE: Final = 0.95
_FEWEST: Final = 4


class Figure(msgspec.Struct, frozen=True):
    """What was measured, one value per round. ``better`` says which way is."""

    group: str
    name: str
    unit: str
    better: Literal["lower", "higher"]
    values: Annotated[list[float], msgspec.Meta(min_length=1)]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The tenth and the ninetieth percentile."""
        return percentile(self.values, 0.1), percentile(self.values, 0.9)


class Report(msgspec.Struct, frozen=True):
    """A run of ``hayhost bench``. ``route`` is what routes were measured with, ``notes`` what is missing and why."""

    hayhost: str
    machine: dict[str, str]
    plugin: str
    version: str
    isolation: str
    sharing: str
    route: str
    figures: list[Figure]
    notes: list[str] = []

    def encode(self) -> bytes:
        """As JSON, with median and spread beside the values."""
        plain = msgspec.to_builtins(self)
        for figure, fields in zip(self.figures, plain["figures"], strict=True):
            low, high = figure.spread
            fields["values"] = [_short(value) for value in figure.values]
            fields |= {"p50": _short(figure.median), "p10": _short(low), "p90": _short(high), "n": len(figure.values)}
        return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"


class Change(msgspec.Struct, frozen=True):
    """How a figure changed, relative to the old median; the true change is likely from ``low`` to ``high``."""

    group: str
    name: str
    by: float
    low: float
    high: float
    verdict: Literal["better", "worse", "same", "too few rounds"]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, and number of values."""
    return {
        "p50": round(statistics.median(values), 2),
        "p10": round(percentile(values, 0.1), 2),
        "p90": round(percentile(values, 0.9), 2),
        "n": len(values),
    }


def machine() -> dict[str, str]:
    """What the figures are of."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    return {
        "cpu": f"{os.cpu_count()} x {model.partition(':')[2].strip()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in _PACKAGES},
    }


def read_report(file: Path) -> Report:
    """A report that ``--json`` wrote. Raises ``HostError`` if it is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except OSError as error:
        raise HostError(f"{file}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise HostError(f"{file}: not a report of `hayhost bench --json`: {error}") from None


def compare(old: Report, new: Report) -> list[Change]:
    """The changes of all figures that both have, in the order of ``new``.

    A change counts if three things hold: resampling the rounds of both runs puts it on the same side of zero in 95 of
    100 cases; it is more than 5 %; and it is more than what the yardsticks, which have nothing of hayhost in them,
    changed between the runs.
    """
    before = {(figure.group, figure.name): figure for figure in old.figures}
    pairs = [(before[key], figure) for figure in new.figures if (key := (figure.group, figure.name)) in before]
    drifts = [abs(b.median / a.median - 1) for a, b in pairs if a.name.endswith(YARDSTICK) and a.median]
    least = max([_LEAST_CHANGE, *drifts])
    return [_change(a, b, least) for a, b in pairs]


def _change(old: Figure, new: Figure, least: float) -> Change:
    def ratio(a: list[float], b: list[float]) -> float:
        bottom = statistics.median(a)
        return statistics.median(b) / bottom - 1 if bottom else 0.0

    by = ratio(old.values, new.values)
    if min(len(old.values), len(new.values)) < _FEWEST:
        return Change(new.group, new.name, by, by, by, "too few rounds")
    chance = random.Random(0)  # the same files are always judged alike
    resampled = sorted(
        ratio(chance.choices(old.values, k=len(old.values)), chance.choices(new.values, k=len(new.values)))
        for _ in range(_RESAMPLES)
    )
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    low, high = resampled[tail], resampled[-1 - tail]
    verdict: Literal["better", "worse", "same"] = "same"
    if (low > 0 or high < 0) and abs(by) > least:
        verdict = "better" if (by > 0) is (new.better == "higher") else "worse"
    return Change(new.group, new.name, by, low, high, verdict)
