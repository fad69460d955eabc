"""Checks that an adapter fits a backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from revmux.adapters.config import NORMALIZED_SINCE, AdapterConfig, dtype_name
from revmux.backbone import Backbone
from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.methods import Method
from revmux.pretrained.pretrained import Pretrained


def check_base(config: AdapterConfig, pretrained: Pretrained, folder: str | Path) -> None:
    """Check that a backbone is the one that an adapter was trained on. A different dtype causes a warning.

    Raises:
        UserError: the weights, the prompt or the labels differ.
    """
    check_model(config, pretrained.identity, folder)
    check_prompt(config, pretrained.prompt, folder)
    if config.label_names != pretrained.backbone.label_names:
        raise UserError(
            f"adapter {str(folder)!r} has the labels {', '.join(config.label_names)}, but the backbone has "
            f"{', '.join(pretrained.backbone.label_names)}; load the task model that it was trained on"
        )
    given = dtype_name(pretrained.backbone.dtype)
    if config.dtype is not None and config.dtype != given:
        warnings.warn(
            f"adapter {str(folder)!r} was trained on a {config.dtype} backbone, but the given backbone is {given}, so scores "
            f"will differ slightly; load the backbone with dtype {config.dtype} to get the scores of training",
            stacklevel=2,
        )


def check_format(config: AdapterConfig, method: Method, backbone: Backbone, folder: str | Path) -> None:
    """Check that a method still reads a backbone's states as it did in training.

    Raises:
        UserError: the adapter was trained on states that have since been normalized.
    """
    normalizes = type(backbone).normalize is not Backbone.normalize
    if normalizes and method.reads_own_states and config.format_version < NORMALIZED_SINCE:
        raise UserError(
            f"adapter {str(folder)!r} has format version {config.format_version}, in which {method.name} read the states of a "
            f"{backbone.config.model_type} backbone before its final norm; it reads them after it since format version "
            f"{NORMALIZED_SINCE}: train the adapter again"
        )


def check_model(
    config: AdapterConfig, identity: Mapping[str, str | None], folder: str | Path, model: str | Path | None = None
) -> None:
    """Check that a model is the one that an adapter was trained on. No weights are loaded.

    Args:
        config: the adapter's config.
        identity: the model's identity, from :func:`revmux.pretrained.identity.identify`.
        folder: the adapter's folder, for the error message.
        model: the model's location, for the error message. By default, its name.

    Raises:
        UserError: the models differ.
    """
    name = str(model or identity["name"])
    for key in ("sha256", "revision"):
        wanted, given = config.base_model.get(key), identity.get(key)
        if wanted and given and wanted != given:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']} ({key} {wanted[:12]}…), but the given "
                f"backbone is {name} ({key} {given[:12]}…); load the former, or train the adapter on the latter"
            )
        if wanted and given:
            return
    if config.base_model["name"] != identity["name"]:
        raise UserError(
            f"adapter {str(folder)!r} was trained on {config.base_model['name']}, but the given backbone is {name}; "
            f"load {config.base_model['name']}, or train the adapter on {name}"
        )


def check_prompt(config: AdapterConfig, prompt: Prompt | None, folder: str | Path) -> None:
    """Check that a backbone has the prompt that an adapter was trained with.

    Raises:
        UserError: the prompts differ.
    """
    own = config.recorded_prompt()
    if own == prompt:
        return
    names = [f"prompt {one.name}" if one else "no prompt" for one in (own, prompt)]
    where = f" ({own.difference(prompt)})" if own and prompt else ""
    raise UserError(
        f"adapter {str(folder)!r} was trained with {names[0]}, but the given backbone has {names[1]}{where}; omit the "
        "prompt in a command, which then uses the adapter's prompt, or in Python load the backbone with "
        f"recorded_prompt([{str(folder)!r}])"
    )
