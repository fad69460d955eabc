"""Run one forward pass of a batch of groups, and time its steps.

Steps: ``pad`` (tokens to the device), ``plain`` (the whole plain model, or what remains of it after a prefill that
several tasks share), ``prefill``, ``multiplex``, ``upper``, ``head`` (demultiplexer and classifier), ``resume`` (inputs
that fall back) and ``reply`` (scores to the CPU). The later stages of a ladder add to the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.fallback import resume
from revmux.grouping import gather_rows
from revmux.ladder import LadderAnswers, Stage, climb
from revmux.serving.limits import WIDEST
from revmux.serving.scheduling import PLAIN, Group


@dataclass(frozen=True)
class Outcome:
    """The results of a forward pass over R inputs. Lists are in the order of the groups' members.

    Attributes:
        scores: (R, C) float32 on the CPU.
        valid: (R) whether the scores of the input, and of all inputs that shared its last group, are finite.
        widths: (R) N of the last group that the input was in; 1 for the plain model.
        methods: (R) method of that group.
        last: (R) the last stage of the ladder that the input was in; 0 if it was in none.
        answered_by: (R) the stage that answered; 0 is the plain model.
        groups: (R) number of the last group that the input was in, unique in the pass.
        fell_back: (R) whether the input went on from an adapter to the plain model.
        padded_tokens: R times the length of the longest input.
        steps: seconds per step.
    """

    scores: Tensor
    valid: list[bool]
    widths: list[int]
    methods: list[str]
    last: list[int]
    answered_by: list[int]
    groups: list[int]
    fell_back: list[bool]
    padded_tokens: int
    steps: dict[str, float]


class StepClock:
    """Measures the time between marks. On a GPU it records CUDA events, so that marks do not synchronize.

    Args:
        device: the device that runs the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("")

    def mark(self, step: str) -> None:
        """Mark the end of a step."""
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((step, event))
        else:
            self._marks.append((step, perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the total seconds of each step. On a GPU, wait for the end of the last step first."""
        if self._stream is not None:
            self._stream.synchronize()
        total: dict[str, float] = {}
        for (_, start), (step, end) in zip(self._marks, self._marks[1:]):
            if isinstance(start, float) and isinstance(end, float):
                spent = end - start
            else:
                spent = start.elapsed_time(end) / 1000  # type: ignore[union-attr,arg-type]
            total[step] = total.get(step, 0.0) + spent
        return total


def run_pass(
    backbone: Backbone,
    first: Mapping[int, Stage],
    later: Sequence[Stage],
    padded: Callable[[], TokenBatch],
    groups: Sequence[Group],
    caps: Sequence[int | None],
    prefilled: Callable[[], HiddenState] | None = None,
) -> Outcome:
    """Compute the answers of groups that share one prefill, and of all stages that their inputs reach.

    Args:
        backbone: the frozen task model.
        first: stage 1 by N, an exit head at 1. The plain model needs none.
        later: the later stages, stage 2 first.
        padded: returns the tokens of R inputs, group by group in the order of the members, each tensor (R, S) on the CPU.
        groups: groups with the same stem, see :class:`revmux.serving.scheduling.Route`. Groups of the plain model have
            one member each.
        caps: (R) the widest group that each input allows; None allows any.
        prefilled: returns the plain states of the R inputs, for groups of the plain model at any depth and for others at
            that of their prefill. None computes them.
    """
    clock = StepClock(backbone.device)
    tokens = {name: tensor.to(backbone.device) for name, tensor in padded().items()}  # (R, S) each
    clock.mark("pad")
    if groups[0].route == PLAIN:
        nothing = torch.zeros(len(caps), dtype=torch.long)
        if prefilled is None:
            plain = backbone(tokens).float()  # (R, C)
        else:
            state = prefilled()
            clock.mark("prefill")
            plain = resume(backbone, state)
        answers = LadderAnswers(plain, nothing, torch.arange(len(caps)), nothing.bool())
        clock.mark("plain")
    else:
        answers = _multiplexed(backbone, first, later, tokens, groups, caps, clock, prefilled)
    scores = answers.scores.cpu()  # (R, C)
    clock.mark("reply")
    finite = scores.isfinite().all(dim=1)  # (R,)
    # A value that is not finite in one member of a group may have changed the others, even if their scores are finite.
    broken = answers.group[~finite & ~answers.fell_back]
    valid = finite & (answers.fell_back | ~torch.isin(answers.group, broken))
    routes = [group.route for group in groups for _ in group.members]  # (R)
    last: list[int] = answers.last.tolist()
    adapters = [later[stage - 2].model if stage > 1 else None for stage in last]
    return Outcome(
        scores=scores,
        valid=valid.tolist(),
        widths=[route.width if model is None else model.num_inputs for route, model in zip(routes, adapters)],
        methods=[route.method if model is None else model.method.name for route, model in zip(routes, adapters)],
        last=last,
        answered_by=answers.stage.tolist(),
        groups=answers.group.tolist(),
        fell_back=answers.fell_back.tolist(),
        padded_tokens=tokens["input_ids"].numel(),
        steps=clock.seconds(),
    )


def _multiplexed(
    backbone: Backbone,
    first: Mapping[int, Stage],
    later: Sequence[Stage],
    tokens: TokenBatch,
    groups: Sequence[Group],
    caps: Sequence[int | None],
    clock: StepClock,
    prefilled_before: Callable[[], HiddenState] | None,
) -> LadderAnswers:
    """Return the answers to R inputs of groups with adapters."""
    rows = len(caps)
    scores = torch.zeros(rows, backbone.num_labels, dtype=torch.float32, device=backbone.device)
    unsure = torch.zeros(rows, dtype=torch.bool, device=backbone.device)
    shared: HiddenState | None = None
    goes_on = False
    for width, slots in slots_by_width(groups, backbone.device).items():
        stage = first[width]
        model = stage.model
        own_tokens, own_slots = model.slot_tokens(tokens, slots)
        if model.method.prepares_tokens:
            prefilled = model.prefill(own_tokens)
        else:
            if shared is None:
                shared = model.prefill(tokens) if prefilled_before is None else prefilled_before()
            prefilled = shared
        clock.mark("prefill")
        output = model.run_groups(prefilled, own_slots, clock.mark)
        # Rows of other widths are zero. A row that fills several slots gets the mean of their scores.
        found = gather_rows(output.scores, slots, rows).float()  # (R, C)
        scores += found
        if stage.threshold:
            members = torch.zeros_like(unsure).index_fill(0, slots.flatten(), True)
            unsure |= members & stage.unsure([found], prefilled.mask)
            goes_on = True
        clock.mark("head")
    numbers = torch.tensor([number for number, group in enumerate(groups) for _ in group.members])  # (R,)
    answers = LadderAnswers(scores, torch.ones_like(numbers), numbers, torch.zeros_like(numbers, dtype=torch.bool))
    if shared is None or not goes_on:
        return answers
    widest = torch.tensor([WIDEST if cap is None else cap for cap in caps])
    return climb(backbone, later, shared, answers, unsure, widest=widest, on_step=clock.mark)


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
