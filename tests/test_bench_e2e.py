"""``hayhost bench`` on real plugins, with few rounds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .commands import environment, run_hayhost
from .conftest import routes, write_plugin

ROUNDS = 4
SMALL = ("--rounds", ROUNDS, "--seconds", "0.05", "--orgs", 10)
HOOKS = """
from hayhost.sdk import *

@define_hay_plugin
class Plugin:
    name = "test"

    def on_initialize(self, ctx):
        ctx.register.route("POST", "/items/{id}", self.items)

    async def on_start(self, ctx): ...
    def on_config_update(self, ctx): ...
    async def on_enable(self, ctx): ...
    def on_disable(self, ctx): ...
    async def on_stop(self, ctx): ...

    def on_validate_auth(self, ctx):
        raise RuntimeError("no credentials")

    async def items(self, req):
        return {"id": req.params["id"], "body": req.json()}
"""


def figures(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(figure["group"], figure["name"]): figure for figure in report["figures"]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The output, the report and the plugin of a whole run."""
    folder = tmp_path_factory.mktemp("bench")
    write_plugin(folder / "p", HOOKS, name="p", capabilities=("routes",))
    done = run_hayhost("bench", folder / "p", *SMALL, "--json", folder / "report.json")
    assert done.code == 0, done.err
    return done.out, folder / "report.json", folder / "p"


def test_every_part_is_measured(measured: tuple[str, Path, Path]) -> None:
    report = json.loads(measured[1].read_text())
    found = figures(report)
    phases = ["route", "fork", "confine", "admit", "hooks", "answer"]
    assert all(len(found["cold start", phase]["values"]) == ROUNDS for phase in [*phases, "first answer"])
    for values in zip(*(found["cold start", phase]["values"] for phase in phases), strict=True):
        assert all(value > 0 for value in values)
    total = found["cold start", "first answer"]["values"]
    sums = [sum(found["cold start", phase]["values"][n] for phase in phases) for n in range(ROUNDS)]
    assert sums == pytest.approx(total, rel=0.01)
    assert ("cold start with a spare", "hooks") in found
    hooks = {name for group, name in found if group == "hooks"}
    assert hooks == {
        "on_initialize", "on_start", "on_validate_auth", "on_config_update", "on_enable", "on_disable", "on_stop",
    }  # fmt: skip
    for connections in ("1 connection", "8 connections", "32 connections"):
        assert found[f"route, {connections}", "latency p50"]["p50"] > 0
    assert 0 < found["route, 32 connections", "share of Tornado's"]["p50"] < 2
    assert len(found["memory at 10 orgs", "PSS"]["values"]) == 10
    assert found["memory at 10 orgs", "private dirty"]["p50"] < found["memory at 10 orgs", "RSS"]["p50"]
    assert len(found["reload", "save to new code"]["values"]) == ROUNDS
    assert report["route"] == "POST /items/x"
    assert report["isolation"] in ("confined", "namespaced", "hardened")
    assert any("on_validate_auth raised" in note for note in report["notes"])


def test_the_table_has_every_figure(measured: tuple[str, Path, Path]) -> None:
    for figure in json.loads(measured[1].read_text())["figures"]:
        assert f"\n  {figure['name']} " in measured[0]
    assert "\x1b" not in measured[0]  # it is not on a terminal


def test_the_plugin_is_left_as_it_was(measured: tuple[str, Path, Path]) -> None:
    assert (measured[2] / "plugin.py").read_text() == HOOKS
    assert sorted(os.listdir(measured[2])) == ["plugin.py", "pyproject.toml"]


def test_a_run_is_compared_with_an_older_one(measured: tuple[str, Path, Path], tmp_path: Path) -> None:
    old = json.loads(measured[1].read_text())
    for figure in old["figures"]:
        if figure["group"] == "hooks":
            figure["values"] = [value * 100 for value in figure["values"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    done = run_hayhost("bench", measured[2], "--only", "hooks", *SMALL, "--compare", tmp_path / "old.json")
    assert done.code == 0, done.err
    changes = done.out.partition("\nsince ")[2]
    verdicts = {line.split()[0]: line.split()[1] for line in changes.splitlines() if line.startswith("  on_")}
    assert verdicts.pop("on_initialize") == "too"
    assert set(verdicts.values()) == {"better"}
    assert "cold start" not in changes


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_is_drawn(measured: tuple[str, Path, Path], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"bench.{suffix}"
    done = run_hayhost("bench", measured[2], "--only", "hooks", *SMALL, "--plot", file)
    assert done.code == 0, done.err
    assert file.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_without_matplotlib_nothing_is_measured(measured: tuple[str, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    env = environment({"PYTHONPATH": str(tmp_path)})
    done = run_hayhost("bench", measured[2], "--plot", tmp_path / "bench.svg", env=env)
    assert (done.code, done.out) == (1, "")
    assert done.err == "hayhost: --plot needs matplotlib: pip install 'hayhost[bench]'\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--plot", "bench.pdf"), "--plot bench.pdf: give a file that ends in .svg or .png"),
    (("--route", "echo"), "--route 'echo': give a method and a path, such as 'POST /echo'"),
])  # fmt: skip
def test_wrong_arguments_are_refused(
    measured: tuple[str, Path, Path], arguments: tuple[str, str], message: str
) -> None:
    done = run_hayhost("bench", measured[2], *arguments)
    assert (done.code, done.err) == (1, f"hayhost: {message}\n")


def test_a_file_that_is_no_report_is_refused(measured: tuple[str, Path, Path]) -> None:
    done = run_hayhost("bench", measured[2], "--compare", measured[2] / "plugin.py")
    assert done.code == 1
    assert "not a report of `hayhost bench --json`" in done.err


def test_a_route_that_fails_is_said(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", routes("", fail='def: raise ValueError("no")'), name="p", capabilities=("routes",))
    done = run_hayhost("bench", tmp_path / "p", "--only", "routes", *SMALL)
    assert done.code == 1
    assert "was answered 500" in done.err


def test_a_plugin_without_routes_has_hooks(tmp_path: Path) -> None:
    source = (
        "from hayhost.sdk import *\n@define_hay_plugin\nclass P:\n    name = 'p'\n    def on_start(self, ctx): ...\n"
    )
    write_plugin(tmp_path / "p", source, name="p")
    done = run_hayhost("bench", tmp_path / "p", *SMALL)
    assert done.code == 0, done.err
    assert "  on_start " in done.out
    assert "note: the plugin has no route" in done.out


def test_a_plugin_that_does_not_load_is_said(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", "import nothing_of_this_name", name="p")
    done = run_hayhost("bench", tmp_path / "p", *SMALL)
    assert done.code == 1
    assert "nothing_of_this_name" in done.err
    assert "Traceback" not in done.err


def test_the_help_teaches() -> None:
    done = run_hayhost("bench", "--help")
    assert done.code == 0
    for word in ("cold", "hooks", "routes", "memory", "reload", "--compare before.json", "PSS", "Tornado"):
        assert word in done.out
