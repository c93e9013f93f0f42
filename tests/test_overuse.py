"""Workers that take too much of the machine where there are no cgroups, seen from outside."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hayhost.overuse import Overuse
from sandbox.confinement import Plan

from .conftest import wait_until

PLAN = Plan(processes=20, memory=256 << 20)
PROGRAMS = Plan(processes=20, memory=256 << 20, programs=("/bin/true",))
CPUS = os.sched_getaffinity(0)
THREADS = "import threading\nfor _ in range(30): threading.Thread(target=threading.Event().wait, daemon=True).start()"
SHARED = "import mmap\nheld = mmap.mmap(-1, 300 << 20)\nfor at in range(0, 300 << 20, 4096): held[at] = 1"
MAPPED = "held = open(__import__('sys').executable, 'rb').read()"
CHILDREN = "import os\nfor _ in range(30):\n if not os.fork(): input()"
SPIN = """
import hashlib, threading
def spin():
    while True: hashlib.pbkdf2_hmac("sha256", b"x", b"y", 50_000)
for _ in range(3): threading.Thread(target=spin, daemon=True).start()
"""

Start = Callable[[str], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Processes that have run some code, and then wait."""
    started: list[subprocess.Popen[str]] = []

    def run(source: str) -> int:
        command = [sys.executable, "-c", f"{source}\nprint('done', flush=True)\ninput()"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        return process.pid

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("source", "plan", "told"),
    [
        (THREADS, PLAN, "it had 31 processes and threads, more than its 20; permissions.processes"),
        (CHILDREN, PROGRAMS, "it had 31 processes and threads, more than its 20; permissions.processes"),
        (SHARED, PLAN, "it used more than its 256 MiB of memory; permissions.memory"),
        (f"import os\nif os.fork(): os.wait()\n{SHARED}", PROGRAMS, "it used more than its 256 MiB of memory"),
    ],
    ids=["threads", "children", "shared memory", "shared memory of a child"],
)
def test_too_much_for_two_looks_is_the_end(start: Start, source: str, plan: Plan, told: str) -> None:
    pid, overuse = start(source), Overuse()
    assert overuse.look({pid: plan}) == {}
    assert told in overuse.look({pid: plan})[pid]


def test_what_is_in_its_limits_is_left_alone(start: Start) -> None:
    pid, overuse = start(MAPPED), Overuse()
    assert [overuse.look({pid: PROGRAMS}) for _ in range(3)] == [{}] * 3


def test_memory_that_it_shares_with_others_is_counted_once(start: Start) -> None:
    pid = start(f"import os\n{SHARED.replace('300', '200')}\nif os.fork(): os.wait()")
    overuse = Overuse()
    assert [overuse.look({pid: PROGRAMS}) for _ in range(3)] == [{}] * 3


@pytest.mark.skipif(len(CPUS) < 2, reason="there is one processor")
def test_more_than_one_processor_is_one_until_it_is_calm(start: Start) -> None:
    pid, overuse = start(SPIN), Overuse()
    tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]

    def kept() -> bool:
        assert overuse.look({pid: PLAN}) == {}
        return all(len(os.sched_getaffinity(task)) == 1 for task in tasks)

    wait_until(kept, "all its threads are on one processor")
    overuse.processors = CPUS
    os.kill(pid, 19)

    def free() -> bool:
        assert overuse.look({pid: PLAN}) == {}
        return all(os.sched_getaffinity(task) == CPUS for task in tasks)

    wait_until(free, "they may be on any again")


def test_a_process_that_is_no_more_is_no_problem() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    overuse = Overuse()
    overuse.look({child.pid: PLAN})
    child.wait()
    assert overuse.look({child.pid: PLAN}) == {}
    overuse.forget([])
