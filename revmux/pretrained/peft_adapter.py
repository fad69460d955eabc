"""PEFT adapters with a classification head, as PEFT and the hub have them: their files. See :mod:`revmux.pretrained.peft_model`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from transformers import AutoConfig

from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.location import CONFIG_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, check_task_type, peft_settings

HEADS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")
"""The last linear map of the heads of Transformers, whose rows are the classes."""
_FILES = (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    CONFIG_NAME,
    "task.json",
    "token*",
    "special_tokens*",
    "vocab*",
    "merges*",
)
_PREFIX = "base_model.model."
_PLAIN_LORA = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings of LoRA that may have any value, because the saved weights already reflect them or because they are read here."""
_PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}
"""Values of other settings, besides those that mean no, that change nothing once the adapter is trained."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that PEFT saved.

    Attributes:
        folder: its local folder.
        settings: the content of ``adapter_config.json``.
    """

    folder: Path
    settings: dict[str, Any]

    @property
    def base(self) -> str:
        """Folder or hub id of the model that it was tuned on."""
        return str(self.settings["base_model_name_or_path"])

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of that model on the hub."""
        revision = self.settings.get("revision")
        return None if revision is None else str(revision)

    def saved_weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the saved weights, by their names in the model.

        Raises:
            UserError: the file is missing or damaged.
        """
        file = self.folder / PEFT_WEIGHTS_NAME
        try:
            with safe_open(file, "pt") as weights:
                return {
                    name.removeprefix(_PREFIX): tuple(weights.get_slice(name).get_shape())
                    for name in weights.keys()  # noqa: SIM118  # it is no dictionary
                }
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def weights(self) -> dict[str, Tensor]:
        """The saved weights, by their names in the model. They are in memory, so the file may change afterwards.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            found = load((self.folder / PEFT_WEIGHTS_NAME).read_bytes())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None
        return {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}

    def _unreadable(self, error: Exception) -> UserError:
        file = self.folder / PEFT_WEIGHTS_NAME
        return UserError(f"cannot read {file} ({error}); save the adapter again, with safe serialization")

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter consists of low-rank updates of weights, and of whole weights, alone."""
        settings = self.settings
        return settings["peft_type"] == "LORA" and all(
            name in _PLAIN_LORA or not value or value in _PLAIN_VALUES.get(name, ()) for name, value in settings.items()
        )

    def factor(self, rank: int) -> float:
        """The factor of LoRA's updates of a rank."""
        alpha = self.settings["lora_alpha"]
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def label_names(self) -> list[str] | None:
        """The classes: those of ``config.json`` beside the adapter, or ``LABEL_0`` and so on; None without a saved head."""
        if (self.folder / CONFIG_NAME).is_file():
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            return [config.id2label[index] for index in range(config.num_labels)]
        saved = self.saved_weights()
        classes = next((saved[f"{head}.weight"][0] for head in HEADS if f"{head}.weight" in saved), None)
        return None if classes is None else [f"LABEL_{index}" for index in range(classes)]


def read_peft_adapter(location: str, revision: str | None = None) -> PeftAdapter | None:
    """The adapter in a folder or hub repository, or None if it contains a whole model.

    Args:
        location: a folder, or a Hugging Face id.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: it is an adapter, but not one with a classification head, or its files cannot be downloaded.
    """
    folder: Path | None = Path(location)
    if not Path(location).is_dir():
        if hub.cached_folder(location, revision, "model.safetensors") is not None:
            return None
        if hub.optional_file(location, PEFT_CONFIG_NAME, revision) is None:
            return None
        folder = hub.fetch(location, revision, _FILES)
    assert folder is not None
    settings = peft_settings(folder)
    if settings is None:
        return None
    check_task_type(location, settings)
    return PeftAdapter(folder, settings)
