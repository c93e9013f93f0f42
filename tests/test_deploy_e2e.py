"""The dashboard and the alert rules that are shipped: all that they ask for is what a real host tells."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from .conftest import wait_until, write_plugin
from .hosting import PREAMBLE
from .managing import managed
from .mcping import call
from .scraping import scrape

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus/alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana/hayhost.json").read_text())
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""

EVERYTHING = (
    PREAMBLE
    + """
class Tools:
    def list_tools(self):
        return [{"name": "add", "description": "adds", "inputSchema": {"type": "object"}}]
    def call_tool(self, name, arguments):
        return {"content": [{"type": "text", "text": "3"}]}

@route("GET", "/die")
async def die(req):
    os._exit(3)

@define_hay_plugin
class Everything:
    name = "everything"

    def on_initialize(self, ctx):
        ctx.register.config({"id": {"type": "string"}, "secret": {"type": "string", "sensitive": True}})
        ctx.register.auth.oauth2(
            id="oauth", label="OAuth", authorization_url="https://example.com/a", token_url="https://example.com/t",
            scopes=[], client_id=ctx.config.field("id"), client_secret=ctx.config.field("secret"),
        )
        register(ctx)

    async def on_start(self, ctx):
        ctx.logger.info("started")
        await ctx.mcp.start_local("tools", lambda mcp: Tools())
"""
)

Metrics = dict[str, dict[str, set[str]]]
"""The values of each label of each metric."""


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    folder = tmp_path_factory.mktemp("deploy")
    folder.chmod(0o755)
    plugins = folder / "plugins"
    network = '[tool.hay-plugin.permissions]\nnetwork = ["example.com:443"]\n'
    write_plugin(plugins / "everything", EVERYTHING, extra=network)
    with managed(folder, plugins=plugins) as manager:
        manager.ok("POST", "/orgs", {"id": "acme"})
        manager.put("acme", "everything")
        assert manager.host.get("/plugins/everything/acme/die").status == 502
        call(manager.host, "/plugins/everything/acme/mcp", "add")
        wait_until(lambda: scrape(manager.host).sum("event_loop_lag_seconds_count") > 0)
        found: Metrics = defaultdict(lambda: defaultdict(set))
        for name, labels, _ in scrape(manager.host).samples:
            for label, value in labels.items():
                found[name][label].add(value)
            found[name]["__name__"].add(name)
    return found


def _queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def _selectors(node: Any) -> Iterator[Any]:
    """All that is selected in a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    for child in ("expr", "lhs", "rhs", "param"):
        yield from _selectors(getattr(node, child)) if hasattr(node, child) else ()
    for argument in getattr(node, "args", ()):
        yield from _selectors(argument)


def _grouped(node: Any) -> Iterator[tuple[set[str], Any]]:
    """The labels by which something is put together, and that."""
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield set(node.modifier.labels), node.expr
    for child in ("expr", "lhs", "rhs"):
        yield from _grouped(getattr(node, child)) if hasattr(node, child) else ()
    for argument in getattr(node, "args", ()):
        yield from _grouped(argument)


def _parsed(query: str) -> Any:
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


@pytest.mark.parametrize(("what", "query"), list(_queries()))
def test_queries_ask_for_what_there_is(metrics: Metrics, what: str, query: str) -> None:
    parsed = _parsed(query)
    selectors = list(_selectors(parsed))
    assert selectors
    for selector in selectors:
        if selector.name == "up":  # Prometheus' own
            continue
        assert selector.name in metrics, f"{what}: there is no {selector.name}"
        known = metrics[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in known.keys() | SCRAPED, f"{what}: {selector.name} has no label {matcher.name}"
            if matcher.name in SCRAPED or "$" in matcher.value or "Re" in str(matcher.op):
                continue
            if (matcher.name, matcher.value) not in {("route", "other"), ("code", "503"), ("action", "load")}:
                assert matcher.value in known[matcher.name], f"{what}: {matcher.name} is never {matcher.value}"
    for labels, inner in _grouped(parsed):
        for selector in _selectors(inner):
            assert labels <= metrics[selector.name].keys() | SCRAPED, f"{what}: {labels}"


def test_every_metric_is_on_the_dashboard_or_needs_no_place_there(metrics: Metrics) -> None:
    shown = {selector.name for _, query in _queries() for selector in _selectors(_parsed(query))}
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in shown}
    there = {re.sub("_(bucket|count|sum)$", "", name) for name in metrics if name.startswith("hayhost_")}
    assert there - shown == {"hayhost_info", "hayhost_sample_age_seconds"}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert DASHBOARD["uid"] == "hayhost"
    assert "id" not in DASHBOARD, "Grafana gives one"
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = (range(place[at], place[at] + place[size]) for at, size in ("xw", "yh"))
        cells = {(x, y) for x in columns for y in rows}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        for target in panel["targets"]:
            assert set(re.findall(r"\$([a-z]+)", target["expr"])) <= variables
    for variable in DASHBOARD["templating"]["list"]:
        assert variable["type"] in ("query", "datasource")


def test_rules_have_all_that_who_is_woken_needs(metrics: Metrics) -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        said = " ".join(rule["annotations"].values())
        parsed = _parsed(rule["expr"])
        kept = next((labels for labels, _ in _grouped(parsed)), None)
        if kept is None:
            kept = SCRAPED.union(*(metrics[selector.name] for selector in _selectors(parsed)))
        for label in re.findall(r"\$labels\.(\w+)", said):
            assert label in kept, f"{rule['alert']} has no {label}"


def test_promtool_takes_the_rules() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("there is no promtool here; it comes with Prometheus, which is too large to install for this")
    done = subprocess.run([promtool, "check", "rules", ALERTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
