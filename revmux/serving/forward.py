"""Run one forward pass of a batch of groups, and time its stages.

Stages: ``pad`` (tokens to the device), ``plain`` (the whole plain model), ``prefill``, ``multiplex``, ``upper``,
``head`` (demultiplexer and classifier), ``resume`` (inputs that fall back) and ``reply`` (scores to the CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.fallback import confidence, resume
from revmux.grouping import gather_rows
from revmux.model import MultiplexedClassifier
from revmux.serving.scheduling import PLAIN, Group


@dataclass(frozen=True)
class Outcome:
    """The results of a forward pass over R inputs.

    Attributes:
        scores: (R, C) float32 on the CPU, in the order of the groups' members.
        finite: (R) whether all scores of the input are finite.
        fell_back: (R) whether the input fell back to the plain model.
        padded_tokens: R times the length of the longest input.
        stages: seconds per stage.
    """

    scores: Tensor
    finite: list[bool]
    fell_back: list[bool]
    padded_tokens: int
    stages: dict[str, float]


class StageClock:
    """Measures the time between marks. On a GPU it records CUDA events, so that marks do not synchronize.

    Args:
        device: the device that runs the stages.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """Mark the end of a stage."""
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the total seconds of each stage. On a GPU, wait for the end of the last stage first."""
        if self._stream is not None:
            self._stream.synchronize()
        total: dict[str, float] = {}
        for (_, start), (stage, end) in zip(self._marks, self._marks[1:]):
            if isinstance(start, float) and isinstance(end, float):
                spent = end - start
            else:
                spent = start.elapsed_time(end) / 1000  # type: ignore[union-attr,arg-type]
            total[stage] = total.get(stage, 0.0) + spent
        return total


def run_pass(
    backbone: Backbone,
    models: dict[int, MultiplexedClassifier],
    thresholds: dict[int, float],
    padder: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    inputs: Sequence[dict[str, list[int]]],
) -> Outcome:
    """Compute the answers of groups that share one prefill.

    Args:
        backbone: the frozen task model.
        models: backbone with adapter by N, an exit head at 1. The plain model needs none.
        thresholds: confidence by N below which an answer falls back. Answers of an N without an entry never do.
        padder: the backbone's tokenizer.
        groups: groups with the same stem, see :class:`revmux.serving.scheduling.Route`. Groups of the plain model have
            one member each.
        inputs: R token lists, group by group in the order of the members.
    """
    clock = StageClock(backbone.device)
    tokens = pad(inputs, padder, backbone.device)  # (R, S) each
    clock.mark("pad")
    fell_back = torch.zeros(len(inputs), dtype=torch.bool, device=backbone.device)
    if groups[0].route == PLAIN:
        scores = backbone(tokens).float()  # (R, C)
        clock.mark("plain")
    else:
        scores = _multiplexed(backbone, models, thresholds, tokens, groups, fell_back, clock)
    scores, fell = scores.cpu(), fell_back.cpu()
    clock.mark("reply")
    finite = scores.isfinite().all(dim=1)  # (R,)
    return Outcome(scores, finite.tolist(), fell.tolist(), tokens["input_ids"].numel(), clock.seconds())


def _multiplexed(
    backbone: Backbone,
    models: dict[int, MultiplexedClassifier],
    thresholds: dict[int, float],
    tokens: TokenBatch,
    groups: Sequence[Group],
    fell_back: Tensor,
    clock: StageClock,
) -> Tensor:
    """Return the scores (R, C) of groups with adapters, and set ``fell_back`` (R,) for the inputs that fall back."""
    rows = len(fell_back)
    scores = torch.zeros(rows, backbone.num_labels, dtype=torch.float32, device=backbone.device)
    shared: HiddenState | None = None
    for width, slots in slots_by_width(groups, backbone.device).items():
        model = models[width]
        own_tokens, own_slots = model.slot_tokens(tokens, slots)
        if model.method.prepares_tokens:
            prefilled = model.prefill(own_tokens)
        else:
            prefilled = shared = model.prefill(tokens) if shared is None else shared
        clock.mark("prefill")
        output = model.run_groups(prefilled, own_slots, clock.mark)
        # Rows of other widths are zero. A row that fills several slots gets the mean of their scores.
        found = gather_rows(output.scores, slots, rows).float()  # (R, C)
        scores += found
        if width in thresholds:
            members = torch.zeros_like(fell_back).index_fill(0, slots.flatten(), True)
            fell_back |= members & (confidence(found) < thresholds[width])
        clock.mark("head")
    if thresholds and shared is not None and bool(fell_back.any()):
        unsure = fell_back.nonzero().squeeze(1)
        scores[unsure] = resume(backbone, shared.take(unsure))
        clock.mark("resume")
    return scores


def slots_by_width(groups: Sequence[Group], device: torch.device | str = "cpu") -> dict[int, Tensor]:
    """Return by N the rows in the slots of its groups, (G, N) long. Rows are numbered in the order of the groups."""
    found: dict[int, list[Tensor]] = {}
    first = 0
    for group in groups:
        found.setdefault(group.width, []).append(slot_rows(first, group))
        first += len(group.members)
    return {width: torch.stack(slots).to(device) for width, slots in found.items()}


def slot_rows(first: int, group: Group) -> Tensor:
    """Return the rows (N,) in the slots of a group whose members start at row ``first``. Members repeat to fill it."""
    return first + torch.arange(group.width) % len(group.members)


def pad(
    inputs: Sequence[dict[str, list[int]]], padder: PreTrainedTokenizerBase, device: torch.device | str
) -> TokenBatch:
    """Pad R token lists to tensors (R, S) on the device, with S the length of the longest list."""
    columns = {name: [tokens[name] for tokens in inputs] for name in inputs[0]}
    padded = padder.pad(columns, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in padded.items()}
