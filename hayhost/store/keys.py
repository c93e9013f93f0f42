"""Keys, and what is encrypted with them: AES-256-GCM, bound to the place where the ciphertext is kept.

A sealed value is ``v1.<key id>.<base64 of nonce and ciphertext>``. The associated data is the purpose, org, plugin and
field: a value that is copied to any other place does not decrypt there.
"""

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hayhost.errors import SecretKeyError
from hayhost.logs import escape

__all__ = ["VARIABLE", "Keyring", "Place", "new_key"]

VARIABLE: Final = "HAYHOST_SECRET_KEY"
_SIZE: Final = 32
_NONCE: Final = 12
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_FORM: Final = "32 bytes as 64 hex digits or as base64"


class Place(msgspec.Struct, frozen=True):
    """Where a sealed value is kept."""

    purpose: str
    org: str = ""
    plugin: str = ""
    field: str = ""

    def associated_data(self) -> bytes:
        """The place as bytes, different for every other place."""
        return msgspec.json.encode(["hayhost", self.purpose, self.org, self.plugin, self.field])


class Keyring:
    """Keys by id: the first one seals, all of them open. Never shown in a ``repr``."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        """Raises ``SecretKeyError`` if there is no key, or one of another size or twice."""
        self._ciphers: dict[str, AESGCM] = {}
        for position, key in enumerate(keys, 1):
            if len(key) != _SIZE or not any(key):
                raise SecretKeyError(f"key {position} is not {_FORM}")
            if (identifier := _identify(key)) in self._ciphers:
                raise SecretKeyError(f"key {position} is there twice")
            self._ciphers[identifier] = AESGCM(key)
        if not self._ciphers:
            raise SecretKeyError("there is no key")
        self.primary: Final = next(iter(self._ciphers))
        """The id of the key that seals."""

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._ciphers)})"

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all keys; an id tells nothing of its key."""
        return tuple(self._ciphers)

    @classmethod
    def parse(cls, text: str, source: str) -> "Keyring":
        """Keys separated by commas or line ends; ``source`` is named in errors. Raises ``SecretKeyError``."""
        words = [word.strip() for word in re.split(r"[,\n]", text)]
        try:
            return cls(_decode(word, position) for position, word in enumerate(filter(None, words), 1))
        except SecretKeyError as error:
            raise SecretKeyError(f"{source}: {error}") from None

    @classmethod
    def load(cls, file: Path, environ: Mapping[str, str] | None = None, *, make: bool = True) -> "Keyring":
        """The keys of ``HAYHOST_SECRET_KEY``, else of ``file``; with ``make`` it is made if there is none.

        Raises ``SecretKeyError`` if a key is malformed, or if others than the file's owner can read it.
        """
        environ = os.environ if environ is None else environ
        if VARIABLE in environ:
            return cls.parse(environ[VARIABLE], VARIABLE)
        try:
            if make:
                _make(file)
            return cls.parse(_read(file), str(file))
        except FileNotFoundError:
            raise SecretKeyError(
                f"{file}: the store's key is not there; put the file back, or say where it is with --key-file"
            ) from None
        except OSError as error:
            raise SecretKeyError(f"{file}: cannot be used as key file: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise SecretKeyError(f"{file}: is not a key file") from None

    def seal(self, plain: bytes, place: Place) -> str:
        """``plain`` encrypted with the first key, for this place only."""
        nonce = os.urandom(_NONCE)
        sealed = nonce + self._ciphers[self.primary].encrypt(nonce, plain, place.associated_data())
        return f"v1.{self.primary}.{base64.urlsafe_b64encode(sealed).decode()}"

    def open(self, sealed: str, place: Place) -> bytes:
        """What was sealed for this place. Raises ``SecretKeyError`` if its key is missing or it was tampered with."""
        version, _, rest = sealed.partition(".")
        identifier, _, encoded = rest.partition(".")
        what = escape("/".join(filter(None, (place.org, place.plugin, (place.field or place.purpose)[:100]))))
        if version == "v1" and identifier and identifier not in self._ciphers:
            raise SecretKeyError(
                f"{what}: encrypted with the key {_plain(identifier)}, which is not among the given keys"
            )
        try:
            if version != "v1":
                raise ValueError
            data = base64.b64decode(encoded, altchars=b"-_", validate=True)
            return self._ciphers[identifier].decrypt(data[:_NONCE], data[_NONCE:], place.associated_data())
        except (KeyError, ValueError, InvalidTag):
            raise SecretKeyError(f"{what}: does not decrypt: it was tampered with, or moved from elsewhere") from None


def new_key() -> str:
    """A new key, as it stands in key files."""
    return base64.urlsafe_b64encode(os.urandom(_SIZE)).decode()


def _plain(identifier: str) -> str:
    return identifier if re.fullmatch(r"[0-9a-f]{16}", identifier) else "?"


def _identify(key: bytes) -> str:
    return hashlib.blake2b(b"key id", key=key, digest_size=8).hexdigest()


def _decode(word: str, position: int) -> bytes:
    if _HEX.fullmatch(word):
        return bytes.fromhex(word)
    try:
        if _BASE64.fullmatch(word):
            return base64.b64decode(
                word.rstrip("=") + "=", altchars=b"-_" if set(word) & set("-_") else b"+/", validate=True
            )
    except binascii.Error:
        pass
    raise SecretKeyError(f"key {position} is not {_FORM}")


def _make(file: Path) -> None:
    """Make the file with a new key, complete or not at all, unless it is there."""
    if os.path.lexists(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.urandom(6).hex()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(f"{new_key()}\n".encode())
            opened.flush()
            os.fsync(opened.fileno())
        try:
            os.link(partial, file)
        except FileExistsError:
            pass  # another host that starts now was quicker, and its key is the one that counts
    finally:
        partial.unlink()
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # what is encrypted with a key must not outlive it
    finally:
        os.close(folder)


def _read(file: Path) -> str:
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)) as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise SecretKeyError(f"{file}: is not a key file")
        if status.st_mode & 0o077:
            raise SecretKeyError(f"{file}: can be read or changed by others; use `chmod 600 {file}`")
        if status.st_uid not in (os.geteuid(), 0):
            raise SecretKeyError(f"{file}: belongs to another user")
        return opened.read(1 << 16).decode("ascii")
