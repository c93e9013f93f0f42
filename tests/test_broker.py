"""The egress broker against names and addresses that must not be reached, and against workers that mean harm."""

import array
import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayhost.egress import Egress
from hayhost.errors import HostError
from sandbox import wire
from sandbox.broker import addresses, limits, messages, names
from sandbox.broker.addresses import Policy
from sandbox.broker.names import Rules, normalise
from sandbox.broker.resolver import Resolver, Share

from .conftest import wait_until
from .networking import Bench, answer, bench, dial

PLAIN = "api.test:{plain}"
EPERM, ENOBUFS = 1, 105


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("broker")) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Bench]:
    """A broker that no other test uses, and that allows nothing special."""
    with bench(tmp_path, allow=()) as made:
        yield made


def encode(message: wire.Message) -> bytes:
    return msgspec.msgpack.encode(message)


def works(made: Bench, end: socket.socket) -> bool:
    """Whether the broker connects for the worker at ``end``."""
    said, connection = answer(dial(end, "api.test", made.network.plain))
    if connection is not None:
        connection.close()
    return said.error == 0


def cut_off(end: socket.socket) -> bool:
    """Wait until the broker has closed its end."""
    with contextlib.suppress(ConnectionResetError):
        while end.recv(1 << 16):
            pass
    return True


def descriptors(made: Bench) -> int:
    return len(os.listdir(f"/proc/{made.egress.pid}/fd"))


# ---- names


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("API.Stripe.com", "api.stripe.com"),
        ("api.stripe.com.", "api.stripe.com"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("localhost", "localhost"),
        ("1.2.3.com", "1.2.3.com"),
        ("0x7f.example", "0x7f.example"),
    ],
)
def test_a_name_has_one_spelling(host: str, name: str) -> None:
    assert normalise(host) == name


BAD_NAMES = [
    "", ".", "..", "a..b", ".example.com", "example.com..", "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001",
    "0x7f.1", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.0.0.1.", "0", "00", "0x", "0x.", "1.1", "example.1",
    "example.0x1", "[127.0.0.1]", "[::1]", "::1", "::", "fe80::1%eth0", "fe80::1%25eth0", "::ffff:127.0.0.1",
    "1::2%", "a%00.com", "a\0.com", "a\n.com", "a b.com", "a/b", "a@b", "user@a.com", "a:80", "a,b", "a\\b.com",
    "\uff11\uff12\uff17.0.0.1", "\u2460.0.0.1", "exa\u00admple.com", "example\u3002com", "\u212aexample.com", "-a.com",
    "a-.com", "a" * 64 + ".com", "a." * 127 + "com", "*.example.com", "ex*mple.com", "127.0.0.0x1", "999.999.999.999",
]  # fmt: skip


@pytest.mark.parametrize("host", BAD_NAMES)
def test_what_could_be_read_as_something_else_is_no_name(host: str) -> None:
    with pytest.raises(ValueError, match=r"not a DNS name|an IP address"):
        normalise(host)


@given(st.text())
def test_a_name_has_nothing_in_it_that_is_not_of_names(host: str) -> None:
    with contextlib.suppress(ValueError):
        name = normalise(host)
        assert re.fullmatch(r"[a-z0-9_.-]{1,253}", name)
        assert normalise(name) == name
        assert names.literal(name) is None


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("api.stripe.com", 443, True),
        ("api.stripe.com", 80, False),
        ("api.stripe.com", 0, True),
        ("stripe.com", 443, False),
        ("evil-api.stripe.com", 443, False),
        ("api.stripe.com.evil.com", 443, False),
        ("acme.zendesk.com", 443, True),
        ("acme.zendesk.com", 444, False),
        ("acme.zendesk.com", 0, True),
        ("zendesk.com", 443, False),
        ("a.b.zendesk.com", 443, False),
        ("zendesk.com.evil.com", 443, False),
        ("evilzendesk.com", 443, False),
        ("8.8.8.8", 443, False),
        ("2600::1", 443, False),
    ],
)
def test_rules(host: str, port: int, allowed: bool) -> None:
    assert Rules(["api.stripe.com:443", "*.zendesk.com:443"]).allow(host, port) is allowed
    assert Rules(True).allow(host, port)
    assert not Rules(False).allow(host, port)


