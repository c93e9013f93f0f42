"""Seccomp filters in force: honest work goes on, and what is refused is refused."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

import pytest

from sandbox.confinement import seccomp
from sandbox.confinement.seccomp import Rules
from sandbox.confinement.syscalls import NUMBERS

_ALL: Final = Rules(subprocess=True, private_root=True, scoped_signals=True)
needs_kernel = pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no filter for this machine")

# The workloads are functions of a script that runs alone, so that other interpreters can run it too.
_CHILD: Final = """
import ctypes, errno, json, os, signal, socket, sys, tempfile, threading
sys.path[:0] = {path!r}
from sandbox.confinement import seccomp
from sandbox.confinement.syscalls import NUMBERS
libc = ctypes.CDLL(None, use_errno=True)
numbers = NUMBERS[os.uname().machine]
def call(name, *args):
    number = numbers[name] if isinstance(name, str) else name
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result == 0 and name in ("clone", "fork"):
        os._exit(9)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "done"
rules = seccomp.Rules(**{rules!r})
zygote, worker = seccomp.zygote_filter(rules), seccomp.worker_filter(rules)
queue, front = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
socket.send_fds(front, [b"x"], [client.fileno()])
server = listener.accept()[0]
result = {{}}
assert libc.prctl(38, 1, 0, 0, 0) == 0
seccomp.Filter(zygote).install()
if {worker!r}:
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.setsid()
    seccomp.Filter(worker).install()
{script}
print(json.dumps(result))
sys.stdout.flush()
os._exit(0)
"""


def _confined(script: str, rules: Rules, worker: bool = True, python: str = sys.executable) -> Any:
    """What ``script`` leaves in ``result``, run by ``python`` under the filters."""
    path = [str(Path(seccomp.__file__).parents[2])]
    program = _CHILD.format(path=path, rules=vars(rules), worker=worker, script=textwrap.dedent(script))
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


_WORKLOADS: Final = {
    "asyncio": """
        import asyncio
        async def main():
            ours, theirs = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=ours)
            theirs.sendall(b"hello\\n")
            assert await asyncio.wait_for(reader.readline(), 5) == b"hello\\n"
            writer.write(b"bye")
            await writer.drain()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: None)
            results = await asyncio.gather(*[asyncio.sleep(0, n) for n in (1, 2)])
            return await asyncio.to_thread(theirs.recv, 9), results
        assert asyncio.run(main()) == (b"bye", [1, 2])
    """,
    "threads": """
        import concurrent.futures, queue as queues
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(abs, range(100))) == 4950
        threading.Timer(0, lambda: None).start()
    """,
    "passed descriptors": """
        data, [descriptor], _, _ = socket.recv_fds(queue, 10, 1)
        passed = socket.socket(fileno=descriptor)
        passed.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        passed.settimeout(5)
        passed.sendall(b"ping")
        passed.sendmsg([b"!"])
        assert server.recv(5, socket.MSG_WAITALL) == b"ping!" and passed.getpeername() == listener.getsockname()
        passed.shutdown(socket.SHUT_RDWR)
        queue.send(b"done")
    """,
    "ssl": """
        import ssl, hashlib, secrets
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            assert len(outgoing.read()) > 100
        assert len(hashlib.scrypt(b"x", salt=b"y", n=2, r=1, p=1)) and secrets.token_bytes(8)
    """,
    "files": """
        import sqlite3, shutil, zipfile, mmap, glob, logging.handlers
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            with sqlite3.connect("x.db") as db:
                db.execute("pragma journal_mode=wal")
                db.execute("create table t (x)")
                db.executemany("insert into t values (?)", [(n,) for n in range(100)])
                assert db.execute("select sum(x) from t").fetchone() == (4950,)
            db.close()
            with tempfile.NamedTemporaryFile() as file, open("y", "w+b") as other:
                file.write(bytes(10000)), file.flush()
                shutil.copyfile(file.name, "z")
                other.truncate(4096)
                mmap.mmap(other.fileno(), 4096)[:2] = b"ab"
            with zipfile.ZipFile("a.zip", "w") as archive:
                archive.write("z")
            shutil.unpack_archive("a.zip", "unpacked")
            os.makedirs("a/b"), os.symlink("z", "l"), os.rename("z", "w"), os.mkfifo("f"), glob.glob("**")
            handler = logging.handlers.RotatingFileHandler("log", maxBytes=10, backupCount=2)
            [handler.emit(logging.makeLogRecord({"msg": "x" * 20})) for _ in range(4)]
            assert len(list(os.scandir("."))) >= 8
            os.chdir("/")
    """,
    "the rest of the library": """
        import decimal, email, faulthandler, gzip, locale, platform, pwd, random, resource, select, selectors, time
        import uuid, zoneinfo, datetime, urllib.request, http.client, multiprocessing, importlib.metadata, getpass
        locale.setlocale(locale.LC_ALL, ""), time.sleep(0), time.localtime(), faulthandler.enable(), platform.platform()
        assert pwd.getpwuid(os.getuid()) and uuid.uuid4() and os.cpu_count() and os.getloadavg() and os.times()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), os.nice(0), os.getpriority(0, 0), os.sched_getaffinity(0)
        zoneinfo.ZoneInfo("UTC"), datetime.datetime.now(), random.random(), socket.gethostname(), os.uname()
        assert multiprocessing.Pipe() and selectors.DefaultSelector() and select.epoll() and not os.isatty(1)
        for name in ("numpy", "pydantic"):
            try:
                module = __import__(name)
            except ImportError:
                continue
            if name == "numpy":
                assert (module.ones((300, 300)) @ module.ones((300, 300))).sum() == 300 ** 3
            else:
                assert module.create_model("M", x=(int, ...))(x="3").x == 3
    """,
}


@needs_kernel
@pytest.mark.parametrize("worker", [False, True], ids=["zygote", "worker"])
@pytest.mark.parametrize("rules", [Rules(), _ALL, Rules(truncate=False)], ids=str)
def test_honest_work_is_not_in_the_way(rules: Rules, worker: bool) -> None:
    script = "\n".join(textwrap.dedent(workload) for workload in _WORKLOADS.values())
    assert _confined(script, rules, worker) == {}


_PROCESSES: Final = """
    import asyncio, subprocess
    def attempt(what):
        try:
            return what()
        except OSError as error:
            return errno.errorcode[error.errno]
    def fork():
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    async def run():
        return await (await asyncio.create_subprocess_exec("/bin/true")).wait()
    def signalled():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.raise_signal(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0
    result["fork"] = attempt(fork)
    result["run"] = attempt(lambda: subprocess.run(["/bin/true"]).returncode)
    result["spawn"] = attempt(lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1])
    result["asyncio"] = attempt(lambda: asyncio.run(run()))
    result["shell"] = attempt(lambda: subprocess.check_output("echo $(echo 1 | cat); kill -0 $$", shell=True).decode())
    result["session"] = attempt(os.setsid)
    result["self"] = attempt(signalled)
    result["parent"] = attempt(lambda: os.kill(os.getppid(), 0))
