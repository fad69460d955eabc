"""The plots of a front show every row and need no network."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from revmux import UserError
from revmux.methods import method_class, method_names
from revmux.plan.front import FrontRow
from revmux.plan.plots import label_of, plot_front_html, plot_front_png
from revmux.plan.report import front_row

ROWS = [
    FrontRow("siso", "siso", 1, 0, math.nan, 0.9, 0.9, 1.0, 1.0),
    FrontRow("revmux-n2", "revmux", 2, 3, 0.25, 0.88, 0.9, 0.75, 1.3),
    FrontRow("revmux-n4", "revmux", 4, 3, 0.25, 0.85, 0.9, 0.6, threshold=0.8, fallback=0.12),
    FrontRow("head", "exit-head", 1, 2, math.nan, 0.80, 0.9, 0.7),
    FrontRow("stairs", "exit-head", 1, 2, math.nan, 0.89, 0.9, 0.5, threshold=0.9, fallback=0.02, later=("N=2 l=3",)),
]


def test_the_png_is_written_atomically(tmp_path: Path) -> None:
    path = plot_front_png(ROWS, tmp_path / "deep" / "front.png", "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in path.parent.iterdir()] == ["front.png"]


def test_the_page_shows_every_row_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    text = plot_front_html(ROWS, tmp_path / "front.html", "a title").read_text()
    for row in ROWS:
        assert row.name in text
    assert "12.0%" in text
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=.https?:", text)
    assert [item.name for item in tmp_path.iterdir()] == ["front.html"]


def test_labels_describe_each_point() -> None:
    assert [label_of(row) for row in ROWS] == [
        "SISO",
        "N=2 l=3",
        "N=4 l=3, 12% fall back",
        "layer 2",
        "layer 2 → N=2 l=3, 2% fall back",
    ]
    assert [row.group for row in ROWS] == ["siso", "revmux", "revmux", "exit-head", "ladder"]


def test_a_result_row_is_drawn_at_its_counted_cost() -> None:
    row = {
        "method": "exit-head",
        "num_inputs": 1,
        "prefill_layers": 2,
        "accuracy_mean": 0.8,
        "accuracy_std": 0.01,
        "siso_accuracy": 0.9,
        "cost_counted": 0.5,
        "throughput_ratio": 1.7,
    }
    mark = front_row(row)
    assert (mark.cost, mark.accuracy, mark.accuracy_std) == (0.5, 0.8, 0.01)
    assert (mark.name, label_of(mark)) == ("exit head at layer 2", "layer 2")


def test_every_method_names_itself_in_tables_and_sentences() -> None:
    named = {name: method_class(name).system_name(2, 3) for name in method_names()}
    assert len(set(named.values())) == len(named)
    assert (named["siso"], named["exit-head"]) == ("SISO (the plain model)", "exit head at layer 3")
    assert named["revmux"] == "revmux N=2 l=3"
    assert method_class("exit-head").describe(1, 3) == "an exit head at layer 3"
    assert method_class("siso").describe(1, 0) == "the plain model (SISO)"
    assert [name for name in method_names() if method_class(name).is_plain] == ["siso"]
    assert [name for name in method_names() if not method_class(name).multiplexes()] == [
        "exit-head",
        "siso",
        "skip-only",
    ]


def test_an_empty_plot_is_refused_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row to plot"):
        plot_front_png([], tmp_path / "front.png", "")