# ---- addresses

FORBIDDEN = [
    "0.0.0.0", "0.0.0.1", "0.255.255.255", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200",
    "100.127.255.255", "127.0.0.1", "127.1.2.3", "127.255.255.255", "168.63.129.16", "169.254.169.254", "169.254.0.1",
    "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.254", "255.255.255.255", "192.31.196.1", "192.52.193.1",
    "192.175.48.1", "::", "::1", "::2", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:a9fe:a9fe", "::ffff:10.0.0.1",
    "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "64:ff9b:1:ffff::a00:1", "100::1", "100:0:0:1::1", "2001::1", "2001:0:7f00:1::", "2001:2::1",
    "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1", "3fff::1",
    "3ffe::1", "5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fdff:ffff::1", "fe80::1", "fe80::a9fe:a9fe",
    "febf::1", "fec0::1", "feff::1", "ff00::1", "ff02::1", "ff0e::1", "4000::1", "8000::1", "e000::1", "1::1",
    "2600::5efe:7f00:1", "2600::200:5efe:a00:1", "2620:4f:8000::1",
]  # fmt: skip


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@pytest.mark.parametrize("text", FORBIDDEN)
def test_a_special_address_is_refused(text: str) -> None:
    assert Policy().refusal(packed(text))


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
     "169.253.255.255", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "198.17.255.255", "198.20.0.0",
     "223.255.255.255", "2600::1", "2606:4700:4700::1111", "2a00:1450::1", "2001:200::1", "3ffd::1"],
)  # fmt: skip
def test_a_public_address_is_not(text: str) -> None:
    assert Policy().refusal(packed(text)) is None


def test_the_operator_allows_networks_and_nothing_else_with_them() -> None:
    policy = Policy(["10.1.0.0/16", "::1/128", "64:ff9b::/96"])
    assert policy.refusal(packed("10.1.2.3")) is None
    assert policy.refusal(packed("::1")) is None
    assert policy.refusal(packed("64:ff9b::8.8.8.8")) is None
    for text in ("10.2.0.1", "127.0.0.1", "::ffff:10.1.2.3", "64:ff9b::127.0.0.1", "64:ff9b:1::1"):
        assert policy.refusal(packed(text)), text


@pytest.mark.parametrize("binds_any", [False, True])
def test_this_hosts_own_addresses_are_refused(monkeypatch: pytest.MonkeyPatch, binds_any: bool) -> None:
    assert addresses._is_own(ipaddress.ip_address("127.0.0.1"))
    monkeypatch.setattr(addresses, "_binds_any", lambda _: binds_any)
    monkeypatch.setattr(addresses, "_SPECIAL", [])  # whatever they are
    own = addresses._own()
    assert {"127.0.0.1"} <= own
    assert all(Policy().refusal(packed(text)) for text in own)
    assert Policy().refusal(packed("8.8.8.8")) is None


@pytest.mark.parametrize("host", [*FORBIDDEN, *BAD_NAMES])
def test_no_spelling_gets_through_the_broker(made: Bench, host: str) -> None:
    with made.worker(True, org=f"org-{hash(host)}") as end:
        if len(host) > names.MAX_NAME + 1 or host == "127.0.0.1":
            return  # the first is no datagram, the second is what these tests allow
        said, connection = answer(dial(end, host, made.network.plain))
    assert connection is None
    assert said.error in (EPERM, socket.EAI_NONAME)


@pytest.mark.parametrize("addresses_of", [["127.0.0.1"], ["10.0.0.1", "fd00::1"], ["169.254.169.254"], ["::1"],
                                          ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], ["0.0.0.0"]])  # fmt: skip
