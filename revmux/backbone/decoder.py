"""Decoder-only models: causal layers, each input's answer at its own last token, a final norm after layer L."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from revmux.backbone.attention import causal_mask
from revmux.backbone.base import padding_mask
from revmux.backbone.generative import GenerativeBackbone, last_token, token_positions
from revmux.backbone.state import HiddenState, TokenBatch
from revmux.backbone.verbalizer import Verbalizer
from revmux.errors import UserError


class DecoderBackbone(GenerativeBackbone):
    """A causal language model, or a classifier built on one, cut at any layer.

    Padding may be on either side: positions are counted from each input's first token.
    """

    shared_answer = False

    def __init__(self, model: nn.Module, verbalizer: Verbalizer | None = None) -> None:
        super().__init__(model, verbalizer)
        if verbalizer is not None and verbalizer.answer_prefix:
            raise UserError(
                f"answer_prefix {list(verbalizer.answer_prefix)} is for encoder-decoders; "
                "end the prompt's template with these tokens instead"
            )

    @property
    @abstractmethod
    def core(self) -> Any:
        """The model without its head."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm between layer L and the head."""

    def window(self, index: int) -> int | None:
        """The sliding window of layer ``index`` in tokens, or None if it attends to everything before."""
        return None

    def embed(self, tokens: TokenBatch) -> HiddenState:
        hidden, mask, shift = self.embed_words(tokens)  # (B, S, d)
        return HiddenState(
            hidden=hidden,
            mask=mask,
            answer=self._answer_place(tokens) + shift,
            depth=0,
            positions=token_positions(mask),
        )

    def _answer_place(self, tokens: TokenBatch) -> Tensor:
        mask = padding_mask(tokens)
        padding = self.core.config.pad_token_id
        if self.verbalizer is None and padding is not None:
            # Classification heads are tuned on the last token that is not the padding token, even if a text
            # itself ends with that token.
            text = mask & (tokens["input_ids"] != padding)
            mask = text | (mask & ~text.any(dim=1, keepdim=True))
        return last_token(mask)  # (B, 1)

    def layer_masks(self, state: HiddenState) -> Callable[[int], Tensor | None]:
        """A function from a layer's index to its attention mask. Layers with the same window share one mask."""
        windows = [self.window(index) for index in range(self.num_layers)]
        masks = {window: causal_mask(self.core.config, state, window) for window in set(windows[state.depth :])}
        return lambda index: masks[windows[index]]

    def answers(self, state: HiddenState) -> Tensor:
        return self.final_norm(state.read())  # (B, A, d)

    def readout(self, answer: Tensor) -> Tensor:
        return answer

    def score(self, vector: Tensor) -> Tensor:
        return self.model.score(vector) if self.verbalizer is None else self.score_words(vector)
