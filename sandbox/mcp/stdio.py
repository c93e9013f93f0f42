"""A program that speaks MCP on its standard streams, as a child of the worker.

It is in the worker's sandbox and session, and in a process group of its own: the group ends with the connection, and
the front ends whatever is left of the session when the worker is gone. What it writes is bounded: a message that is too
long is skipped without being kept, and one that writes nothing but garbage is ended.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import anyio
import anyio.abc
import mcp_types as types
from mcp.client._transport import TransportStreams
from mcp.shared.message import SessionMessage

from hayhost.sdk.errors import RegistrationError

from ..confinement import MINIMAL_ENVIRONMENT, program_path
from .protocol import MAX_MESSAGE, NOT_AVAILABLE
from .remote import RemoteServer
from .server import Failed, Notice

__all__ = ["StdioServer", "program", "working_directory"]

_READ: Final = 64 << 10
_ENDS: Final = 4 << 10  # of a line that is too long: where the id is, in whatever order the keys are
_MAX_GARBAGE: Final = 1_000  # lines without a message between them
_STDERR_RATE: Final = 1 << 20  # bytes per second; who writes more waits
_STDERR_LINE: Final = 8 << 10
_FLUSH: Final = 0.5
_LAST_WORDS: Final = 0.3  # between the end of its output and its own, whichever is first
_END_BY_ITSELF: Final = 1.5  # after its input has ended, and again after SIGTERM
_KILLED: Final = 2.0
_ID_FIRST: Final = re.compile(rb'^\s*\{(?:"jsonrpc":\s*"2\.0",\s*)?"id":\s*(\d{1,15})\s*,')
_ID_LAST: Final = re.compile(rb',\s*"id":\s*(\d{1,15})\s*(?:,\s*"jsonrpc":\s*"2\.0")?\s*\}\s*$')


def program(command: str, allowed: Iterable[str], folder: str) -> str:
    """The path of the program that ``command`` means, a name or a path from the plugin's folder.

    Raises ``RegistrationError`` unless it is one of those ``allowed`` in the manifest.
    """
    path = _find(command, folder)
    if command not in allowed and path not in {_find(other, folder) for other in allowed}:
        raise RegistrationError(
            f"{command!r} is not among the programs that this plugin may start: "
            f'add it to the manifest, permissions.subprocess = ["{command}"]'
        )
    if path is None:
        raise RegistrationError(f"there is no command {command!r}, neither on the PATH nor in the plugin's folder")
    return path


def _find(command: str, folder: str) -> str | None:
    if os.sep not in command:
        return shutil.which(command, path=program_path())
    path = os.path.join(folder, command)
    return path if os.path.isfile(path) else None


def working_directory(cwd: str | os.PathLike[str] | None, folder: str) -> str:
    """``cwd`` as a path, from the plugin's folder. Raises ``RegistrationError`` unless it is a folder in there."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, os.fspath(cwd) if cwd is not None else ""))
    if path != root and not path.startswith(os.path.join(root, "")):
        raise RegistrationError(f"cwd {os.fspath(cwd or '')!r} is not in the plugin's folder")
    if not os.path.isdir(path):
        raise RegistrationError(f"cwd {os.fspath(cwd or '')!r} is no folder")
    return path


