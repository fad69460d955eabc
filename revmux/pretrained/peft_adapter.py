"""PEFT adapters with a classification head, as PEFT and the hub have them, as task models.

The adapter is merged into the model that it was tuned on. Only the layers that it changes differ from that model's, so a
server keeps all others in memory once for all adapters on one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.location import CONFIG_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, check_task_type, peft_settings
from revmux.utils.extras import require

_HEADS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")
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
                    name.removeprefix("base_model.model."): tuple(weights.get_slice(name).get_shape())
                    for name in weights.keys()  # noqa: SIM118  # it is no dictionary
                }
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file} ({error}); save the adapter again, with safe serialization") from None

    def label_names(self) -> list[str] | None:
        """The classes: those of ``config.json`` beside the adapter, or ``LABEL_0`` and so on; None without a saved head."""
        if (self.folder / CONFIG_NAME).is_file():
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            return [config.id2label[index] for index in range(config.num_labels)]
        saved = self.saved_weights()
        classes = next((saved[f"{head}.weight"][0] for head in _HEADS if f"{head}.weight" in saved), None)
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


def merged_config(adapter: PeftAdapter, base: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the merged model.

    Args:
        adapter: the adapter.
        base: the configuration of its base model.

    Raises:
        UserError: neither the adapter nor its base model has a classification head.
    """
    names = adapter.label_names()
    if names is None:
        if not any("SequenceClassification" in name for name in base.architectures or []):
            raise UserError(
                f"adapter {str(adapter.folder)!r} contains no classification head, and neither does {adapter.base}; save "
                "it with modules_to_save, or with task_type SEQ_CLS"
            )
        return base
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(base)]
    base.architectures = [classifier.__name__]
    base.id2label = dict(enumerate(names))
    base.label2id = {name: index for index, name in enumerate(names)}
    return base


def load_merged(
    adapter: PeftAdapter, base_location: str, config: PretrainedConfig, **arguments: Any
) -> PreTrainedModel:
    """Load the base model and merge the adapter into it.

    Args:
        adapter: the adapter.
        base_location: folder or hub id of its base model.
        config: the configuration of the merged model.
        arguments: arguments of ``from_pretrained``.

    Raises:
        UserError: the package peft is missing, PEFT cannot load or merge the adapter, or weights of the head are missing.
    """
    peft = require("peft", "peft")
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        base_location, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **arguments
    )
    saved = adapter.saved_weights()
    new = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    _check_complete(adapter, [name for name in new if name not in saved])
    try:
        tuned = peft.PeftModel.from_pretrained(model, str(adapter.folder))
        merged = tuned.merge_and_unload(safe_merge=True)
    except (AttributeError, ImportError, NotImplementedError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"PEFT cannot merge adapter {str(adapter.folder)!r} of type {adapter.settings['peft_type']} into "
            f"{adapter.base} ({type(error).__name__}: {error}); only adapters that change weights, such as LoRA, can be "
            "merged"
        ) from None
    assert isinstance(merged, PreTrainedModel)
    return merged


def _check_complete(adapter: PeftAdapter, missing: Sequence[str]) -> None:
    """Refuse an adapter whose answers would depend on weights that nobody trained."""
    if missing:
        raise UserError(
            f"neither adapter {str(adapter.folder)!r} nor {adapter.base} contains {', '.join(sorted(missing)[:3])}, so its "
            "answers would be random; train it with modules_to_save that names these modules"
        )
