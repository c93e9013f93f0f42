"""Run with ``pytest``."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.testing import PluginHarness


@pytest.fixture
def plugin() -> Iterator[PluginHarness]:
    with PluginHarness(Path(__file__).parent, org_id="acme") as harness:
        yield harness


def test_echo(plugin: PluginHarness) -> None:
    response = plugin.request("POST", "/echo?a=1&a=2", json={"text": "héllo"})
    assert response.status == 200
    assert response.json() == {"org": "acme", "query": {"a": ["1", "2"]}, "body": {"text": "héllo"}}


def test_malformed_json_is_a_bad_request(plugin: PluginHarness) -> None:
    assert plugin.request("POST", "/echo", body="{").status == 400


def test_hello(plugin: PluginHarness) -> None:
    assert plugin.request("GET", "/hello/Ada%20L.").json() == {"message": "Hello, Ada L.!"}