def test_a_name_that_leads_to_a_special_address_is_refused(own: Bench, addresses_of: list[str]) -> None:
    own.network.names.set("evil.test", addresses_of)
    with own.worker(["evil.test:{plain}"]) as end:
        said, connection = answer(dial(end, "evil.test", own.network.plain))
    assert connection is None
    assert said.error == EPERM
    assert "which no plugin may connect to" in said.text
    assert not any(text in said.text for text in addresses_of)  # where it leads is for the operator only
    own.wait_for("connection refused", host="evil.test")


def test_a_refused_address_beside_an_allowed_one_is_left_out(made: Bench) -> None:
    made.network.names.set("both.test", ["10.0.0.1", "127.0.0.1", "fd00::7"])
    with made.worker(["both.test:{plain}"], org="both") as end:
        _, connection = answer(dial(end, "both.test", made.network.plain))
    assert connection is not None
    with connection:
        assert connection.getpeername() == ("127.0.0.1", made.network.plain)


def test_a_name_that_changes_its_address_is_judged_and_dialled_as_one_answer(made: Bench) -> None:
    made.network.names.set("rebound.test", "127.0.0.1", "10.0.0.1", "127.0.0.1", "169.254.169.254")
    with made.worker(["rebound.test:{plain}"], org="rebound") as end:
        asked = made.network.names.asked.count("rebound.test")
        got = []
        for dials in range(1, 5):
            said, connection = answer(dial(end, "rebound.test", made.network.plain))
            got.append(connection.getpeername()[0] if connection else said.error)
            if connection:
                connection.close()
            assert made.network.names.asked.count("rebound.test") == asked + dials  # once each
    assert got == ["127.0.0.1", EPERM, "127.0.0.1", EPERM]


def test_unlisted_names_ports_and_addresses_are_refused_without_being_resolved(made: Bench) -> None:
    made.network.names.set("not.test", "127.0.0.1")
    with made.worker([PLAIN, "*.wild.test:{plain}"], org="unlisted") as end:
        for host, port in (("not.test", made.network.plain), ("api.test", made.network.port), ("wild.test", 80),
                           ("a.b.wild.test", made.network.plain), ("127.0.0.1", made.network.plain)):  # fmt: skip
            said, _ = answer(dial(end, host, port))
            assert said.error == EPERM
            assert "is not in permissions.network" in said.text
        said, connection = answer(dial(end, "A.wild.test.", made.network.plain))
        assert connection is not None
        connection.close()
    assert "not.test" not in made.network.names.asked


def test_a_missing_name_and_a_port_that_nobody_listens_on_are_failures(made: Bench) -> None:
    with made.worker(True, org="failures") as end:
        assert answer(dial(end, "missing.test", 80))[0].error == socket.EAI_NONAME
        assert answer(dial(end, "api.test", 1))[0].error == 111
    made.wait_for("connection failed", host="api.test", port=1)
    assert made.egress.counters["p", "failures"].failed == 2


def test_the_systems_own_resolver(tmp_path: Path) -> None:
    with bench(tmp_path, nameserver=False) as made, made.worker(True) as end:
        said, connection = answer(dial(end, "localhost", made.network.plain))
        assert said.error == 0
        assert connection is not None
        connection.close()
        assert answer(dial(end, "missing.invalid", 80))[0].error < 0


# ---- descriptors


