"""Classic BPF as seccomp runs it: decision trees in, the bytes of ``struct sock_filter`` out.

A filter is a tree of ``Branch`` nodes whose leaves are return values; it looks at ``struct seccomp_data`` in words of
32 bits. Trees share subtrees freely: what is equal is emitted once where a jump can reach it.
"""

import struct
from dataclasses import dataclass
from typing import Final

__all__ = [
    "ALLOW",
    "ARCH",
    "JEQ",
    "JGE",
    "JSET",
    "KILL",
    "MAX_INSTRUCTIONS",
    "NR",
    "PRETEND",
    "WORD",
    "Branch",
    "Node",
    "ProgramTooLongError",
    "assemble",
    "choose",
    "errno",
    "high",
    "instructions",
    "low",
]

LOAD: Final = 0x20
"""``A = seccomp_data[k]`` (BPF_LD | BPF_W | BPF_ABS)."""
AND: Final = 0x54
"""``A &= k`` (BPF_ALU | BPF_AND | BPF_K)."""
JUMP: Final = 0x05
"""``pc += k`` (BPF_JMP | BPF_JA)."""
JEQ: Final = 0x15
"""``pc += jt if A == k else jf``; ``JGE`` asks for ``A >= k``, ``JSET`` for ``A & k``."""
JGE: Final = 0x35
JSET: Final = 0x45
RETURN: Final = 0x06
"""The verdict is ``k`` (BPF_RET | BPF_K)."""

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
"""The whole process, not the one thread."""
_ERRNO: Final = 0x00050000
PRETEND: Final = _ERRNO
"""Do nothing, and say that it has been done."""
_MAX_ERRNO: Final = 4095

NR: Final = 0
"""Offsets in ``struct seccomp_data``."""
ARCH: Final = 4
_ARGUMENTS: Final = 16

MAX_INSTRUCTIONS: Final = 4096
WORD: Final = 0xFFFFFFFF
_REACH: Final = 253  # jt and jf have 8 bits, and two more instructions may get between
_INSTRUCTION: Final = struct.Struct("<HBBI")


class ProgramTooLongError(Exception):
    """The kernel takes no program of that many instructions."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Go on at ``yes`` or ``no``, as the word at ``offset``, masked with ``mask``, compares with ``value``."""

    offset: int
    operation: int
    value: int
    yes: "Node"
    no: "Node"
    mask: int = WORD


Node = int | Branch
"""A return value, or what to ask next."""


def errno(number: int) -> int:
    """The verdict that has the system call fail with ``number``."""
    if not 0 < number <= _MAX_ERRNO:
        raise ValueError(f"{number} is no errno")
    return _ERRNO | number


def low(argument: int) -> int:
    """Where the low 32 bits of an argument (0 to 5) are, on a little-endian machine."""
    return _ARGUMENTS + 8 * argument


def high(argument: int) -> int:
    """Where the high 32 bits of an argument are, on a little-endian machine."""
    return low(argument) + 4


def choose(offset: int, ranges: list[tuple[int, Node]]) -> Node:
    """A balanced search for the word at ``offset``: each range begins at its number, the first at 0."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    return Branch(offset, JGE, ranges[middle][0], choose(offset, ranges[middle:]), choose(offset, ranges[:middle]))


class _Assembler:
    """Emits from the end to the beginning: every jump goes forward, so its target is there already."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int]] = []
        self._emitted: dict[tuple[Node, tuple[int, int] | None], int] = {}

    def node(self, node: Node, loaded: tuple[int, int] | None) -> int:
        """Where ``node`` begins, counted from the end, for code that has ``loaded`` (offset and mask) in A."""
        word = (node.offset, node.mask) if isinstance(node, Branch) else None
        key = (node, word if word is not None and word == loaded else None)
        known = self._emitted.get(key)
        if known is not None and (isinstance(node, Branch) or len(self._code) - known <= _REACH):
            return known
        if not isinstance(node, Branch):
            place = self._add(RETURN, node)
        else:
            yes = self.node(node.yes, word)
            no = self.node(node.no, word)
            yes = self._near(yes, node.yes)
            no = self._near(no, node.no)
            after = len(self._code) - 1
            place = self._add(node.operation, node.value, after - yes, after - no)
            if word != loaded:
                self._emitted[node, word] = place
                if node.mask != WORD:
                    self._add(AND, node.mask)
                place = self._add(LOAD, node.offset)
        self._emitted[key] = place
        return place

    def _near(self, target: int, node: Node) -> int:
        """Where to jump for what is at ``target``: on the way there if that is too far."""
        distance = len(self._code) - 1 - target
        if distance <= _REACH:
            return target
        return self._add(JUMP, distance) if isinstance(node, Branch) else self._add(RETURN, node)

    def _add(self, code: int, k: int, yes: int = 0, no: int = 0) -> int:
        self._code.append((code, yes, no, k))
        return len(self._code) - 1

    def encode(self) -> bytes:
        if len(self._code) > MAX_INSTRUCTIONS:
            raise ProgramTooLongError(f"{len(self._code)} instructions; at most {MAX_INSTRUCTIONS} are allowed")
        return b"".join(_INSTRUCTION.pack(*instruction) for instruction in reversed(self._code))


def assemble(root: Node) -> bytes:
    """The program that decides as ``root`` does. Raises ``ProgramTooLongError``."""
    assembler = _Assembler()
    assembler.node(root, None)
    return assembler.encode()


def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    """The instructions of a program: code, jt, jf and k of each."""
    return list(_INSTRUCTION.iter_unpack(program))
