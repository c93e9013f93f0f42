"""The front's look at a process from outside."""

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hayhost import inspection
from hayhost.inspection import inspect, pid_inside, threads_of
from sandbox.confinement import Plan

ALL = Plan(layers=frozenset({"inspection"}))


@pytest.fixture
def shared() -> Iterator[None]:
    """This process has shared memory that has no name."""
    memory = mmap.mmap(-1, 4096)
    yield
    memory.close()


def test_shared_mappings_are_the_same_by_query_and_by_text(shared: None, tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * 4096)
    with file.open("rb") as open_file, mmap.mmap(open_file.fileno(), 0, access=mmap.ACCESS_READ):
        descriptor = os.open(f"/proc/{os.getpid()}/maps", os.O_RDONLY)
        text = list(inspection._shared_of_text(descriptor))
        os.close(descriptor)
        assert sorted(inspection._shared(os.getpid())) == sorted(text)
        assert os.fsencode(file) in [path for _, _, path in text]


def test_shared_memory_without_a_name_is_found(shared: None) -> None:
    assert "make shared memory in on_start" in inspection._memory(os.getpid(), ALL)


def test_a_shared_file_of_the_scratch_folder_is_found(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * 4096)
    with file.open("r+b") as open_file, mmap.mmap(open_file.fileno(), 0):
        assert inspection._memory(os.getpid(), ALL) == ""
        assert "mapped" in inspection._memory(os.getpid(), Plan(scratch=str(tmp_path)))


def test_a_descriptor_that_the_front_did_not_make_is_found() -> None:
    with Path("/etc/passwd").open() as file:
        known = {(status.st_dev, status.st_ino) for status in map(os.stat, _descriptors())}
        assert inspection._descriptors(os.getpid(), frozenset(known)) == ""
        status = os.fstat(file.fileno())
        without = frozenset(known - {(status.st_dev, status.st_ino)})
        assert "/etc/passwd" in inspection._descriptors(os.getpid(), without)


def _descriptors() -> list[str]:
    folder = f"/proc/{os.getpid()}/fd"
    return [path for name in os.listdir(folder) if os.path.exists(path := f"{folder}/{name}")]


def test_threads_are_counted() -> None:
    before, gate = threads_of(os.getpid()), threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    assert threads_of(os.getpid()) == before + 1
    assert "threads before it was told" in inspect(os.getpid(), ALL, frozenset(), before)
    gate.set()
    thread.join()


def test_a_process_that_has_not_given_up_anything_is_found() -> None:
    assert inspect(os.getpid(), ALL, frozenset(), 10_000) in (
        "it has privileges that it was to give up",
        "it may gain privileges",
    )


def test_a_process_that_is_no_more() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert "cannot be inspected" in inspect(pid, ALL, frozenset(), 1)
    assert pid_inside(pid) == pid
    assert threads_of(pid) == 1
