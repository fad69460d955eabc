"""The Grafana dashboard: Grafana's types know every key, and Prometheus's parser every query."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import promql_parser
import pytest
from dashboard_queries import FILE, panels, queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

SCRIPT = Path(__file__).parents[1] / "deploy/grafana_dashboard.py"


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["FILE"] == FILE
    assert script["build"]() == FILE.read_text(), f"run python {SCRIPT.relative_to(Path.cwd())}"


def test_grafanas_types_know_every_key() -> None:
    register_default_plugins()
    page = json.loads(FILE.read_text())
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(page))) == page
    with pytest.raises(TypeError):
        Dashboard.from_json({**page, "panels": 5})


def test_panels_have_different_numbers_and_do_not_overlap() -> None:
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in found
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_panel_has_queries_that_prometheus_parses() -> None:
    charts = [panel for panel in panels() if panel["type"] != "row"]
    assert all(chart["targets"] for chart in charts)
    for query in queries():
        promql_parser.parse(query)
