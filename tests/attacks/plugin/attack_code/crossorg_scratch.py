"""Cross-org: what a worker leaves in its scratch folder so that it is not wiped, or so that wiping does harm."""

import fcntl
import os
import shutil
import struct
from pathlib import Path

from .harness import Refused, Victims, attack, scratch

_IMMUTABLE = 0x10
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602


def _place(v: Victims, name: str) -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"), f"hayattack-{v.place}-{name}")


@attack("Leaves a file for its next worker in a folder without any permissions", stages=True, again=True, harm="loot")
def leave_for_next_locked(v: Victims) -> str:
    folder = _place(v, "locked")
    inner = folder / "inner"
    if v.stage == "leave":
        inner.mkdir(parents=True)
        (inner / "file").write_text(v.token)
        inner.chmod(0)
        folder.chmod(0)
        return "left"
    folder.chmod(0o700)
    inner.chmod(0o700)
    text = (inner / "file").read_text()
    shutil.rmtree(folder)
    return text


@attack(
    "Leaves a file for its next worker below more folders than recursion can bear", stages=True, again=True, harm="loot"
)
def leave_for_next_deep(v: Victims) -> str:
    top = _place(v, "deep")
    if v.stage == "find":
        return (top / "z-file").read_text()
    top.mkdir()
    (top / "z-file").write_text(v.token)
    folder = os.open(top, os.O_RDONLY)
    for _ in range(3_000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    return "left"


@attack("Makes a file in its scratch folder that nobody can remove", root=True)
def scratch_immutable(v: Victims) -> str:
    path = os.path.join(scratch(), "file")
    Path(path).touch()
    descriptor = os.open(path, os.O_RDONLY)
    [flags] = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8)))
    fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags | _IMMUTABLE))
    try:
        os.unlink(path)
    except PermissionError:
        return "it cannot be removed"
    finally:
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags))
    raise Refused("it could be removed")


@attack("Leaves a link to a folder elsewhere, for whoever wipes its scratch folder to follow", harm="file", host=True)
def leave_link_to_wipe(v: Victims) -> str:
    place = _place(v, "links")
    place.mkdir()
    (place / "folder").symlink_to(v.directory)
    (place / "file").symlink_to(v.file)
    return "left"
