"""The management API of a running host."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .reloading import Lab, source


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("api"), "--spares", 0)
    yield lab
    lab.close()


def _command(lab: Lab, plugin: str, url: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    url = url or f"http://127.0.0.1:{lab.host.port}"
    command = [sys.executable, "-m", "hayhost", "rollback", plugin, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env or None)


def test_plugins_are_listed_with_what_serves_and_how_loads_went(lab: Lab) -> None:
    lab.add("listed", source(1))
    assert lab.version("listed") == 1
    answer = lab.host.get("/api/v1/plugins")
    assert answer.status == 200
    (shown,) = [plugin for plugin in answer.json()["items"] if plugin["name"] == "listed"]
    assert shown == lab.show("listed")
    assert (shown["state"], shown["error"], shown["previous"], shown["workers"]) == ("ready", None, None, 1)
    assert shown["current"]["version"] == "1.2.3"
    assert len(shown["current"]["digest"]) == 64
    (record,) = shown["history"]
    assert (record["error"], record["digest"]) == ("", shown["current"]["digest"])


def test_the_history_has_the_newest_first_and_what_changed(lab: Lab) -> None:
    lab.add("past", source(1))
    lab.reload("past", source(2, extra="async def: return 1"))
    lab.fail("past", "raise ValueError('broken')")
    newest, second, _ = lab.show("past")["history"]
    assert newest["error"] == "ValueError: broken"
    assert second["changes"] == ["route +GET /extra", "route +POST /extra"]
    assert second["ms"] > 0
    assert lab.show("past")["traceback"].endswith("ValueError: broken")


def test_a_plugin_that_never_loaded_is_shown_with_its_error(lab: Lab) -> None:
    lab.make("never", "1/0")
    lab.host.wait_for_log('"plugin":"never","reason":"ZeroDivisionError')
    shown = lab.show("never")
    assert (shown["state"], shown["current"]) == ("error", None)
    assert shown["error"] == "ZeroDivisionError: division by zero"
    assert lab.rollback("never").status == 409


def test_roll_back_by_the_api(lab: Lab) -> None:
    lab.add("back", source(1))
    first = lab.show("back")["current"]
    refused = lab.rollback("back")
    assert refused.status == 409
    assert "no version before" in refused.json()["error"]
    assert lab.version("back") == 1
    lab.reload("back", source(2))
    assert lab.version("back") == 2
    second = lab.show("back")["current"]
    answer = lab.rollback("back")
    assert answer.status == 200
    assert answer.json() == lab.show("back")
    assert (answer.json()["current"], answer.json()["previous"]) == (first, second)
    assert lab.version("back") == 1
    assert lab.rollback("back").json()["current"] == second, "the version before is the newer one now"
    assert lab.version("back") == 2


def test_roll_back_by_the_command(lab: Lab) -> None:
    lab.add("order", source(1))
    refused = _command(lab, "order")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("hayhost: order: The plugin order has no version before")
    lab.reload("order", source(2))
    done = _command(lab, "order", http_proxy="http://127.0.0.1:1")  # a proxy is for other machines
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("order: serves version 1.2.3 again (content ")
    assert lab.version("order") == 1


@pytest.mark.parametrize("plugin", ["nobody", "no such/../plugin", "ä?b"])
def test_the_command_for_a_plugin_that_is_not_there(lab: Lab, plugin: str) -> None:
    done = _command(lab, plugin)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hayhost: {plugin}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "nonsense", "http://127.0.0.1:x"])
def test_the_command_without_a_host(lab: Lab, url: str) -> None:
    done = _command(lab, "any", url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hayhost: no host answers at {url}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/plugins/nobody", 404),
        ("POST", "/api/v1/plugins/nobody/rollback", 404),
        ("GET", "/api/v1/nothing", 404),
        ("GET", "/api/v2/plugins", 404),
        ("GET", "/api/v1/plugins/", 404),
        ("POST", "/api/v1/plugins", 405),
        ("DELETE", "/api/v1/plugins/nobody", 405),
        ("GET", "/api/v1/plugins/nobody/rollback", 405),
        ("OPTIONS", "/api/v1/plugins/nobody/rollback", 204),
    ],
)
def test_what_is_not_there(lab: Lab, method: str, path: str, status: int) -> None:
    answer = lab.host.request(method, path)
    assert answer.status == status
    if status == 404:
        assert "error" in answer.json()
    else:
        assert answer.headers["Allow"] in ("GET, HEAD, OPTIONS", "OPTIONS, POST")


def test_head(lab: Lab) -> None:
    answer = lab.host.request("HEAD", "/api/v1/plugins")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/guarded"), ("POST", "/guarded/rollback")])
def test_pages_of_others_and_rebound_names_are_refused(
    lab: Lab, method: str, path: str, headers: dict[str, str]
) -> None:
    if not (lab.plugins / "guarded").exists():
        lab.add("guarded", source(1))
        lab.reload("guarded", source(2))
    answer = lab.host.request(method, f"/api/v1/plugins{path}", headers=headers)
    assert answer.status == 403
    assert lab.version("guarded") == 2


def test_the_host_stays_ready_while_a_plugin_is_added(lab: Lab) -> None:
    gate = lab.outside / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    lab.make("slow", wait + source(1))
    lab.host.wait_for_log('"event":"ready"')
    while lab.show("slow").get("state") != "loading":
        pass
    assert lab.host.get("/readyz").status == 200
    gate.touch()
    assert lab.version("slow") == 1
