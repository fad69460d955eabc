"""Measure a pretrained LLaMA on GLUE: every system, its prompts and their constant prefix; an interrupted run resumes.

python -m benchmarks.llama --glue GLUE
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama.measure import WHY, measure_task, unmeasured_task
from benchmarks.llama.prefix import measure_prefix, titles
from benchmarks.llama.prompts import MAX_LENGTH, TASKS, measure_prompt, shipped_prompts
from benchmarks.llama.systems import stored_layers
from benchmarks.llama.tasks import KEPT, TEACHERS, taught
from benchmarks.llama.tasks import TASKS as MEASURED
from benchmarks.rows import kept_file, kept_rows
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.config import DataConfig
from revmux.data.prompt import load_prompt
from revmux.data.task import load_task
from revmux.pretrained.config import SMOLLM2_NAME, BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run, git_commit

RESULT = Path("benchmarks/results/llama.json")
PREFIX_PROMPT = "sst2-chat"
PARTS = ("systems", "prompts", "prefix")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the result file after every task and part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama", description=__doc__)
    parser.add_argument("--glue", type=Path, required=True, help="folder with SST-2, MRPC and RTE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--tasks", nargs="+", choices=MEASURED, default=list(MEASURED), help="tasks of the systems")
    parser.add_argument("--systems", nargs="+", help="parts of the titles of the systems to train, or ladder")
    parser.add_argument("--seeds", type=int, default=1, help="most runs per system")
    parser.add_argument("--teacher", choices=TEACHERS, help="the model that adapters stand on, if not the task's own")
    parser.add_argument("--limit", type=int, help="most inputs of every split, in files of their own")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, which share the cores")
    parser.add_argument("--measured-only", action="store_true", help="train nothing; report the runs that are done")
    parser.add_argument("--pairs", type=int, default=5, help="paired timings of the prefix")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights, except for the prefix")
    parser.add_argument("--model", default=SMOLLM2_NAME, help="the language model, with 30 layers")
    settings = parser.parse_args(argv)
    result = RESULT if settings.limit is None else KEPT / f"limit-{settings.limit}.json"
    if "systems" in settings.parts:
        for name in settings.tasks:
            rows, data = _systems(name, settings)
            _write(result, settings, rows, {name: data})
    if "prompts" in settings.parts:
        for task, short in TASKS.items():
            for prompt in shipped_prompts(short):
                asked, row = (load_prompt(prompt), settings.dtype), {"kind": "prompt", "task": task, "prompt": prompt}
                measure = partial(measure_prompt, task, prompt, settings.glue, settings.dtype)
                is_new = not kept_file(KEPT, prompt, asked).is_file()
                if settings.measured_only and is_new:
                    rows = [row | dict.fromkeys(("selection", "dev", "dev_calibrated")) | {"why": WHY}]
                else:
                    rows = [kept_rows(KEPT, prompt, asked, measure)]
                _write(result, settings, rows, {}, "prompts" if is_new else None)
    if "prefix" in settings.parts:
        asked = (settings.pairs, torch.get_num_threads())
        is_new = not kept_file(KEPT, "prefix", asked).is_file()
        if settings.measured_only and is_new:
            rows = [{"kind": "prefix", "title": title, "ratio_median": None, "why": WHY} for title in titles()]
        else:
            rows = kept_rows(KEPT, "prefix", asked, partial(_prefix, settings))
        _write(result, settings, rows, {}, "prefix" if is_new else None)


def _systems(name: str, settings: argparse.Namespace) -> tuple[list[Row], Row]:
    """The rows of one task, and what is known about its data."""
    spec = replace(MEASURED[name], teacher=settings.teacher or MEASURED[name].teacher)
    place = {"family": "llama", "backbone": settings.model, "task": name, "teacher": spec.teacher}
    place |= {"prompt": spec.prompt, "dtype": settings.dtype}
    folder = KEPT / (name if settings.limit is None else f"{name}-limit-{settings.limit}") / spec.teacher
    if settings.measured_only and not folder.is_dir():
        return [place | row for row in unmeasured_task()], {}
    threads = max(1, (os.cpu_count() or 1) // settings.processes)
    torch.set_num_threads(threads)
    found = taught(spec, settings.glue, stored_layers(), settings.limit, settings.model, settings.dtype)
    rows = measure_task(
        found, settings.seeds, settings.processes, threads, settings.systems, not settings.measured_only
    )
    own = found.unlabelled.choosing.identity
    data = own | {
        "commit": git_commit(),
        "labelled": len(found.labelled.choosing.train),
        "choosing": own["test"],
        "test": len(found.unlabelled.task.test),
    }
    return [place | row for row in rows], data


def _write(
    result: Path, settings: argparse.Namespace, rows: list[Row], data: Row, measured_part: str | None = None
) -> None:
    """Write the result file with new rows in place of those that it has of the same systems.

    The rows of systems have commits of their own. Of the other parts, ``commits`` has the commit of the last measurement;
    ``measured_part`` is the one that has been measured now.

    A row without figures replaces none that has some: they come from an earlier run, on this machine or another. All
    rows of a task have the same prompt, teacher and data type, so measured rows remove those of other settings.
    """
    kept: Row = json.loads(result.read_text()) if result.is_file() else {"meta": {"data": {}}, "rows": []}
    current = {_table(row): _setting(row) for row in rows if "why" not in row}
    merged = {_key(row): row for row in kept["rows"] if current.get(_table(row), _setting(row)) == _setting(row)}
    for row in rows:
        if "why" not in row or "why" in merged.get(_key(row), row):
            merged[_key(row)] = row
    sizes = kept["meta"]["data"] | {name: size for name, size in data.items() if size}
    meta = describe_run("python -m benchmarks.llama --glue GLUE", sizes, {"name": settings.model})
    known, before = kept["meta"].get("commits", {}), kept["meta"].get("commit")
    earlier = {part: known.get(part, before) for part in PARTS if part != "systems"}
    meta["commits"] = earlier | ({measured_part: meta["commit"]} if measured_part and "why" not in rows[0] else {})
    write_json(result, {"meta": meta, "rows": list(merged.values())})


def _table(row: Row) -> str:
    """The rows that share their settings: those of a task's systems. Every prompt is a table of its own."""
    if row["kind"] == "prefix":
        return "prefix"
    return repr([row["task"], row["prompt"] if row["kind"] == "prompt" else "systems"])


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("teacher", "prompt", "dtype"))


def _key(row: Row) -> str:
    names = ["title", "systems", "most_cost"]
    if row["kind"] in ("siso", "systems"):  # the width of a ladder is a result
        names.append("num_inputs")
    return repr([_table(row), row["kind"], *(row.get(name) for name in names)])


def _prefix(settings: argparse.Namespace) -> list[Row]:
    pretrained = load_pretrained(BackboneConfig(SMOLLM2_NAME, max_length=MAX_LENGTH, prompt=PREFIX_PROMPT))
    backbone = pretrained.backbone.freeze()
    assert isinstance(backbone, DecoderBackbone)
    split = pretrained.tokenize(load_task(DataConfig(str(settings.glue / "SST-2"), limit=1)).test, MAX_LENGTH)
    return [row | {"prompt": PREFIX_PROMPT} for row in measure_prefix(backbone, split, settings.pairs)]


if __name__ == "__main__":
    main()
