"""Encoder-decoders: the cut is between encoder layers, and the decoder runs once per sequence, after layer L.

With a verbalizer the decoder reads only its start token, so one decoder step serves a whole group. With a
classification head the decoder reads the text itself, shifted by one. Its embeddings accompany the encoder's states
as ``HiddenState.decoder`` and are mixed in the same way, and each input has its own answer position there.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revmux.backbone.attention import causal_mask, cross_mask
from revmux.backbone.base import padding_mask
from revmux.backbone.generative import GenerativeBackbone, last_token, token_positions
from revmux.backbone.state import HiddenState, TokenBatch
from revmux.backbone.verbalizer import Verbalizer
from revmux.errors import UserError


class EncoderDecoderBackbone(GenerativeBackbone):
    """``...ForConditionalGeneration`` or ``...ForSequenceClassification`` cut at any encoder layer.

    Attributes:
        shared_answer: True with a verbalizer (one decoder step), False with a classification head (each
            input's own end-of-sequence token).
        layers_read_positions: whether every layer needs the token positions, or only the embeddings.
    """

    layers_read_positions: ClassVar[bool]

    def __init__(self, model: nn.Module, verbalizer: Verbalizer | None = None) -> None:
        super().__init__(model, verbalizer)
        if not self.config.is_encoder_decoder:
            raise UserError(
                f"{type(model).__name__} has no encoder to cut; load ...ForConditionalGeneration "
                "or ...ForSequenceClassification"
            )
        self.shared_answer = verbalizer is not None
        self._start_token()  # fail on an incomplete configuration here rather than in the first batch

    @property
    @abstractmethod
    def encoder(self) -> Any:
        """The encoder stack."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The decoder stack."""

    @abstractmethod
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's layers."""

    @abstractmethod
    def place(self, stack: Any, words: Tensor, positions: Tensor) -> Tensor:
        """Word embeddings (B, S, d) to the input of a stack's first layer."""

    @abstractmethod
    def finish(self, stack: Any, hidden: Tensor) -> Tensor:
        """The operations of a stack after its last layer."""

    @abstractmethod
    def decoder_arguments(self, stream: HiddenState, memory: HiddenState) -> dict[str, Any]:
        """The arguments of every decoder layer besides its hidden states and the memory."""

    @property
    def word_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def embed(self, tokens: TokenBatch) -> HiddenState:
        words, mask, shift = self.embed_words(tokens)  # (B, S, d)
        positions = token_positions(mask)
        own = padding_mask(tokens)
        answer = last_token(own) if self.shared_answer else self._end_of_text(tokens["input_ids"], own)
        decoder = None if self.shared_answer else self._shifted_text(tokens["input_ids"], own, answer)
        return replace(self._begin(self.encoder, words, mask, answer + shift, positions), decoder=decoder)

    def _begin(self, stack: Any, words: Tensor, mask: Tensor, answer: Tensor, positions: Tensor) -> HiddenState:
        """The input state of a stack, at depth 0."""
        return HiddenState(
            hidden=self.place(stack, words, positions),  # (B, S, d)
            mask=mask,
            answer=answer,
            depth=0,
            positions=positions if self.layers_read_positions else None,
        )

    def _end_of_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The index of each input's last end-of-sequence token: (B, 1)."""
        ends = mask & (ids == self.config.eos_token_id)  # (B, S)
        if not bool(ends.any(dim=1).all()):
            raise UserError(
                f"an input has no end-of-sequence token ({self.config.eos_token_id}), at which {self.config.model_type} "
                "reads its answer; tokenize with special tokens"
            )
        return last_token(ends)

    def _shifted_text(self, ids: Tensor, mask: Tensor, answer: Tensor) -> HiddenState:
        """The decoder's stream for a classification head: the start token, then the text without its end."""
        first = mask.int().argmax(dim=1, keepdim=True)  # (B, 1) padding on the left
        shifted = ids.roll(1, dims=1).scatter(1, first, self._start_token())  # (B, S)
        return self._begin(self.decoder, self.decoder.embed_tokens(shifted), mask, answer, token_positions(mask))

    def _answer_steps(self, memory: HiddenState) -> HiddenState:
        """The decoder's stream for a verbalizer: start token and prefix, once per concatenated input."""
        prefix = () if self.verbalizer is None else self.verbalizer.answer_prefix
        steps = len(prefix) + 1
        copies = 1 if memory.segments is None else memory.answer.shape[1]  # A
        device = memory.hidden.device
        ids = torch.tensor([self._start_token(), *prefix] * copies, device=device).expand(len(memory), -1)  # (G, A·T)
        answer = torch.arange(1, copies + 1, device=device) * steps - 1  # (A,) the last step of each copy
        stream = self._begin(
            self.decoder,
            self.decoder.embed_tokens(ids),
            torch.ones_like(ids, dtype=torch.bool),
            answer.expand(len(memory), -1),
            torch.arange(steps, device=device).repeat(copies).expand(len(memory), -1),
        )
        if memory.segments is None:
            return stream
        segments = memory.segments.gather(1, memory.answer).repeat_interleave(steps, dim=1)  # (G, A·T)
        return replace(stream, segments=segments)

    def _start_token(self) -> int:
        for config in (self.config, getattr(self.model, "generation_config", None)):
            token = getattr(config, "decoder_start_token_id", None)
            if token is not None:
                return int(token)
        raise UserError(
            f"the configuration of {type(self.model).__name__} has no decoder_start_token_id; set it to the token that "
            "its decoder was trained to start with"
        )

    def answers(self, state: HiddenState) -> Tensor:
        memory = self.finish(self.encoder, state.hidden)  # (G, S, d)
        stream = self._answer_steps(state) if state.decoder is None else state.decoder
        arguments = self.decoder_arguments(stream, state)
        hidden = stream.hidden
        for layer in self.decoder_layers():
            hidden = self._decode(layer, hidden, memory, arguments)  # (G, T, d)
        read = HiddenState(hidden=hidden, mask=stream.mask, answer=stream.answer, depth=0).read()  # (G, A, d)
        return self.finish(self.decoder, read)

    def _decode(self, layer: nn.Module, hidden: Tensor, memory: Tensor, arguments: dict[str, Any]) -> Tensor:
        def forward(hidden: Tensor, memory: Tensor) -> Tensor:
            output = layer(hidden, encoder_hidden_states=memory, **arguments)
            return output[0] if isinstance(output, tuple) else output

        if self.gradient_checkpointing and torch.is_grad_enabled() and (hidden.requires_grad or memory.requires_grad):
            return checkpoint(forward, hidden, memory, use_reentrant=False)
        return forward(hidden, memory)

    def stream_masks(self, stream: HiddenState, memory: HiddenState) -> dict[str, Any]:
        """The decoder's two masks: causal over its own stream, and cross-attention to the memory."""
        return {
            "attention_mask": causal_mask(self.decoder.config, stream),
            "encoder_attention_mask": cross_mask(self.decoder.config, stream, memory),
        }

    def readout(self, answer: Tensor) -> Tensor:
        if self.verbalizer is not None:
            return answer
        head = self.model.classification_head
        return torch.tanh(head.dense(head.dropout(answer)))

    def score(self, vector: Tensor) -> Tensor:
        if self.verbalizer is not None:
            return self.score_words(vector)
        head = self.model.classification_head
        return head.out_proj(head.dropout(vector))
