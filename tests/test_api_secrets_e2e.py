"""Secrets that are given through the API are found nowhere but where they belong."""

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import HostProcess, seen_of, wait_until
from .managing import API, Manager, managed, write_recorder
from .test_api_tenants_e2e import Org, _cases

# Each is recognised wherever it is found, also cut off or escaped.
SECRETS = {
    name: f"s3cr3t{name}Zx9"
    for name in (
        *("Field", "Json", "Key", "Rejected", "Wrongtype", "Unknown", "Malformed", "Twice", "Update", "Validate"),
        *("Tried", "Patched", "Crashed", "Large", "Method"),
    )
}


class Listener:
    """Keeps all that the stream of events says."""

    def __init__(self, manager: Manager) -> None:
        self.heard = b""
        self._connection = manager.host.connect()
        headers = {"Authorization": f"Bearer {manager.token}"}
        self._connection.request("GET", f"{API}/events", headers=headers)
        self._response = self._connection.getresponse()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.heard, "the stream begins")

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            while line := self._response.readline():
                self.heard += line

    def close(self) -> None:
        """Wait for the stream's end, which is the host's."""
        self._thread.join(60)
        self._response.close()
        self._connection.close()


class Scene:
    """A host that was given all the secrets, and what it answered to that."""

    def __init__(self, manager: Manager, folder: Path) -> None:
        self.manager = manager
        self.folder = folder
        self.answers: list[bytes] = []
        self.tokens: list[str] = []

    def call(self, method: str, path: str, body: Any = None, raw: bytes | None = None, **headers: str) -> int:
        if raw is None:
            answer = self.manager.call(method, path, body, **headers)
        else:
            named = {"Authorization": f"Bearer {self.manager.token}", "Content-Type": "application/json"}
            answer = self.manager.host.request(method, API + path, raw, named)
        self.answers.append(str(answer.headers).encode() + answer.body)
        return answer.status


def _give_secrets(scene: Scene) -> None:
    call, one = scene.call, "/orgs/acme/plugins/recorder"
    auth = {"methodId": "key", "credentials": {"apiKey": SECRETS["Key"]}}
    config = {"value": "plain", "apiKey": SECRETS["Field"], "hidden": {"deep": [SECRETS["Json"]]}}
    assert call("PUT", one, {"config": config, "auth": auth}) == 201
    assert scene.manager.host.get("/plugins/recorder/acme/value").status == 200
    assert call("PATCH", one, {"config": {"apiKey": SECRETS["Patched"]}}) == 200
    assert call("PUT", one, {"config": {"apiKey": [SECRETS["Wrongtype"]]}}) == 422
    assert call("PUT", one, {"config": {"apiKey": "x", "other": SECRETS["Unknown"]}}) == 422
    assert call("PUT", one, {"auth": {"methodId": "key", "credentials": SECRETS["Rejected"]}}) == 422
    assert call("PUT", one, {"auth": {"methodId": "none", "credentials": {"apiKey": SECRETS["Method"]}}}) == 422
    assert call("PUT", one, raw=f'{{"config": {{"apiKey": "{SECRETS["Malformed"]}'.encode()) == 400
    assert call("PUT", one, raw=f'{{"config": {{"a": "{SECRETS["Twice"]}", "a": 1}}}}'.encode()) == 400
    assert call("PUT", one, {"config": {"apiKey": SECRETS["Large"] * 30_000}}) == 413
    assert call("POST", f"{one}/validate", {"auth": {"methodId": "key", "credentials": {"k": SECRETS["Tried"]}}}) == 200
    worker = "/plugins/recorder/acme"
    assert call("POST", f"{worker}/config-update", {"config": {"apiKey": SECRETS["Update"]}}) == 200
    state = {"methodId": "key", "credentials": {"apiKey": SECRETS["Validate"]}}
    assert call("POST", f"{worker}/validate-auth", {"authState": state}) == 200
    config = {"fault": "on_config_update:exit", "apiKey": SECRETS["Crashed"]}
    assert call("PUT", one, {"config": config, "auth": {"methodId": "key", "credentials": {"apiKey": "wrong"}}}) == 200
    scene.tokens = [scene.manager.new_token(name, org) for name, org in (("acme's", "acme"), ("another", None))]
    for token in scene.tokens:
        assert Manager(scene.manager.host, token).call("GET", "/orgs/acme").status == 200
        assert call("GET", f"/orgs/acme?token={token}") == 422
        assert call("GET", "/orgs/acme", Authorization=f"Bearer {token}x") == 401
        assert call("GET", f"{worker}/value", Authorization=f"Bearer {token}") == 200


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("secrets")
    with managed(folder, "--log-level", "debug") as manager:
        manager.token = manager.new_token("admin")
        yield Scene(manager, folder)


