"""MUX-PLM (Murahari et al., 2023): a keyed or contextual sum, demultiplexed with one learned key per slot.

The Gaussian multiplexer is ``o = mean_k(h_k * v_k)``. The contextual multiplexer has a Transformer layer T_1 over the
tokens of each input and a Transformer layer T_2 over the N slots at each position::

    c_k = (h_k + T_1(h_k)) * v_k
    o   = mean_k(c_k + T_2(c_1..c_N)_k)

The RSA demultiplexer has a learned key p_k per slot::

    x   = norm(gelu(W_1 [p_k ; ô]))
    x   = x + norm(gelu(W_m x))            m = 2..M
    ĥ_k = x + LayerNorm(gelu(W x))

The backbone's own head classifies, and is tuned too. The published models are pretrained as multiplexed models
(retrieval, then mquestions language modelling) before the task. Here, the retrieval warm-up uses the text of the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState
from revmux.errors import UserError, one_of
from revmux.methods.attention import TransformerLayer
from revmux.methods.base import BackboneShape, Method, mix_channels, pick_own
from revmux.methods.registry import register_method
from revmux.methods.retrieval import check_retrieval, retrieval_loss, sample_questions
from revmux.methods.slot_keys import GaussianKeys, hidden_without_padding


@dataclass(frozen=True)
class MuxPLMOptions:
    """Settings of MUX-PLM.

    Args:
        multiplexer: ``gaussian`` (keyed sum) or ``contextual`` (with attention over tokens and over slots).
        key_norm: norm of the Gaussian keys. None means √d.
        learn_keys: whether to train the keys v_k.
        heads: attention heads of the contextual multiplexer. None means d / 64 if that is an integer, otherwise 1.
        demultiplexer_layers: M, at least 1.
        retrieval_weight: weight of the retrieval loss, relative to a task weight of 1.
        retrieval_fraction: fraction of the positions in the retrieval loss.
        warmup_steps: number of first optimizer steps that train on retrieval only.
        dropout: dropout of the contextual multiplexer in training.
        tune_backbone: whether to train the backbone too, as published.
    """

    multiplexer: Literal["gaussian", "contextual"] = "gaussian"
    key_norm: float | None = None
    learn_keys: bool = False
    heads: int | None = None
    demultiplexer_layers: int = 2
    retrieval_weight: float = 0.1
    retrieval_fraction: float = 0.1
    warmup_steps: int = 0
    dropout: float = 0.1
    tune_backbone: bool = True


class RSADemultiplexer(nn.Module):
    """The RSA demultiplexer: an MLP on a shared state and the key of one slot.

    Args:
        num_inputs: N.
        hidden: d.
        layers: M.
    """

    def __init__(self, num_inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(num_inputs, hidden, dtype=torch.float32))
        self.dense = nn.ModuleList(nn.Linear((2 if m == 0 else 1) * hidden, hidden) for m in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, hidden)
        self.last_norm = nn.LayerNorm(hidden)

    def forward(self, state: Tensor, key: Tensor) -> Tensor:
        """Recover a slot's own state (..., d) from a shared state (..., d) and the slot's key (..., d)."""
        x = self.norm[0](F.gelu(self.dense[0](torch.cat([key, state], dim=-1))))
        for dense, norm in zip(self.dense[1:], self.norm[1:], strict=True):
            x = x + norm(F.gelu(dense(x)))
        return x + self.last_norm(F.gelu(self.last(x)))

    def all_slots(self, state: Tensor) -> Tensor:
        """Recover the states of all slots: (G, A, d) to (G, A, N, d)."""
        shape = (*state.shape[:-1], *self.keys.shape)
        return self(state.unsqueeze(-2).expand(shape), self.keys.expand(shape))


class ContextualMixer(nn.Module):
    """Attention over the tokens of each input, keys, attention over the slots at each position, and the mean.

    Args:
        hidden: d.
        heads: attention heads.
        keys: v_k.
        dropout: dropout in training.
    """

    def __init__(self, hidden: int, heads: int, keys: GaussianKeys, dropout: float) -> None:
        super().__init__()
        self.keys = keys
        self.over_tokens = TransformerLayer(hidden, heads, dropout)
        self.over_slots = TransformerLayer(hidden, heads, dropout)

    def forward(self, states: HiddenState) -> Tensor:
        """Mix the slots: (G, N, S, d) to (G, S, d)."""
        hidden = hidden_without_padding(states)
        tokens = hidden.flatten(0, 1)  # (G·N, S, d)
        context = self.over_tokens(tokens, attend_to_present(states.mask.flatten(0, 1))).view_as(hidden)
        keyed = self.keys(hidden + context) * states.mask.unsqueeze(-1)  # (G, N, S, d)
        by_position = keyed.transpose(1, 2)  # (G, S, N, d)
        present = states.mask.transpose(1, 2)  # (G, S, N)
        mixed = self.over_slots(by_position.flatten(0, 1), attend_to_present(present.flatten(0, 1)))  # (G·S, N, d)
        return ((by_position + mixed.view_as(by_position)) * present.unsqueeze(-1)).mean(dim=2)


def attend_to_present(mask: Tensor) -> Tensor:
    """An attention mask, (B, S) bool to (B, S, S): every row attends to the present columns and to itself."""
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(1) | itself


@register_method
class MuxPLM(Method):
    """Gaussian or contextual multiplexer, RSA demultiplexer, and the backbone's own head."""

    name: ClassVar[str] = "mux-plm"
    Options: ClassVar[type] = MuxPLMOptions
    matches_teacher: ClassVar[bool] = False
    training_only: ClassVar[tuple[str, ...]] = ("retrieval_decoder",)

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        settings, hidden = self.options, shape.hidden_size
        check_retrieval(self.name, settings.retrieval_weight, settings.retrieval_fraction, settings.warmup_steps)
        if settings.demultiplexer_layers < 1:
            raise UserError(f"mux-plm: demultiplexer_layers is {settings.demultiplexer_layers}; choose 1 or more")
        self.tunes_backbone = settings.tune_backbone
        self.has_auxiliary_loss = settings.retrieval_weight > 0
        self.warmup_steps = settings.warmup_steps
        self.keys = GaussianKeys(num_inputs, hidden, settings.key_norm, settings.learn_keys)
        self.mixer: ContextualMixer | None = None
        if settings.multiplexer == "contextual":
            self.mixer = ContextualMixer(hidden, self._heads(), self.keys, settings.dropout)
        elif settings.multiplexer != "gaussian":
            raise one_of(
                "multiplexer", settings.multiplexer, ["gaussian", "contextual"], "set multiplexer to one of these"
            )
        self.demultiplexer = RSADemultiplexer(num_inputs, hidden, settings.demultiplexer_layers)
        if self.has_auxiliary_loss:
            self.retrieval_decoder = nn.Linear(hidden, shape.vocab_size)

    def _heads(self) -> int:
        hidden, heads = self.shape.hidden_size, self.options.heads
        if heads is None:
            return hidden // 64 if hidden % 64 == 0 else 1
        if heads < 1 or hidden % heads:
            raise UserError(f"mux-plm: hidden_size ({hidden}) must be divisible by heads ({heads}); choose a divisor")
        return int(heads)

    def multiplex(self, states: HiddenState) -> HiddenState:
        mixed = self.keys.mix(hidden_without_padding(states)) if self.mixer is None else self.mixer(states)  # (G, S, d)
        return mix_channels(states, mixed, self.shape.shared_answer)

    @property
    def reads_whole_inputs(self) -> bool:
        return super().reads_whole_inputs or self.mixer is not None  # the contextual mixer attends in both directions

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return pick_own(self.demultiplexer.all_slots(answers))

    def auxiliary_loss(self, backbone: Backbone, shared: HiddenState, token_ids: Tensor, mask: Tensor) -> Tensor:
        questions = sample_questions(token_ids, mask, self.options.retrieval_fraction)
        shift = shared.hidden.shape[1] - token_ids.shape[-1]  # tokens before each text, such as a soft prompt
        states = backbone.normalize(shared.hidden)  # (G, S', d)
        hidden = states[questions.rows, questions.positions + shift]  # (P, d)
        own = self.demultiplexer(hidden, self.demultiplexer.keys[questions.slots])  # (P, d)
        return self.options.retrieval_weight * retrieval_loss(self.retrieval_decoder(own), questions)
