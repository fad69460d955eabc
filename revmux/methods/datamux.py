"""DataMUX (Murahari et al., NeurIPS 2022): keyed inputs are summed, and a tuned backbone learns to separate them.

Multiplexer, with one key per slot: a vector v_k, or an orthogonal matrix O_k::

    o = mean_k(h_k * v_k)          or          o = sum_k(O_k h_k) / √N

Index demultiplexer: N + 1 tokens precede each input. Slot k has its index token at position k, filler tokens at the
other N - 1 positions, and then a CLS token. These tokens are mixed like all others::

    ĥ_k = LayerNorm(gelu(W [ô at position k ; ô at the CLS]))

MLP demultiplexer, with one linear layer per slot on the answer state::

    ĥ_k = LayerNorm_k(gelu(W_k ô))

The method has its own head. The published version has l = 0 and no attention mask. This implementation supports any l
and masks padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.errors import UserError, one_of
from revmux.methods.base import BackboneShape, Method, mix_channels, pick_own
from revmux.methods.registry import register_method
from revmux.methods.retrieval import check_retrieval, retrieval_loss, sample_questions
from revmux.methods.slot_keys import Keys, build_keys, hidden_without_padding


@dataclass(frozen=True)
class DataMUXOptions:
    """Settings of DataMUX.

    Args:
        keys: ``gaussian`` (vectors) or ``orthogonal`` (matrices).
        key_norm: norm of the Gaussian keys. None means √d.
        learn_keys: whether to train the keys.
        demultiplexer: ``index`` (prefix tokens) or ``mlp`` (one layer per slot).
        index_tokens: ids of N index tokens and one filler token for the index demultiplexer, which texts do not use.
            None means the last N + 1 ids of the vocabulary, the rarest ones. (BERT also has unused ids at 1..99.)
        retrieval_weight: weight of the retrieval loss, relative to a task weight of 1. Published: 0.1 to 0.9.
        retrieval_fraction: fraction of the positions in the retrieval loss.
        warmup_steps: number of first optimizer steps that train on retrieval only.
        dropout: dropout before each demultiplexer layer in training.
        tune_backbone: whether to train the backbone too, as published.
    """

    keys: Keys = "gaussian"
    key_norm: float | None = None
    learn_keys: bool = False
    demultiplexer: Literal["index", "mlp"] = "index"
    index_tokens: Sequence[int] | None = None
    retrieval_weight: float = 0.1
    retrieval_fraction: float = 0.1
    warmup_steps: int = 0
    dropout: float = 0.1
    tune_backbone: bool = True


class SlotLayers(nn.Module):
    """One linear layer, GELU and LayerNorm per slot.

    Args:
        num_inputs: N.
        hidden: d.
        dropout: dropout before the layers in training.
    """

    def __init__(self, num_inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_inputs))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(num_inputs))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor) -> Tensor:
        """Apply the layers of all slots to the same state: (..., d) to (..., N, d)."""
        state = self.dropout(state)
        return torch.stack(
            [norm(F.gelu(dense(state))) for dense, norm in zip(self.dense, self.norm, strict=True)], dim=-2
        )


@register_method
class DataMUX(Method):
    """Keyed sum, index or MLP demultiplexer, and retrieval objective."""

    name: ClassVar[str] = "datamux"
    Options: ClassVar[type] = DataMUXOptions
    matches_teacher: ClassVar[bool] = False
    training_only: ClassVar[tuple[str, ...]] = (
        "retrieval_slots",
        "retrieval_dense",
        "retrieval_norm",
        "retrieval_decoder",
    )
    prefix: Tensor

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        settings, hidden = self.options, shape.hidden_size
        check_retrieval(self.name, settings.retrieval_weight, settings.retrieval_fraction, settings.warmup_steps)
        self.tunes_backbone = settings.tune_backbone
        self.has_auxiliary_loss = settings.retrieval_weight > 0
        self.warmup_steps = settings.warmup_steps
        self.keys = build_keys(settings.keys, num_inputs, hidden, settings.key_norm, settings.learn_keys)
        self.by_index = settings.demultiplexer == "index"
        if self.by_index:
            self._add_index_tokens()
            self.dense = nn.Linear(2 * hidden, hidden)
            self.norm = nn.LayerNorm(hidden)
        elif settings.demultiplexer == "mlp":
            self.slots = SlotLayers(num_inputs, hidden, settings.dropout)
        else:
            raise one_of("demultiplexer", settings.demultiplexer, ["index", "mlp"], "set demultiplexer to one of these")
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, shape.num_labels)
        if self.has_auxiliary_loss:
            self.retrieval_slots = None if self.by_index else SlotLayers(num_inputs, hidden, settings.dropout)
            self.retrieval_dense = nn.Linear((2 if self.by_index else 1) * hidden, hidden)
            self.retrieval_norm = nn.LayerNorm(hidden)
            self.retrieval_decoder = nn.Linear(hidden, shape.vocab_size)

    def _add_index_tokens(self) -> None:
        if self.shape.encoder_decoder:
            raise UserError(
                "datamux: demultiplexer is 'index', which reads encoder positions, but this backbone answers from its "
                "decoder; choose demultiplexer 'mlp'"
            )
        need, vocabulary = self.num_inputs + 1, self.shape.vocab_size
        given = self.options.index_tokens
        ids = [vocabulary - 1 - k for k in range(need)] if given is None else list(given)
        if len(set(ids)) != need or not all(0 <= token < vocabulary for token in ids):
            raise UserError(
                f"datamux: index_tokens is {ids}; N = {self.num_inputs} needs {need} distinct ids in 0..{vocabulary - 1}"
            )
        prefix = torch.full((self.num_inputs, self.num_inputs), ids[-1])
        prefix.fill_diagonal_(0)
        prefix += torch.diag(torch.tensor(ids[:-1]))
        self.register_buffer("prefix", prefix)  # (N, N): row k precedes slot k's CLS
        self.prepares_tokens = True
        self.added_tokens = need

    def prepare(self, tokens: TokenBatch) -> TokenBatch:
        if not self.by_index:
            return tokens
        ids = tokens["input_ids"]  # (G, N, S)
        mask = tokens.get("attention_mask")
        # With left padding, the first token of the text (its CLS) is not at position 0.
        first = (
            torch.zeros_like(ids[..., :1]) if mask is None else mask.long().argmax(dim=-1, keepdim=True)
        )  # (G, N, 1)
        prefix = self.prefix.expand(len(ids), -1, -1)  # (G, N, N)
        prepared = {"input_ids": torch.cat([prefix, ids.gather(-1, first), ids], dim=-1)}  # (G, N, N+1+S)
        for name, tensor in tokens.items():
            if name != "input_ids":
                filling = torch.full_like(tensor[..., :1], int(name == "attention_mask")).expand(
                    -1, -1, self.added_tokens
                )
                prepared[name] = torch.cat([filling, tensor], dim=-1)
        return prepared

    def multiplex(self, states: HiddenState) -> HiddenState:
        mixed = self.keys.mix(hidden_without_padding(states))  # (G, S, d)
        return mix_channels(states, mixed, self.shape.shared_answer)

    def read(self, backbone: Backbone, state: HiddenState) -> Tensor:
        """The answer states (G, A, d). With index tokens: (G, N+A, d), the N index positions first."""
        if not self.by_index:
            return backbone.answers(state)
        if getattr(backbone, "soft_prompt", None) is not None:
            raise UserError(
                "datamux: demultiplexer is 'index', whose tokens must come first, but this backbone has a soft prompt "
                "there; choose demultiplexer 'mlp'"
            )
        positions = torch.arange(self.added_tokens, device=state.hidden.device).expand(len(state), -1)  # (G, N+1)
        index, cls = positions.split([self.num_inputs, 1], dim=1)
        # The CLS of a causal model attends to no text, so each input's own answer position is read instead.
        answer = torch.cat([index, cls if self.shape.shared_answer else state.answer], dim=1)  # (G, N+A)
        spans = None
        if state.spans is not None:
            at_index = F.one_hot(index, state.hidden.shape[1]).bool()  # (G, N, S)
            spans = torch.cat([at_index, state.spans], dim=1)  # (G, N+A, S)
        return backbone.answers(replace(state, answer=answer, spans=spans))

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        if not self.by_index:
            return pick_own(self.slots(answers))  # (G, N, d)
        index, answer = answers.split([self.num_inputs, answers.shape[1] - self.num_inputs], dim=1)
        pairs = torch.cat([index, answer.expand_as(index)], dim=-1)  # (G, N, 2d)
        return self.norm(F.gelu(self.dense(self.dropout(pairs))))

    def vector(self, backbone: Backbone, answer: Tensor) -> Tensor:
        return F.gelu(self.head(answer))

    def score(self, backbone: Backbone, vector: Tensor) -> Tensor:
        return self.classifier(vector)

    def auxiliary_loss(self, backbone: Backbone, shared: HiddenState, token_ids: Tensor, mask: Tensor) -> Tensor:
        questions = sample_questions(token_ids, mask, self.options.retrieval_fraction)
        shift = shared.hidden.shape[1] - token_ids.shape[-1]  # tokens before each text
        states = backbone.normalize(shared.hidden)  # (G, S', d)
        hidden = states[questions.rows, questions.positions + shift]  # (P, d)
        if self.retrieval_slots is None:
            hidden = torch.cat([states[questions.rows, questions.slots], hidden], dim=-1)  # (P, 2d)
        else:
            rows = torch.arange(len(questions.slots), device=questions.slots.device)
            hidden = self.retrieval_slots(hidden)[rows, questions.slots]  # (P, d)
        logits = self.retrieval_decoder(self.retrieval_norm(F.gelu(self.retrieval_dense(hidden))))  # (P, V)
        return self.options.retrieval_weight * retrieval_loss(logits, questions)
