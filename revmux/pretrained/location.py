"""The location of a model: an embedded model, a folder or GGUF file, or a hub id. No large library is imported."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_MODELS, EMBEDDED_NAME, EMBEDDED_PACKAGE, SMOLLM2_NAME, BackboneConfig
from revmux.pretrained.gguf import SMOLLM2, SUFFIX, converted_model, packaged_model
from revmux.utils.copies import local_path
from revmux.utils.extras import check_extras
from revmux.utils.files import recover_folder

CONFIG_NAME = "config.json"
PROMPT_NAME = "prompt.json"
"""File name of the prompt that a task model was tuned with, next to its configuration."""
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"


def locate(model: str) -> str:
    """The folder or hub id that a model name stands for. Weights are not read, except once to copy or convert them.

    Args:
        model: see :class:`BackboneConfig`.

    Raises:
        UserError: an embedded model is not installed and cannot be downloaded, a folder is missing or contains no model, a
            URI cannot be copied, or a GGUF file cannot be converted.
    """
    if model == SMOLLM2_NAME:
        return str(packaged_model(SMOLLM2))
    if model == EMBEDDED_NAME:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(f"the embedded backbone {model} is not installed; run: pip install 'revmux[minilm]'")
        return str(Path(spec.origin).parent / "model")
    path = local_path(model)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise UserError(f"cannot find GGUF file {model!r}; name an existing file")
        return str(converted_model(path))
    recover_folder(path)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file() and peft_settings(path) is None:
            raise UserError(f"folder {model!r} contains no {CONFIG_NAME}; name a folder that save_pretrained wrote")
        return str(path)
    # A hub id is NAME or USER/NAME.
    if path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(
            f"cannot find folder {model!r}; name an existing folder, a Hugging Face id, or {' or '.join(EMBEDDED_MODELS)}"
        )
    return model


def peft_settings(folder: Path) -> dict[str, Any] | None:
    """The configuration of the PEFT adapter in a folder; None if the folder contains none, or a whole model.

    Raises:
        UserError: the configuration is damaged.
    """
    file = folder / PEFT_CONFIG_NAME
    if not file.is_file() or any(weights.name != PEFT_WEIGHTS_NAME for weights in folder.glob("*.safetensors")):
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not a valid adapter configuration ({error}); save the adapter again") from None
    # RevMUX's own adapters have a file of this name, too.
    return settings if isinstance(settings, dict) and "peft_type" in settings else None


def check_task_type(model: str, settings: Mapping[str, Any]) -> None:
    """Check that a PEFT adapter classifies and that its base model is named.

    Raises:
        UserError: it does not, or the name is missing.
    """
    if settings.get("task_type") != "SEQ_CLS":
        raise UserError(
            f"the PEFT adapter {model!r} has the task_type {settings.get('task_type')!r}; name one with a classification "
            "head, of task_type SEQ_CLS"
        )
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise UserError(f"the PEFT adapter {model!r} does not name its base model; add base_model_name_or_path")


def check_model(config: BackboneConfig, needs_answers: bool = True) -> None:
    """Check a model as far as possible without importing torch and transformers.

    Args:
        config: the model. A hub id is not checked.
        needs_answers: whether the model must have a trained classification head or a prompt.

    Raises:
        UserError: as in :func:`locate`, the configuration is damaged, or the model has neither a head nor a prompt.
    """
    folder = Path(locate(config.model))
    if not folder.is_dir():
        return
    if (adapter := peft_settings(folder)) is not None:
        check_task_type(config.model, adapter)
        check_extras("peft")
        base = replace(config, model=adapter["base_model_name_or_path"], revision=adapter.get("revision"))
        check_model(base, needs_answers=False)
        return
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        architectures = list(settings.get("architectures") or [])
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder / CONFIG_NAME} is not a valid model configuration ({error}); save the model again"
        ) from None
    if needs_answers and config.prompt is None and not has_head(architectures) and not (folder / PROMPT_NAME).is_file():
        raise no_answers(config.model, architectures)


def has_head(architectures: Sequence[str] | None) -> bool:
    """Whether the ``architectures`` of a model's configuration include a classification head."""
    return any("SequenceClassification" in name for name in architectures or [])


def no_answers(model: str, architectures: Sequence[str] | None) -> UserError:
    """The error for a model that has neither a classification head nor a prompt, with the remedies."""
    names = list(architectures or ["model"])
    remedy = f"tune a task model first: revmux finetune --backbone.model {model}"
    if any("ForCausalLM" in name or "ForConditionalGeneration" in name for name in names):
        remedy += ", or let it answer by label words: --backbone.prompt sst2 (or another prompt)"
    return UserError(f"{model} is a {', '.join(names)} without a trained classification head; {remedy}")
