"""What is kept of the log in memory is bounded, and no worker's lines push out another's; writers wait for nobody."""

import asyncio
import threading

import pytest

from hayhost.logs.log import Listener, Log
from hayhost.logs.records import Record, Wanted
from hayhost.logs.rings import Rings
from hayhost.logs.writing import Writer

from .conftest import wait_until


def record(id: int, org: str = "", plugin: str = "p", size: int = 100) -> Record:
    return Record(id, 20, plugin, org, 0, "", b"x" * size)


def kept(rings: Rings, org: str) -> list[int]:
    found, _ = rings.find(Wanted(plugin="p", org=org))
    return [record.id for ring in found for record in ring]


def test_each_has_its_number_of_records() -> None:
    rings = Rings(1 << 30, 10)
    for id in range(100):
        rings.add(record(id, "loud"))
    rings.add(record(100, "quiet"))
    assert kept(rings, "loud") == list(range(90, 100))
    assert kept(rings, "quiet") == [100]
    assert kept(rings, "nobody") == []


def test_none_has_more_than_its_part() -> None:
    rings = Rings(1 << 20, 1_000_000)
    for id in range(10_000):
        rings.add(record(id, "loud", size=1_000))
    assert 40 < len(kept(rings, "loud")) < 60
    assert rings.size <= 1 << 20


@pytest.mark.parametrize("size", [1, 300, 5_000])
def test_all_together_are_bounded(size: int) -> None:
    rings = Rings(1 << 20, 1_000)
    for id in range(20_000):
        rings.add(record(id, f"org{id % 3_000}", size=size))
        assert rings.size <= 1 << 20
    assert kept(rings, f"org{19_999 % 3_000}")[-1] == 19_999


def test_the_loud_make_room_before_the_quiet() -> None:
    rings = Rings(1 << 20, 100_000)
    rings.add(record(0, "quiet"))
    for id in range(1, 50_000):
        rings.add(record(id, f"loud{id % 20}", size=500))
    assert kept(rings, "quiet") == [0]


def test_one_record_that_is_larger_than_all_may_be() -> None:
    rings = Rings(1 << 20, 100)
    rings.add(record(1, "a"))
    rings.add(record(2, "a", size=2 << 20))
    rings.add(record(3, "a"))
    assert kept(rings, "a")[-1] == 3
    assert rings.size <= 1 << 20


def test_what_may_be_forgotten_is_known() -> None:
    rings = Rings(1 << 30, 10)
    begun = rings.find(Wanted())[1]
    for id in range(begun + 1, begun + 31):
        rings.add(record(id, "a"))
    assert rings.find(Wanted(org="a"))[1] == begun + 20
    assert rings.find(Wanted(org="b"))[1] == begun


class Sink:
    """Takes what is written, unless it is told to stand still."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.open = threading.Event()
        self.open.set()
        self.writer = Writer(self._write, lambda count: b"missing %d\n" % count, "test")

    def _write(self, data: bytes) -> None:
        assert self.open.wait(60)
        self.lines += data.splitlines()


def test_lines_are_written_in_order() -> None:
    sink = Sink()
    for number in range(10_000):
        sink.writer.put(b"%d\n" % number)
    assert sink.writer.flush(60)
    assert sink.lines == [b"%d" % number for number in range(10_000)]


def test_what_nobody_takes_is_dropped_and_counted() -> None:
    sink = Sink()
    sink.open.clear()
    for _ in range(1_000):
        sink.writer.put(b"x" * 9_999 + b"\n")
    assert not sink.writer.flush(0)
    sink.open.set()
    wait_until(lambda: any(line.startswith(b"missing") for line in sink.lines), "it is told, although nothing follows")
    [told] = [line for line in sink.lines if line.startswith(b"missing")]
    assert int(told.split()[1]) + len(sink.lines) - 1 == 1_000
    assert sink.lines[-1] == told
    sink.writer.put(b"after\n")
    assert sink.writer.flush(60)
    assert sink.lines[-1] == b"after"


def test_a_listener_that_is_behind_is_told_how_much_it_lost() -> None:
    async def listen() -> None:
        listener = Listener(Wanted(org="a"))
        for id in range(5_000):
            listener.give(record(id, "a" if id % 2 else "b"))
        records, lost = await listener.next(60)
        assert (len(records), lost) == (2_000, 500)
        assert await listener.next(0) == ([], 0)
        thread = threading.Thread(target=listener.give, args=(record(1, "a"),))
        thread.start()
        assert len((await listener.next(60))[0]) == 1
        thread.join()
        listener.close()
        assert await listener.next(60) == ([], 0)
        assert listener.closed

    asyncio.run(listen())


def test_ids_grow() -> None:
    written: list[int] = []
    log = Log(Rings(1 << 20, 100), lambda fields: written.append(fields["id"]))
    for _ in range(1_000):
        log.info({"level": "info", "event": "x"})
    assert written == sorted(set(written))
