"""What the dashboard is served as, and what it is told: problems, totals, the doctor's report."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hayhost.dashboard import FILES

from .conftest import HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE
from .managing import Manager, managed

WORD = re.compile(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|DOMParser|srcdoc")


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with managed(tmp_path_factory.mktemp("dashboard"), "--spares", 0) as manager:
        yield manager


@pytest.mark.parametrize("path", FILES)
def test_each_file_is_served_with_its_policy_and_tag(manager: Manager, path: str) -> None:
    answer = manager.host.get(path)
    assert (answer.status, answer.body) == (200, FILES[path].body)
    policy = answer.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for"):
        assert part in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    tag = answer.headers["ETag"]
    again = manager.host.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert manager.host.request("HEAD", path).headers["Content-Length"] == str(len(answer.body))
    assert manager.host.request("POST", path).status == 405


@pytest.mark.parametrize("path", FILES)
def test_no_file_makes_markup_of_text_or_names_another_origin(path: str) -> None:
    text = FILES[path].body.decode()
    assert not WORD.search(text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/",
        "/dashboard/../__init__.py",
        "/dashboard/%2e%2e/__init__.py",
        "/dashboard/no.js",
        "//",
        "/index.html",
    ],
)
def test_nothing_else_is_served(manager: Manager, path: str) -> None:
    assert manager.host.get(path).status == 404


def test_web_pages_elsewhere_have_no_part_in_it(manager: Manager) -> None:
    assert manager.host.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status == 200  # somebody follows a link
    assert manager.host.get("/dashboard/app.js", headers={"Sec-Fetch-Site": "cross-site"}).status == 403
    assert manager.host.get("/", headers={"Host": "rebound.example"}).status == 403


def test_a_single_plugin_at_the_root_is_alone_there(start: Serve, tmp_path: Path) -> None:
    folder = write_plugin(
        tmp_path / "one", PREAMBLE + "@route('GET', '/')\nasync def root(req):\n    return 'mine'\n" + PLUGIN
    )
    arguments = ["run", "--plugin-path", folder, "--org-id", "acme", "--port", "0", "--mode", "test"]
    host: HostProcess = start(*arguments, "--log-format", "json").wait_ready()
    assert host.get("/").body == b"mine"
    assert host.get("/dashboard/app.js").status == 404


def test_what_is_wrong_is_told_with_why_since_and_what_to_do(manager: Manager) -> None:
    assert manager.get("/problems") == {"items": []}
    for org in ("acme", "beta"):
        manager.put(org, config={"fault": "on_start:raise"})
        assert manager.host.get(f"/plugins/recorder/{org}/value").status == 200
    manager.put("gamma", auth={"methodId": "key", "credentials": {"apiKey": "wrong"}})
    auth, degraded = wait_until(lambda: len(found := manager.get("/problems")["items"]) == 2 and found, "both")
    assert (auth["kind"], auth["severity"], auth["plugin"], auth["orgs"]) == ("auth", "error", "recorder", ["gamma"])
    assert (degraded["kind"], degraded["orgs"], degraded["count"]) == ("degraded", ["acme", "beta"], 2)
    assert "no luck" in degraded["why"]
    for one in (auth, degraded):
        assert one["remedy"]
        assert one["since"] > 1_700_000_000
    host = manager.get("/host")
    assert (host["workers"]["degraded"], host["open"], host["store"], host["actor"]) == (2, True, True, "local")
    for org in ("acme", "beta", "gamma"):
        manager.ok("DELETE", f"/orgs/{org}")
    wait_until(lambda: manager.get("/problems")["items"] == [], "nothing is wrong any more")


def test_a_worker_that_does_not_start_is_a_problem_until_it_does(manager: Manager) -> None:
    manager.put("acme", config={"fault": "on_start:exit"})
    for _ in range(5):
        assert manager.host.get("/plugins/recorder/acme/value").status == 503
    [problem] = manager.get("/problems")["items"]
    assert (problem["kind"], problem["severity"], problem["orgs"]) == ("breaker", "error", ["acme"])
    assert manager.get("/host")["workers"] == {"error": 1}
    manager.put("acme", config={})
    assert manager.get("/problems")["items"] == []
    manager.ok("DELETE", "/orgs/acme")


def test_what_does_not_load_is_a_problem(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "bad", "raise RuntimeError('not today')")
    write_plugin(tmp_path / "odd", PREAMBLE + PLUGIN, extra="colour = 'blue'\n")
    manager = Manager(serve(tmp_path))
    kinds = {one["kind"]: one for one in manager.get("/problems")["items"]}
    assert set(kinds) == {"plugin", "manifest"}
    assert (kinds["plugin"]["plugin"], "not today" in kinds["plugin"]["why"]) == ("bad", True)
    assert "colour" in kinds["manifest"]["why"]
    write_plugin(tmp_path / "bad", PREAMBLE + PLUGIN)
    write_plugin(tmp_path / "odd", PREAMBLE + PLUGIN)
    wait_until(lambda: manager.get("/problems")["items"] == [], "both are served")


def test_less_isolation_than_was_asked_for_is_told_to_the_operator(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "one", PREAMBLE + PLUGIN)
    manager = Manager(serve(tmp_path, "--isolation", "none"))
    assert manager.get("/problems")["items"] == []  # what was not asked for is not missing
    assert manager.get("/host")["isolation"] == "none"


def test_the_doctor_examines_the_machine_and_keeps_what_it_found(manager: Manager) -> None:
    report = manager.get("/doctor")
    assert report["level"] in ("none", "limited", "confined", "namespaced", "hardened")
    assert {one["layer"] for one in report["layers"]} >= {"landlock", "seccomp"}
    assert report["canaries"]
    assert manager.get("/doctor") == report
    assert manager.call("GET", "/doctor?maxAge=1").status == 422


def test_an_orgs_token_is_told_of_its_own(tmp_path: Path) -> None:
    with managed(tmp_path, "--spares", 0) as manager:
        for org in ("acme", "beta"):
            manager.put(org, config={"fault": "on_start:raise"})
            assert manager.host.get(f"/plugins/recorder/{org}/value").status == 200
        own = Manager(manager.host, manager.new_token("acme", "acme"))
        [problem] = own.get("/problems")["items"]
        assert problem["orgs"] == ["acme"]
        host = own.get("/host")
        assert (host["org"], host["open"], host["workers"]) == ("acme", False, {"degraded": 1})
        assert own.call("GET", "/doctor").status == 403
        assert Manager(manager.host).call("GET", "/problems").status == 401
        assert manager.host.get("/").status == 200