def test_a_peer_sees_the_end_when_the_worker_closes(made: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        port = server.getsockname()[1]
        with made.worker([f"api.test:{port}"], org="end") as end:
            _, connection = answer(dial(end, "api.test", port))
            assert connection is not None
            peer, _ = server.accept()
            with peer:
                peer.settimeout(60)
                connection.close()
                assert peer.recv(1) == b""


def test_nothing_is_left_of_workers_and_dials(made: Bench) -> None:
    with made.worker([PLAIN], org="left") as end:
        assert works(made, end)
    wait_until(lambda: made.call(lambda: len(made.egress._workers)) == 0, "all workers are forgotten")
    before = descriptors(made)
    for _ in range(3):
        with made.worker([PLAIN], org="left") as end:
            for _ in range(10):
                assert works(made, end)
            dial(end, "api.test", 1).close()
    wait_until(lambda: descriptors(made) <= before, "the broker's descriptors are closed")


def test_the_broker_has_given_up_what_it_does_not_need(made: Bench) -> None:
    status = Path(f"/proc/{made.egress.pid}/status").read_text()
    assert re.search(r"NoNewPrivs:\s+1", status)
    if os.geteuid() == 0:
        assert re.search(r"Uid:\s+65534\s+65534\s+65534", status)
        assert re.search(r"CapEff:\s+0+\n", status)
        assert re.search(r"Groups:\s*\n", status)


# ---- workers that mean harm


def test_a_closed_reply_cancels_the_dial(made: Bench) -> None:
    made.network.names.set("hangs.test", "127.0.0.1")
    made.network.names.silent.add("hangs.test")
    with made.worker(["hangs.test:80", PLAIN], org="cancels") as end:
        before = descriptors(made)
        replies = [dial(end, "hangs.test", 80) for _ in range(32)]
        wait_until(lambda: descriptors(made) >= before + 32, "all are pending")
        begun = time.monotonic()
        for reply in replies:
            reply.close()
        assert works(made, end)  # there would be no room for it
        assert time.monotonic() - begun < 4
        wait_until(lambda: descriptors(made) <= before + 1, "nothing is kept")


def test_no_more_than_so_many_dials_of_a_worker_are_pending_and_the_rest_waits(made: Bench) -> None:
    made.network.names.set("hangs.test", "127.0.0.1")
    made.network.names.silent.add("hangs.test")
    with made.worker(["hangs.test:80"], org="many") as end, made.worker([PLAIN], org="other") as other:
        before = descriptors(made)
        replies = [dial(end, "hangs.test", 80) for _ in range(100)]
        wait_until(lambda: descriptors(made) >= before + 32, "some are pending")
        assert works(made, other)
        assert descriptors(made) <= before + 60  # with those that ask for names
        for reply in replies:
            reply.close()
        wait_until(lambda: descriptors(made) <= before, "nothing is kept")


def test_one_orgs_hanging_names_keep_no_other_org_waiting(made: Bench) -> None:
    made.network.names.silent.add("hangs.test")
    with contextlib.ExitStack() as stack:
        replies = []
        for _ in range(3):
            end = stack.enter_context(made.worker(["hangs.test:80"], org="greedy"))
            replies += [dial(end, "hangs.test", 80) for _ in range(32)]
        other = stack.enter_context(made.worker([PLAIN], org="modest"))
        begun = time.monotonic()
        assert all(works(made, other) for _ in range(20))
        assert time.monotonic() - begun < 4
        for reply in replies:
            reply.close()


def test_many_orgs_with_hanging_names_keep_no_other_org_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def look_up(name: str, *_: Any, **__: Any) -> list[Any]:
        if name == "hangs.test":
            may_end.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0))]

    async def ask() -> None:
        resolver = Resolver()
        greedy = [Share() for _ in range(100)]
        hanging = [asyncio.create_task(resolver.addresses("hangs.test", share)) for share in greedy for _ in range(4)]
        await asyncio.sleep(0)
        assert await resolver.addresses("api.test", Share()) == [bytes((192, 0, 2, 1))]
        assert not any(task.done() for task in hanging)
        may_end.set()
        assert all(len(found) == 1 for found in await asyncio.gather(*hanging))
        assert [share.running for share in greedy] == [0] * 100

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    asyncio.run(ask())