"""
_REFUSED: Final = dict.fromkeys(("run", "spawn", "asyncio", "shell"), "EPERM")
_STARTED: Final = {"fork": 3, "run": 0, "spawn": 0, "asyncio": 0, "shell": "1\n"}


@needs_kernel
@pytest.mark.parametrize(
    ("rules", "worker", "expected"),
    [
        (Rules(), False, {"fork": 3, "self": 0, "parent": "EPERM", **_REFUSED}),
        (Rules(), True, {"fork": "EPERM", "session": "EPERM", "self": "EPERM", "parent": "EPERM", **_REFUSED}),
        (Rules(scoped_signals=True), False, {"fork": 3, "self": 0, "parent": None, **_REFUSED}),
        (Rules(scoped_signals=True), True, {"fork": "EPERM", "self": 0, "parent": "EPERM", **_REFUSED}),
        (Rules(private_processes=True), False, {"fork": 3, "self": 0, "parent": None, **_REFUSED}),
        (Rules(private_processes=True), True, {"fork": "EPERM", "self": 0, "parent": "EPERM", **_REFUSED}),
        (_ALL, False, {**_STARTED, "self": 0, "parent": None}),
        (_ALL, True, {**_STARTED, "session": "EPERM", "self": 0, "parent": None}),
    ],
    ids=str,
)
def test_processes(rules: Rules, worker: bool, expected: dict[str, Any]) -> None:
    result = _confined(_PROCESSES, rules, worker)
    assert {name: result[name] for name in expected} == expected


_TIGHTEN: Final = """
    zeros = ctypes.create_string_buffer(64)
    result["ruleset"] = call("landlock_create_ruleset", 0, 0, 1)
    result["restrict"] = call("landlock_restrict_self", -1, 0)
    result["filter"] = call("seccomp", 1, 0, 0)
    result["listener"] = call("seccomp", 1, 8, 0)
    for name, option in {"subreaper": 36, "no new privileges": 38, "dumpable": 4, "seccomp": 21}.items():
        result[name] = call("prctl", option, int(option != 4), 0, 0, 0) in ("done", "EFAULT")
    result["dumpable again"] = call("prctl", 4, 1)
    result["limits"] = call("prlimit64", 0, 7, 0, zeros)