class StdioServer(RemoteServer):
    """``log(line)`` hears what the program writes to its standard error."""

    kind = "stdio"

    def __init__(
        self,
        id: str,
        command: Sequence[str],
        cwd: str,
        env: Mapping[str, str],
        timeout: float | None,
        changed: Callable[[], None],
        failed: Failed,
        notice: Notice,
        log: Callable[[str], None],
    ) -> None:
        super().__init__(id, timeout, changed, failed, notice)
        self._command = list(command)
        self._cwd = cwd
        self._env = env
        self._log = log
        self._asked: set[int] = set()
        """The ids of the requests that have not been answered yet."""

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[TransportStreams]:
        self._asked.clear()
        process = self._spawn()
        try:
            async with _Streams(process) as streams:
                came, read = anyio.create_memory_object_stream[SessionMessage | Exception]()
                write, goes = anyio.create_memory_object_stream[SessionMessage]()
                ended = asyncio.create_task(self._watch(process))
                work = [
                    ended,
                    asyncio.create_task(self._read(streams.stdout, came, ended)),
                    asyncio.create_task(self._write(streams.stdin, goes)),
                    asyncio.create_task(self._log_errors(streams.stderr)),
                ]
                try:
                    yield read, write
                finally:
                    with anyio.CancelScope(shield=True):
                        read.close()
                        write.close()
                        await asyncio.wait({work[2]}, timeout=0 if self.why else _FLUSH)
                        streams.stdin.close()
                        await _end(process, gently=not self.why)
                        for task in work:
                            task.cancel()
                        await asyncio.wait(work)
                        came.close()
                        goes.close()
        finally:
            _kill(process)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        environment = {name: os.environ.get(name, value) for name, value in MINIMAL_ENVIRONMENT.items()}
        try:
            return subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._cwd,
                env={**environment, **self._env},
                process_group=0,
            )
        except OSError as error:
            raise type(error)(error.errno, f"cannot start {self._command[0]}: {error.strerror}") from error

    async def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        status = await _exited(process)
        how = f"it was killed by signal {-status}" if status < 0 else f"it exited with code {status}"
        self.why = self.why or how

    # ---- what it writes

    async def _read(
        self,
        stdout: asyncio.StreamReader,
        came: "anyio.abc.ObjectSendStream[SessionMessage | Exception]",
        ended: "asyncio.Task[None]",
    ) -> None:
        """Pass on what comes until its output ends, or it does while a child of it keeps the output open."""
        reading = asyncio.create_task(self._pass_on(stdout, came))
        try:
            await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({reading, ended}, timeout=_LAST_WORDS)
        finally:
            reading.cancel()
            await came.aclose()

    async def _pass_on(
        self, stdout: asyncio.StreamReader, came: "anyio.abc.ObjectSendStream[SessionMessage | Exception]"
    ) -> None:
        garbage = 0
        with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            async for line in _lines(stdout):
                try:
                    messages = self._messages(line)
                except ValueError:
                    garbage += 1
                    if garbage == 1 and isinstance(line, bytes):
                        text = line[:200].decode("utf-8", "replace")
                        self._log(f"wrote something that is no MCP message to its standard output: {text}")
                    if garbage >= _MAX_GARBAGE:
                        self.why = f"it wrote {garbage} lines that are no MCP messages"
                        break
                else:
                    garbage = 0
                    for message in messages:
                        await came.send(message)

    def _messages(self, line: "bytes | _TooLong") -> list[SessionMessage]:
        """The message in ``line``, or what stands for it. Raises ``ValueError`` if it is none."""
        if isinstance(line, _TooLong):
            self._log(f"wrote a message of more than {MAX_MESSAGE} bytes, which is dropped")
            found = _ID_FIRST.match(line.first) or _ID_LAST.search(line.last)
            error = types.ErrorData(code=NOT_AVAILABLE, message=f"the answer is larger than {MAX_MESSAGE} bytes")
            ids = [int(found[1])] if found else sorted(self._asked)
            self._asked.difference_update(ids)
            return [SessionMessage(types.JSONRPCError(jsonrpc="2.0", id=id, error=error)) for id in ids]
        if not line.strip():
            return []
        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
        if isinstance(message, types.JSONRPCResponse | types.JSONRPCError) and isinstance(message.id, int):
            self._asked.discard(message.id)
        return [SessionMessage(message)]

    async def _log_errors(self, stderr: asyncio.StreamReader) -> None:
        partial = b""
        with contextlib.suppress(OSError):
            while data := await stderr.read(_READ):
                *lines, partial = (partial + data).split(b"\n")
                if len(partial) > _STDERR_LINE:
                    lines.append(partial)
                    partial = b""
                for line in lines:
                    self._say(line)
                await asyncio.sleep(len(data) / _STDERR_RATE)
        self._say(partial)

    def _say(self, line: bytes) -> None:
        if text := line[:_STDERR_LINE].decode("utf-8", "replace").strip():
            self._log(text)

    # ---- what it reads

    async def _write(self, stdin: asyncio.StreamWriter, goes: "anyio.abc.ObjectReceiveStream[SessionMessage]") -> None:
        with contextlib.suppress(anyio.ClosedResourceError, OSError):
            async for item in goes:
                message = item.message
                if isinstance(message, types.JSONRPCRequest) and isinstance(message.id, int):
                    self._asked.add(message.id)
                stdin.write(message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await stdin.drain()
        await goes.aclose()


class _TooLong:
    """The first and the last bytes of a line that was too long to be kept."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.last = b""


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator["bytes | _TooLong"]:
    buffer = bytearray()
    skipped: _TooLong | None = None
    while data := await stream.read(_READ):
        *ends, rest = data.split(b"\n")
        for end in ends:
            if skipped is not None:
                skipped.last = (skipped.last + end)[-_ENDS:]
                yield skipped
                skipped = None
            else:
                yield bytes(buffer) + end if buffer else end
            buffer.clear()
        if skipped is not None:
            skipped.last = (skipped.last + rest)[-_ENDS:]
            continue
        buffer += rest
        if len(buffer) > MAX_MESSAGE:
            skipped = _TooLong(bytes(buffer[:_ENDS]))
            skipped.last = bytes(buffer[-_ENDS:])
            buffer.clear()


class _Streams:
    """The three pipes to a process, within the event loop."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._transports: list[asyncio.BaseTransport] = []

    async def __aenter__(self) -> "_Streams":
        loop = asyncio.get_running_loop()
        self.stdout = await self._reader(loop, self._process.stdout)
        self.stderr = await self._reader(loop, self._process.stderr)
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader(), loop=loop)
        transport, _ = await loop.connect_write_pipe(lambda: protocol, self._process.stdin)
        self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        self._transports.append(transport)
        return self

    async def _reader(self, loop: asyncio.AbstractEventLoop, pipe: Any) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(limit=_READ)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._transports.append(transport)
        return reader

    async def __aexit__(self, *_: object) -> None:
        for transport in self._transports:
            if isinstance(transport, asyncio.WriteTransport) and transport.get_write_buffer_size():
                transport.abort()  # nobody reads it any more
            transport.close()


async def _end(process: "subprocess.Popen[bytes]", *, gently: bool) -> None:
    """Let it end by itself, then tell it to, then kill it and all that it has started."""
    for number in (0, signal.SIGTERM) if gently else ():
        if number:
            _signal_group(process, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_BY_ITSELF):
                await _exited(process)
                break
    _kill(process)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILLED):
            await _exited(process)


async def _exited(process: "subprocess.Popen[bytes]") -> int:
    """Wait until the process has ended; its exit code, or minus a signal. It stays to be reaped."""
    if (status := _status(process)) is not None:
        return status
    descriptor = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return _status(process) or 0


def _status(process: "subprocess.Popen[bytes]") -> int | None:
    if process.returncode is not None:
        return process.returncode
    try:
        info = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the plugin has reaped it
        return 0
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left, or the kernel cannot keep signals within the worker: then it may end nobody


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process group, whose number nobody else can have before its leader is reaped, and reap it."""
    _signal_group(process, signal.SIGKILL)
    process.poll()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-process.pid, os.WNOHANG)[0]:
            pass