def _leaks(text: bytes, scene: Scene) -> list[str]:
    secrets = dict(SECRETS)
    for number, token in enumerate([*scene.tokens, str(scene.manager.token)]):
        secrets[f"token {number}"] = token.split("_")[2]
    return [name for name, secret in secrets.items() if secret.encode() in text or secret[:12].encode() in text]


def test_secrets_are_nowhere(scene: Scene) -> None:
    with contextlib.closing(Listener(scene.manager)) as listener:
        _find_nothing(scene, listener)


def _find_nothing(scene: Scene, listener: Listener) -> None:
    manager = scene.manager
    _give_secrets(scene)

    for case in _cases(manager.get("/openapi.json"), Org("acme", manager, "0" * 16)):
        if case.method == "GET" and case.name not in ("events", "streamLogs", "openapi"):
            scene.call("GET", case.path)
    for path in ("metadata", "health", "mcp/list-tools"):
        scene.call("GET", f"/plugins/recorder/acme/{path}")
    for path in ("/metrics", "/readyz", "/healthz"):
        scene.answers.append(manager.host.get(path).body)
    # The plugin's own routes may say what they like, and this one does.
    told = [answer for answer in scene.answers if SECRETS["Crashed"].encode() in answer and b'"pid"' in answer]
    for answer in scene.answers:
        assert not _leaks(answer, scene) or answer in told, answer[:2000]
    assert len(told) <= len(scene.tokens)

    for pid in (manager.host.pid, *manager.host.pids()):
        for name in ("cmdline", "environ"):
            assert not _leaks(seen_of(pid, name), scene), (pid, name)
    for file in scene.folder.glob("store.*"):
        assert not _leaks(file.read_bytes(), scene), file
    manager.host.process.terminate()
    assert manager.host.process.wait(60) == 0
    listener.close()
    assert b"event: installation" in listener.heard
    assert b"event: worker" in listener.heard
    assert not _leaks(listener.heard, scene)
    assert "hook on_validate_auth" in manager.host.log
    assert not _leaks(manager.host.log.encode(), scene)
    for file in scene.folder.glob("store.*"):
        assert not _leaks(file.read_bytes(), scene), file


def test_the_key_file_and_the_store_are_their_owners_only(tmp_path: Path) -> None:
    with managed(tmp_path):
        for file in tmp_path.glob("store*"):
            assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_no_process_leaves_a_core(tmp_path: Path, number: int) -> None:
    write_recorder(tmp_path / "plugins")
    allowing = ("sh", "-c", 'ulimit -c unlimited && exec "$@"', "sh")
    store = str(tmp_path / "store.db")
    arguments = ["serve", str(tmp_path / "plugins"), "--store", store, "--port", "0", "--log-format", "json"]
    host = HostProcess(arguments, prefix=allowing, writable=tmp_path)
    try:
        host.wait_ready()
        Manager(host).put("acme", config={"apiKey": SECRETS["Field"]})
        assert host.get("/plugins/recorder/acme/value").status == 200
        for pid in (host.pid, *host.pids()):
            if pid == host.pid or b"watcher" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert re.search(r"Max core file size +0 +0 ", limits), (pid, limits)
        assert os.stat(f"/proc/{host.pid}/environ").st_uid == 0  # the kernel's own: it is not dumpable
        os.kill(host.pid, number)
        assert host.process.wait(60) == -number
        assert not list(Path(host.folder.name).glob("*core*"))
        assert not list((tmp_path / "plugins").rglob("core*"))
    finally:
        host.kill()


def test_masks_are_all_that_is_shown(tmp_path: Path) -> None:
    with managed(tmp_path) as manager:
        auth = {"methodId": "key", "credentials": {"apiKey": SECRETS["Key"]}}
        config = {"value": "plain", "apiKey": SECRETS["Field"], "hidden": {"deep": 1}}
        shown = manager.put("acme", config=config, auth=auth)
        assert shown["config"] == {"value": "plain", "apiKey": "********", "hidden": "********"}
        assert shown["auth"] == {"methodId": "key", "credentials": {"apiKey": "********"}}
        listed = manager.get("/orgs/acme/plugins")["items"][0]
        assert listed["config"] == shown["config"]
        assert SECRETS["Key"] not in json.dumps(listed)
