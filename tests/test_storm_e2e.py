"""A short storm; ``python -m tests.storm`` is the long one.

The schedule is the same each time, so that what a change breaks is its own. A longer look: HAYHOST_TEST_STORM=60 is
seconds of it, HAYHOST_TEST_SEED another seed.
"""

import itertools
import os

import pytest

from .storm.agent import KINDS, schedule
from .storm.run import Plan, storm

SECONDS = float(os.environ.get("HAYHOST_TEST_STORM", "15"))
SEED = int(os.environ.get("HAYHOST_TEST_SEED", "11"))


def test_a_seed_makes_one_schedule() -> None:
    faults = schedule(1, 600, 2)
    assert faults == schedule(1, 600, 2)
    assert faults != schedule(2, 600, 2)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert all(early.at <= late.at < 600 for early, late in itertools.pairwise(faults))


@pytest.mark.timeout(240 + 3 * SECONDS)
def test_nobody_notices_a_storm(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nstorm of seed {SEED}")
    report = storm(Plan(SEED, SECONDS, orgs=10, plugins=3, clients=20, rate=2.0), print)
    assert report.violations == [], f"HAYHOST_TEST_SEED={SEED}, log: {report.log}"
    assert sum(report.faults.values()) > SECONDS / 2
    assert report.statuses["200"] > 100
