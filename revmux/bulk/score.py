"""Run the inputs of a unit through the model: in groups by length, in passes bounded by tokens."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from revmux.bulk.texts import Tokens
from revmux.methods import Siso
from revmux.serving.forward import run_pass
from revmux.serving.scheduling import PLAIN, ForwardPass, Group, form_groups, form_passes
from revmux.serving.task import Task
from revmux.utils.out_of_memory import is_out_of_memory, release_memory

_log = logging.getLogger(__name__)
STRETCH = 1.25
"""Padding makes no group of a unit longer than this many times its own length. A unit has enough inputs for many passes."""
NOT_FINITE = "the scores of this input are not finite"


@dataclass
class Answers:
    """The answers to M inputs, in their order.

    Attributes:
        scores: (M, C) float32, before softmax.
        widths: N of the last group that each input was in.
        methods: method of that group.
        stages: the stage of the ladder that answered each input; 0 is the plain model.
        fell_back: whether each input fell back to the plain model.
        finite: whether all scores of an input, and of those that shared its last group, are finite.
        cost: counted cost of all passes; 1 is one input in the plain model.
        device_seconds: time of all passes without padding.
    """

    scores: Tensor
    widths: list[int]
    methods: list[str]
    stages: list[int]
    fell_back: list[bool]
    finite: list[bool]
    cost: float = 0.0
    device_seconds: float = 0.0

    def is_plain(self, index: int) -> bool:
        """Whether an answer is the plain model's."""
        return self.stages[index] == 0


def classify_tokens(task: Task, tokens: Tokens, max_tokens: int, plain: bool = False) -> Answers:
    """Classify inputs in full groups.

    The longest inputs share the first groups. The groups depend on nothing but the lengths of the inputs.

    Args:
        task: the model with its adapters, in a process that uses no other thread for it.
        tokens: M inputs.
        max_tokens: maximum number of tokens per pass, including padding. A single group may always run.
        plain: whether to use the plain model for all inputs.
    """
    lengths = tokens.lengths
    routes = [PLAIN] if plain else task.lineup.routes
    groups = form_groups(lengths, [None] * len(lengths), routes)
    size = len(lengths)
    scores = torch.zeros(size, len(task.label_names))
    answers = Answers(scores, [1] * size, [Siso.name] * size, [0] * size, [False] * size, [True] * size)
    with torch.inference_mode():
        for forward in form_passes(groups, lengths, max_tokens, STRETCH):
            _run(task, tokens, forward, answers)
        _retry_alone(task, tokens, answers)
    return answers


def _run(task: Task, tokens: Tokens, forward: ForwardPass, answers: Answers) -> None:
    """Run one pass and store its answers. After an out-of-memory error, run its halves."""
    members = [index for group in forward.groups for index in group.members]
    local: list[Group] = []
    first = 0
    for group in forward.groups:
        local.append(Group(group.route, tuple(range(first, first + len(group.members)))))
        first += len(group.members)
    lineup = task.lineup
    try:
        outcome = run_pass(
            task.backbone,
            lineup.stages,
            lineup.later_stages,
            partial(tokens.padded, members, task.padder),
            local,
            [None] * len(members),
        )
    except Exception as error:
        if len(forward.groups) == 1 or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # releases the tensors of the failed pass
        _log.warning(
            "a pass of %d inputs ran out of memory and is repeated in two halves; lower max_batch_tokens", len(members)
        )
    else:
        answers.scores[members] = outcome.scores
        answers.device_seconds += sum(seconds for step, seconds in outcome.steps.items() if step != "pad")
        answers.cost += lineup.pass_cost(forward.groups, outcome.last, outcome.fell_back)
        for row, index in enumerate(members):
            answers.widths[index], answers.methods[index] = outcome.widths[row], outcome.methods[row]
            answers.stages[index], answers.fell_back[index] = outcome.answered_by[row], outcome.fell_back[row]
            answers.finite[index] = outcome.valid[row]
        return
    release_memory(task.backbone.device)
    half = len(forward.groups) // 2
    for part in (forward.groups[:half], forward.groups[half:]):
        _run(task, tokens, ForwardPass(forward.stem, part), answers)


def _retry_alone(task: Task, tokens: Tokens, answers: Answers) -> None:
    """Run each input whose group has scores that are not finite again, alone in the plain model."""
    for index, finite in enumerate(answers.finite):
        if not finite and answers.methods[index] != Siso.name:
            _run(task, tokens, ForwardPass(PLAIN.stem, (Group(PLAIN, (index,)),)), answers)
