"""The summary of a job: a page and a picture with label counts, confidence, the answers by stage, and sampled rows."""

from __future__ import annotations

import io
from importlib import resources
from typing import Any

import jinja2

from revmux.bulk.classify import Report
from revmux.bulk.job import Job
from revmux.bulk.output import OutputFolder
from revmux.utils.extras import require

SUMMARY_NAMES = ("summary.html", "summary.png")
_MOST_LABELS = 30
_DPI = 110


def write_summary(output: OutputFolder, report: Report, job: Job) -> None:
    """Write ``summary.html`` and ``summary.png`` next to the manifest.

    Raises:
        UserError: matplotlib is not installed, or the output cannot be written.
    """
    figures = summarize(report, job)
    page, picture = SUMMARY_NAMES
    output.meta.write(page, render_page(figures).encode())
    output.meta.write(picture, draw_picture(figures))


def summarize(report: Report, job: Job) -> dict[str, Any]:
    """All figures of the summary."""
    totals = report.totals
    sample = sorted(totals.sample, key=lambda row: row["hash"])[: job.settings["sample_rows"]]
    return {
        "output": report.output,
        "input": job.input,
        "totals": totals,
        "price": report.price,
        "answered": totals.rows - totals.errors,
        "labels": totals.labels.most_common(_MOST_LABELS),
        "more_labels": max(0, len(totals.labels) - _MOST_LABELS),
        "confidence": totals.confidence,
        "answered_by": sorted(totals.answered_by.items()),
        "sample": sample,
        "failed": report.failed,
        "stopped": report.stopped,
        "is_complete": report.is_complete,
    }


def render_page(figures: dict[str, Any]) -> str:
    """The summary as one HTML page without scripts or links. All texts are escaped."""
    template = resources.files("revmux.bulk").joinpath("summary.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=True
    )
    return environment.from_string(template).render(figures)


def draw_picture(figures: dict[str, Any]) -> bytes:
    """The charts of the summary as a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    require("matplotlib", "report")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (labels, histogram, stages) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    _bars(labels, "rows by label", figures["labels"])
    counts = figures["confidence"]
    histogram.bar(
        [(index + 0.5) / len(counts) for index in range(len(counts))], counts, width=0.9 / max(1, len(counts))
    )
    histogram.set_title("rows by confidence")
    histogram.set_xlabel("probability of the label")
    _bars(stages, "rows by stage", figures["answered_by"])
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI, format="png")
    pyplot.close(figure)
    return content.getvalue()


def _bars(axes: Any, title: str, counts: list[tuple[str, int]]) -> None:
    # A dollar sign would start a formula.
    names = [name.replace("$", r"\$")[:30] for name, _ in counts]
    axes.barh(range(len(counts)), [count for _, count in counts])
    axes.set_yticks(range(len(counts)), names)
    axes.invert_yaxis()
    axes.set_title(title)
