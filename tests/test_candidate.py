"""How a plan describes the systems that it compares."""

from __future__ import annotations

import numpy as np

from revmux.plan.candidate import Candidate, PlannedStage


def test_a_ladder_says_when_inputs_go_on_and_which_stages_have_lora() -> None:
    first = PlannedStage("a", "exit-head", 1, 2, 0.9, 0.25, options={"layer": 2})
    second = PlannedStage("b", "exit-head", 1, 2, 0.8, 0.1, options={"layer": 4, "lora_rank": 8})
    assert Candidate((first, second), np.ones(1), 0.5).describe() == (
        "an exit head at layer 2, then an exit head at layer 4 with LoRA of rank 8 if its confidence is below 90.0% "
        "(25% of inputs), then the plain model if its confidence is below 80.0% (10% of inputs)"
    )
