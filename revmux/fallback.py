"""Fall-back by confidence: an answer that is not sure enough resumes alone from its prefilled state, not from the start.

An input that shared a pass still has its own states after layer l. Where the group's answer to it is not sure, layers
l+1..L and the model's own head run on those, and it is answered exactly as the plain model would have done.
"""

from __future__ import annotations

from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.errors import UserError
from revmux.methods import Method


def confidence(scores: Tensor) -> Tensor:
    """How sure an answer is: the probability of its likeliest class.

    Args:
        scores: (..., C) before softmax; with one class only, which is scored by a sigmoid, yes and no are the classes.

    Returns:
        (...), from 1/C to 1.
    """
    if scores.shape[-1] == 1:
        yes = scores.float().sigmoid().squeeze(-1)
        return yes.maximum(1 - yes)
    return scores.float().softmax(-1).amax(-1)


def resume(backbone: Backbone, prefilled: HiddenState) -> Tensor:
    """Each input alone through the layers that it has not passed yet, and the model's own head.

    Args:
        backbone: frozen.
        prefilled: B plain inputs at depth l.

    Returns:
        (B, C) label scores, the plain model's.
    """
    state = backbone.run(prefilled, backbone.num_layers)
    return backbone.classify(backbone.answers(state)[:, 0]).float()


def check_threshold(threshold: float, method: Method, source: str = "") -> None:
    """Refuse a threshold that is none, and one for a method whose prefill is not the plain model's.

    Args:
        threshold: 0 switches the fall-back off, which every method serves.
        method: of the adapter.
        source: where the adapter came from, for the message.

    Raises:
        UserError: naming the threshold or the method.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"the fall-back threshold is {threshold}; choose a confidence in 0..1, 0 for no fall-back")
    if threshold > 0 and (method.prepares_tokens or method.tunes_backbone):
        why = "changes the tokens of its inputs" if method.prepares_tokens else "tunes the backbone"
        raise UserError(
            f"adapter {source or method.name} ({method.name}) cannot fall back: the method {why}, so its prefilled "
            "states are not the plain model's; set the threshold to 0"
        )