"""


@needs_kernel
def test_a_zygote_can_confine_its_workers_further_and_they_cannot_undo_it() -> None:
    common = {"subreaper": True, "no new privileges": True, "dumpable": True, "seccomp": True, "limits": "done"}
    common |= {"listener": "EPERM", "dumpable again": "EPERM"}
    landlock = {"ruleset", "restrict"}
    zygote = _confined(_TIGHTEN, Rules(), worker=False)
    assert {name: said for name, said in zygote.items() if name not in landlock} == {**common, "filter": "EFAULT"}
    assert "EPERM" not in [zygote[name] for name in landlock]  # ENOSYS or EOPNOTSUPP where there is none
    refused = dict.fromkeys(("filter", *landlock), "EPERM")
    assert _confined(_TIGHTEN, Rules()) == {**common, **refused}


_DENIALS: Final = """
    x = ctypes.c_char_p(b"/tmp")
    here, top = ctypes.create_string_buffer(256), 0xDEAD << 32
    for name, args in {
        "io_uring_setup": (1, here), "ptrace": (2, os.getppid(), 0, 0), "unshare": (0x10000000,), "bpf": (0, here, 8),
        "memfd_create": (x, 0), "memfd_secret": (0,), "userfaultfd": (1,), "perf_event_open": (here, 0, -1, -1, 0),
        "add_key": (x, x, x, 1, -1), "keyctl": (0, -3, 0), "setns": (0, 0), "mount": (x, x, x, 0, 0), "chroot": (x,),
        "open_tree": (-100, x, 0), "fsopen": (x, 0), "name_to_handle_at": (-100, x, here, here, 0),
        "process_vm_readv": (os.getppid(), here, 1, here, 1, 0), "pidfd_open": (os.getppid(), 0),
        "kcmp": (1, 1, 0, 0, 0),
        "clone": (0x10000011, 0, 0, 0, 0), "seccomp": (1, 0, here), "landlock_create_ruleset": (0, 0, 1),
        "execve": (x, 0, 0), "setpgid": (0, 0), "tkill": (os.getpid(), 0), "kill": (1, 0),
        "prctl": (22, 1),
        "prlimit64": (os.getppid(), 7, 0, here), "sched_setaffinity": (os.getppid(), 8, here),
        "shmget": (0, 4096, 0o1600),
        "mq_open": (x, 0o102, 0o600, 0), "inotify_init1": (0,), "fanotify_init": (0, 0), "splice": (0, 0, 1, 0, 1, 0),
        "chmod": (x, 0o1777), "fchmodat": (-100, x, 0o1777), "utimensat": (-100, x, 0, 0), "sync": (), "setuid": (0,),
        "personality": (0x40000,), "connect": (3, here, 16), "bind": (3, here, 16), "listen": (3, 1),
        "accept4": (3, 0, 0, 0),
        "sendto": (queue.fileno(), x, 1, 0, here, 16), "fcntl": (queue.fileno(), 8, os.getpid()), "mlockall": (1,),
        "close_range": (500, 600, 2), "mknodat": (-100, x, 0o020600, 259), "process_madvise": (0, here, 1, 4, 0),
        "reboot": (0, 0, 0, 0), "pidfd_getfd": (0, 0, 0), "statmount": (here, here, 256, 0),
    }.items():
        if name in numbers:
            result[name] = call(name, *args)
    for family in range(46):
        result[f"socket {family}"] = {call("socket", family, kind, 0) for kind in (1, 2, 3, 5)}.pop()
    result["socketpair dgram"] = call("socketpair", top | 1, top | 2, 0, here)
"""
_OTHER_DENIALS: Final = """
    result["TIOCSTI"] = call("ioctl", 0, 0x5412 | 5 << 40, ctypes.c_char_p(b"x"))
    result["cork"] = call("setsockopt", client.fileno(), 6, 31, ctypes.c_char_p(b"tls"), 3)
    result["clone3"] = call("clone3", 0, 0)
    result["new"] = call(999)
    try:
        os.getxattr("/", "user.x")
    except OSError as error:
        result["xattr"] = errno.errorcode[error.errno]
"""


@needs_kernel
def test_what_is_refused_is_refused_by_the_kernel() -> None:
    result = _confined(_DENIALS, Rules())
    assert len(result) > 90
    assert {name: said for name, said in result.items() if said != "EPERM"} == {}
    assert _confined(_OTHER_DENIALS, _ALL) == {
        "TIOCSTI": "ENOTTY",
        "cork": "ENOPROTOOPT",
        "clone3": "ENOSYS",
        "new": "ENOSYS",
        "xattr": "ENOTSUP",
    }


_INT_80: Final = """
    import mmap
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, 20; int 0x80; ret: getpid of the 32-bit table
    result["pid"] = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@needs_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other tables are x86_64's")
@pytest.mark.parametrize("script", ["call(0x40000000 | numbers['getpid'])", _INT_80], ids=["x32", "i386"])
def test_a_call_of_another_table_is_the_end_of_the_process(script: str) -> None:
    with pytest.raises(AssertionError, match=f"^.{256 - signal.SIGSYS},"):
        _confined(script, Rules())


@needs_kernel
def test_install_raises_what_the_kernel_says() -> None:
    # Without no_new_privs an ordinary user may install none at all.
    with pytest.raises(OSError, match=os.strerror(errno.EACCES if os.geteuid() else errno.EINVAL)):
        seccomp.Filter(b"\x00" * 8).install()
