"""What encoder-decoders and decoders have in common: two kinds of head, a soft prompt, padding on either side."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from revmux.backbone.base import Backbone, padding_mask
from revmux.backbone.soft_prompt import SoftPrompt
from revmux.backbone.state import TokenBatch
from revmux.backbone.verbalizer import Verbalizer, VerbalizerHead
from revmux.errors import UserError


class GenerativeBackbone(Backbone):
    """A model that classifies with its own head, or by label words through its output embedding.

    Args:
        model: ``...ForSequenceClassification``, or a language model if a verbalizer is given.
        verbalizer: the tokens of each class; None uses the model's own classification head.

    Attributes:
        verbalizer: as given.
        soft_prompt: trainable vectors before every input, or None; see :meth:`add_soft_prompt`.

    Raises:
        UserError: the model does not have the required head.
    """

    def __init__(self, model: nn.Module, verbalizer: Verbalizer | None = None) -> None:
        super().__init__(model)
        self.verbalizer = verbalizer
        self.soft_prompt: SoftPrompt | None = None
        self.label_rows: VerbalizerHead | None = None
        name = type(model).__name__
        has_classifier = any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)
        if verbalizer is None:
            if not has_classifier:
                raise UserError(
                    f"{name} has no sequence classification head; load ...ForSequenceClassification, "
                    "or pass a verbalizer to score label words"
                )
            return
        output = self.model.get_output_embeddings()
        if has_classifier or output is None:
            raise UserError(
                f"{name} scores no vocabulary for the verbalizer to read; load a language model "
                "(...ForCausalLM, ...ForConditionalGeneration), or leave the verbalizer out"
            )
        self.label_rows = VerbalizerHead(verbalizer, output.weight.shape[0]).to(output.weight.device)

    @property
    def num_labels(self) -> int:
        return super().num_labels if self.verbalizer is None else len(self.verbalizer.label_names)

    @property
    def label_names(self) -> list[str]:
        return super().label_names if self.verbalizer is None else list(self.verbalizer.label_names)

    @property
    def position_limit(self) -> int:
        """The largest number of positions of the model, including those of a soft prompt."""
        return int(self.config.max_position_embeddings)

    @property
    def max_length(self) -> int:
        return self.position_limit - (0 if self.soft_prompt is None else len(self.soft_prompt))

    @property
    @abstractmethod
    def word_embeddings(self) -> nn.Module:
        """The module that maps token ids to word embeddings."""

    @property
    def output_bias(self) -> Tensor | None:
        """(V,) bias of the vocabulary scores, or None."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def add_soft_prompt(self, length: int) -> SoftPrompt:
        """Put trainable vectors in front of every input, initialised with the embeddings of random words.

        The vectors belong to the backbone: its ``state_dict`` holds them and :meth:`freeze` freezes them.

        Args:
            length: P, number of vectors. The maximum length of inputs shrinks by P tokens.

        Raises:
            UserError: ``length`` leaves no room for an input.
        """
        if not 1 <= length < self.position_limit:
            raise UserError(f"soft prompt length is {length}; choose 1..{self.position_limit - 1}")
        words = torch.randint(int(self.config.vocab_size), (length,), device=self.device)
        self.soft_prompt = SoftPrompt(self.word_embeddings(words))
        self.frozen = False
        return self.soft_prompt

    def embed_words(self, tokens: TokenBatch) -> tuple[Tensor, Tensor, int]:
        """Word embeddings after the soft prompt.

        Returns:
            (B, P + S, d), its mask (B, P + S), and P.
        """
        hidden, mask = self.word_embeddings(tokens["input_ids"]), padding_mask(tokens)  # (B, S, d), (B, S)
        if self.soft_prompt is None:
            return hidden, mask, 0
        return *self.soft_prompt(hidden, mask), len(self.soft_prompt)

    def score_words(self, vector: Tensor) -> Tensor:
        """Label scores (..., C) of a readout vector (..., d) from the verbalizer's rows of the output embedding."""
        head: Any = self.label_rows
        return head(vector, self.model.get_output_embeddings().weight, self.output_bias)


def language_model_class(config: Any) -> Any:
    """The transformers class that builds a language model from a configuration."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def token_positions(mask: Tensor) -> Tensor:
    """Positions 0, 1, ... counted from each input's first token, on whichever side the padding is.

    Args:
        mask: (B, S) bool.

    Returns:
        (B, S) long; 0 for padding on the left, and counting on through padding on the right.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    behind = (place - last_token(mask)).clamp(min=0)  # (B, S)
    return (mask.cumsum(dim=1) - 1 + behind).clamp(min=0)


def last_token(mask: Tensor) -> Tensor:
    """The index of the last True in each row: (B, S) bool to (B, 1) long."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1, keepdim=True)
