"""The names of tools of several servers in one list."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayhost.installs import ToolLists
from hayhost.mcp.names import MAX_NAME, Origin, assign

NAMES = st.text(st.sampled_from([*"ab_", "-", ".", "/", "é", " ", "\ud800"]), min_size=1, max_size=90)
PLUGINS = st.text(string.ascii_lowercase[:3] + "-", min_size=1, max_size=64).map(lambda name: "p" + name[1:])
ORIGINS = st.lists(st.builds(Origin, PLUGINS, NAMES, NAMES), max_size=20)


def of(name: str, plugin: str = "stripe", server: str = "s") -> Origin:
    return Origin(plugin, server, name)


def test_a_name_begins_with_the_plugins() -> None:
    assert assign([of("refund"), of("refund", "crm")], with_plugin=True) == {
        "stripe__refund": of("refund"),
        "crm__refund": of("refund", "crm"),
    }


def test_on_the_plugins_own_endpoint_it_is_as_the_server_has_it() -> None:
    long = "x" * 100 + "."
    assert list(assign([of("refund"), of(long)], with_plugin=False)) == ["refund", long]


@pytest.mark.parametrize("with_plugin", [True, False])
def test_a_name_that_two_servers_have_is_neithers_alone(with_plugin: bool) -> None:
    named = assign([of("get", server="a"), of("get", server="b"), of("put")], with_plugin=with_plugin)
    before = "stripe__" if with_plugin else ""
    assert list(named) == [f"{before}a__get", f"{before}b__get", f"{before}put"]


@given(ORIGINS, st.booleans())
def test_names_are_unambiguous(origins: list[Origin], with_plugin: bool) -> None:
    named = assign(origins, with_plugin=with_plugin)
    assert sorted(named.values()) == sorted(set(origins))
    if with_plugin:
        assert all(len(name) <= MAX_NAME and name.isascii() for name in named)
        assert all(set(name) <= set(string.ascii_letters + string.digits + "_-") for name in named)


@given(ORIGINS, ORIGINS)
def test_names_do_not_depend_on_other_plugins(origins: list[Origin], others: list[Origin]) -> None:
    others = [other._replace(plugin=f"o{other.plugin[:40]}") for other in others]
    origins = [origin._replace(plugin=origin.plugin[:40]) for origin in origins]
    alone = assign(origins, with_plugin=True)
    together = assign([*others, *origins], with_plugin=True)
    assert {name: origin for name, origin in together.items() if origin in alone.values()} == alone


def test_long_names_that_differ_at_their_ends_stay_apart() -> None:
    named = assign([of("x" * 80 + "a"), of("x" * 80 + "b")], with_plugin=True)
    assert len(named) == 2
    assert all(len(name) == MAX_NAME and name.startswith("stripe__xxx") for name in named)


def test_a_server_cannot_take_the_name_that_another_tool_is_given() -> None:
    (made,) = assign([of("a.b")], with_plugin=True)
    copied = of(made.removeprefix("stripe__"))
    for origins in ([of("a.b"), copied], [copied, of("a.b")]):
        assert len(assign(origins, with_plugin=True)) == 2


@pytest.mark.parametrize(
    ("lists", "allowed"),
    [
        (ToolLists(), True),
        (ToolLists(allow=("stripe__*",)), True),
        (ToolLists(allow=("stripe__refund",)), True),
        (ToolLists(allow=("stripe__Refund",)), False),
        (ToolLists(allow=("crm__*",)), False),
        (ToolLists(deny=("*__refund",)), False),
        (ToolLists(allow=("stripe__refund",), deny=("stripe__re*",)), False),
    ],
)
def test_lists_of_tools(lists: ToolLists, allowed: bool) -> None:
    assert lists.allows("stripe", "refund") is allowed
