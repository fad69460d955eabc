"""Token split: the shared sequence is divided over tokens, not channels (after ConcatPlexer).

After layer l each input keeps its answer token whole and has its other tokens pooled, N neighbours into one of full
width; the N shortened inputs lie side by side in one sequence of about S + N tokens, which do not read each other::

    x   = concat of N neighbouring tokens, absent ones 0, times N / (tokens present)
    p   = W x + mlp(x)                                   # W starts as the mean, mlp at zero
    ĥ_k = ô_k + correct([ô_k ; h_k])                     # starts at zero; h_k is the input's own prefilled answer state

So a frozen layer sees tokens of the kind that it knows, and every input is answered at its own answer token.
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
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class TokenSplitOptions:
    """Settings of the token split.

    Args:
        skip: let the correction of the answer state read the input's own prefilled answer state as well.
        pooling_width: width of the pooling MLP's middle layer; None is d, 0 leaves the MLP out.
        exit_layer: e, the layer after which the shared pass is left; None is the last.
        tune_backbone: train the backbone too.
    """

    skip: bool = True
    pooling_width: int | None = None
    exit_layer: int | None = None
    tune_backbone: bool = False


class NeighbourPooling(nn.Module):
    """N neighbouring tokens to one; at the start, their mean.

    Args:
        num_neighbours: N.
        hidden: d.
        width: middle width of the MLP, 0 for none.
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
        """Blocks of neighbours to one token each.

        Args:
            tokens: (..., N, d).
            present: (..., N) bool, the tokens that count; a block's weights are shared among these.

        Returns:
            (..., d).
        """
        # A quotient of integers would have the process's default dtype, which loading a model changes for a while.
        count = present.sum(dim=-1, keepdim=True).clamp(min=1).to(torch.float32)  # (..., 1)
        weight = present * (self.num_neighbours / count)  # (..., N)
        block = (tokens * weight.unsqueeze(-1).to(tokens.dtype)).flatten(-2)  # (..., N·d)
        pooled = self.linear(block)
        if self.inner is None or self.outer is None:
            return pooled
        return pooled + self.outer(F.gelu(self.inner(block)))


@register_method
class TokenSplit(Method):
    """Pooled inputs side by side in one shared sequence."""

    name: ClassVar[str] = "token-split"
    marks: ClassVar[tuple[str, str]] = ("^", "triangle-up")
    Options: ClassVar[type] = TokenSplitOptions

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if num_inputs < 2:
            raise UserError(f"token-split takes N = 2 or more inputs, not N = {num_inputs}; use siso for N = 1")
        settings, hidden = self.options, shape.hidden_size
        self.tunes_backbone = settings.tune_backbone
        self.last_layer = checked_exit_layer(self.name, settings.exit_layer, shape.num_layers)
        width = hidden if settings.pooling_width is None else settings.pooling_width
        if width < 0:
            raise UserError(f"token-split: pooling_width is {width}; choose 0 (no MLP) or more")
        self.pooling = NeighbourPooling(num_inputs, hidden, width)
        self.correct_inner = nn.Linear((2 if settings.skip else 1) * hidden, hidden)
        self.correct_outer = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.correct_outer.weight)
        nn.init.zeros_(self.correct_outer.bias)

    def exit_layer(self) -> int:
        return self.last_layer

    def multiplex(self, states: HiddenState) -> HiddenState:
        if states.decoder is not None:
            raise UserError(
                "token-split divides one token sequence, but this backbone's decoder reads the text as well; "
                "choose revmux or an encoder-only backbone"
            )
        groups, num_inputs, _, _ = states.hidden.shape
        order, present = self.neighbours(states)  # (G, N, P-1, N) both
        flat = order.flatten(2).unsqueeze(-1).expand(-1, -1, -1, states.hidden.shape[-1])  # (G, N, (P-1)·N, d)
        tokens = states.hidden.gather(2, flat).unflatten(2, order.shape[2:])  # (G, N, P-1, N, d)
        pooled = self.pooling(tokens, present)  # (G, N, P-1, d)

        def with_answer(of_blocks: Tensor, of_answer: Tensor) -> Tensor:
            """Blocks (G, N, P-1, ...) and answer token (G, N, 1, ...) to one sequence a group (G, N·P, ...)."""
            # A causal answer token reads what stands before it; a CLS stands first.
            parts = [of_answer, of_blocks] if self.shape.shared_answer else [of_blocks, of_answer]
            return torch.cat(parts, dim=2).flatten(1, 2)

        def at_blocks(of_tokens: Tensor) -> Tensor:
            """Values of tokens (G, N, S), to the members of each block (G, N, P-1, N)."""
            return of_tokens.gather(2, order.flatten(2)).unflatten(2, order.shape[2:])

        answer = states.answer  # (G, N, 1)
        answer_state = states.hidden.gather(2, answer.unsqueeze(-1).expand(-1, -1, -1, states.hidden.shape[-1]))
        filled = with_answer(present.any(dim=-1), torch.ones_like(answer, dtype=torch.bool))  # (G, N·P)
        block_length = filled.shape[1] // num_inputs  # P
        owner = torch.arange(1, num_inputs + 1, device=filled.device).repeat_interleave(block_length)  # (N·P,)
        starts = torch.arange(num_inputs, device=filled.device) * block_length  # (N,)
        places = starts if self.shape.shared_answer else starts + block_length - 1
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
            answer=places.expand(groups, -1),  # (G, N)
            depth=states.depth,
            positions=positions,
            segments=filled * owner,
            spans=spans,
        )

    def neighbours(self, states: HiddenState) -> tuple[Tensor, Tensor]:
        """Each input's own tokens but its answer token, in order, in blocks of N.

        Only the input's own tokens are counted, on whichever side the padding is, so padding changes nothing.

        Returns:
            Their places (G, N, P-1, N) long and whether there is such a token (G, N, P-1, N) bool,
            P = 1 + ⌈(S-1) / N⌉.
        """
        length = states.hidden.shape[2]
        blocks = -(-(length - 1) // self.num_inputs)
        place = torch.arange(length, device=states.hidden.device)
        others = states.mask & (place != states.answer)  # (G, N, S)
        order = torch.argsort((~others).to(torch.uint8), dim=-1, stable=True)  # own tokens first
        size = blocks * self.num_inputs
        order = F.pad(order, (0, max(size - length, 0)))[..., :size]
        present = torch.arange(size, device=order.device) < others.sum(dim=-1, keepdim=True)  # (G, N, size)
        shape = (blocks, self.num_inputs)
        return order.unflatten(-1, shape), present.unflatten(-1, shape)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        known = torch.cat([answers, own], dim=-1) if self.options.skip else answers  # (G, N, 2d or d)
        return answers + self.correct_outer(F.gelu(self.correct_inner(known)))
