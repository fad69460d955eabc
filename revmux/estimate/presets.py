"""Shapes of well-known models by name. This module imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_MODELS

PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert"},
    "bert-large": {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "t5-small": {
        "model_type": "t5",
        "decoder_start_token_id": 0,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
    },
    "t5-base": {
        "model_type": "t5",
        "decoder_start_token_id": 0,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
    },
    "t5-large": {
        "model_type": "t5",
        "decoder_start_token_id": 0,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 4096,
        "num_layers": 24,
        "num_heads": 16,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
"""Settings of the paper's backbones and of a larger LLaMA, as in ``config.json``; missing ones have the defaults of the model type."""


@dataclass(frozen=True)
class StageShape:
    """An adapter whose memory is estimated.

    Args:
        method: Name of the method.
        num_inputs: Width N. Default: 2, or the only N that the method supports.
        prefill_layers: Number of prefill layers l. Default: half of the layers.
        options: Options of the method by name.
    """

    method: str = "revmux"
    num_inputs: int | None = None
    prefill_layers: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def check_shape_name(model: str) -> None:
    """Check that a name is a preset, an embedded model or a model folder.

    Raises:
        UserError: it is none of these; the message lists the presets.
    """
    names = (*PRESETS, *EMBEDDED_MODELS)
    if model not in names and not (Path(model).expanduser() / "config.json").is_file():
        raise UserError(
            f"model is {model!r}, neither one of {', '.join(names)} nor a folder with a config.json; choose one of these"
        )
