"""Attention masks of decoders: causal, sliding window, concatenated inputs, and cross-attention to an encoder's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from revmux.backbone.base import as_attention_mask, dense
from revmux.backbone.state import HiddenState


def causal_mask(config: Any, state: HiddenState, window: int | None = None) -> Tensor | None:
    """The tokens that each decoder token attends to: itself, the earlier tokens of its own input, and a constant prefix.

    Args:
        config: configuration of the attending module, with its attention implementation and sliding window.
        state: (B, S, d).
        window: size of the sliding window in positions, or None.

    Returns:
        (B, 1, S, S), or (B, 1, S, P + S) after a prefix of P tokens, in the form that the implementation expects; None if
        its built-in causal mask is enough.
    """
    if state.segments is None and state.prefix is None:
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        mask = make(
            config=config,
            inputs_embeds=state.hidden,
            attention_mask=state.mask,
            past_key_values=None,
            position_ids=state.positions,
        )
        return dense(mask)
    segments = state.mask.long() if state.segments is None else state.segments
    rows, columns = segments.unsqueeze(2), segments.unsqueeze(1)  # (B, S, 1), (B, 1, S)
    seen = ((rows == columns) & (columns > 0)).tril()  # (B, S, S)
    if window is not None and state.positions is not None:
        seen &= state.positions.unsqueeze(2) - state.positions.unsqueeze(1) < window
    # Padding attends to itself, so that no softmax is over an empty set.
    seen |= torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    if state.prefix is not None:
        before = seen.new_ones(*seen.shape[:2], len(state.prefix))  # (B, S, P)
        if window is not None and state.positions is not None and state.prefix.positions is not None:
            before &= state.positions.unsqueeze(2) - state.prefix.positions.unsqueeze(1) < window
        seen = torch.cat([before, seen], dim=-1)  # (B, S, P + S)
    return as_attention_mask(seen, state.hidden.dtype, config._attn_implementation)


def cross_mask(config: Any, stream: HiddenState, memory: HiddenState) -> Tensor | None:
    """The tokens of the encoder's memory that each decoder token attends to.

    Args:
        config: configuration of the decoder.
        stream: (B, T, d).
        memory: (B, S, d); if both have segments, a token attends to its own input only.

    Returns:
        (B, 1, T, S) in the form that the implementation expects; None if every token attends to the whole memory.
    """
    if stream.segments is None or memory.segments is None:
        mask = create_bidirectional_mask(
            config=config,
            inputs_embeds=stream.hidden,
            attention_mask=memory.mask,
            encoder_hidden_states=memory.hidden,
        )
        return dense(mask)
    rows, columns = stream.segments.unsqueeze(2), memory.segments.unsqueeze(1)  # (B, T, 1), (B, 1, S)
    seen = (rows == columns) & (columns > 0)  # (B, T, S)
    seen |= ~seen.any(dim=-1, keepdim=True)  # padding of the stream attends to everything rather than nothing
    return as_attention_mask(seen, stream.hidden.dtype, config._attn_implementation)
