"""Measure a pretrained LLaMA's prompts and their constant prefix on GLUE; an interrupted run resumes.

python -m benchmarks.llama --glue GLUE
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama.prefix import measure_prefix
from benchmarks.llama.prompts import MAX_LENGTH, TASKS, measure_prompt
from benchmarks.rows import kept_rows
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.config import DataConfig
from revmux.data.prompt import load_prompt
from revmux.data.task import load_task
from revmux.pretrained.config import SMOLLM2_NAME, BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/llama.json"), Path("runs/llama")
PREFIX_PROMPT = "sst2-chat"


def main() -> None:
    """Measure what is missing, then write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True, help="folder with SST-2, MRPC and RTE")
    parser.add_argument("--pairs", type=int, default=5, help="paired timings of the prefix")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights for the accuracy of prompts")
    settings = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task, short in TASKS.items():
        for prompt in (short, f"{short}-chat"):
            measure = partial(measure_prompt, task, prompt, settings.glue, settings.dtype)
            rows.append(kept_rows(KEPT, prompt, (load_prompt(prompt), settings.dtype), measure))
    rows += kept_rows(KEPT, "prefix", (settings.pairs, torch.get_num_threads()), partial(_prefix, settings))
    data = {"source": "GLUE", "tasks": list(TASKS)}
    meta = describe_run("python -m benchmarks.llama --glue GLUE", data, {"name": SMOLLM2_NAME})
    write_json(RESULT, {"meta": meta, "rows": rows})


def _prefix(settings: argparse.Namespace) -> list[dict[str, Any]]:
    pretrained = load_pretrained(BackboneConfig(SMOLLM2_NAME, max_length=MAX_LENGTH, prompt=PREFIX_PROMPT))
    backbone = pretrained.backbone.freeze()
    assert isinstance(backbone, DecoderBackbone)
    split = pretrained.tokenize(load_task(DataConfig(str(settings.glue / "SST-2"), limit=1)).test, MAX_LENGTH)
    return [row | {"prompt": PREFIX_PROMPT} for row in measure_prefix(backbone, split, settings.pairs)]


if __name__ == "__main__":
    main()
