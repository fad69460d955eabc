"""Prediction of the size of a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from revmux.backbone import Backbone
from revmux.data.tokens import SplitTokens

GIGABYTE = 10**9


@dataclass(frozen=True)
class StoreSize:
    """Bytes on disk.

    Attributes:
        teacher: readout vectors and label scores of all inputs, in float32.
        layer: states of all real tokens at one layer.
    """

    teacher: int
    layer: int


def predict_size(split: SplitTokens, backbone: Backbone, dtype: torch.dtype, prompt_length: int = 0) -> StoreSize:
    """The size of a split's features.

    Args:
        split: the tokens.
        backbone: the backbone, which determines the widths.
        dtype: type of the states on disk.
        prompt_length: states per input besides those of its tokens: a soft prompt of an encoder-decoder adds some, the constant
            prefix of a decoder is not stored.
    """
    states = int(split.lengths.sum()) + prompt_length * len(split)
    return StoreSize(
        teacher=len(split) * (backbone.readout_size + backbone.num_labels) * 4,
        layer=states * backbone.hidden_size * dtype.itemsize,
    )
