"""Calibration of label words: a bias per class that corrects a language model's preference for one of the words.

The biases b and a scale s minimize the cross-entropy of ``s · (scores + b)`` on labelled inputs. This is a convex problem of
C + 1 numbers (s and s · b), so a few hundred inputs suffice. The scale changes no answer and is not kept, but without it
the biases of a model whose scores are too flat or too steep are those of its probabilities, not of its answers. Calibration
on the data's labels replaces the estimate from content-free inputs of Zhao et al. (2021), https://arxiv.org/abs/2102.09690.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from revmux.backbone.base import evaluating
from revmux.data.config import DataConfig
from revmux.data.prompt import Prompt, write_prompt
from revmux.data.task import load_task
from revmux.errors import UserError
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

BATCH = 32
LEAST_SCALE = 0.05
"""If the scores say less than this about the labels, the scale stays 1: the biases would grow without bound."""


def fit_bias(scores: Tensor, labels: Tensor, steps: int = 100) -> list[float]:
    """The biases with which the classes are separated best, with mean 0.

    Args:
        scores: (R, C) label scores.
        labels: (R,) long; every class should occur, or its bias only grows smaller with the steps.
        steps: maximum number of steps of L-BFGS.

    Returns:
        C numbers.
    """
    scores, labels = scores.detach().double().cpu(), labels.cpu()
    scores = scores - scores.mean(dim=1, keepdim=True)  # so that the scale does not act on what all classes share
    scale, shift = _fit(scores, labels, steps, scaled=True)
    if scale < LEAST_SCALE:
        scale, shift = _fit(scores, labels, steps, scaled=False)
    bias = shift / scale
    return [round(float(value), 4) for value in bias - bias.mean()]


def _fit(scores: Tensor, labels: Tensor, steps: int, scaled: bool) -> tuple[float, Tensor]:
    """The scale and shift (C,) with the lowest cross-entropy of ``scale · scores + shift``; the scale is 1 if not fitted."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=scaled)
    shift = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    fitted = [scale, shift] if scaled else [shift]
    optimizer = torch.optim.LBFGS(fitted, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scale * scores + shift, labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float(scale.detach()), shift.detach()


def label_scores(pretrained: Pretrained, split: Dataset, max_length: int) -> Tensor:
    """The plain model's scores of a split, (R, C) in float32 on the CPU, in the order of the split."""
    tokens = pretrained.tokenize(split, max_length)
    backbone, order = pretrained.backbone, tokens.lengths.argsort()
    scores = torch.empty(len(tokens), backbone.num_labels)
    with evaluating(backbone), torch.inference_mode():
        for rows in order.split(BATCH):
            scores[rows] = backbone(tokens.batch(rows, backbone.device)).float().cpu()
    return scores


def calibrated(prompt: Prompt, label_names: list[str], bias: list[float]) -> Prompt:
    """A prompt with these biases in addition to its own."""
    total = {name: round(prompt.bias.get(name, 0.0) + value, 4) for name, value in zip(label_names, bias, strict=True)}
    return replace(prompt, bias=total)


def calibrate_file(config: BackboneConfig, data: DataConfig, output: str, inputs: int) -> str:
    """Calibrate a prompt on the selection set of a task, and write it as a YAML file.

    Args:
        config: the model with its prompt.
        data: the task.
        output: the file.
        inputs: maximum number of inputs.

    Returns:
        A line with the accuracy on these inputs before and after.

    Raises:
        UserError: the model or the data cannot be loaded, ``output`` is not a YAML file, or ``inputs`` is not positive.
    """
    if Path(output).suffix not in (".yaml", ".yml"):
        raise UserError(f"output is {output!r}; name a .yaml file")
    if inputs < 1:
        raise UserError(f"inputs is {inputs}; choose 1 or more, such as 500")
    task = load_task(data)
    selection = task.selection.select(range(min(inputs, len(task.selection))))
    pretrained = load_pretrained(config, task.label_names)
    pretrained.backbone.freeze()
    assert pretrained.prompt is not None
    scores, labels = label_scores(pretrained, selection, config.max_length), torch.tensor(selection["label"])
    bias = fit_bias(scores, labels)
    prompt = calibrated(pretrained.prompt, pretrained.backbone.label_names, bias)
    write_prompt(prompt, Path(output))
    before, after = (float((each.argmax(1) == labels).float().mean()) for each in (scores, scores + torch.tensor(bias)))
    return f"{output}: accuracy on {len(labels)} inputs of the selection set {before:.1%} before, {after:.1%} after"