def test_an_org_makes_no_more_than_so_many_connections_a_minute(made: Bench) -> None:
    with made.worker([], org="hasty") as end, made.worker([PLAIN], org="hasty") as second:
        for _ in range(limits.DIALS_AT_ONCE):
            dial(end, "api.test", 1).close()  # refused anyway: the rules come first, and cost nothing
        assert works(made, second)
    with made.worker(True, org="hastier") as end:
        errors = [EPERM]
        while errors[-1] == EPERM and len(errors) < 4 * limits.DIALS_AT_ONCE:
            errors.append(answer(dial(end, "127.0.0.2", 1))[0].error)
        assert errors[-1] == ENOBUFS
        assert len(errors) > limits.DIALS_AT_ONCE
    with made.worker([PLAIN], org="calm") as other:
        assert works(made, other)


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "an empty datagram": b"",
    "an unknown message": msgspec.msgpack.encode([99, "api.test", 80]),
    "a message of the broker's": encode(messages.Answer(0, "", 1)),
    "a wrong type": msgspec.msgpack.encode([1, 5, "x"]),
    "too few fields": msgspec.msgpack.encode([1, "api.test"]),
    "too many fields": msgspec.msgpack.encode([1, "api.test", 80, 1]),
    "a port of 0": msgspec.msgpack.encode([1, "api.test", 0]),
    "a port that is too large": msgspec.msgpack.encode([1, "api.test", 65536]),
    "a negative port": msgspec.msgpack.encode([1, "api.test", -1]),
    "a name that is too long": msgspec.msgpack.encode([1, "a" * 255, 80]),
    "a broken name": b"\x93\x01\xa2\xff\xfe\x50",
    "deep nesting": b"\x91" * 1000,
    "a giant array": b"\xdd\xff\xff\xff\xff",
    "bytes left over": encode(messages.Dial("api.test", 80)) + b"x",
    "negative figures": msgspec.msgpack.encode([2, 1, -1, 0]),
    "giant figures": msgspec.msgpack.encode([2, 1, 1 << 63, 0]),
    "a giant datagram": b"\xc4" * 100_000,
    "a datagram that is a byte too long": encode(messages.Dial("api.test", 80)).ljust(messages.MAX_DATAGRAM + 1, b"\0"),
    "no socket": encode(messages.Dial("api.test", 80)),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_worker_that_sends_garbage_is_cut_off_and_nobody_else(made: Bench, what: str) -> None:
    with made.worker([PLAIN], org="bad") as bad, made.worker([PLAIN], org="good") as good:
        reply, theirs = socket.socketpair()
        with reply, theirs:
            if what == "no socket":
                bad.send(GARBAGE[what])
            else:
                socket.send_fds(bad, [GARBAGE[what]], [theirs.fileno()] if GARBAGE[what] else [])
        assert cut_off(bad)
        assert works(made, good)
    if GARBAGE[what]:
        made.wait_for("the worker is cut off from the network", org="bad")


@given(st.binary(max_size=1024))
def test_no_bytes_are_more_than_malformed(data: bytes) -> None:
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        decoded = msgspec.msgpack.decode(data, type=messages.FromWorker)
        assert isinstance(decoded, messages.Dial | messages.Done)


def half_pair(kind: int) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.close()
    return ours


def other_descriptors() -> dict[str, Any]:
    return {
        "a file": lambda: tempfile.TemporaryFile(),
        "a pipe": lambda: os.fdopen(os.pipe()[1], "wb"),
        "a datagram pair": lambda: half_pair(socket.SOCK_DGRAM),
        "a seqpacket pair": lambda: half_pair(socket.SOCK_SEQPACKET),
        "an internet socket": lambda: socket.socket(),
    }


@pytest.mark.parametrize("what", other_descriptors())
def test_another_descriptor_than_a_stream_socket_cuts_the_worker_off(made: Bench, what: str) -> None:
    before = descriptors(made)
    with made.worker([PLAIN], org="odd") as end, made.worker([PLAIN], org="good") as good:
        with other_descriptors()[what]() as odd:
            socket.send_fds(end, [encode(messages.Dial("api.test", 80))], [odd.fileno()])
        assert cut_off(end)
        assert works(made, good)
    wait_until(lambda: descriptors(made) <= before, "the broker keeps nothing")


def test_its_own_descriptor_as_the_reply_cuts_the_worker_off(made: Bench) -> None:
    with made.worker([PLAIN], org="self") as end:
        socket.send_fds(end, [encode(messages.Dial("api.test", 80))], [end.fileno()])
        assert cut_off(end)


