"""The log's file: rotated, read from its end, and no reason for a host to stop."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hayhost.logs import file as log_file
from hayhost.logs.file import LogFile, find, record_of
from hayhost.logs.records import Wanted


def line(id: int, **fields: Any) -> bytes:
    record = {"id": id, "time": "t", "level": "info", "event": f"event {id}", **fields}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


class Said:
    """What a file tells of itself."""

    def __init__(self, path: Path, size: int = 1_000_000, count: int = 3) -> None:
        self.failures: list[str] = []
        self.lost: list[int] = []
        self.file = LogFile(path, size, count, self.failures.append, self.lost.append)


def ids(path: Path, limit: int = 1_000, after: int | None = None, **wanted: Any) -> list[int]:
    return [record.id for record in find(path, Wanted(**wanted), limit, after)]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch(0o644)
    Said(path).file.write(line(1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    said = Said(path, size=len(line(10)) * 10)
    for id in range(10, 95):
        said.file.write(line(id))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", "log.1", "log.2"]
    assert [len(file.read_bytes().splitlines()) for file in files] == [5, 10, 10]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert ids(path) == list(range(70, 95))
    assert ids(path, 8) == list(range(87, 95))
    assert ids(path, 8, after=75) == list(range(76, 84))
    assert ids(path, 8, after=90) == [91, 92, 93, 94]
    assert ids(path, since=89) == list(range(89, 95))
    assert not said.failures


def test_only_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    said = Said(path, size=len(line(10)) * 2, count=1)
    for id in range(10, 15):
        said.file.write(line(id))
    assert ids(path) == [14]
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_one_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    said = Said(path)
    said.file.write(line(1))
    path.rename(tmp_path / "old")
    said.file.write(line(2))
    assert ids(path) == [2]
    assert ids(tmp_path / "old") == [1]


def test_one_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "not there" / "log"
    said = Said(path)
    for id in range(3):
        said.file.write(line(id) * 2)
    assert said.failures == ["No such file or directory"]
    path.parent.mkdir()
    said.file.write(line(9))
    assert said.lost == [6]
    assert ids(path) == [9]


def test_a_full_disk_leaves_no_half_line_to_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    said = Said(path)
    write, room = os.write, [10]

    def fill(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", fill)
    said.file.write(line(1))
    said.file.write(line(2))
    assert said.failures == ["No space left on device"]
    room[0] = 1_000
    said.file.write(line(3))
    assert said.lost == [2]
    assert ids(path) == [3]


def test_what_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    said = Said(path)
    said.file.write(line(1, plugin="a", org="x", level="error") + line(2, plugin="a", org="y", meta={"org": "x"}))
    said.file.write(line(3, plugin="b", org="x", request="r", traceback="Some Text") + line(4))
    assert ids(path, org="x") == [1, 3]
    assert ids(path, plugin="a") == [1, 2]
    assert ids(path, plugin="a", org="x") == [1]
    assert ids(path, level=40) == [1]
    assert ids(path, request="r") == [3]
    assert ids(path, text="some text") == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"not JSON",
        b"[]",
        b"{}",
        b'{"id":"1","time":"t","level":"info","event":"e"}',
        b'{"id":1,"time":"t","level":"loud","event":"e"}',
        b'{"id":1,"time":"t","level":"info","event":3}',
        b'{"id":1,"time":"t","level":"info","event":"e","worker":"x"}',
        b'{"id":1,"time":"t","level":"info","event":"e","source":"x"}',
        b"\xff\xfe",
        b'{"id":1,"time":"t","level":"info","event":"e","meta":' + b"[" * 100_000,
    ],
)
def test_lines_of_others(tmp_path: Path, wrong: bytes) -> None:
    assert record_of(wrong) is None
    path = tmp_path / "log"
    path.write_bytes(line(1) + wrong + b"\n" + line(2))
    assert ids(path) == [1, 2]


def test_lines_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "_CHUNK", 7)
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(id) for id in range(1, 20)))
    assert ids(path) == list(range(1, 20))
