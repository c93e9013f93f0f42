"""What workers say of their MCP servers is a stranger's word."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hayhost.mcp.listings import Listings, Served
from sandbox import wire

NO_OBJECTS = [b"\xff", b'{"instructions": "\xff"}', b"[]", b"[" * 10_000, b"{"]


@pytest.mark.parametrize("info", NO_OBJECTS)
def test_a_server_that_describes_itself_badly_has_said_nothing(info: bytes) -> None:
    served = Served("a")
    served.describe(info)
    assert (served.capabilities, served.instructions, served.handshake) == ({}, "", True)


@pytest.mark.parametrize("notification", NO_OBJECTS)
def test_a_notice_that_is_none_is_passed_on_to_nobody(notification: bytes) -> None:
    noticed: list[Any] = []
    listings = Listings(cast(Any, None), lambda shelf: None, lambda shelf, message: noticed.append(message))
    plugin = cast(Any, SimpleNamespace(name="p"))
    listings.shelf(plugin, "acme")
    slot = cast(Any, SimpleNamespace(plugin=plugin, org_id="acme"))
    listings._worker_noticed(slot, wire.McpNotice("a", notification))
    assert noticed == []
    listings._worker_noticed(slot, wire.McpNotice("a", b'{"method": "x"}'))
    assert noticed == [{"method": "x"}]
