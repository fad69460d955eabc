"""The ladder: cheap stages answer the inputs that they are sure about, and the plain model answers the rest.

Each stage is an adapter with a threshold. The first stage answers all inputs. An input whose answer has a confidence
(plain or learned) below the stage's threshold goes on to the next stage, and from the last stage to the plain model. Each input keeps its
own plain state, which only moves upwards, so no layer of the plain model runs twice for an input::

    layers 1..l₁ ─ stage 1 ─ unsure ─ layers l₁+1..l₂ ─ stage 2 ─ unsure ─ … ─ layers l_K+1..L ─ the model's own head

A ladder with one stage is the plain fallback: the unsure inputs resume alone from their prefilled states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.deferral import Deferral
from revmux.errors import UserError
from revmux.fallback import check_threshold, confidence, resume, why_states_differ
from revmux.grouping import consecutive_groups, gather_rows
from revmux.model import MultiplexedClassifier, OnStep


@dataclass(frozen=True)
class Stage:
    """One stage of a ladder.

    Attributes:
        model: the backbone with the adapter of this stage.
        threshold: confidence below which an input goes on to the next stage, or to the plain model after the last
            stage. 0 means that all answers are final.
        deferral: the learned confidence of this stage; None uses the probability of the most likely class.
    """

    model: MultiplexedClassifier
    threshold: float = 0.0
    deferral: Deferral | None = None

    def __str__(self) -> str:
        return f"{self.model.method.name}, N = {self.model.num_inputs}"

    def unsure(self, passed: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Which inputs go on from this stage. An answer that is not finite never does.

        Args:
            passed: the scores (R, C) of every stage so far; those of this stage are the last.
            mask: (R, S) bool, True for the tokens of the inputs.

        Returns:
            (R,) bool.
        """
        if self.deferral is None:
            return confidence(passed[-1]) < self.threshold
        return self.deferral.confidence(passed, mask.sum(dim=1)) < self.threshold


@dataclass(frozen=True)
class LadderAnswers:
    """The answers of a ladder to R inputs. Scores are on the backbone's device, everything else is on the CPU.

    Attributes:
        scores: (R, C) float32 label scores.
        last: (R,) long, the last stage that the input was in, from 1.
        group: (R,) long, the number of the input's group in that stage. Numbers are unique over all stages.
        fell_back: (R,) bool, whether the scores are the plain model's.
    """

    scores: Tensor
    last: Tensor
    group: Tensor
    fell_back: Tensor

    @property
    def stage(self) -> Tensor:
        """(R,) long, the stage that answered; 0 is the plain model."""
        return self.last.masked_fill(self.fell_back, 0)


