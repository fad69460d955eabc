"""Zero-shot accuracy of the shipped prompts, without and with a bias per label word fitted on the selection set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from revmux.data.config import DataConfig
from revmux.data.prompt import prompt_names
from revmux.data.task import load_task
from revmux.pretrained.calibration import fit_bias, label_scores
from revmux.pretrained.config import SMOLLM2_NAME, BackboneConfig
from revmux.pretrained.loading import load_pretrained

TASKS = {"SST-2": "sst2", "MRPC": "mrpc", "RTE": "rte"}
SELECTION = 300
MAX_LENGTH = 384


def shipped_prompts(task: str) -> list[str]:
    """The shipped prompts of a task for language models.

    Args:
        task: a value of :data:`TASKS`.
    """
    return [name for name in (task, f"{task}-chat", f"{task}-few-shot") if name in prompt_names()]


def measure_prompt(task_name: str, prompt: str, glue: Path, dtype: Any = "float32") -> dict[str, Any]:
    """Return the row of one prompt: accuracy on the selection set and on the development set, plain and calibrated.

    Args:
        task_name: a key of :data:`TASKS`, and the name of its folder.
        prompt: name of a shipped prompt.
        glue: folder of GLUE.
        dtype: type of the weights.
    """
    task = load_task(DataConfig(str(glue / task_name)))
    pretrained = load_pretrained(
        BackboneConfig(SMOLLM2_NAME, max_length=MAX_LENGTH, prompt=prompt, dtype=dtype), task.label_names
    )
    pretrained.backbone.freeze()
    selection = task.selection.select(range(min(SELECTION, len(task.selection))))
    row: dict[str, Any] = {"kind": "prompt", "task": task_name, "prompt": prompt, "dtype": dtype}
    bias = torch.zeros(pretrained.backbone.num_labels)
    for name, split in (("selection", selection), ("dev", task.test)):
        scores, labels = label_scores(pretrained, split, MAX_LENGTH), torch.tensor(split["label"])
        if name == "selection":
            bias = torch.tensor(fit_bias(scores, labels))
        for kind, found in (("", scores), ("_calibrated", scores + bias)):
            row[name + kind] = round(float((found.argmax(dim=1) == labels).float().mean()), 4)
        row[f"{name}_inputs"] = len(labels)
        row[f"{name}_majority"] = round(float(labels.bincount().max()) / len(labels), 4)
    row["bias"] = dict(zip(pretrained.backbone.label_names, bias.tolist(), strict=True))
    row["constant_tokens"] = len(getattr(pretrained.backbone, "constant_tokens", ()))
    return row
