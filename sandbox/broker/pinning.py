"""Connections that lead where they were made to, whatever who has them does.

A connected descriptor can be disconnected and connected to something else. Workers are refused ``connect`` because of
that, except where their programs need it. What they are passed there takes in packets of its first peer only, so that
no other connection of it is ever made.
"""

import ctypes
import socket
import struct
from typing import Final

__all__ = ["pin"]

_ATTACH_FILTER, _LOCK_FILTER = 26, 44  # SO_*, socket(7): once locked it is neither changed nor removed
_LOAD, _LOAD_HALF, _EQUAL, _RETURN = 0x20, 0x28, 0x15, 0x06  # classic BPF, as in linux/filter.h
_NETWORK: Final = 0xFFF00000  # SKF_NET_OFF: offsets in the IP header, where others are in the TCP header
_SOURCE: Final = {socket.AF_INET: 12, socket.AF_INET6: 8}
_ALL: Final = 0xFFFFFFFF
_INSTRUCTION: Final = struct.Struct("=HBBI")


def pin(sock: socket.socket) -> None:
    """Have ``sock``, a TCP connection, hear of its present peer only, for good. Raises ``OSError``."""
    host, port = sock.getpeername()[:2]
    address = socket.inet_pton(sock.family, host.partition("%")[0])
    wanted = [(_LOAD_HALF, 0, port)]
    for at in range(0, len(address), 4):
        wanted.append((_LOAD, _NETWORK + _SOURCE[sock.family] + at, int.from_bytes(address[at : at + 4], "big")))
    code = b""
    for number, (load, place, value) in enumerate(wanted):
        otherwise = 2 * (len(wanted) - 1 - number) + 1
        code += _INSTRUCTION.pack(load, 0, 0, place) + _INSTRUCTION.pack(_EQUAL, 0, otherwise, value)
    code += _INSTRUCTION.pack(_RETURN, 0, 0, _ALL) + _INSTRUCTION.pack(_RETURN, 0, 0, 0)
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // _INSTRUCTION.size, ctypes.addressof(kept))
    sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
    sock.setsockopt(socket.SOL_SOCKET, _LOCK_FILTER, 1)
