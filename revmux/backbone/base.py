"""A frozen pretrained model, cut between any two layers.

Each family has one file beside this one. It defines how its model embeds tokens, runs a range of layers, and reads
the answer. The rest of revmux uses this interface only. The cut model and the whole model share every weight:
nothing is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

from revmux.backbone.answer_layer import answers_only
from revmux.backbone.state import HiddenState, Prefix, TokenBatch
from revmux.errors import UserError

_EMBEDDING_WORDS = ("embed", "wte", "wpe", "shared.", "soft_prompt")  # parameter names of what comes before layer 1


class Backbone(nn.Module, ABC):
    """A Hugging Face model in four steps: embed, run layers ``depth+1..to``, read answers, classify.

    ``embed → run(L) → answers → classify`` is the model's own forward pass, operation by operation.

    Args:
        model: the pretrained model with its head.

    Attributes:
        model_types: the ``config.model_type`` values that this family serves.
        shared_answer: True if the answers of all inputs are at the same position (CLS, a decoder step), so that a
            shared sequence is read once; False if each input has its own position (its last token).
    """

    model_types: ClassVar[tuple[str, ...]]
    shared_answer: bool = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.gradient_checkpointing = False
        self.frozen = False

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """L, the number of layers. The model can be cut between any two."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """d, the size of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def num_labels(self) -> int:
        """C, the number of classes that the head scores."""
        return int(self.config.num_labels)

    @property
    def readout_size(self) -> int:
        """Width of the vector that the classifier reads."""
        return self.hidden_size

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the scores."""
        return [self.config.id2label[index] for index in range(self.num_labels)]

    @property
    def max_length(self) -> int:
        """The largest number of tokens in an input."""
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.model.parameters()).dtype

    def freeze(self) -> Backbone:
        """Disable gradients and dropout, so that the model's output for an input alone never changes again."""
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    def keep_prefix(self, tokens: Sequence[int]) -> None:
        """Declare the tokens that every input begins with, if the family is causal. They then run once.

        Args:
            tokens: the constant tokens.

        Raises:
            UserError: the states of the tokens depend on the rest of the input.
        """
        raise UserError(
            f"a constant prefix was declared, but {self.config.model_type} reads text in both directions, so the states of "
            "its first tokens depend on the whole input; only decoders such as llama and gpt2 can compute them once"
        )

    def constant_prefix(self) -> Prefix | None:
        """The states, keys and values of the constant tokens before every input; None if there are none, or if the
        weights are being trained."""
        return None

    def add_soft_prompt(self, length: int) -> nn.Module:
        """Put trainable vectors in front of every input, if the family supports it.

        Args:
            length: number of vectors.

        Raises:
            UserError: the family does not support soft prompts.
        """
        raise UserError(
            f"soft_prompt is {length}, but {self.config.model_type} does not support soft prompts; choose a language model, "
            "such as t5 or llama, or leave soft_prompt out"
        )

    def unfreeze_above(self, depth: int) -> Backbone:
        """Train the layers above ``depth`` and the head, and the embeddings too if ``depth`` is 0."""
        self.requires_grad_(True)
        self.frozen = False
        if depth > 0:
            for name, parameter in self.named_parameters():
                if any(word in name for word in _EMBEDDING_WORDS):
                    parameter.requires_grad_(False)
            for index in range(depth):
                self.layer(index).requires_grad_(False)
        return self

    @abstractmethod
    def embed(self, tokens: TokenBatch) -> HiddenState:
        """Tokens, each (B, S), to the state at depth 0: (B, S, d), answers (B, 1)."""

    def embed_whole(self, tokens: TokenBatch) -> HiddenState:
        """Like :meth:`embed`, with a constant prefix as ordinary tokens of each input."""
        return self.embed(tokens)

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """Layer ``index``, 0-based."""

    @abstractmethod
    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        """The arguments of every layer besides the hidden states: masks, rotary or relative positions.

        Computed once per call of :meth:`run`. Returns a function from a layer's index to its arguments.
        """

    def answer_layer(self, index: int, hidden: Tensor, places: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Layer ``index`` for the answer positions only, without dropout, if the family supports it.

        Args:
            index: 0-based.
            hidden: (B, S, d), input of the layer.
            places: (B, A) long, positions of the answers.
            arguments: as returned by :meth:`layer_arguments`.

        Returns:
            (B, A, d), or None if the whole layer must run.
        """
        return None

    def run_to_answers(self, state: HiddenState, to: int) -> HiddenState:
        """:meth:`run` for a caller that reads only the answers. The result may differ from :meth:`run` by rounding.

        Returns:
            A state at depth ``to`` whose only tokens are the answers, (B, A, d), if the family supports it; otherwise all
            tokens, (B, S, d).

        Raises:
            UserError: ``to`` is not in ``state.depth..L``.
        """
        if to <= state.depth or self.training:
            return self.run(state, to)
        self._check_depth(state, to)
        arguments = self.layer_arguments(state)
        below = self._run(state, to - 1, arguments)

        def last(hidden: Tensor) -> Tensor | None:
            return self.answer_layer(to - 1, hidden, below.answer, arguments(to - 1))

        hidden = self._checkpointed(last, below.hidden)  # (B, A, d)
        return self._run(below, to, arguments) if hidden is None else answers_only(hidden, to)

    def run(self, state: HiddenState, to: int) -> HiddenState:
        """Layers ``state.depth + 1`` to ``to``.

        Args:
            state: (B, S, d) at any depth.
            to: target depth, from ``state.depth`` to L.

        Returns:
            The state at depth ``to``, same shape.

        Raises:
            UserError: ``to`` is not in ``state.depth..L``.
        """
        self._check_depth(state, to)
        return state if to == state.depth else self._run(state, to, self.layer_arguments(state))

    def _check_depth(self, state: HiddenState, to: int) -> None:
        if not state.depth <= to <= self.num_layers:
            raise UserError(
                f"cannot run to layer {to} from layer {state.depth}: choose {state.depth}..{self.num_layers}"
            )

    def _run(self, state: HiddenState, to: int, arguments: Callable[[int], dict[str, Any]]) -> HiddenState:
        hidden = state.hidden
        for index in range(state.depth, to):
            hidden = self._run_layer(index, hidden, arguments(index))  # (B, S, d)
        return replace(state, hidden=hidden, depth=to)

    def _run_layer(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        layer = self.layer(index)

        return self._checkpointed(lambda hidden: layer_output(layer, hidden, arguments), hidden)

    def _checkpointed(self, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled() and hidden.requires_grad:
            return checkpoint(forward, hidden, use_reentrant=False)
        return forward(hidden)

    def answers(self, state: HiddenState) -> Tensor:
        """The answer states of a state that has passed the layers: (B, A, d).

        Families with a final norm or a decoder apply it here.
        """
        return state.read()

    def normalize(self, hidden: Tensor) -> Tensor:
        """States of any layer (..., d) as the head expects those of layer L, for heads that read them early.

        Families with a final norm apply it here: without it, some channels of a token are orders of magnitude larger than all
        other values.
        """
        return hidden

    def own_answers(self, state: HiddenState) -> Tensor:
        """Each plain input's normalized state at its answer position, at any depth: (B, d)."""
        return self.normalize(state.read()[:, 0])

    def own_states(self, state: HiddenState) -> Tensor:
        """[answer state ; mean over the tokens, those of a constant prefix included] of each plain input: (B, 2d).

        All states are normalized.
        """
        mask = state.mask.unsqueeze(-1)  # (B, S, 1)
        total, count = (self.normalize(state.hidden) * mask).sum(dim=1), mask.sum(dim=1)  # (B, d), (B, 1)
        if state.prefix is not None:
            total = total + self.normalize(state.prefix.hidden[state.depth]).sum(dim=1)
            count = count + len(state.prefix)
        return torch.cat([self.own_answers(state), total / count], dim=-1)

    @abstractmethod
    def readout(self, answer: Tensor) -> Tensor:
        """An answer state (..., d) to the vector that the classifier reads (..., readout_size)."""

    @abstractmethod
    def score(self, vector: Tensor) -> Tensor:
        """The vector that the classifier reads to label scores (..., C)."""

    def classify(self, answer: Tensor) -> Tensor:
        """An answer state (..., d) to label scores (..., C) by the model's own head."""
        return self.score(self.readout(answer))

    def forward(self, tokens: TokenBatch) -> Tensor:
        """The plain model (SISO): tokens (B, S) to label scores (B, C)."""
        state = self.run(self.embed(tokens), self.num_layers)
        return self.classify(self.answers(state)[:, 0])


def layer_output(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The states after a layer of Transformers: (B, S, d)."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def padding_mask(tokens: TokenBatch) -> Tensor:
    """(B, S) bool, True for tokens and False for padding."""
    mask = tokens.get("attention_mask")
    return torch.ones_like(tokens["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def visibility(state: HiddenState, dtype: torch.dtype, implementation: str) -> Tensor | None:
    """The block-diagonal attention mask of inputs concatenated in one sequence, or None without segments.

    Returns:
        (B, 1, S, S): bool for SDPA, additive in ``dtype`` for eager attention. A row that may
        attend to nothing (padding) attends to itself, so that no softmax is over an empty set.
    """
    if state.segments is None:
        return None
    rows, columns = state.segments.unsqueeze(2), state.segments.unsqueeze(1)  # (B, S, 1), (B, 1, S)
    seen = (rows == columns) & (columns > 0)  # (B, S, S)
    seen |= torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    return as_attention_mask(seen, dtype, implementation)


def bidirectional_mask(config: Any, state: HiddenState) -> Tensor | None:
    """The mask of a layer whose tokens attend to all tokens of their own input.

    Args:
        config: configuration of the attending module, with its attention implementation.
        state: (B, S, d).

    Returns:
        (B, 1, S, S) in the form that the implementation expects; None if every token attends to the whole sequence.
    """
    mask = visibility(state, state.hidden.dtype, config._attn_implementation)
    if mask is not None:
        return mask
    return dense(create_bidirectional_mask(config=config, inputs_embeds=state.hidden, attention_mask=state.mask))


def dense(mask: object) -> Tensor | None:
    """A mask of Transformers as eager and SDPA attention take it.

    Transformers also knows the block masks of FlexAttention, which no backbone here uses.
    """
    assert mask is None or isinstance(mask, Tensor)
    return mask


def as_attention_mask(seen: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """(B, S, S) bool, True where a row attends to a column, in the 4-D form that Hugging Face attention expects."""
    seen = seen.unsqueeze(1)  # (B, 1, S, S)
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the context, the former mode after it."""
    former = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(former)
