"""What counts as a change between two measurements."""

import random
from pathlib import Path

import pytest

from hayhost.bench.figures import YARDSTICK, Change, Figure, Report, compare, percentile, read_report
from hayhost.errors import HostError


def report(*figures: Figure) -> Report:
    machine = {"cpu": "1 x abacus", "kernel": "6", "python": "3", "date": "2026-01-01"}
    return Report("0", machine, "p", "1", "confined", "fork", "GET /", list(figures))


def lower(values: list[float], name: str = "latency") -> Figure:
    return Figure("g", name, "ms", "lower", values)


def noisy(median: float, seed: int, count: int = 20) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(median, median / 10) for _ in range(count)]


def change(old: list[float], new: list[float], better: str = "lower") -> Change:
    figures = (Figure("g", "f", "ms", better, values) for values in (old, new))  # type: ignore[arg-type]
    (found,) = compare(*(report(figure) for figure in figures))
    return found


def test_a_run_is_as_itself() -> None:
    values = noisy(1, 0)
    assert change(values, values).verdict == "same"
    assert change(values, values).by == 0


def test_noise_is_no_change() -> None:
    verdicts = [change(noisy(1, seed), noisy(1, seed + 1000)).verdict for seed in range(50)]
    assert verdicts.count("same") >= 45


@pytest.mark.parametrize(("factor", "way", "verdict"), [
    (1.3, "lower", "worse"),
    (0.7, "lower", "better"),
    (1.3, "higher", "better"),
    (0.7, "higher", "worse"),
])  # fmt: skip
def test_what_is_beyond_noise_is_found(factor: float, way: str, verdict: str) -> None:
    for seed in range(20):
        found = change(noisy(1, seed), noisy(factor, seed + 1000), way)
        assert found.verdict == verdict
        assert found.low <= found.by <= found.high
        assert abs(found.by - (factor - 1)) < 0.15


def test_a_change_that_is_certain_but_small_is_none() -> None:
    assert change([1.0, 1.001, 1.002, 1.001] * 5, [1.03, 1.031, 1.032, 1.031] * 5).verdict == "same"


def test_a_machine_that_was_slower_is_not_a_change_of_the_host() -> None:
    alone = f"latency {YARDSTICK}"
    slower = [value * 1.2 for value in noisy(1, 3)]
    old = report(lower(noisy(1, 1)), lower(noisy(1, 2), alone))
    assert compare(old, report(lower(slower), lower(noisy(1, 2), alone)))[0].verdict == "worse"
    assert compare(old, report(lower(slower), lower([v * 1.3 for v in noisy(1, 2)], alone)))[0].verdict == "same"


def test_too_few_rounds_say_nothing() -> None:
    assert change([1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]).verdict == "too few rounds"


def test_only_figures_that_both_have_are_compared() -> None:
    both = compare(report(lower([1.0] * 4), lower([1.0] * 4, "old")), report(lower([1.0] * 4, "new"), lower([1.0] * 4)))
    assert [found.name for found in both] == ["latency"]


def test_a_median_of_nothing_is_compared_with() -> None:
    assert change([0.0] * 5, [1.0] * 5).verdict == "same"


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    written = report(lower([1.0, 2.0, 3.0]))
    file.write_bytes(written.encode())
    assert read_report(file) == written


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"figures": [{"values": []}]}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(HostError, match=r"report\.json: not a report"):
        read_report(file)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100)]
    assert [percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