class Ladder(nn.Module):
    """Classifies inputs with the stages of a ladder. The models are put into eval mode.

    Args:
        stages: the first one answers all inputs.

    Raises:
        UserError: see :func:`check_ladder`.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        check_ladder(stages)
        self.stages = tuple(stages)
        self.models = nn.ModuleList([stage.model for stage in stages])
        self.eval()

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone of all stages."""
        return self.stages[0].model.backbone

    @property
    def num_inputs(self) -> int:
        """N of the first stage."""
        return self.stages[0].model.num_inputs

    def classify(
        self, tokens: TokenBatch, groups: Tensor | None = None, order: Tensor | None = None, resumes: bool = True
    ) -> LadderAnswers:
        """Answer a batch of inputs. Inputs of similar length should be neighbours.

        Args:
            tokens: each (B, S).
            groups: (G, N) long, rows of ``tokens`` in each group of the first stage. By default, consecutive inputs
                form a group.
            order: see :func:`climb`.
            resumes: see :func:`climb`.

        Raises:
            UserError: the inputs are longer than the backbone's maximum length.
        """
        first, rows = self.stages[0].model, tokens["input_ids"].shape[0]
        if groups is None:
            groups = consecutive_groups(rows, self.num_inputs).to(tokens["input_ids"].device)
        prepared, slots = first.slot_tokens(tokens, groups)
        if first.method.prepares_tokens:  # the states depend on the slot, and check_ladder allows no threshold
            scores = gather_rows(first.run_groups(first.prefill(prepared), slots).scores, groups, rows)
            return first_answers(scores.float(), groups)
        return self.run(self.backbone.embed(tokens), groups, order, resumes)

    def run(
        self, state: HiddenState, groups: Tensor, order: Tensor | None = None, resumes: bool = True
    ) -> LadderAnswers:
        """Answer inputs from their plain states.

        Args:
            state: B inputs of the plain model, at most as deep as the first stage's prefill.
            groups: (G, N) long, rows of ``state`` in each group of the first stage.
            order: see :func:`climb`.
            resumes: see :func:`climb`.
        """
        first = self.stages[0]
        state = self.backbone.run(state, first.model.prefill_layers)
        scores = gather_rows(first.model.run_groups(state, groups).scores, groups, len(state)).float()  # (B, C)
        answers = first_answers(scores, groups)
        if not first.threshold:
            return answers
        unsure = first.unsure([scores], state.mask)
        return climb(self.backbone, self.stages[1:], state, answers, unsure, order, resumes=resumes)

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Label scores per input: tokens (B, S) to scores (B, C)."""
        return self.classify(tokens).scores


def check_ladder(stages: Sequence[Stage]) -> None:
    """Check that inputs can go from each stage to the next one and to the plain model.

    Raises:
        UserError: there is no stage, a threshold is outside 0..1, a method does not support it, a stage has fewer
            prefill layers than the stage before it, or a later stage cannot be reached.
    """
    if not stages:
        raise UserError("a ladder needs 1 or more stages, not 0; add a stage")
    for stage in stages:
        check_threshold(stage.threshold, stage.model.method)
    for number, (stage, after) in enumerate(pairwise(stages), 1):
        if stage.threshold == 0:
            raise UserError(
                f"stage {number} ({stage}) has no threshold (0), so no input reaches stage {number + 1} ({after}); "
                f"choose a threshold above 0, or remove stage {number + 1}"
            )
        if reason := why_states_differ(after.model.method):
            raise UserError(
                f"stage {number + 1} ({after}) cannot continue from the plain model's states: the method {reason}; use "
                "it as the only stage, without a threshold"
            )
        if after.model.prefill_layers < stage.model.prefill_layers:
            raise UserError(
                f"stage {number + 1} ({after}) has {after.model.prefill_layers} prefill layers and stage {number} "
                f"({stage}) has {stage.model.prefill_layers}; the number must not decrease, so exchange these stages "
                "or remove one"
            )
        if after.model.backbone is not stage.model.backbone:
            raise UserError(
                f"stages {number} and {number + 1} have different backbones; load both adapters onto one backbone"
            )


def first_answers(scores: Tensor, groups: Tensor) -> LadderAnswers:
    """The answers of a first stage.

    Args:
        scores: (R, C).
        groups: (G, N) long, the rows in each group; every row is in one group.
    """
    group = torch.zeros(len(scores), dtype=torch.long)
    group[groups.cpu()] = torch.arange(len(groups)).unsqueeze(1).expand(groups.shape)
    return LadderAnswers(scores, torch.ones_like(group), group, torch.zeros_like(group, dtype=torch.bool))


def climb(
    backbone: Backbone,
    stages: Sequence[Stage],
    state: HiddenState,
    answers: LadderAnswers,
    unsure: Tensor,
    order: Tensor | None = None,
    widest: Tensor | None = None,
    resumes: bool = True,
    on_step: OnStep | None = None,
) -> LadderAnswers:
    """Pass the unsure inputs of a first stage through the later stages and the plain model.

    Each stage puts its inputs into full groups. If fewer than N are left over, they repeat to fill a group or go to the
    plain model, whichever runs fewer layers. An answer that is not finite never goes on.

    Args:
        backbone: the frozen backbone of all stages.
        stages: the later stages, stage 2 first. Without any, all unsure inputs resume on the plain model.
        state: R inputs of the plain model, at the depth of the first stage's prefill.
        answers: the first stage's answers to these inputs.
        unsure: (R,) bool, whether the input goes on.
        order: (R,) sort key; inputs with similar keys share a group. None uses their lengths.
        widest: (R,) long on the CPU, the widest group that each input allows. An input that does not allow a stage
            goes to the plain model.
        resumes: whether the plain model runs. If not, the scores of inputs that fall back are those of their last
            stage; this is for callers that have the plain model's answers.
        on_step: called with ``prefill``, ``multiplex``, ``upper``, ``head`` and ``resume`` after each of these parts.
    """
    rows = unsure.cpu().nonzero().squeeze(1)  # (U,) inputs without a final answer
    if not len(rows):
        return answers
    mark, device = on_step or _ignore, state.hidden.device
    keys = (state.mask.sum(dim=1) if order is None else order).cpu()  # (R,)
    scores, last, group = answers.scores.clone(), answers.last.clone(), answers.group.clone()
    passed = [answers.scores]  # (R, C) for each stage so far
    below = rows  # (U,) the rows of ``state`` with the states of these inputs
    plain = torch.zeros(len(rows), dtype=torch.bool)  # (U,) whether the input only waits for the plain model
    for number, stage in enumerate(stages, 2):
        model, width = stage.model, stage.model.num_inputs
        if widest is not None:
            plain |= widest[rows] < width
        joining = _joining(model, (~plain).nonzero().squeeze(1), keys[rows])  # (J,) indices into ``rows``
        if not len(joining):
            break
        # The inputs that only wait for the plain model need these layers too.
        state = backbone.run(state.take(below.to(device)), model.prefill_layers)  # U rows
        mark("prefill")
        groups = consecutive_groups(len(joining), width)  # (G, N) indices into ``joining``
        output = model.run_groups(state, joining[groups].to(device), mark)
        found = gather_rows(output.scores, groups.to(device), len(joining)).float()  # (J, C)
        members = rows[joining]
        at = members.to(device)
        scores[at] = found
        last[members] = number
        group[members] = int(group.max()) + 1 + torch.arange(len(joining)) // width
        passed.append(scores.clone())
        goes_on = stage.unsure([one[at] for one in passed], state.mask[joining.to(device)]).cpu()  # (J,)
        mark("head")
        plain = torch.ones_like(plain).index_fill(0, joining, False)
        below = torch.cat([plain.nonzero().squeeze(1), joining[goes_on]])
        rows, plain = rows[below], plain[below]
        if not len(rows):
            break
    if len(rows) and resumes:
        scores[rows.to(device)] = resume(backbone, state.take(below.to(device)))
        mark("resume")
    return LadderAnswers(scores, last, group, answers.fell_back.index_fill(0, rows, True))


def _joining(model: MultiplexedClassifier, candidates: Tensor, keys: Tensor) -> Tensor:
    """The candidates that share groups, neighbours in a group, ordered by their keys.

    Args:
        model: the model of the stage.
        candidates: (K,) long, indices into ``keys``.
        keys: (U,) sort keys.

    Returns:
        (J,) candidates, all of them or without the incomplete group.
    """
    ordered = candidates[keys[candidates].argsort(descending=True, stable=True)]
    left = len(ordered) % model.num_inputs
    shared = model.method.exit_layer() - model.prefill_layers  # layers of a group
    alone = model.backbone.num_layers - model.prefill_layers  # layers of one input on the plain model
    return ordered if shared < left * alone else ordered[: len(ordered) - left]


def _ignore(stage: str) -> None:
    """The default callback: do nothing."""
