"""The public conformance suite, and the MCP Inspector, against plugins that the real host serves."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from . import nodejs
from .conftest import HostProcess
from .hosting import hosting

SUITE = ("@modelcontextprotocol/conformance", "0.2.0-alpha.12")
INSPECTOR = ("@modelcontextprotocol/inspector", "2.12.0")
ENDPOINT = "/plugins/everything/{}/mcp"
LIMIT = 150.0


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with hosting(Path(__file__).parent / "conformance", "--no-reload", writable=False) as host:
        yield host


@pytest.mark.parametrize(("revision", "least"), [("2025-11-25", 30), ("2026-07-28", 37)])
def test_every_required_scenario_passes(host: HostProcess, revision: str, least: int, tmp_path: Path) -> None:
    script = nodejs.install(*SUITE) / "dist" / "index.js"
    url = f"http://localhost:{host.port}{ENDPOINT.format('conformance')}"
    command: list[str | Path] = [
        nodejs.node(),
        script,
        "server",
        "--url",
        url,
        "--requirements",
        revision,
        "-o",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    summary = done.stdout.partition("=== SUMMARY ===")[2]
    assert done.returncode == 0, summary + done.stderr[-2000:]
    scored = summary.partition("Not scored")[0]
    passed = [line.split()[1].rstrip(":") for line in scored.splitlines() if line.startswith("✓")]
    required = _required(script, revision)
    assert len(required) == least
    assert set(required) <= set(passed), scored


def _required(script: Path, revision: str) -> list[str]:
    """The names of the server scenarios that a revision requires."""
    command: list[str | Path] = [nodejs.node(), script, "list", "--server", "--requirements", revision]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    names = listed.partition("Server scenarios")[2].partition("\n\n")[0]
    return [line.strip()[2:] for line in names.splitlines() if line.strip().startswith("- ")]


def inspect(host: HostProcess, path: str, *options: str) -> Any:
    """What the Inspector's command line says."""
    script = nodejs.install(*INSPECTOR) / "clients" / "launcher" / "build" / "index.js"
    url = f"http://127.0.0.1:{host.port}{path}"
    command: list[str | Path] = [nodejs.node(), script, "--cli", url, "--transport", "http", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_inspector_lists_and_calls_tools_of_two_orgs_at_once(host: HostProcess) -> None:
    nodejs.install(*INSPECTOR)
    paths = [ENDPOINT.format(org) for org in ("acme", "beta")]
    with ThreadPoolExecutor(2) as pool:
        # What acme's tool adds to its list, no other org has.
        inspect(host, paths[0], "--method", "tools/call", "--tool-name", "test_trigger_tool_change")
        lists = list(pool.map(lambda path: inspect(host, path, "--method", "tools/list"), paths))
        names = [{tool["name"] for tool in listed["tools"]} for listed in lists]
        assert "test_simple_text" in names[1]
        assert names[0] - names[1] == {"extra_0"}
        call = ("--method", "tools/call", "--tool-name", "test_simple_text")
        for answer in pool.map(lambda path: inspect(host, path, *call), paths):
            assert answer["content"][0]["text"] == "This is a simple text response for testing."
