"""Which org has which plugin: in test mode, and in ``hayhost run``."""

import asyncio
from typing import Any

import msgspec
import pytest

from hayhost.errors import ConflictError, NotFoundError
from hayhost.installs import Auth, Change, EveryOrg, Installation, Installs, SingleInstall, TestInstalls


def put(installs: Installs, org: str, change: Change, **options: Any) -> Installation:
    return asyncio.run(installs.put("any", org, change, actor="test", **options))


def test_test_mode_knows_every_org() -> None:
    installs = TestInstalls()
    assert installs.find("any", "acme") == Installation("acme", "Test Org acme", {}, None, True, "")
    changed = put(installs, "acme", Change({"a": 1}))
    assert changed == Installation("acme", "Test Org acme", {"a": 1}, revision=1)
    assert installs.find("any", "acme") == changed
    for plugin, org in (("other", "acme"), ("any", "beta")):
        found = installs.find(plugin, org)
        assert found is not None
        assert found.config == {}


def test_what_is_disabled_in_test_mode_is_there_anew_when_it_is_used() -> None:
    installs = TestInstalls()
    put(installs, "acme", Change({"a": 1}))
    assert not put(installs, "acme", Change(enabled=False)).enabled
    assert installs.find("any", "acme") == Installation("acme", "Test Org acme")
    asyncio.run(installs.remove("any", "acme", actor="test"))  # and once more does nothing
    assert installs.find("any", "acme") == Installation("acme", "Test Org acme")


def test_a_single_install_knows_no_other_org() -> None:
    installs = SingleInstall(Installation("acme", "Acme", problem="odd"))
    found = installs.find("any", "acme")
    assert found is not None
    assert found.problem == "odd"
    assert installs.find("any", "beta") is None
    with pytest.raises(NotFoundError):
        put(installs, "beta", Change({}))
    put(installs, "acme", Change(enabled=False))
    assert installs.find("any", "acme") == Installation("acme", "Acme", enabled=False, problem="odd", revision=1)


def test_a_new_config_has_not_the_problems_of_the_old_one() -> None:
    installs = SingleInstall(Installation("acme", "Acme", problem="odd"))
    assert put(installs, "acme", Change({"a": 1})).problem == ""


def test_a_change_of_another_revision_is_refused() -> None:
    installs = TestInstalls()
    put(installs, "acme", Change({"a": 1}), if_revision=0)
    with pytest.raises(ConflictError) as caught:
        put(installs, "acme", Change({"a": 2}), if_revision=0)
    assert caught.value.current == 1
    assert put(installs, "acme", Change({"a": 2}), if_revision=1).config == {"a": 2}


def test_new_credentials_are_of_unknown_validity() -> None:
    before = Installation("acme", "Acme", {}, Auth("k", {"a": 1}), auth_validity="valid")
    assert Change({"b": 1}).apply(before).auth_validity == "valid"
    assert Change(auth=Auth("k", {"a": 1})).apply(before).auth_validity == "valid"
    assert Change(auth=Auth("k", {"a": 2})).apply(before).auth_validity == "unknown"
    assert Change(auth=None).apply(before).auth is None
    assert Change(auth=Auth("k", {"a": 2}), auth_validity="invalid").apply(before).auth_validity == "invalid"


def test_in_test_mode_a_store_comes_first() -> None:
    kept = SingleInstall(Installation("acme", "Acme"))
    installs = EveryOrg(kept)
    assert installs.find("any", "acme") == Installation("acme", "Acme")
    assert installs.find("any", "beta") == Installation("beta", "Test Org beta")
    put(installs, "acme", Change({"a": 1}))
    assert asyncio.run(installs.load("any", "acme")) == Installation("acme", "Acme", {"a": 1}, revision=1)


def test_no_secret_in_what_python_shows_of_them() -> None:
    auth = Auth("k", {"apiKey": "sk_5ecret"})
    installation = Installation("acme", "Acme", {"toleranceSeconds": "sk_5ecret"}, auth)
    shown = repr(installation) + str(auth) + repr(Change(installation.config, auth=auth))
    assert "acme" in shown
    assert "sk_5ecret" not in shown
    assert "toleranceSeconds" not in shown


@pytest.mark.parametrize(
    "given",
    [
        {"methodId": "k"},
        {"credentials": {}},
        {"methodId": "", "credentials": {}},
        {"methodId": 3, "credentials": {}},
        {"methodId": "k", "credentials": []},
        {"methodId": "k", "credentials": {}, "password": "sk_5ecret"},
    ],
)
def test_what_is_no_auth(given: object) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, Auth)
    assert "sk_5ecret" not in str(caught.value)
