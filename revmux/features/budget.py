"""Prediction of the size of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from revmux.backbone import Backbone
from revmux.data.tokens import SplitTokens

GIGABYTE = 10**9


class Probe(NamedTuple):
    """What running one input shows about the states of a backbone.

    Attributes:
        added: states per input besides those of its tokens: a soft prompt of an encoder-decoder adds some, the constant
            prefix of a decoder is not stored.
        has_decoder: whether a decoder also reads the text, which the store does not support.
    """

    added: int
    has_decoder: bool


def probe(backbone: Backbone, split: SplitTokens) -> Probe:
    """Run the first input of a split through the embeddings of a frozen backbone."""
    with torch.inference_mode():
        state = backbone.embed(split.batch([0], backbone.device))
    return Probe(int(state.mask.sum()) - int(split.lengths[0]), state.decoder is not None)


@dataclass(frozen=True)
class StoreSize:
    """Bytes on disk.

    Attributes:
        teacher: readout vectors and label scores of all inputs, in float32.
        layer: states of all real tokens at one layer.
    """

    teacher: int
    layer: int


def predict_size(split: SplitTokens, backbone: Backbone, dtype: torch.dtype, added: int = 0) -> StoreSize:
    """The size of a split's features.

    Args:
        split: the tokens.
        backbone: the backbone, which determines the widths.
        dtype: type of the states on disk.
        added: see :class:`Probe`.
    """
    states = int(split.lengths.sum()) + added * len(split)
    return StoreSize(
        teacher=len(split) * (backbone.readout_size + backbone.num_labels) * 4,
        layer=states * backbone.hidden_size * dtype.itemsize,
    )
