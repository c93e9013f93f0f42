"""A short part of ``python -m tests.fuzz``.

The seed is the same each time, so that what a change breaks is its own; HAYHOST_TEST_SEED is another.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .conftest import write_plugin
from .fuzz import frames, http, inputs
from .fuzz.machines import FrontMachine, WorkerMachine
from .hosting import hosting
from .managing import managed

SEED = int(os.environ.get("HAYHOST_TEST_SEED", "11"))

TestFront = FrontMachine.TestCase
TestWorker = WorkerMachine.TestCase
TestFront.settings = TestWorker.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("run", "count"), [(frames.decode, 20_000), (frames.workers, 3_000), (frames.zygotes, 1_000)])
def test_frames(run: frames.Run, count: int) -> None:
    assert run(count, SEED) > 0


def test_metadata() -> None:
    assert inputs.metadata(1_000, SEED) > 0


def test_manifests(tmp_path: Path) -> None:
    assert inputs.manifests(600, SEED, tmp_path) > 0


def test_requests(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", http.MIRROR)
    with hosting(tmp_path, "--request-timeout", "5") as host:
        outcomes = http.fuzz(host, 1_000, SEED)
        assert outcomes["200"] > 100
        assert outcomes["bad 400"] > 100


def test_settings(tmp_path: Path) -> None:
    with managed(tmp_path, "--spares", 0) as manager:
        assert set(inputs.settings(manager, 50, SEED)) >= {200, 422}
