"""Models whose operations and memory are estimated: tiny ones of every family, and methods without weights."""

import torch
from tiny_models import tiny_classifier, tiny_config
from transformers import T5ForConditionalGeneration

from revmux import BackboneShape, build_method, cut
from revmux.backbone import Backbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.methods import Method

BERT = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

TINY: dict[str, dict] = {
    "bert": {},
    "electra": {"embedding_size": 32},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "share_att_key": True,
        "attn_implementation": None,  # there is only one implementation
    },
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "roberta": {"pad_token_id": 1},
    "distilbert": {},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "llama": {"num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {},
    "bart": {"pad_token_id": 1},
    "t5": {"d_kv": 24, "decoder_start_token_id": 0},
}


def tiny(family: str) -> Backbone:
    settings = {**BERT, "attn_implementation": "eager", **TINY[family]}
    if family != "t5":
        return tiny_classifier(family, num_labels=2, **settings)
    torch.manual_seed(0)
    words = Verbalizer(label_names=("no", "yes"), token_ids=((3,), (4,)))
    return cut(T5ForConditionalGeneration(tiny_config("t5", **settings)), words).freeze()


def on_meta(backbone: Backbone, name: str, num_inputs: int, options: dict | None = None) -> Method:
    with torch.device("meta"):
        return build_method(name, BackboneShape.of(backbone), num_inputs, options)
