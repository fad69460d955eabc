"""A tiny task model, and adapters that answer every input as the model alone would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from revmux.artifact import describe, save_pretrained
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained import BackboneConfig, Pretrained, load_pretrained

WORDS = [f"w{index}" for index in range(60)]
CUT = 1


def write_model(folder: Path) -> Path:
    """A tiny BERT whose layers above the cut leave a state as it is.

    A token-split adapter that was never trained then answers every input as the plain model does, whoever else is
    in its group: an answer that went to the wrong input shows.
    """
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ok", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=66,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config)
    for layer in model.bert.encoder.layer[CUT:]:
        for part in (layer.attention.output.dense, layer.output.dense):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def load(folder: Path) -> Pretrained:
    return load_pretrained(BackboneConfig(model=str(folder), max_length=64))


def write_adapter(
    folder: Path,
    pretrained: Pretrained,
    num_inputs: int,
    prefill_layers: int = CUT,
    method: str = "token-split",
    **more: Any,
) -> Path:
    torch.manual_seed(num_inputs)
    adapters = build_method(method, BackboneShape.of(pretrained.backbone), num_inputs, more)
    model = MultiplexedClassifier(pretrained.backbone, adapters, prefill_layers)
    return save_pretrained(model, describe(model, pretrained, 64, {"source": "toy"}), folder / f"{method}-{num_inputs}")


def text(index: int) -> str:
    """Texts of 1 to 20 words, most of them different."""
    return " ".join(WORDS[(index * 7 + place * (index % 11 + 1)) % 60] for place in range(1 + index % 20))


def plain_scores(pretrained: Pretrained, texts: list[str]) -> Tensor:
    """(B, C) scores of the plain model on one padded batch."""
    with torch.inference_mode():
        return pretrained.backbone(dict(pretrained.tokenizer(texts, padding=True, return_tensors="pt")))
