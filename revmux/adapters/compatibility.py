"""Whether an adapter fits the backbone that it is put on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from revmux.adapters.config import AdapterConfig, dtype_name
from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained


def check_base(config: AdapterConfig, pretrained: Pretrained, folder: str | Path) -> None:
    """Refuse an adapter on another backbone than its own; warn of the same one in another dtype.

    Raises:
        UserError: naming both backbones.
    """
    check_model(config, pretrained.identity, folder)
    check_prompt(config, pretrained.prompt, folder)
    if config.label_names != pretrained.backbone.label_names:
        raise UserError(
            f"adapter {str(folder)!r} has the labels {', '.join(config.label_names)}, the backbone has "
            f"{', '.join(pretrained.backbone.label_names)}; load the task model that it was trained on"
        )
    given = dtype_name(pretrained.backbone.dtype)
    if config.dtype is not None and config.dtype != given:
        warnings.warn(
            f"adapter {str(folder)!r} was trained on a {config.dtype} backbone, but the one given is {given}: scores will "
            f"differ a little; load the backbone with dtype {config.dtype} for those of training",
            stacklevel=2,
        )


def check_model(
    config: AdapterConfig, identity: Mapping[str, str | None], folder: str | Path, model: str | Path | None = None
) -> None:
    """Refuse an adapter of another model; no weights are loaded.

    Args:
        config: of the adapter.
        identity: of the model, as :func:`revmux.pretrained.identity.identify` gives it.
        folder: of the adapter, for the message.
        model: where the model is, for the message; by default its name.

    Raises:
        UserError: naming both models.
    """
    name = str(model or identity["name"])
    for key in ("sha256", "revision"):
        wanted, given = config.base_model.get(key), identity.get(key)
        if wanted and given and wanted != given:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']} ({key} {wanted[:12]}…), but the backbone "
                f"given is {name} ({key} {given[:12]}…); load that backbone, or train the adapter on this one"
            )
        if wanted and given:
            return
    if config.base_model["name"] != identity["name"]:
        raise UserError(
            f"adapter {str(folder)!r} was trained on {config.base_model['name']}, but the backbone given is {name}; "
            "load that backbone"
        )


def check_prompt(config: AdapterConfig, prompt: Prompt | None, folder: str | Path) -> None:
    """Refuse an adapter on a backbone with another prompt than its own.

    Raises:
        UserError: naming both prompts, and where they differ.
    """
    own = config.recorded_prompt()
    if own == prompt:
        return
    names = [f"prompt {known.name}" if known else "no prompt" for known in (own, prompt)]
    where = f" ({own.difference(prompt)})" if own and prompt else ""
    raise UserError(
        f"adapter {str(folder)!r} was trained with {names[0]}, but the backbone given has {names[1]}{where}; leave "
        "the prompt out of a command, which then takes the adapter's own, or in Python load the backbone with "
        f"recorded_prompt([{str(folder)!r}])"
    )
