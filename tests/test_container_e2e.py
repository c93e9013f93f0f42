"""What the Dockerfile makes: checked as text, and its layout run as an ordinary user on a root that is read-only."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import environment
from .conftest import LIMIT, HostProcess, all_gone, wait_until, write_plugin

ROOT = Path(__file__).parent.parent
UID = "10001"

# A mount namespace as `docker run --read-only --tmpfs /tmp -v .:/data` has it, and then that user without a capability.
ENTER = """
set -eu
data=$1; temporary=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=700,uid=10001,gid=10001 tmpfs "$data"
mount -t tmpfs -o mode=1777 tmpfs "$temporary"
mount -o remount,bind,ro /
cd "$data"
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and what follows each."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last(name: str) -> str:
    return [rest for word, rest in instructions() if word == name][-1]


def test_it_runs_as_an_ordinary_user_by_number() -> None:
    assert last("USER") == f"{UID}:{UID}"
    after = [word for word, _ in instructions()][[word for word, _ in instructions()].index("USER") :]
    assert "RUN" not in after


def test_the_process_gets_signals_itself() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["/opt/hayhost/bin/hayhost"]
    assert json.loads(last("CMD")) == ["serve", "/plugins"]
    assert last("STOPSIGNAL") == "SIGTERM"


def test_images_have_versions_and_sources_exist() -> None:
    for word, rest in instructions():
        assert word != "ADD"
        if word == "FROM":
            assert re.match(r"python:3\.\d+-slim-\w+( AS build)?$", rest)
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()


def test_no_store_and_no_key_gets_into_the_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    sources = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert named == sources
    assert {"**/*.db*", "**/*.key"} <= set(lines)


def settings() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", last("ENV")))


@pytest.fixture(scope="module")
def as_user() -> None:
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("only root, with unshare and setpriv, can make a read-only root for another user")
    again = "import subprocess, sys, tornado; subprocess.run([sys.executable, '-c', ''], check=True)"
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    command = ["unshare", "--mount", *user, sys.executable, "-c", again]
    if subprocess.run(command, capture_output=True, timeout=LIMIT, check=False).returncode:
        pytest.skip(f"an ordinary user cannot run {sys.executable} (or nobody may make mount namespaces here)")


@pytest.fixture
def place(as_user: None) -> Iterator[Path]:
    """A folder that other users can pass through, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        for name in ("data", "temporary", "plugins"):
            (place / name).mkdir()
        yield place


def contained(place: Path) -> list[str]:
    """What to put before a command to have it run as in the container."""
    return ["unshare", "--mount", "sh", "-c", ENTER, "-", str(place / "data"), str(place / "temporary")]


def test_it_runs_on_a_read_only_root(place: Path) -> None:
    write_plugin(
        place / "plugins" / "p",
        """
        from hayhost.sdk import *
        import os, tempfile

        @define_hay_plugin
        class Plugin:
            name = "p"

            def on_initialize(self, ctx):
                ctx.register.route("GET", "/who", self.who)

            def who(self, req):
                with tempfile.TemporaryFile() as file:
                    return {"uid": os.getuid(), "written": file.write(b"scratch")}
        """,
    )
    env = {**settings(), "TMPDIR": str(place / "temporary"), "HAYHOST_HOST": "127.0.0.1", "HAYHOST_PORT": "0"}
    host = HostProcess(
        ["serve", str(place / "plugins"), "--mode", "test", "--store", "hayhost.db"], env, contained(place)
    )
    try:
        host.wait_ready()
        assert host.get("/plugins/p/acme/who").json() == {"uid": int(UID), "written": 7}
        assert host.health("p", "acme")["isolation"] == "confined"
        pids = host.pids()
        assert host.stop() == 0
        wait_until(lambda: all_gone(pids))
    finally:
        host.kill()


def test_without_a_token_it_listens_on_nothing_that_is_public(place: Path) -> None:
    command = [*contained(place), sys.executable, "-P", "-m", "hayhost", "serve", str(place / "plugins")]
    env = environment({**settings(), "TMPDIR": str(place / "temporary"), "HAYHOST_PORT": "0"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    assert "0.0.0.0 is not a loopback address, and without a token" in done.stderr
