"""The queries of the Grafana dashboard, and the metrics and labels that they need."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser

FILE = Path(__file__).parents[1] / "deploy/helm/revmux/dashboards/revmux.json"
_VALUES = {"$__rate_interval": "5m", "$task": ".*", "$replica": ".*"}


def panels() -> list[dict[str, Any]]:
    """All panels and rows."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["panels"]
    return found


def queries(first: str = "revmux") -> list[str]:
    """The PromQL of all panels and variables.

    Args:
        first: the first part of the metrics' names.
    """
    page = json.loads(FILE.read_text())
    found = [target["expr"] for panel in page["panels"] for target in panel.get("targets", [])]
    for variable in page["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            found.append(f"sum by ({label}) ({metric})")
    for name, value in {"${metrics}": first, **_VALUES}.items():
        found = [query.replace(name, value) for query in found]
    assert not [query for query in found if "$" in query]
    return found


def needed(first: str = "revmux") -> dict[str, set[str]]:
    """The labels that the queries need, by metric."""
    found: dict[str, set[str]] = {}
    for query in queries(first):
        _collect(promql_parser.parse(query), set(), found)
    return found


def _collect(node: Any, grouped: set[str], found: dict[str, set[str]]) -> None:
    """Add the metrics of an expression, which is grouped by labels."""
    if isinstance(node, promql_parser.VectorSelector):
        labels = {matcher.name for matcher in node.matchers.matchers}
        found.setdefault(node.name, set()).update(labels | grouped)
    elif isinstance(node, promql_parser.MatrixSelector):
        _collect(node.vector_selector, grouped, found)
    elif isinstance(node, promql_parser.AggregateExpr):
        _collect(node.expr, grouped | set(node.modifier.labels if node.modifier else ()), found)
    elif isinstance(node, promql_parser.BinaryExpr):
        _collect(node.lhs, grouped, found)
        _collect(node.rhs, grouped, found)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            _collect(argument, grouped, found)
    elif isinstance(node, promql_parser.ParenExpr):
        _collect(node.expr, grouped, found)
    else:
        assert isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral), node
