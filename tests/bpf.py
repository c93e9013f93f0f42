"""Classic BPF, interpreted as the kernel does it for seccomp, and explored: inputs that take every way through it."""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Data", "InvalidProgramError", "Jump", "Trace", "decode", "explore", "run"]

_DATA: Final = struct.Struct("<IIQ6Q")
_WORD: Final = 0xFFFFFFFF
_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06
_JEQ, _JGT, _JGE, _JSET = 0x15, 0x25, 0x35, 0x45


class InvalidProgramError(Exception):
    """The kernel would not take this program."""


@dataclass(frozen=True)
class Data:
    """``struct seccomp_data``."""

    number: int
    arch: int
    args: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    pointer: int = 0

    def pack(self) -> bytes:
        return _DATA.pack(self.number, self.arch, self.pointer, *self.args)


@dataclass(frozen=True)
class Jump:
    """A conditional jump that was executed, and what it looked at."""

    at: int
    code: int
    value: int
    taken: bool
    offset: int
    mask: int


@dataclass
class Trace:
    """What a program did with an input."""

    verdict: int = -1
    reached: list[int] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)


@functools.cache
def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    """The instructions (code, jt, jf, k), checked as the kernel checks them."""
    if len(program) % 8 or not 0 < len(program) // 8 <= 4096:
        raise InvalidProgramError(f"{len(program)} bytes")
    code = list(struct.iter_unpack("<HBBI", program))
    for at, (operation, yes, no, k) in enumerate(code):
        left = len(code) - at - 1
        if operation == _LOAD and (k % 4 or k >= _DATA.size):
            raise InvalidProgramError(f"{at}: no word at {k}")
        if operation == _JUMP and k >= left:
            raise InvalidProgramError(f"{at}: jumps out")
        if operation in (_JEQ, _JGT, _JGE, _JSET) and max(yes, no) >= left:
            raise InvalidProgramError(f"{at}: jumps out")
        if operation not in (_LOAD, _AND, _JUMP, _RETURN, _JEQ, _JGT, _JGE, _JSET):
            raise InvalidProgramError(f"{at}: unknown code {operation:#x}")
    if code[-1][0] != _RETURN:
        raise InvalidProgramError("does not end")
    return code


def run(program: bytes | list[tuple[int, int, int, int]], data: Data) -> Trace:
    """Run a program, or a decoded one."""
    code = decode(program) if isinstance(program, bytes) else program
    memory = data.pack()
    trace = Trace()
    accumulator = offset = mask = at = 0
    while True:
        operation, yes, no, k = code[at]
        trace.reached.append(at)
        at += 1
        if operation == _RETURN:
            trace.verdict = k
            return trace
        if operation == _LOAD:
            accumulator, offset, mask = int.from_bytes(memory[k : k + 4], "little"), k, _WORD
        elif operation == _AND:
            accumulator, mask = accumulator & k, mask & k
        elif operation == _JUMP:
            at += k
        else:
            taken = {
                _JEQ: accumulator == k,
                _JGT: accumulator > k,
                _JGE: accumulator >= k,
                _JSET: accumulator & k != 0,
            }[operation]
            trace.jumps.append(Jump(at - 1, operation, k, taken, offset, mask))
            at += yes if taken else no


def _otherwise(data: Data, jump: Jump) -> Data | None:
    """``data`` with the one word changed that ``jump`` looks at, so that it goes the other way."""
    memory = bytearray(data.pack())
    word = int.from_bytes(memory[jump.offset : jump.offset + 4], "little")
    if jump.code == _JEQ:
        # Inverted it is unlikely to be what the next jump asks for.
        word = word ^ jump.mask if jump.taken else (word & ~jump.mask) | jump.value
    elif jump.code == _JSET:
        word = word & ~jump.value if jump.taken else word | (jump.value & -jump.value)
    else:
        edge = jump.value + (jump.code == _JGT)
        if edge > _WORD or (jump.taken and edge == 0):
            return None
        word = edge - 1 if jump.taken else edge
    memory[jump.offset : jump.offset + 4] = (word & _WORD).to_bytes(4, "little")
    number, arch, pointer, *args = _DATA.unpack(memory)
    return Data(number, arch, (args[0], args[1], args[2], args[3], args[4], args[5]), pointer)


def explore(program: bytes, start: Data) -> Iterator[tuple[Data, Trace]]:
    """One input for each way through the program that can be found from ``start`` by turning jumps around."""
    code = decode(program)
    todo, seen = [start], {start}
    ways: set[tuple[int, ...]] = set()
    while todo:
        data = todo.pop()
        trace = run(code, data)
        way = tuple(trace.reached)
        if way in ways:
            continue
        ways.add(way)
        yield data, trace
        for jump in trace.jumps:
            other = _otherwise(data, jump)
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)