def test_more_descriptors_than_one_are_not_kept(made: Bench) -> None:
    with made.worker([PLAIN], org="lots") as end:
        assert works(made, end)
        before = descriptors(made)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            lots = array.array("i", [theirs.fileno()] * 200)
            end.sendmsg(
                [encode(messages.Dial("api.test", made.network.plain))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, lots)]
            )
            theirs.close()
            ours.settimeout(60)
            said, connection = answer(ours)
        assert said.error == 0
        assert connection is not None
        connection.close()
        wait_until(lambda: descriptors(made) <= before, "the broker keeps nothing")


def test_a_reply_that_nobody_reads_and_that_blocks_stalls_nothing(made: Bench) -> None:
    with made.worker([PLAIN], org="stubborn") as end, made.worker([PLAIN], org="good") as good:
        kept = []
        for _ in range(10):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(bytes(1 << 16))
            theirs.setblocking(True)  # for the broker, too: it is the same open socket
            socket.send_fds(end, [encode(messages.Dial("api.test", made.network.plain))], [theirs.fileno()])
            kept += [ours, theirs]
        for _ in range(5):
            assert works(made, good)
        for sock in kept:
            sock.close()


def test_a_flood_delays_others_but_little(made: Bench) -> None:
    with made.worker([PLAIN], org="flood") as end, made.worker([PLAIN], org="unmoved") as good:
        end.setblocking(False)
        flood = encode(messages.Done(1, 2, 3))
        begun = time.monotonic()
        answered = 0
        while time.monotonic() - begun < 2 and answered < limits.DIALS_AT_ONCE // 2:  # more would be its own flood
            with contextlib.suppress(BlockingIOError):
                for _ in range(1000):
                    end.send(flood)
            assert works(made, good)
            answered += 1
        assert answered > 5


def test_figures_of_no_connection_are_ignored(made: Bench) -> None:
    with made.worker([PLAIN], org="liar") as end:
        for number in range(10):
            end.send(encode(messages.Done(number, 1, 1)))
        assert works(made, end)
        end.send(encode(messages.Done(1, (1 << 63) - 1, 5)))
        end.send(encode(messages.Done(1, 7, 7)))  # again: it is closed already
        made.wait_for("connection closed", org="liar")
        assert works(made, end)
    counters = made.egress.counters["p", "liar"]
    wait_until(lambda: counters.connected == 2, "both are counted")
    assert (counters.closed, counters.sent, counters.received) == (1, (1 << 63) - 1, 5)


def test_the_log_of_an_org_is_rated(made: Bench) -> None:
    with made.worker([], org="noisy") as end:
        begun = time.monotonic()
        for _ in range(300):
            answer(dial(end, "x\x1b[31m.test", 80))
        most = 201 + (time.monotonic() - begun) * 20
    assert 200 <= len(made.records("connection refused", org="noisy")) <= most
    assert "\x1b" not in made.log.getvalue()
    counters = made.egress.counters["p", "noisy"]
    wait_until(lambda: counters.refused == 300, "all are counted")


# ---- the process and its handle


def test_it_ends_with_the_front(made: Bench, tmp_path: Path) -> None:
    with bench(tmp_path) as other:
        pid = other.egress.pid
        other.wait(other.egress.stop())
        assert not Path(f"/proc/{pid}").exists()
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "sandbox.broker", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
    ours.close()
    assert process.wait(60) == 0


def test_it_survives_what_ends_a_terminals_processes_and_says_what_it_is(made: Bench) -> None:
    os.kill(made.egress.pid, signal.SIGINT)
    with made.worker([PLAIN], org="after") as end:
        assert works(made, end)
    by_hand = subprocess.run([sys.executable, "-I", "-m", "sandbox.broker"], capture_output=True, text=True)
    assert by_hand.returncode == 64
    assert "of no use by itself" in by_hand.stderr


@pytest.mark.parametrize("options", [{"allow": ["10.0.0.0/33"]}, {"nameserver": "nonsense"}])
def test_settings_that_mean_nothing_keep_it_from_starting(options: dict[str, Any]) -> None:
    async def start() -> None:
        egress = Egress(**options)
        try:
            await egress.start()
        finally:
            await egress.stop()

    with pytest.raises(HostError, match="the egress broker could not start"):
        asyncio.run(start())
