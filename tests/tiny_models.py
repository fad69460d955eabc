"""Tiny models and tokenizers with random weights, for all tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from revmux import cut
from revmux.backbone import Backbone

WORDS = [f"w{index}" for index in range(40)]
LABELS = ["bad", "good"]
TEMPLATE = ["Text:", "Is", "it", "bad", "or", "good?", "Answer:", "good", "no"]
"""Words of the prompt that are in the vocabulary of the tiny language models."""
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_OWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "distilbert": {
        "hidden_size": ("dim",),
        "num_hidden_layers": ("n_layers",),
        "num_attention_heads": ("n_heads",),
        "intermediate_size": ("hidden_dim",),
    },
    "gpt2": {
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
        "max_position_embeddings": ("n_positions",),
    },
    "bart": {
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("encoder_layers", "decoder_layers"),
        "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
        "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
    },
    "t5": {
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("num_layers", "num_decoder_layers"),
        "num_attention_heads": ("num_heads",),
        "intermediate_size": ("d_ff",),
        "max_position_embeddings": ("n_positions",),
    },
}


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The configuration of a tiny model.

    Args:
        model_type: as in ``config.json``.
        settings: the architecture's settings. Sizes may use BERT's names for every architecture; those left out
            default to :data:`SIZES`. The architecture's own names are used unchanged and take precedence.
    """
    names, own = _OWN_NAMES.get(model_type, {}), {}
    for name, value in {**SIZES, **settings}.items():
        own |= dict.fromkeys(names.get(name, (name,)), value)
    return AutoConfig.for_model(model_type, **{**own, **{name: settings[name] for name in settings if name in own}})


def tiny_classifier(model_type: str, seed: int = 0, **settings: Any) -> Backbone:
    """A frozen classifier of three classes with random weights, cut; see :func:`tiny_config`."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **{"num_labels": 3, **settings})
    return cut(AutoModelForSequenceClassification.from_config(config)).freeze()


def word_tokenizer(names: Sequence[str], unknown: str = "[UNK]") -> Tokenizer:
    """A tokenizer of whole words between spaces; the id of a name is its index."""
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def write_tiny_model(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A random BERT classifier (d = 32, L = 3) and a tokenizer of 40 words, as save_pretrained writes them.

    Args:
        folder: where to write.
        seed: seed of the weights.
        sizes: other sizes of the model.
    """
    torch.manual_seed(seed)
    config = tiny_config(
        "bert",
        **{"vocab_size": len(WORDS) + 4, **sizes},
        initializer_range=0.2,  # so that a random model gives different inputs different scores
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    core = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_language_model(folder: Path, family: str) -> Path:
    """A random language model (d = 32, L = 3) whose tokenizer adds a start token, as LLaMA's, or an end token, as T5's."""
    torch.manual_seed(0)
    names = ["<pad>", "</s>", "<unk>", "<s>", *TEMPLATE, *WORDS]
    core = word_tokenizer(names, "<unk>")
    frame = "<s> $A" if family == "llama" else "$A </s>"
    core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 3), ("</s>", 1)])
    tokens = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if family == "t5" else {})
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)
    if family == "llama":
        config = tiny_config("llama", vocab_size=len(names), initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config = tiny_config(
            "t5",
            vocab_size=len(names),
            d_kv=8,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            initializer_factor=2.0,
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
