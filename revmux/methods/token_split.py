"""Token split: each input is shortened, and the inputs share the tokens of a sequence, not its channels (ConcatPlexer).

After layer l, each input keeps its answer token. R neighbouring tokens at a time are pooled into one token of full
width, where R is N unless the option ``ratio`` sets it. The N shortened inputs are concatenated into one sequence of
about N·(1 + S/R) tokens and do not attend to each other::

    x   = concat of R neighbouring tokens, absent ones 0, times R / (tokens present)
    p   = W x + mlp(x)                                   # W is initialized to the mean, mlp to zero
    ĥ_k = correction of ô_k by the input's own state     # see revmux.methods.own_state

The frozen layers thus process tokens similar to those of pretraining, and each input has its own answer token. Since the
inputs do not attend to each other, no input needs a partner: with a ratio, N may be 1.

With ``kept_tokens``, the K tokens of each input with the highest learned relevance are blocks of one token, and only the
others are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.errors import UserError
from revmux.methods.base import BackboneShape, Method, checked_exit_layer
from revmux.methods.own_state import CorrectedMethod, OwnStateCorrection, OwnStateKind
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class TokenSplitOptions:
    """Settings of the token split.

    Args:
        ratio: R, the number of neighbouring tokens that are pooled into one. None means N.
        kept_tokens: K, the number of tokens per input that are not pooled, besides the answer token.
        own_state: how each input's own prefilled state corrects its answer state: ``none``, ``linear``,
            ``mlp`` or ``attention``.
        pooling_width: width of the pooling MLP's middle layer. None means d, 0 means no MLP.
        lora_rank: rank of the low-rank updates of layers l+1..e. 0 means none.
        exit_layer: e, the layer after which answers are read. None means the last layer.
        tune_backbone: whether to train the backbone too.
    """

    ratio: int | None = None
    kept_tokens: int = 0
    own_state: OwnStateKind = "mlp"
    lora_rank: int = 0
    pooling_width: int | None = None
    exit_layer: int | None = None
    tune_backbone: bool = False


class NeighbourPooling(nn.Module):
    """Pools R neighbouring tokens into one. Initialized to their mean.

    Args:
        num_neighbours: R.
        hidden: d.
        width: width of the MLP's middle layer, 0 for no MLP.
    """

    def __init__(self, num_neighbours: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.linear = nn.Linear(num_neighbours * hidden, hidden)
        self.inner = nn.Linear(num_neighbours * hidden, width) if width else None
        self.outer = nn.Linear(width, hidden) if width else None
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(hidden, dtype=torch.float32).repeat(1, num_neighbours) / num_neighbours)
            self.linear.bias.zero_()
        if self.outer is not None:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Pool each block of neighbours into one token.

        Args:
            tokens: (..., R, d).
            present: (..., R) bool, False for absent tokens. The weights of a block are rescaled to the present tokens.

        Returns:
            (..., d).
        """
        # A quotient of integers would have the default dtype, which changes while a model is loaded.
        count = present.sum(dim=-1, keepdim=True).clamp(min=1).to(torch.float32)  # (..., 1)
        weight = present * (self.num_neighbours / count)  # (..., R)
        block = (tokens * weight.unsqueeze(-1).to(tokens.dtype)).flatten(-2)  # (..., R·d)
        pooled = self.linear(block)
        if self.inner is None or self.outer is None:
            return pooled
        return pooled + self.outer(F.gelu(self.inner(block)))


