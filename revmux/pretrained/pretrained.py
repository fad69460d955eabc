"""A loaded backbone with its tokenizer and identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
)

from revmux.backbone import Backbone, TokenBatch
from revmux.data.prompt import Prompt
from revmux.data.tokens import TokenizedSplit, encode_texts
from revmux.pretrained.shared_base import SharedBase


@dataclass(frozen=True)
class Pretrained:
    """A loaded backbone with its tokenizer and identity.

    Attributes:
        backbone: the cut model.
        tokenizer: its tokenizer.
        identity: ``name``, ``revision`` and ``sha256`` of the weights, as recorded in artifacts.
        has_head: whether the checkpoint contains a trained classification head.
        prompt: the template around each input, with words for every class; None if there is a classification head.
        pairs: whether the model was tuned on pairs of texts; None if this is not recorded.
        base: the base model whose weights the backbone shares; None if all weights are its own.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str | None]
    has_head: bool
    prompt: Prompt | None = None
    pairs: bool | None = None
    base: SharedBase | None = None

    def tokenize(self, split: Dataset, max_length: int) -> TokenizedSplit:
        """Tokenize a split for this backbone, with each input in the prompt.

        Raises:
            UserError: the template does not fit the inputs or ``max_length``.
        """
        return TokenizedSplit(split, self.tokenizer, max_length, self.prompt)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> TokenBatch:
        """Tokenize texts, or pairs of texts, as one padded batch on the backbone's device, each (B, S)."""
        encoded, _ = encode_texts(self.tokenizer, texts, pairs, max_length, self.prompt)
        return {
            name: tensor.to(self.backbone.device)
            for name, tensor in self.tokenizer.pad(encoded, return_tensors="pt").items()
        }
