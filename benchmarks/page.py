"""Write the figures of ``benchmarks/results/`` between the marks in README.md and docs/.

python -m benchmarks.page
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.bulk.page import bulk_words
from benchmarks.data import data_words
from benchmarks.front.page import front_words
from benchmarks.gpu.page import gpu_words
from benchmarks.llama.page import llama_words
from benchmarks.long_tests import long_tests_words
from benchmarks.plan.page import plan_words
from benchmarks.precision import precision_words
from benchmarks.serving.page import path_words, serving_words
from benchmarks.size import size_words
from benchmarks.systems.page import systems_words
from benchmarks.tasks.page import routing_words, tasks_words
from benchmarks.training.page import training_words
from revmux.methods import method_class
from revmux.plan.report import comparison_table, row_name
from revmux.utils.files import write_durably

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
MARKS = re.compile(r"(<!-- (?P<name>[a-z-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)


def quickstart_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the table of the quickstart and a description of how it was measured."""
    meta, rows = result["meta"], result["rows"]
    data, machine, seconds = meta["data"], meta["machine"], meta["seconds"]
    steps = ", ".join(f"{step.lower()} {value:.0f} s" for step, value in seconds.items())
    words = (
        f"{comparison_table(rows)}\n\n"
        f"One seed. Accuracy is measured on {data['test']} test inputs after training on {data['train']} examples: the mean ± the "
        f"standard deviation over {meta.get('shuffles', 10)} shuffles of which inputs share a group. Cost is the number of "
        f"operations per input relative to SISO, counted at the mean length. Throughput is that of the model alone relative to SISO: the median over pairs of "
        f"runs. {machine['cores']} cores, torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`.\n\n"
        f"Time per step: {steps}; {sum(seconds.values()) / 60:.1f} minutes up to the report.\n"
    )
    return {"quickstart": words, "gain": _gain_words(rows)}


def _gain_words(rows: list[dict[str, Any]]) -> str:
    """Return one line per trained system: the throughput that it gains and the accuracy that it loses."""
    siso = next(row["accuracy_mean"] for row in rows if method_class(row["method"]).is_plain)
    lines = [
        f"- {row_name(row)}: {row['throughput_ratio']:.2f} times the plain model's throughput, "
        f"{100 * (siso - row['accuracy_mean']):.1f} points of accuracy lost."
        for row in sorted(rows, key=lambda row: -row["accuracy_mean"])
        if not method_class(row["method"]).is_plain
    ]
    return "\n".join(lines) + "\n"


WRITERS = {
    "bulk": bulk_words,
    "data": data_words,
    "front": front_words,
    "gpu": gpu_words,
    "precision": precision_words,
    "quickstart": quickstart_words,
    "routing": routing_words,
    "systems": systems_words,
    "tasks": tasks_words,
    "training": training_words,
    "llama": llama_words,
    "long-tests": long_tests_words,
    "plan": plan_words,
    "size": size_words,
    "serving": serving_words,
    "serving-path": path_words,
}
"""For each result file, the function that returns its texts by mark."""


def all_words() -> dict[str, str]:
    """Return the text of every mark whose result file exists, and of the long tests, which may not have been run yet."""
    words = {"long-tests": "No run is recorded yet.\n"}
    for name, write in WRITERS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            words |= write(json.loads(file.read_text()))
    return words


def main() -> None:
    """Fill every mark on every page.

    Raises:
        SystemExit: a page has a mark that no result file covers.
    """
    words = all_words()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        unknown = sorted({match["name"] for match in MARKS.finditer(text)} - words.keys())
        if unknown:
            raise SystemExit(
                f"error: {page.name} has marks without a result file: {', '.join(unknown)}; run the benchmark that writes it"
            )
        filled = MARKS.sub(lambda match: match[1] + words[match["name"]] + match[3], text)
        if filled != text:
            write_durably(page, filled)


if __name__ == "__main__":
    main()