@register_method
class TokenSplit(CorrectedMethod, Method):
    """Concatenation of the pooled inputs in one shared sequence."""

    name: ClassVar[str] = "token-split"
    marks: ClassVar[tuple[str, str]] = ("^", "triangle-up")
    Options: ClassVar[type] = TokenSplitOptions

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        self.ratio = num_inputs if self.options.ratio is None else self.options.ratio
        if self.ratio < 2:
            raise UserError(
                f"token-split pools {self.ratio} tokens into one (ratio {self.options.ratio}, N = {num_inputs}), which "
                "shortens nothing; choose a ratio of 2 or more, or N = 2 or more without a ratio"
            )
        settings, hidden = self.options, shape.hidden_size
        self.tunes_backbone = settings.tune_backbone
        self.last_layer = checked_exit_layer(self.name, settings.exit_layer, shape.num_layers)
        width = hidden if settings.pooling_width is None else settings.pooling_width
        if width < 0:
            raise UserError(f"token-split: pooling_width is {width}; choose 0 (no MLP) or more")
        if settings.kept_tokens < 0:
            raise UserError(f"token-split: kept_tokens is {settings.kept_tokens}; choose 0 (pool all tokens) or more")
        self.relevance = nn.Linear(hidden, 1) if settings.kept_tokens else None
        self.pooling = NeighbourPooling(self.ratio, hidden, width)
        self.own_state = OwnStateCorrection(hidden, settings.own_state)

    def exit_layer(self) -> int:
        return self.last_layer

    def multiplex(self, states: HiddenState) -> HiddenState:
        if states.decoder is not None:
            raise UserError(
                "token-split needs a single token sequence, but this backbone's decoder also reads the text; "
                "choose revmux or an encoder-only backbone"
            )
        groups, num_inputs, _, _ = states.hidden.shape
        relevance = self.relevance(states.hidden).squeeze(-1) if self.relevance else None  # (G, N, S)
        order, present = self.neighbours(states, relevance)  # (G, N, P-1, R) both
        flat = order.flatten(2).unsqueeze(-1).expand(-1, -1, -1, states.hidden.shape[-1])  # (G, N, (P-1)·R, d)
        tokens = states.hidden.gather(2, flat).unflatten(2, order.shape[2:])  # (G, N, P-1, R, d)
        pooled = self.pooling(tokens, present)  # (G, N, P-1, d)
        if relevance is not None:
            # A factor of one in value, by whose gradient the relevance is learned.
            share = relevance.gather(2, order[..., 0]).sigmoid()  # (G, N, P-1), of the first token of each block
            pooled = pooled * (1 + share - share.detach()).unsqueeze(-1)

        def with_answer(of_blocks: Tensor, of_answer: Tensor) -> Tensor:
            """Join blocks (G, N, P-1, ...) and answer tokens (G, N, 1, ...) to one sequence per group (G, N·P, ...)."""
            # A causal model's answer token attends to earlier tokens, so it comes last. A CLS comes first.
            parts = [of_answer, of_blocks] if self.shape.shared_answer else [of_blocks, of_answer]
            return torch.cat(parts, dim=2).flatten(1, 2)

        def at_blocks(of_tokens: Tensor) -> Tensor:
            """Arrange values per token (G, N, S) by block (G, N, P-1, R)."""
            return of_tokens.gather(2, order.flatten(2)).unflatten(2, order.shape[2:])

        answer = states.answer  # (G, N, 1)
        answer_state = states.hidden.gather(2, answer.unsqueeze(-1).expand(-1, -1, -1, states.hidden.shape[-1]))
        filled = with_answer(present.any(dim=-1), torch.ones_like(answer, dtype=torch.bool))  # (G, N·P)
        block_length = filled.shape[1] // num_inputs  # P
        owner = torch.arange(1, num_inputs + 1, device=filled.device).repeat_interleave(block_length)  # (N·P,)
        starts = torch.arange(num_inputs, device=filled.device) * block_length  # (N,)
        answers = starts if self.shape.shared_answer else starts + block_length - 1
        positions = spans = None
        if states.positions is not None:
            last = at_blocks(states.positions).masked_fill(~present, 0).amax(dim=-1)  # (G, N, P-1)
            positions = with_answer(last, states.positions.gather(2, answer))
        if states.spans is not None:
            span = states.spans.squeeze(2)  # (G, N, S)
            inside = with_answer((at_blocks(span) & present).any(dim=-1), span.gather(2, answer))  # (G, N·P)
            slots = torch.arange(1, num_inputs + 1, device=filled.device).unsqueeze(1)  # (N, 1)
            spans = inside.unsqueeze(1) & (owner == slots)  # (G, N, N·P)
        return HiddenState(
            hidden=with_answer(pooled, answer_state),
            mask=filled,
            answer=answers.expand(groups, -1),  # (G, N)
            depth=states.depth,
            positions=positions,
            segments=filled * owner,
            spans=spans,
        )

    def multiplex_prefix(self, states: HiddenState) -> HiddenState:
        return states.map(lambda tensor: tensor[:, 0])  # whole, since all inputs read the same tokens

    def neighbours(self, states: HiddenState, relevance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tokens of each input except its answer token, in order, in blocks of R.

        Padding is skipped on either side, so it does not affect the blocks.

        Args:
            states: the prefilled states, each tensor (G, N, ...).
            relevance: (G, N, S) scores of the tokens; the K tokens with the highest scores are blocks of one token, which
                come first. None pools all tokens.

        Returns:
            The positions of the tokens (G, N, P-1, R) long, and whether each token is present (G, N, P-1, R) bool,
            with P = 1 + K + ⌈(S-1-K) / R⌉.
        """
        length = states.hidden.shape[2]
        position = torch.arange(length, device=states.hidden.device)
        others = states.mask & (position != states.answer)  # (G, N, S)
        if relevance is None:
            return self._blocks(others, length - 1)
        number = min(self.options.kept_tokens, length - 1)
        kept = relevance.masked_fill(~others, -torch.inf).topk(number, dim=-1).indices.sort(dim=-1).values  # (G, N, K)
        present = others.gather(2, kept)
        order, pooled = self._blocks(others.scatter(2, kept, False), length - 1 - number)
        alone = F.pad(present.unsqueeze(-1), (0, self.ratio - 1))  # (G, N, K, R)
        return torch.cat([kept.unsqueeze(-1).expand_as(alone), order], 2), torch.cat([alone, pooled], 2)

    def _blocks(self, others: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Blocks of R of the tokens that are True in ``others`` (G, N, S), of which each input has at most ``most``."""
        length, blocks = others.shape[2], -(-most // self.ratio)
        order = torch.argsort((~others).to(torch.uint8), dim=-1, stable=True)  # own tokens first
        size = blocks * self.ratio
        order = F.pad(order, (0, max(size - length, 0)))[..., :size]
        present = torch.arange(size, device=order.device) < others.sum(dim=-1, keepdim=True)  # (G, N, size)
        shape = (blocks, self.ratio)
        return order.unflatten(-1, shape), present.unflatten(-1, shape)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return self.own_state(answers, own)  # (G, N, d)
