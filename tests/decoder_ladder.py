"""A tiny random LLaMA with a chat prompt, and a ladder on it: an exit head, a group of two, the plain model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import WORDS, write_language_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from revmux.adapters.folder import describe_adapter, load_adapter, save_adapter
from revmux.fallback import confidence
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

CHAT_TEMPLATE = "{% for message in messages %}<s> Text: {{ message['content'] }} Answer: {% endfor %}"
PROMPT = {"template": "Is it bad or good? {text}", "labels": {"bad": ["bad"], "good": ["good"]}, "chat": True}
CONSTANT = 7
"""Tokens before every text: ``<s> Text: Is it bad or good?``"""
MAX_LENGTH = 24
LORA_RANK = 2
TEXTS = [" ".join(WORDS[(index * 7 + place * 3) % 40] for place in range(1 + index % 9)) for index in range(32)]


@dataclass(frozen=True)
class DecoderLadder:
    """The files.

    Attributes:
        model: folder of the language model.
        prompt: the prompt's YAML file.
        head: adapter of stage 1, an exit head at layer 2 with LoRA in this layer.
        two: adapter of stage 2, RevMUX with N = 2 and LoRA in layer 3.
    """

    model: Path
    prompt: Path
    head: Path
    two: Path

    @property
    def adapters(self) -> list[str]:
        return [str(self.head), str(self.two)]

    def config(self) -> BackboneConfig:
        return BackboneConfig(str(self.model), max_length=MAX_LENGTH, prompt=str(self.prompt))

    def pretrained(self) -> Pretrained:
        loaded = load_pretrained(self.config())
        loaded.backbone.freeze()
        return loaded


def write_decoder_ladder(folder: Path) -> DecoderLadder:
    """Write the model, the prompt and the adapters. About half of the inputs go on from each stage."""
    model = write_language_model(folder / "chat-llama", "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    prompt = folder / "prompt.yaml"
    prompt.write_text(json.dumps(PROMPT))
    ladder = DecoderLadder(model, prompt, folder / "head", folder / "two")
    pretrained = ladder.pretrained()
    _write(pretrained, ladder.head, "exit-head", 1, 1, 1, {"layer": 2})
    _write(pretrained, ladder.two, "revmux", 2, 2, 2, {"own_state": "mlp", "zero_init": False})
    return ladder


def whole_model_scores(ladder: DecoderLadder, texts: Sequence[str]) -> Tensor:
    """The scores of "bad" and "good" by Transformers alone, each text in one whole pass, (B, 2)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ladder.model)
    model = LlamaForCausalLM.from_pretrained(ladder.model).eval()
    words = tokenizer.convert_tokens_to_ids(["bad", "good"])
    rows = []
    for text in texts:
        written = f"<s> Text: Is it bad or good? {text} Answer:"
        ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows.append(model(ids).logits[0, -1, words])
    return torch.stack(rows)


def _write(
    pretrained: Pretrained,
    folder: Path,
    method: str,
    num_inputs: int,
    prefill_layers: int,
    stage: int,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(stage)
    own = build_method(method, BackboneShape.of(pretrained.backbone), num_inputs, options | {"lora_rank": LORA_RANK})
    model = MultiplexedClassifier(pretrained.backbone, own, prefill_layers)
    for weight in own.parameters():  # no factor stays at its initial zero
        nn.init.normal_(weight, std=0.2)
    save_adapter(model, describe_adapter(model, pretrained, MAX_LENGTH, {"source": "toy"}), folder)
    with torch.no_grad():
        sure = confidence(load_adapter(folder, pretrained)(pretrained.encode(TEXTS, max_length=MAX_LENGTH)))
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"stage": stage, "fallback_threshold": round(float(sure.median()), 3)}
    file.write_text(json.dumps(config))
