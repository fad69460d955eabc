"""Tiny encoder-decoders and decoders with random weights, whole and cut, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    BartForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForSequenceClassification,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from revmux import BackboneShape, HiddenState, MultiplexedClassifier, build_method, cut
from revmux.backbone import TokenBatch, Verbalizer
from revmux.backbone.generative import GenerativeBackbone

LAYERS, WIDTH, VOCABULARY, LABELS = 3, 32, 60, 3
PAD, END, START = 1, 2, 3
LENGTHS = (9, 4, 7, 6)
WORDS = Verbalizer(("no", "maybe", "yes"), ((11,), (25,), (40,)))
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START, "num_labels": LABELS}
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SPECIAL}
ROTARY: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
T5: dict[str, Any] = {
    **SHAPE,
    "d_kv": 8,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,  # fewer than tokens, so that logarithmic buckets are used
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": START,
}
BART: dict[str, Any] = {
    **SHAPE,
    "decoder_layers": 2,
    "scale_embedding": True,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5-words": lambda: T5ForConditionalGeneration(tiny_config("t5", **T5)),
    "t5-gated-words": lambda: T5ForConditionalGeneration(
        tiny_config("t5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "t5-head": lambda: T5ForSequenceClassification(tiny_config("t5", **T5)),
    "bart-words": lambda: BartForConditionalGeneration(tiny_config("bart", **BART)),
    "bart-head": lambda: BartForSequenceClassification(tiny_config("bart", **BART)),
    "llama-words": lambda: LlamaForCausalLM(tiny_config("llama", **ROTARY)),
    "llama-head": lambda: LlamaForSequenceClassification(tiny_config("llama", **ROTARY)),
    "mistral-words": lambda: MistralForCausalLM(tiny_config("mistral", **ROTARY, sliding_window=3)),
    "qwen2-words": lambda: Qwen2ForCausalLM(
        tiny_config("qwen2", **ROTARY, use_sliding_window=True, sliding_window=3, layer_types=SLIDING)
    ),
    "qwen3-head": lambda: Qwen3ForSequenceClassification(tiny_config("qwen3", **ROTARY)),
    "gpt2-words": lambda: GPT2LMHeadModel(tiny_config("gpt2", **SHAPE)),
    "gpt2-head": lambda: GPT2ForSequenceClassification(tiny_config("gpt2", **SHAPE)),
}
ALL = pytest.mark.parametrize("name", MODELS)
WITH_WORDS = pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-words")])
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


@cache
def whole(name: str, attention: str = "sdpa") -> Any:
    """A random model whose weights are large enough that every mask, position and norm affects its scores."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.2 * noise)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.set_attn_implementation(attention)
    return model


def backbone_of(name: str, attention: str = "sdpa", verbalizer: Verbalizer = WORDS) -> GenerativeBackbone:
    backbone = cut(whole(name, attention), verbalizer if name.endswith("-words") else None)
    assert isinstance(backbone, GenerativeBackbone)
    backbone.freeze()
    return backbone


def batch(side: str = "right", extra: int = 0, junk: int = PAD) -> TokenBatch:
    """Inputs of LENGTHS tokens that end with END, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS) + extra
    ids = torch.full((len(LENGTHS), width), junk)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        text = torch.randint(4, VOCABULARY, (length,), generator=generator)
        text[-1] = END
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def is_decoder(name: str) -> bool:
    return name.split("-")[0] in DECODERS


def vocabulary_scores(name: str, tokens: TokenBatch, attention: str = "sdpa", **embeddings: Any) -> Tensor:
    """Return the whole language model's vocabulary scores at the answer, (B, V)."""
    model, rows = whole(name, attention), torch.arange(len(LENGTHS))
    inputs = embeddings or {"input_ids": tokens["input_ids"]}
    if is_decoder(name):
        mask = tokens["attention_mask"]
        last = (torch.arange(mask.shape[1]) * mask).argmax(dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(**inputs, attention_mask=mask, position_ids=positions).logits[rows, last]
    start = torch.full((len(LENGTHS), 1), START)
    return model(**inputs, attention_mask=tokens["attention_mask"], decoder_input_ids=start).logits[:, -1]


def side_by_side(state: HiddenState) -> HiddenState:
    """Put all rows of a state into one sequence, each as its own segment."""
    rows, length = state.mask.shape
    number = torch.arange(1, rows + 1).unsqueeze(1)
    return HiddenState(
        hidden=state.hidden.flatten(0, 1).unsqueeze(0),
        mask=state.mask.view(1, -1),
        answer=(state.answer + (number - 1) * length).view(1, -1),
        depth=state.depth,
        positions=None if state.positions is None else state.positions.reshape(1, -1),
        segments=(state.mask * number).view(1, -1),
        decoder=None if state.decoder is None else side_by_side(state.decoder),
    )


def multiplexer(backbone: GenerativeBackbone, depth: int, seed: int = 0) -> MultiplexedClassifier:
    torch.manual_seed(seed)
    method = build_method("revmux", BackboneShape.of(backbone), 2, {"zero_init": False})
    return MultiplexedClassifier(backbone, method, depth).eval()
