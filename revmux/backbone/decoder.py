"""Decoder-only models: causal layers, each input's answer at its own last token, a final norm after layer L."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revmux.backbone.attention import causal_mask
from revmux.backbone.base import Backbone, layer_output, padding_mask
from revmux.backbone.generative import GenerativeBackbone, last_token, token_positions
from revmux.backbone.prefix import KeptPrefix, KeyRecorder, PastKeys, kept_exactly
from revmux.backbone.state import HiddenState, Prefix, TokenBatch
from revmux.backbone.verbalizer import Verbalizer
from revmux.errors import UserError


class DecoderBackbone(GenerativeBackbone):
    """A causal language model, or a classifier built on one, cut at any layer.

    Padding may be on either side: positions are counted from each input's first token.
    """

    shared_answer = False

    def __init__(self, model: nn.Module, verbalizer: Verbalizer | None = None) -> None:
        super().__init__(model, verbalizer)
        self.constant_tokens: tuple[int, ...] = ()
        self._kept: KeptPrefix | None = None
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

    def place(self, state: HiddenState) -> HiddenState:
        """Word embeddings with their positions (B, S, d) to the state at depth 0."""
        return state

    def embed(self, tokens: TokenBatch) -> HiddenState:
        prefix = self.constant_prefix()
        rest = None if prefix is None else self._without_constant(tokens)
        if prefix is None or rest is None:
            return self.embed_whole(tokens)
        mask = padding_mask(rest)
        state = HiddenState(
            hidden=self.word_embeddings(rest["input_ids"]),  # (B, S - P, d)
            mask=mask,
            answer=self._answer_place(rest),
            depth=0,
            positions=token_positions(mask) + len(prefix),
            prefix=prefix,
        )
        return self.place(state)

    def embed_whole(self, tokens: TokenBatch) -> HiddenState:
        hidden, mask, shift = self.embed_words(tokens)  # (B, S, d)
        state = HiddenState(
            hidden=hidden,
            mask=mask,
            answer=self._answer_place(tokens) + shift,
            depth=0,
            positions=token_positions(mask),
        )
        return self.place(state)

    def keep_prefix(self, tokens: Sequence[int]) -> None:
        self.constant_tokens, self._kept = tuple(tokens), None

    def constant_prefix(self) -> Prefix | None:
        if not self.frozen or not (self.constant_tokens or self.soft_prompt):
            return None
        weights = [self.core.get_input_embeddings().weight]
        if self.soft_prompt is not None:
            weights.append(self.soft_prompt.vectors)
        if self._kept is None or not self._kept.is_current(weights):
            with kept_exactly(self.device):
                self._kept = KeptPrefix.of(self._run_constant(), weights)
        return self._kept.prefix

    def freeze(self) -> Backbone:
        self._kept = None
        return super().freeze()

    def _run_constant(self) -> Prefix:
        words = torch.tensor([self.constant_tokens], dtype=torch.long, device=self.device)
        hidden = self.word_embeddings(words)  # (1, P, d)
        if self.soft_prompt is not None:
            hidden = torch.cat([self.soft_prompt.vectors.to(hidden.dtype).unsqueeze(0), hidden], dim=1)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        state = HiddenState(hidden=hidden, mask=mask, answer=last_token(mask), depth=0, positions=token_positions(mask))
        return self.prefix_above(self.place(state), self.num_layers)

    def prefix_above(self, state: HiddenState, to: int) -> Prefix:
        """Run constant tokens through layers ``state.depth + 1`` to ``to`` and keep what later tokens read of them.

        Args:
            state: (1, P, d), plain or mixed.
            to: target depth.
        """
        arguments, recorder = self.layer_arguments(state), KeyRecorder()
        hidden = {state.depth: state.hidden}
        for index in range(state.depth, to):
            recorded = {**arguments(index), "past_key_values": recorder}
            hidden[index + 1] = layer_output(self.layer(index), hidden[index], recorded)  # (1, P, d)
        return Prefix(hidden, recorder.layers, state.positions)

    def past_arguments(self, state: HiddenState) -> dict[str, Any]:
        """The argument by which a layer reads the state's constant prefix, if it has one."""
        return {} if state.prefix is None else {"past_key_values": PastKeys(state.prefix)}

    def _without_constant(self, tokens: TokenBatch) -> TokenBatch | None:
        """The tokens after the constant ones, (B, S - P); None if an input does not begin with them."""
        ids, mask, count = tokens["input_ids"], padding_mask(tokens), len(self.constant_tokens)
        if count == 0:
            return tokens
        if ids.shape[1] <= count:
            return None
        offset = torch.arange(ids.shape[1], device=ids.device) - mask.int().argmax(dim=1, keepdim=True)  # (B, S)
        inside = (offset >= 0) & (offset < count)
        expected = torch.tensor(self.constant_tokens, device=ids.device)[offset.clamp(0, count - 1)]
        if not bool((~inside | ((ids == expected) & mask)).all()):
            return None
        rest = mask & ~inside
        return {"input_ids": ids[:, count:], "attention_mask": rest[:, count:].to(ids.dtype)}

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
        return self.normalize(state.read())  # (B, A, d)

    def normalize(self, hidden: Tensor) -> Tensor:
        return self.final_norm(hidden)

    def readout(self, answer: Tensor) -> Tensor:
        return answer

    def score(self, vector: Tensor) -> Tensor:
        return self.model.score(vector) if self.verbalizer is None else self.score_words(vector)
