"""Run with ``pytest``. The program is the real one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.testing import PluginHarness

FOLDER = Path(__file__).parent


@pytest.fixture
def plugin() -> Iterator[PluginHarness]:
    with PluginHarness(FOLDER, org_id="acme", config={"holidays": "2026-12-25, 2027-01-01"}) as harness:
        yield harness


def said(plugin: PluginHarness, tool: str, **arguments: Any) -> tuple[str, bool]:
    """What a tool says, and whether that is an error."""
    result = plugin.call_tool(tool, arguments)
    return result["content"][0]["text"], result["isError"]


def test_tools_are_those_of_the_program(plugin: PluginHarness) -> None:
    assert [(tool["name"], tool["serverId"]) for tool in plugin.list_tools()] == [
        ("weekday", "dates"),
        ("working_days", "dates"),
    ]


def test_weekday(plugin: PluginHarness) -> None:
    assert said(plugin, "weekday", date="2026-11-22") == ("Sunday", False)


@pytest.mark.parametrize(
    ("start", "end", "days"),
    [("2026-11-23", "2026-11-30", "5"), ("2026-12-21", "2027-01-04", "8"), ("2026-11-30", "2026-11-23", "0")],
)
def test_working_days_without_the_org_s_holidays(plugin: PluginHarness, start: str, end: str, days: str) -> None:
    assert said(plugin, "working_days", start=start, end=end) == (days, False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"date": "tomorrow"}, "Invalid isoformat string"),
        ({}, "missing 1 required positional argument"),
        ({"day": "2026-11-22"}, "unexpected keyword argument"),
    ],
)
def test_arguments_that_do_not_fit(plugin: PluginHarness, arguments: dict[str, str], reason: str) -> None:
    text, wrong = said(plugin, "weekday", **arguments)
    assert reason in text
    assert wrong
    assert said(plugin, "weekday", date="2026-11-22") == ("Sunday", False)


def test_a_range_without_end(plugin: PluginHarness) -> None:
    text, wrong = said(plugin, "working_days", start="0001-01-01", end="9999-12-31")
    assert (text, wrong) == ("more than 100000 days", True)
