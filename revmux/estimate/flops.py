"""What an input costs: counted floating-point operations, and the speed-up that they allow.

Counted are matrix products, two operations a multiply-add: every linear layer by its size and the tokens that it
really gets, and both products of attention. The layers of the backbone are counted by formula from their modules;
embedding, multiplexer, demultiplexer and head are walked through once with tensors that have shapes but no values,
so nothing is computed and a backbone on the meta device, whose weights were never loaded, is counted too.
DeBERTa's projection of its relative positions is not counted: a batch shares it, whatever its size, so its share of
an input shrinks with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from revmux.backbone import Backbone, TokenBatch
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.estimate.fake import call_valueless, valueless, weightless
from revmux.methods import BackboneShape, Method, build_method
from revmux.methods.attention import DotProductAttention
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class Cost:
    """Floating-point operations an input, by stage.

    Attributes:
        prefill: embedding and layers 1..l, alone.
        multiplex: the way into the shared sequence.
        upper: this input's share of layers l+1..e.
        head: a decoder where there is one, demultiplexer and classifier.
    """

    prefill: float
    multiplex: float
    upper: float
    head: float

    @property
    def per_input(self) -> float:
        """All stages together."""
        return self.prefill + self.multiplex + self.upper + self.head


def count_flops(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> Cost:
    """Operations an input of a full group, all inputs as long as the longest.

    Args:
        backbone: cut model, on any device.
        method: adapters for it, on any device.
        prefill_layers: l.
        length: S, tokens an input.

    Raises:
        UserError: l is out of range for this backbone and method.
    """
    model = weightless(MultiplexedClassifier(backbone, method, prefill_layers))
    walk = _Walk(model, length)
    with walk.hooks(), valueless(), torch.no_grad():
        call_valueless(model, walk.run)
    return Cost(**{stage: flops / model.num_inputs for stage, flops in walk.flops.items()})


def relative_cost(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> float:
    """Cost an input over the cost of the same input alone (SISO) on the same backbone; 0.5 is twice as fast."""
    alone = count_flops(backbone, _siso(backbone), 0, length).per_input
    return count_flops(backbone, method, prefill_layers, length).per_input / alone


def resume_cost(backbone: Backbone, prefill_layers: int, length: int) -> float:
    """Cost of an input that resumes alone after layer l, relative to SISO: layers l+1..L, a decoder, the model's head."""
    alone = count_flops(backbone, _siso(backbone), prefill_layers, length)
    return (alone.per_input - alone.prefill) / alone.per_input


def _siso(backbone: Backbone) -> Method:
    return build_method("siso", BackboneShape.of(backbone), 1)


def rival_exit_layer(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> int:
    """The deepest layer, at least 1, at which an exit head costs no more than a method: e/L at most its relative cost."""
    return max(1, int(relative_cost(backbone, method, prefill_layers, length) * backbone.num_layers))


def speedup_ceiling(num_layers: int, prefill_layers: int, num_inputs: int, exit_layer: int | None = None) -> float:
    """N·L / (N·l + e − l): the speed-up over SISO if the cut layers were all that costs; e is L by default.

    An encoder-decoder can be above it: its decoder stands above the cut, and a group shares it too.
    """
    depth = num_layers if exit_layer is None else exit_layer
    layers = num_inputs * prefill_layers + depth - prefill_layers
    return num_inputs * num_layers / layers if layers else math.inf


def linear_flops(module: nn.Module, tokens: float) -> float:
    """Operations of every linear layer inside ``module`` when each gets ``tokens`` tokens."""
    return sum(2 * _linear_size(part) * tokens for part in module.modules() if isinstance(part, (nn.Linear, Conv1D)))


def attention_width(config: Any) -> int:
    """Heads times head width, which is not d in every family."""
    heads = int(config.num_attention_heads)
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return heads * int(head)


def layer_flops(backbone: Backbone, index: int, length: int) -> float:
    """Operations of one layer of the backbone on one sequence of ``length`` tokens."""
    config = backbone.config
    products = 4 * length * length * attention_width(config)
    if getattr(config, "relative_attention", False):
        # DeBERTa's tokens also meet the embeddings of 2 · span relative positions, once for each kind of product.
        span = getattr(config, "position_buckets", -1)
        span = span if span > 0 else config.max_position_embeddings
        products += 4 * length * span * attention_width(config) * len(config.pos_att_type)
    return linear_flops(backbone.layer(index), length) + products


def _linear_size(part: nn.Module) -> int:
    weight: Any = part.weight
    return int(weight.numel())


class _Walk:
    """One group through the model, its operations added up by stage."""

    def __init__(self, model: MultiplexedClassifier, length: int) -> None:
        self.model = model
        self.length = length
        self.stage = "prefill"
        self.flops = dict.fromkeys(("prefill", "multiplex", "upper", "head"), 0.0)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Count every linear layer and attention product that runs inside."""
        kinds = (nn.Linear, Conv1D, DotProductAttention)
        handles = [
            module.register_forward_hook(self._count) for module in self.model.modules() if isinstance(module, kinds)
        ]
        backbone = self.model.backbone
        if isinstance(backbone, EncoderDecoderBackbone):
            handles += [
                layer.register_forward_hook(self._count_decoder_layer, with_kwargs=True)
                for layer in backbone.decoder_layers()
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, DotProductAttention):
            query, key = inputs[0], inputs[1]
            flops = 4 * query.numel() * key.shape[-2]
        else:
            flops = 2 * _linear_size(module) * (output.numel() // output.shape[-1])
        self.flops[self.stage] += flops

    def _count_decoder_layer(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: object
    ) -> None:
        rows, steps, _ = inputs[0].shape
        read = steps + named["encoder_hidden_states"].shape[1]
        self.flops[self.stage] += 4 * rows * steps * read * attention_width(self.model.backbone.config)

    def _run_layers(self, depth: int, to: int, rows: int, length: int) -> None:
        backbone = self.model.backbone
        self.flops[self.stage] += rows * sum(layer_flops(backbone, index, length) for index in range(depth, to))

    def run(self) -> None:
        """Walk; results are in ``flops``."""
        model, backbone, method = self.model, self.model.backbone, self.model.method
        ones = torch.ones(model.num_inputs, self.length, dtype=torch.long)
        tokens: TokenBatch = {"input_ids": ones, "attention_mask": ones}
        tokens, groups = model.slot_tokens(tokens, torch.arange(model.num_inputs).unsqueeze(0))
        state = backbone.embed(tokens)
        self._run_layers(0, model.prefill_layers, model.num_inputs, state.hidden.shape[1])
        state = replace(state, depth=model.prefill_layers)
        own = backbone.own_answers(state)[groups]  # (1, N, d)
        self.stage = "multiplex"
        mixed = model.multiplex(state, groups)  # (1, S', d)
        self.stage = "upper"
        self._run_layers(mixed.depth, method.exit_layer(), 1, mixed.hidden.shape[1])
        self.stage = "head"
        model.answer(replace(mixed, depth=method.exit_layer()), own)
