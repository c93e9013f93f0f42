"""The life of an org's settings, from the first PUT to the uninstall, as plugin and clients see it."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .bystanders import bystanders
from .conftest import LIMIT, Serve, all_gone, wait_until
from .hosting import hosting
from .managing import API, Manager, managed, write_recorder
from .reloading import Pending

# Without namespaces, so that a plugin and the tests call a process by the same number.
ISOLATION = "confined"
KEY = {"methodId": "key", "credentials": {"apiKey": "good"}}
WRONG = {"methodId": "key", "credentials": {"apiKey": "wrong"}}


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with managed(tmp_path_factory.mktemp("cycle"), "--spares", 0, "--hook-timeout", "2") as manager:
        yield manager


def _value(manager: Manager, org: str) -> tuple[str, int]:
    answer = manager.host.get(f"/plugins/recorder/{org}/value")
    assert answer.status == 200, answer
    return answer.json()["value"], answer.json()["pid"]


def _hooks(manager: Manager, org: str, *expected: str) -> None:
    """Wait until these hooks have run for the org, and no other."""
    wait_until(lambda: len(manager.hooks(org)) >= len(expected), f"{expected}, not {manager.hooks(org)}")
    assert manager.hooks(org) == list(expected)


def test_hooks_run_in_the_order_of_the_contract(manager: Manager) -> None:
    org = "ordered"
    answer = manager.ok("PUT", f"/orgs/{org}/plugins/recorder", {"config": {"value": "one"}, "auth": KEY})
    assert answer.status == 201
    assert answer.json()["authValidity"] == "valid"
    assert "hooks" not in answer.json() or not answer.json()["hooks"]
    installed = [name for name in manager.hooks(org) if name not in ("on_start", "on_stop")]
    assert installed == ["on_validate_auth", "on_enable", "on_config_update"]
    _, first = _value(manager, org)
    before = len(manager.hooks(org))
    manager.put(org, config={"value": "two"})
    value, second = _value(manager, org)
    assert (value, second != first) == ("two", True)
    wait_until(lambda: manager.hooks(org)[before:].count("on_stop") == 1, "the old worker stops")
    assert manager.hooks(org)[before:] == ["on_config_update", "on_start", "on_stop"]
    told = manager.records(org)[before]
    assert told["meta"]["value"] == "two", "on_config_update sees the new values"
    wait_until(lambda: all_gone([first]), "the old worker is gone")


def test_refused_credentials_are_kept_and_said_to_be_invalid(manager: Manager) -> None:
    shown = manager.put("refused", config={"value": "one"}, auth=WRONG)
    assert shown["authValidity"] == "invalid"
    assert manager.get("/orgs/refused/plugins/recorder")["authValidity"] == "invalid"
    assert manager.put("refused", auth=KEY)["authValidity"] == "valid"
    assert manager.put("refused", config={"value": "two"})["authValidity"] == "valid", (
        "credentials that stay, stay valid"
    )
    assert manager.put("refused", auth=None)["auth"] is None


def test_a_masked_secret_stays_as_it_is_when_it_is_written_and_not_when_it_was_read(manager: Manager) -> None:
    org = "masked"
    manager.put(org, config={"apiKey": "old"})
    slow = {"config": {"apiKey": "********", "fault": "on_validate_auth:hang"}, "auth": KEY}
    pending = Pending(lambda: manager.call("PUT", f"/orgs/{org}/plugins/recorder", slow))
    wait_until(lambda: "on_validate_auth" in manager.hooks(org), "the plugin is asked")
    manager.put(org, config={"apiKey": "new"})
    assert pending.answer().json()["authValidity"] == "invalid"
    assert manager.host.get(f"/plugins/recorder/{org}/value").json()["key"] == "new"


@pytest.mark.parametrize("fault", ["raise", "exit", "hang"])
def test_a_fault_in_on_validate_auth_touches_nothing_that_serves(manager: Manager, fault: str) -> None:
    org = f"validating-{fault}"
    manager.put(org, config={"value": "one"})
    _, pid = _value(manager, org)
    path = f"/plugins/recorder/{org}/value"
    trial: dict[str, Any] = {"config": {"value": "one", "fault": f"on_validate_auth:{fault}"}, "auth": KEY}
    with bystanders(manager.host, path):
        assert manager.ok("POST", f"/orgs/{org}/plugins/recorder/validate", trial).json() == {"valid": False}
        assert _value(manager, org) == ("one", pid)
        state = {"authState": KEY, "config": trial["config"]}
        assert manager.ok("POST", f"/plugins/recorder/{org}/validate-auth", state).json() == {"valid": False}
        assert _value(manager, org) == ("one", pid)
        assert manager.put(org, **trial)["authValidity"] == "invalid"
    assert manager.get(f"/workers?org={org}")["items"][0]["restarts"] == 0


@pytest.mark.parametrize("hook", ["on_config_update", "on_start"])
def test_what_goes_wrong_after_the_commit_is_told_and_the_change_stands(manager: Manager, hook: str) -> None:
    org = f"after-{hook.replace('_', '-')}"
    manager.put(org, config={"value": "one"})
    _value(manager, org)
    shown = manager.put(org, config={"value": "two", "fault": f"{hook}:raise"})
    if hook == "on_config_update":
        assert "no luck" in shown["hooks"][hook]
    assert shown["config"]["value"] == "two"
    assert _value(manager, org)[0] == "two"
    again = manager.put(org, config={"value": "three"})
    assert not again.get("hooks")
    assert _value(manager, org)[0] == "three"


def test_on_enable_that_fails_is_told_by_the_installations_answer(manager: Manager) -> None:
    shown = manager.put("enabling", config={"fault": "on_enable:raise"})
    assert "no luck" in shown["hooks"]["on_enable"]
    assert shown["enabled"] is True


def test_settings_change_under_load_without_losing_a_request(manager: Manager, tmp_path: Path) -> None:
    org = "loaded"
    manager.put(org, config={"value": "0"})
    _, pid = _value(manager, org)
    gate = manager.host.folder.name + "/gate"
    path = f"/plugins/recorder/{org}"
    pending = Pending(lambda: manager.host.get(f"{path}/gated?gate={gate}"))
    manager.host.wait_for_log('"event":"inside"')
    with bystanders(manager.host, f"{path}/value") as others:
        for number in range(1, 9):
            manager.put(org, config={"value": str(number)})
            assert _value(manager, org)[0] == str(number), "what was answered serves"
        others.round()
    Path(manager.host.folder.name).chmod(0o755)
    Path(gate).touch()
    answer = pending.answer()
    assert (answer.status, answer.json()) == (200, {"value": "0", "pid": pid}), "it ends where it began"


def test_on_disable_runs_once_and_the_plugin_is_gone(manager: Manager) -> None:
    org = "disabled"
    manager.put(org, config={"value": "one"})
    _, pid = _value(manager, org)
    shown = manager.ok("POST", f"/orgs/{org}/plugins/recorder/disable").json()
    assert (shown["enabled"], shown["state"]) == (False, "stopped")
    wait_until(lambda: all_gone([pid]), "its worker is gone")
    assert manager.host.get(f"/plugins/recorder/{org}/value").status == 404
    manager.ok("POST", f"/orgs/{org}/plugins/recorder/disable")
    manager.ok("PATCH", f"/orgs/{org}/plugins/recorder", {"enabled": False})
    assert manager.hooks(org).count("on_disable") == 1
    assert "on_stop" not in manager.hooks(org)[-1:]
    before = len(manager.hooks(org))
    assert manager.ok("POST", f"/orgs/{org}/plugins/recorder/enable").json()["enabled"] is True
    assert "on_enable" in manager.hooks(org)[before:]
    assert _value(manager, org)[0] == "one", "settings outlive it"
    manager.ok("DELETE", f"/orgs/{org}/plugins/recorder")
    assert manager.hooks(org).count("on_disable") == 2
    assert manager.call("GET", f"/orgs/{org}/plugins/recorder").status == 404
    assert manager.call("DELETE", f"/orgs/{org}/plugins/recorder").status == 404
    assert manager.host.get(f"/plugins/recorder/{org}/value").status == 404
    assert manager.get(f"/orgs/{org}")["id"] == org


def test_deleting_an_org_disables_what_it_has(manager: Manager) -> None:
    manager.put("deleted", config={"value": "one"})
    _, pid = _value(manager, "deleted")
    assert manager.call("DELETE", "/orgs/deleted").status == 204
    assert manager.hooks("deleted").count("on_disable") == 1
    wait_until(lambda: all_gone([pid]), "its worker is gone")
    for path in ("/orgs/deleted", "/orgs/deleted/plugins", "/orgs/deleted/plugins/recorder"):
        assert manager.call("GET", path).status == 404
    assert manager.host.get("/plugins/recorder/deleted/value").status == 404
    assert manager.get("/audit?org=deleted")["items"][0]["action"] == "org.delete"


def test_the_workers_own_urls_go_the_same_way(manager: Manager) -> None:
    org = "direct"
    manager.put(org, config={"value": "one", "apiKey": "kept"})
    _, pid = _value(manager, org)
    worker = f"/plugins/recorder/{org}"
    before, hooks = manager.get(f"/orgs/{org}/plugins/recorder"), len(manager.hooks(org))
    answer = manager.ok("POST", f"{worker}/config-update", {"config": {"value": "two", "apiKey": "********"}})
    assert answer.json() == {"success": True}
    after = manager.get(f"/orgs/{org}/plugins/recorder")
    assert after["revision"] == before["revision"] + 1
    value = manager.host.get(f"{worker}/value").json()
    assert (value["value"], value["key"]) == ("two", "kept"), "a mask stands for what is stored"
    assert value["pid"] != pid
    assert manager.hooks(org)[hooks:][:2] == ["on_config_update", "on_start"]
    refused = manager.call("POST", f"{worker}/config-update", {"config": {"count": "x", "other": 1}})
    assert refused.status == 400
    assert "config.count" in refused.json()["error"]
    assert "config.other" in refused.json()["error"]
    assert manager.ok("POST", f"{worker}/validate-auth", {"authState": WRONG}).json() == {"valid": False}
    assert manager.ok("POST", f"{worker}/validate-auth", {"authState": KEY}).json() == {"valid": True}
    assert manager.ok("POST", f"{worker}/disable").json() == {"success": True}
    assert manager.get(f"/orgs/{org}/plugins/recorder")["enabled"] is False
    assert manager.call("POST", f"{worker}/disable").status == 404
    assert manager.hooks(org).count("on_disable") == 1


def test_masks_go_out_and_come_back(manager: Manager) -> None:
    one = "/orgs/masks/plugins/recorder"
    shown = manager.put("masks", config={"value": "a", "apiKey": "secret", "hidden": {"x": 1}}, auth=KEY)
    again = manager.ok("PUT", one, {"config": {**shown["config"], "value": "b"}, "auth": shown["auth"]}).json()
    assert again["config"] == {**shown["config"], "value": "b"}
    assert again["authValidity"] == "valid"
    answer = manager.host.get("/plugins/recorder/masks/value").json()
    assert (answer["value"], answer["key"]) == ("b", "secret")
    manager.ok("PUT", one, {"config": {"value": "c"}})
    assert manager.host.get("/plugins/recorder/masks/value").json()["key"] is None, "what is left out is gone"
    refused = manager.call("PUT", one, {"config": {"apiKey": "********"}})
    assert refused.status == 422
    assert refused.json()["errors"][0]["field"] == "config.apiKey"


def test_patch_merges_and_null_removes(manager: Manager) -> None:
    one = "/orgs/patched/plugins/recorder"
    manager.put("patched", config={"value": "a", "count": 1, "apiKey": "s"}, auth=KEY)
    shown = manager.ok("PATCH", one, {"config": {"count": None, "flag": True}}).json()
    assert shown["config"] == {"value": "a", "flag": True, "apiKey": "********"}
    assert shown["auth"] is not None
    assert manager.ok("PATCH", one, {"auth": None}).json()["auth"] is None
    assert manager.ok("PATCH", one, {}).json()["config"] == shown["config"]
    assert manager.call("PATCH", "/orgs/nobody/plugins/recorder", {}).status == 404


def test_entity_tags(manager: Manager) -> None:
    one = "/orgs/tagged/plugins/recorder"
    first = manager.ok("PUT", one, {"config": {"value": "a"}}, If_None_Match="*").headers["ETag"]
    assert manager.call("PUT", one, {}, If_None_Match="*").status == 412
    assert manager.call("GET", one, If_None_Match=first).status == 304
    assert manager.call("GET", one, If_None_Match='"x", ' + first).status == 304
    assert manager.call("GET", one, If_None_Match='"x"').status == 200
    second = manager.ok("PATCH", one, {"config": {"value": "b"}}, If_Match=first).headers["ETag"]
    assert second != first
    for method in ("PUT", "PATCH"):
        refused = manager.call(method, one, {"config": {"value": "lost"}}, If_Match=first)
        assert refused.status == 412
    for path in (f"{one}/enable", f"{one}/disable"):
        assert manager.call("POST", path, If_Match=first).status == 412
    assert manager.call("DELETE", one, If_Match=first).status == 412
    assert manager.get(one)["config"] == {"value": "b"}
    assert manager.ok("PUT", one, {"config": {"value": "c"}}, If_Match=f'"x", {second}').status == 200
    assert manager.call("PUT", "/orgs/untagged/plugins/recorder", {}, If_Match="*").status == 412
    assert manager.call("PUT", "/orgs/untagged", {"name": "x"}, If_Match="*").status == 412
    org = manager.ok("GET", "/orgs/tagged").headers["ETag"]
    assert manager.call("GET", "/orgs/tagged", If_None_Match=org).status == 304
    manager.ok("PATCH", "/orgs/tagged", {"name": "Tagged"}, If_Match=org)
    assert manager.call("PATCH", "/orgs/tagged", {"name": "Lost"}, If_Match=org).status == 412
    assert manager.get("/orgs/tagged")["name"] == "Tagged"


def test_restart(manager: Manager) -> None:
    manager.put("restarted", config={"value": "a"})
    _, pid = _value(manager, "restarted")
    with bystanders(manager.host, "/plugins/recorder/restarted/value"):
        assert manager.ok("POST", "/orgs/restarted/plugins/recorder/restart").json() == {"restarted": True}
    value, other = _value(manager, "restarted")
    assert (value, other != pid) == ("a", True)
    assert manager.call("POST", "/orgs/nobody/plugins/recorder/restart").status == 404


def test_events_arrive(manager: Manager) -> None:
    connection = manager.host.connect()
    connection.request("GET", f"{API}/events")
    response = connection.getresponse()
    heard: list[str] = []

    def listen() -> None:
        while len(heard) < 1000 and (line := response.readline()):
            heard.append(line.decode())
            if "listened" in heard[-1] and "stopped" in heard[-1]:
                return

    assert response.readline() == b": hello\n"
    thread = threading.Thread(target=listen)
    thread.start()
    manager.put("listened", config={"value": "a"})
    _value(manager, "listened")
    manager.ok("POST", "/orgs/listened/plugins/recorder/disable")
    thread.join(LIMIT)
    response.close()
    connection.close()
    text = "".join(heard)
    assert 'event: installation\ndata: {"at":' in text
    for state in ("ready", "stopped"):
        assert f'"org":"listened","state":"{state}"' in text
    assert "id: " in text


@pytest.mark.parametrize("size", [0, 1, 65_536, 300_000, 3_000_000])
def test_bodies_reach_plugins_byte_for_byte(manager: Manager, size: int) -> None:
    manager.put("bytes")
    body = bytes(number * 7 % 256 for number in range(size))
    for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain; charset=utf-16"):
        answer = manager.host.post("/plugins/recorder/bytes/echo", body, headers={"Content-Type": kind})
        assert (answer.status, answer.body) == (200, body)


FORWARDED = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "hooks.example"}


def test_what_proxies_add_is_believed_from_configured_ones_only(manager: Manager, tmp_path: Path) -> None:
    manager.put("proxied")
    seen = manager.host.get("/plugins/recorder/proxied/headers", headers={**FORWARDED, "X-Other": "y"}).json()
    assert seen["x-other"] == "y"
    assert not [name for name in seen if name.startswith("x-forwarded")]
    with managed(tmp_path, "--trusted-proxies", "127.0.0.0/8", "--allowed-hosts", "hooks.example") as trusting:
        trusting.put("proxied")
        seen = trusting.host.get("/plugins/recorder/proxied/headers", headers=FORWARDED).json()
        assert {name.lower(): value for name, value in FORWARDED.items()}.items() <= seen.items()
        assert trusting.call("GET", "/orgs", **FORWARDED).status == 200
        assert trusting.call("GET", "/orgs", **{**FORWARDED, "X-Forwarded-Host": "evil.example"}).status == 403
        assert trusting.call("GET", "/orgs", **FORWARDED, Origin="https://hooks.example").status == 200
        assert trusting.call("GET", "/orgs", **FORWARDED, Origin="http://hooks.example").status == 403
    assert manager.call("GET", "/orgs", Host="hooks.example").status == 403


def test_rates(tmp_path: Path) -> None:
    with managed(tmp_path, "--org-rate", "5/minute", "--plugin-rate", "8/minute") as manager:
        for org in ("one", "two"):
            manager.put(org)
        statuses = [manager.host.get("/plugins/recorder/one/value").status for _ in range(7)]
        assert statuses == [200] * 5 + [429] * 2
        answer = manager.host.get("/plugins/recorder/one/value")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["error"]
        statuses = [manager.host.get("/plugins/recorder/two/value").status for _ in range(6)]
        assert 200 in statuses
        assert statuses[-1] == 429, "all orgs of a plugin share a limit, too"
        assert manager.call("GET", "/orgs").status == 200


def test_routes_can_need_a_token(tmp_path: Path) -> None:
    with managed(tmp_path, "--route-tokens") as manager:
        manager.put("acme", config={"value": "a"})
        manager.put("other")
        local = Manager(manager.host)
        path = "/plugins/recorder/acme/value"
        manager.token = manager.new_token("admin")
        acme, other = (Manager(manager.host, manager.new_token(org, org)) for org in ("acme", "other"))
        assert local.call("GET", path).status == 401
        assert acme.call("GET", path).status == 200
        assert other.call("GET", path).status == 403
        seen = acme.call("GET", "/plugins/recorder/acme/headers").json()
        assert "authorization" not in seen, "a token of the host's is not for plugins"


def test_a_change_whose_client_leaves_is_made_whole_or_not_at_all(manager: Manager) -> None:
    manager.put("hasty", config={"value": "0"})
    for number in range(1, 6):
        connection = http.client.HTTPConnection("127.0.0.1", manager.host.port, timeout=LIMIT)
        body = f'{{"config": {{"value": "{number}", "apiKey": "{number}"}}}}'
        connection.request("PUT", f"{API}/orgs/hasty/plugins/recorder", body, {"Content-Type": "application/json"})
        connection.close()
    manager.put("hasty", config={"value": "last", "apiKey": "last"})
    answer = manager.host.get("/plugins/recorder/hasty/value").json()
    assert answer["value"] == answer["key"]
    assert "an internal error" not in manager.host.log


def test_in_test_mode_with_a_store_every_org_can_be_changed(tmp_path: Path) -> None:
    write_recorder(tmp_path / "plugins")
    options = ("--mode", "test", "--store", tmp_path / "store.db")
    with hosting(tmp_path / "plugins", *options) as host:
        for url in ("/plugins/recorder/unheard-of", "/plugins/recorder/another"):
            assert host.get(f"{url}/value").json()["value"] is None
            answer = host.post(f"{url}/config-update", json_body={"config": {"value": "kept"}})
            assert answer.json() == {"success": True}
            assert host.get(f"{url}/value").json()["value"] == "kept"
        assert host.post("/plugins/recorder/another/disable").json() == {"success": True}
        assert host.get("/plugins/recorder/another/value").status == 404
        assert [org["id"] for org in host.get("/api/v1/orgs").json()["items"]] == ["another", "unheard-of"]


def test_a_host_without_a_store_has_no_tokens_to_judge(serve: Serve, tmp_path: Path) -> None:
    write_recorder(tmp_path)
    host = serve()
    for authorization in ("Bearer of-somebody-else", "Basic YTpi", "hay_0123456789abcdef_x"):
        headers = {"Authorization": authorization}
        update = {"config": {"value": authorization}}
        assert host.post("/plugins/recorder/acme/config-update", json_body=update, headers=headers).status == 200
        assert host.get("/plugins/recorder/acme/value", headers=headers).json()["value"] == authorization
