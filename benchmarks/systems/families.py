"""Cost and throughput of every system on every backbone family, at one small shape with random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from benchmarks.rows import kept_rows
from benchmarks.systems.grid import SYSTEMS, System, exit_head
from revmux.backbone import Backbone, TokenBatch, Verbalizer, cut, supported_model_types
from revmux.estimate.flops import relative_cost
from revmux.estimate.presets import PRESETS
from revmux.estimate.shapes import GENERATIVE_TYPES, meta_backbone
from revmux.estimate.throughput import paired_throughput
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier, plain_classifier

LAYERS, WIDTH, HEADS, INNER, VOCABULARY, LENGTH, INPUTS = 6, 384, 6, 1536, 2000, 16, 16
PUBLISHED_LENGTH = 128


@dataclass(frozen=True)
class Comparison:
    """A system at one N, built for a backbone.

    Attributes:
        system: the system.
        num_inputs: N.
        model: backbone and method.
    """

    system: System
    num_inputs: int
    model: MultiplexedClassifier

    def row(self, family: str, backbone: str, length: int) -> dict[str, Any]:
        """Return the columns that are counted, not timed."""
        model = self.model
        tuned = model.backbone.parameters() if model.method.tunes_backbone else ()
        return {
            "title": self.system.title,
            "method": self.system.method,
            "family": family,
            "backbone": backbone,
            "num_inputs": self.num_inputs,
            "prefill_layers": model.prefill_layers,
            "tunable_params": model.method.tunable_parameters() + sum(weight.numel() for weight in tuned),
            "cost_counted": relative_cost(model.backbone, model.method, model.prefill_layers, length),
        }


def small_backbone(family: str) -> Backbone:
    """Return six layers of width 384 with random weights: a classifier or, for generative families, with label words."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    names = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    special: dict[str, dict[str, Any]] = {
        "distilbert": {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER},
        "t5": {
            "d_model": WIDTH,
            "d_kv": WIDTH // HEADS,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        "bart": {
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "decoder_start_token_id": 2,
        },
        "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        "deberta-v2": names | {"relative_attention": True, "position_buckets": 64, "pos_att_type": "p2c|c2p"},
        "modernbert": names | {"cls_token_id": 1, "sep_token_id": 2},
    }
    rotary = {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
    shape = special.get(family, names)
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        shape = names | rotary
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **common, **shape)
    if family not in GENERATIVE_TYPES:
        return cut(AutoModelForSequenceClassification.from_config(config)).freeze()
    if config.is_encoder_decoder:
        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    return cut(model, Verbalizer(("no", "yes"), ((10,), (11,)))).freeze()


def comparisons(backbone: Backbone, exit_layers: Iterable[int]) -> Iterator[Comparison]:
    """Yield every system at every N on one backbone, and exit heads at the given layers."""
    shape = BackboneShape.of(backbone)
    for system in [*SYSTEMS, *map(exit_head, exit_layers)]:
        for num_inputs in system.widths:
            options = dict(system.options)
            if system.method == "datamux" and shape.encoder_decoder:
                options["demultiplexer"] = "mlp"  # the encoder reads the index tokens, but the answer is in the decoder
            layer = system.config(num_inputs, backbone.num_layers).prefill_layers
            method = build_method(system.method, shape, num_inputs, options).to(backbone.device)
            yield Comparison(system, num_inputs, MultiplexedClassifier(backbone, method, layer).eval())


def against_siso(
    siso: MultiplexedClassifier, rival: Comparison, batches: Sequence[TokenBatch], pairs: int
) -> dict[str, Any]:
    """Return the measured columns of a row; inputs that do not fill a group are dropped, so that no input runs twice."""
    full = [
        {name: tensor[: len(tensor) - len(tensor) % rival.num_inputs] for name, tensor in tokens.items()}
        for tokens in batches
    ]
    ratio = paired_throughput(siso, rival.model, [tokens for tokens in full if len(tokens["input_ids"])], pairs)
    return {
        "throughput_ratio": round(ratio.median, 3),
        "ratio_min": round(ratio.least, 3),
        "ratio_max": round(ratio.most, 3),
        "pairs": ratio.pairs,
    }


def measure_backbone(backbone: Backbone, batches: Sequence[TokenBatch], pairs: int) -> dict[str, dict[str, Any]]:
    """Return the measured columns of every system on one backbone, by ``TITLE N=N``; weights do not affect speed."""
    siso = plain_classifier(backbone)
    return {
        f"{rival.system.title} N={rival.num_inputs}": against_siso(siso, rival, batches, pairs)
        for rival in comparisons(backbone, range(1, backbone.num_layers))
    }


def measure_family(family: str, pairs: int) -> list[dict[str, Any]]:
    """Return the rows of one family with the throughput of each system, timed in alternation with SISO."""
    backbone = small_backbone(family)
    siso = plain_classifier(backbone)
    torch.manual_seed(1)
    tokens: TokenBatch = {
        "input_ids": torch.randint(20, VOCABULARY - 50, (INPUTS, LENGTH)),
        "attention_mask": torch.ones(INPUTS, LENGTH, dtype=torch.long),
    }
    place, why = f"{LAYERS} layers, d = {WIDTH}, random", "random weights have no accuracy"
    return [
        rival.row(family, place, LENGTH)
        | against_siso(siso, rival, [tokens], pairs)
        | {"accuracy_mean": None, "why": why}
        for rival in comparisons(backbone, [LAYERS // 2])
    ]


def measure_families(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the rows of all families."""
    shape = (LAYERS, WIDTH, HEADS, INNER, VOCABULARY, LENGTH, INPUTS, pairs)
    rows: list[dict[str, Any]] = []
    for family in supported_model_types():
        rows += kept_rows(folder / "timed", family, (shape, SYSTEMS), partial(measure_family, family, pairs))
    return rows


def published_shapes() -> list[dict[str, Any]]:
    """Return rows of the paper's backbones, counted on the meta device without weights or timing."""
    rows = []
    for name in PRESETS:
        backbone = meta_backbone(name)
        with torch.device("meta"):
            found = list(comparisons(backbone, [backbone.num_layers // 2]))
        for rival in found:
            row = rival.row(str(backbone.config.model_type), name, PUBLISHED_LENGTH)
            row |= {"throughput_ratio": None, "accuracy_mean": None}
            rows.append(row | {"why": "counted from shapes alone: the weights are on no package registry"})
    return rows
