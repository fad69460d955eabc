"""The systems that a plan compares: the plain model, single adapters, and ladders of adapters with thresholds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from revmux.deferral import Deferral
from revmux.methods import Method, Siso, method_class
from revmux.plan.front import FrontRow, cost_of
from revmux.plan.interval import Floats


@dataclass(frozen=True)
class PlannedStage:
    """One adapter of a system, with the threshold below which an input goes on.

    Attributes:
        adapter: name of the adapter.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l, up to which the inputs have plain states and from which they go on.
        threshold: confidence below which an input goes on to the next stage, or to the plain model after the last one;
            None if every answer is final.
        going_on: share of all inputs that this stage and all before it did not answer.
        options: settings of the method.
        infonce_weight: λ; NaN if the adapter was not trained with InfoNCE.
        folder: adapter folder; None for SISO.
        run_id: MLflow run that trained it; None if there is none.
        deferral: the learned confidence of this stage after the stages before it; None uses the plain one.
    """

    adapter: str
    method: str
    num_inputs: int
    prefill_layers: int
    threshold: float | None = None
    going_on: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    infonce_weight: float = math.nan
    folder: str | None = None
    run_id: str | None = None
    deferral: Deferral | None = None

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return method_class(self.method)

    @property
    def depth(self) -> int:
        """The layer that names the stage: the one that an exit head reads, otherwise l."""
        option = self.kind.exit_option
        return self.prefill_layers if option is None else int(self.options.get(option, self.prefill_layers))

    @property
    def name(self) -> str:
        """The adapter and its threshold, such as ``revmux-n2-l3-1f0a@0.9``; ``~`` marks a learned confidence."""
        return self.adapter if self.threshold is None else f"{self.adapter}@{self.threshold_name}"

    @property
    def threshold_name(self) -> str:
        """The threshold, with a digest of the learned confidence if there is one: ``0.9`` or ``0.9~3f81``."""
        if self.deferral is None:
            return f"{self.threshold or 0:g}"
        return f"{self.threshold or 0:g}~{hashlib.sha256(repr(self.deferral).encode()).hexdigest()[:4]}"

    @property
    def unsure(self) -> str:
        """A phrase for when an input goes on, such as ``if its confidence is below 90.0%``."""
        kind = "confidence" if self.deferral is None else "learned confidence"
        return f"if its {kind} is below {self.threshold or 0:.1%} ({self.going_on:.0%} of inputs)"

    def describe(self) -> str:
        """A phrase that names the stage in a sentence."""
        rank = self.options.get("lora_rank")
        return self.kind.describe(self.num_inputs, self.depth) + (f" with LoRA of rank {rank}" if rank else "")


@dataclass(frozen=True)
class Candidate:
    """One system that could be served, with its results on the inputs of the search.

    Attributes:
        stages: the stages, at least one; a single stage without threshold is an adapter alone, or SISO.
        correct: (M,) share of the groupings in which each input was answered correctly, 0..1.
        cost_counted: operations per input relative to SISO, all stages included.
        throughput_ratio: measured inputs per second relative to SISO, all stages included; None if not measured.
        expected_bound: the upper bound of the loss that a test will probably find, in points.
    """

    stages: tuple[PlannedStage, ...]
    correct: Floats = field(repr=False)
    cost_counted: float
    throughput_ratio: float | None = None
    expected_bound: float = 0.0

    @property
    def first(self) -> PlannedStage:
        """The stage that answers all inputs."""
        return self.stages[0]

    @property
    def name(self) -> str:
        """The names of the stages, joined by ``+``; unique among the candidates."""
        return "+".join(stage.name for stage in self.stages)

    @property
    def is_plain(self) -> bool:
        """Whether this is SISO."""
        return self.first.kind.is_plain

    @property
    def is_ladder(self) -> bool:
        """Whether it has several adapters."""
        return len(self.stages) > 1

    @property
    def multiplexes(self) -> bool:
        """Whether any stage combines inputs."""
        return any(stage.kind.multiplexes() for stage in self.stages)

    @property
    def num_inputs(self) -> int:
        """N of the first stage."""
        return self.first.num_inputs

    @property
    def fallback(self) -> float:
        """Share of the answers that are the plain model's because every stage was unsure."""
        return self.stages[-1].going_on

    @property
    def accuracy(self) -> float:
        """Mean accuracy on the inputs of the search."""
        return float(self.correct.mean())

    @property
    def cost(self) -> float:
        """Cost per input relative to SISO: the measured one if there is one, else the counted one."""
        return cost_of(self.cost_counted, self.throughput_ratio)

    def describe(self) -> str:
        """A phrase about the system, such as ``an exit head at layer 2, then …``."""
        if not self.is_ladder and self.first.threshold is None:
            return self.first.describe()
        parts = [self.first.describe()]
        for before, after in zip(self.stages, self.stages[1:]):
            parts.append(f"{after.describe()} {before.unsure}")
        last = self.stages[-1]
        if last.threshold is not None:
            parts.append(f"the plain model {last.unsure}")
        return ", then ".join(parts)

    def row(self, siso_accuracy: float) -> FrontRow:
        """The candidate as a row of tables and plots."""
        first = self.first
        return FrontRow(
            name=self.name,
            method=first.method,
            num_inputs=first.num_inputs,
            prefill_layers=first.depth,
            infonce_weight=first.infonce_weight,
            accuracy=self.accuracy,
            siso_accuracy=siso_accuracy,
            cost_counted=self.cost_counted,
            throughput_ratio=self.throughput_ratio,
            threshold=first.threshold,
            fallback=self.fallback,
            later=tuple(stage.kind.point_name(stage.num_inputs, stage.depth) for stage in self.stages[1:]),
        )


def siso_candidate(correct: Floats) -> Candidate:
    """The plain model as a candidate: it loses nothing and costs 1."""
    return Candidate((PlannedStage(Siso.name, Siso.name, 1, 0),), correct, cost_counted=1.0, throughput_ratio=1.0)
