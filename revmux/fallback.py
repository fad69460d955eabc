"""Fallback by confidence: an input with a low-confidence answer resumes alone from its prefilled state.

Each input of a group still has its own states after layer l. If the confidence of its answer is below the threshold,
layers l+1..L and the backbone's own head run on those states. The result is exactly the plain model's answer.
"""

from __future__ import annotations

from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.errors import UserError
from revmux.methods import Method


def confidence(scores: Tensor) -> Tensor:
    """The probability of the most likely class.

    Args:
        scores: (..., C) before softmax. A single class is scored by a sigmoid and counts as two classes, yes and no.

    Returns:
        (...), from 1/C to 1, or from 1/2 for a single class.
    """
    if scores.shape[-1] == 1:
        yes = scores.float().sigmoid().squeeze(-1)
        return yes.maximum(1 - yes)
    return scores.float().softmax(-1).amax(-1)


def resume(backbone: Backbone, prefilled: HiddenState) -> Tensor:
    """Run each input alone through its remaining layers and the backbone's own head.

    Args:
        backbone: frozen.
        prefilled: B inputs at depth l, before multiplexing.

    Returns:
        (B, C) label scores of the plain model.
    """
    state = backbone.run(prefilled, backbone.num_layers)
    return backbone.classify(backbone.answers(state)[:, 0]).float()


def check_threshold(threshold: float, method: Method, source: str = "") -> None:
    """Check that a threshold is valid and that the method supports it.

    Args:
        threshold: the confidence below which an input goes on to the next stage or to the plain model. 0 means that
            all answers are final.
        method: the method of the adapter.
        source: where the adapter was loaded from, for the error message.

    Raises:
        UserError: the threshold is not in 0..1, or it is above 0 and the method's prefilled states differ from the
            plain model's.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"the fallback threshold is {threshold}; choose a confidence in 0..1, 0 for no fallback")
    if threshold > 0 and (reason := why_states_differ(method)):
        raise UserError(
            f"adapter {source or method.name} ({method.name}) cannot fall back: the method {reason}, so its prefilled "
            "states are not those of the plain model; set the threshold to 0"
        )


def why_states_differ(method: Method) -> str:
    """Why the prefilled states of a method are not those of the plain model; empty if they are."""
    if method.prepares_tokens:
        return "changes the tokens of its inputs"
    return "tunes the backbone" if method.tunes_backbone else ""
