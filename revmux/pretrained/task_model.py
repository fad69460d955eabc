"""Task models on disk, in Hugging Face format, with the prompt and soft prompt that they were tuned with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from revmux.backbone.soft_prompt import SoftPrompt
from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_MODELS
from revmux.pretrained.location import PROMPT_NAME

if TYPE_CHECKING:
    from revmux.pretrained.pretrained import Pretrained

SOFT_PROMPT_NAME = "soft_prompt.safetensors"
TASK_NAME = "task.json"


def save_task_model(pretrained: Pretrained, folder: str | Path, pairs: bool | None = None) -> Path:
    """Save a backbone, which :func:`revmux.pretrained.loading.load_pretrained` can load again.

    A backbone that was tuned by PEFT's LoRA is saved as PEFT's adapter, with the configuration of the whole model.

    Args:
        pretrained: the backbone, with or without a prompt.
        folder: the target folder, created if it is missing.
        pairs: whether the backbone was tuned on pairs of texts; None if this is not known.

    Returns:
        The target folder.
    """
    folder = Path(folder)
    model = pretrained.backbone.model
    if getattr(model, "_hf_peft_config_loaded", False):
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path, adapter.revision = _base_of(pretrained)
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
    model.save_pretrained(folder)
    pretrained.tokenizer.save_pretrained(folder)
    if pretrained.prompt is not None:
        text = json.dumps(pretrained.prompt.to_dict(), indent=2, ensure_ascii=False)
        (folder / PROMPT_NAME).write_text(text + "\n", encoding="utf-8")
    if pairs is not None:
        (folder / TASK_NAME).write_text(json.dumps({"pairs": pairs}) + "\n", encoding="utf-8")
    soft_prompt = getattr(pretrained.backbone, "soft_prompt", None)
    if soft_prompt is not None:
        save_file({"vectors": soft_prompt.vectors.detach().cpu()}, folder / SOFT_PROMPT_NAME)
    return folder


def _base_of(pretrained: Pretrained) -> tuple[str, str | None]:
    """The name and revision by which an adapter finds the model that it was tuned on."""
    name, location = pretrained.identity["name"], Path(pretrained.backbone.model.name_or_path)
    if name in EMBEDDED_MODELS:
        return name, None
    return (str(location.absolute()), None) if location.is_dir() else (str(name), pretrained.identity["revision"])


def read_prompt(location: str, revision: str | None = None) -> Prompt | None:
    """The prompt that a model was tuned with, or None.

    Args:
        location: a folder, or a Hugging Face id.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: the hub cannot be reached, and the local cache does not show whether the model has a prompt.
    """
    file = _file(location, PROMPT_NAME, revision)
    return None if file is None else Prompt.from_dict(json.loads(file.read_text(encoding="utf-8")))


def read_pairs(location: str) -> bool | None:
    """Whether a task model was tuned on pairs of texts; None if its folder does not record this, or for a hub id."""
    file = Path(location) / TASK_NAME
    if not file.is_file():
        return None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    pairs = recorded.get("pairs") if isinstance(recorded, dict) else None
    return pairs if isinstance(pairs, bool) else None


def read_soft_prompt(location: str, revision: str | None = None) -> SoftPrompt | None:
    """The soft prompt of a model, or None. The arguments and errors are those of :func:`read_prompt`."""
    file = _file(location, SOFT_PROMPT_NAME, revision)
    return None if file is None else SoftPrompt(load_file(file)["vectors"])


def _file(location: str, name: str, revision: str | None) -> Path | None:
    folder = Path(location)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(location, name, revision=revision))
    except LocalEntryNotFoundError as error:  # no network; the repository may still have the file
        if try_to_load_from_cache(location, name, revision=revision) is _CACHED_NO_EXIST:
            return None
        raise UserError(
            f"cannot determine whether {location!r} has a {name}: it is not cached here, and the hub cannot be reached "
            f"({type(error).__name__}); load the model once with a network, or name a local folder"
        ) from None
    except EntryNotFoundError:
        return None
