"""Adapters on disk: ``adapter_config.json``, ``adapter_model.safetensors`` and a generated model card."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import revmux
from revmux import hub
from revmux.backbone import Backbone
from revmux.data.prompts import Prompt
from revmux.errors import UserError
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained import EMBEDDED_NAME, Pretrained
from revmux.type_check import check_types

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class AdapterConfig:
    """All that is needed to put an adapter on its backbone again, and where it came from.

    Attributes:
        method: registered name of the method.
        options: its settings.
        num_inputs: N.
        prefill_layers: l.
        max_length: tokens that inputs were cut to in training.
        label_names: classes in the order of the scores.
        base_model: ``name``, ``revision`` and ``sha256`` of the backbone.
        task: identity of the data.
        training: loss, optimiser and seed.
        metrics: what was measured on data that chose nothing.
        prompt: what every input was put into, as plain data; None with a classification head.
        fallback_threshold: confidence below which a server lets an answer fall back, see :mod:`revmux.fallback`;
            None is never.
        dtype: type of the backbone's weights in training, such as ``bfloat16``; None where it is not recorded.
        tunable_parameters: how many weights were trained, the backbone's not counted.
        format_version: of these files.
        library_version: that wrote them.
    """

    method: str
    num_inputs: int
    prefill_layers: int
    max_length: int
    label_names: list[str]
    base_model: dict[str, str | None]
    options: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    prompt: dict[str, Any] | None = None
    fallback_threshold: float | None = None
    dtype: str | None = None
    tunable_parameters: int = 0
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    @property
    def backbone_is_found(self) -> bool:
        """Whether ``base_model`` leads to the backbone on any machine: it is the embedded one, or one of the hub."""
        return self.base_model.get("revision") is not None or self.base_model["name"] == EMBEDDED_NAME

    def recorded_prompt(self) -> Prompt | None:
        """The prompt, with its classes in the order of the scores."""
        return None if self.prompt is None else Prompt.from_dict(self.prompt, self.label_names)


def describe(
    model: MultiplexedClassifier,
    pretrained: Pretrained,
    max_length: int,
    task: dict[str, Any],
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> AdapterConfig:
    """The config of a model as it stands."""
    return AdapterConfig(
        method=model.method.name,
        options=model.method.options_dict(),
        num_inputs=model.num_inputs,
        prefill_layers=model.prefill_layers,
        max_length=max_length,
        label_names=pretrained.backbone.label_names,
        base_model=pretrained.identity,
        task=task,
        training=training or {},
        metrics=metrics or {},
        prompt=None if pretrained.prompt is None else pretrained.prompt.to_dict(),
        dtype=dtype_name(pretrained.backbone.dtype),
        tunable_parameters=model.method.tunable_parameters(),
        library_version=revmux.__version__,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``, as configurations name it."""
    return str(dtype).removeprefix("torch.")


def adapter_weights(model: MultiplexedClassifier) -> dict[str, Tensor]:
    """What answering takes, copied to the CPU: the method's state, and the backbone's too where the method tunes it."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in _answering_state(model).items()}


def _answering_state(model: MultiplexedClassifier) -> dict[str, Tensor]:
    weights = {f"method.{name}": value for name, value in model.method.inference_state().items()}
    if model.method.tunes_backbone:
        weights |= {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    return weights


def save_pretrained(
    model: MultiplexedClassifier, config: AdapterConfig, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> Path:
    """Write an adapter folder whole or not at all; the hub is not asked.

    Args:
        model: gives the weights, unless they are given.
        config: see :func:`describe`.
        folder: replaced if it exists.
        weights: as :func:`adapter_weights` gives them, such as those of the best epoch.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        save_file(weights or adapter_weights(model), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        _write_description(config, temporary)
    return folder


def _write_description(config: AdapterConfig, folder: Path) -> None:
    text = json.dumps(asdict(config), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n")
    (folder / CARD_NAME).write_text(model_card(config))


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: the one named, or one of the hub, downloaded once.

    Args:
        adapter: a folder; or on the hub ``user/name``, also with its revision as ``user/name@revision``.
        revision: branch, tag or commit on the hub; ignored for folders.

    Raises:
        UserError: no such folder, and the hub has no such adapter either.
    """
    folder = Path(adapter).expanduser()
    name, _, inline = str(adapter).partition("@")
    if folder.exists() or not hub.is_repository(name):
        return folder
    try:
        return hub.fetch(name, revision or inline or None, [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME])
    except UserError as error:
        raise UserError(f"no adapter folder {name!r} here, and as an id of the hub: {error}") from None


def load_config(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        adapter: a folder or an id of the hub, see :func:`adapter_folder`.
        revision: on the hub.

    Raises:
        UserError: no such adapter, not an adapter, written in a newer format, or with values of another type.
    """
    path = adapter_folder(adapter, revision) / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{str(adapter)!r} is no adapter folder: it has no {CONFIG_NAME}; name a folder that training wrote"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); the folder is damaged, write it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object; the folder is damaged, write it again")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version} (revmux {raw.get('library_version')}), this is revmux "
            f"{revmux.__version__} that reads up to {FORMAT_VERSION}; run: pip install --upgrade revmux"
        )
    known = {item.name for item in fields(AdapterConfig)}
    if odd := sorted(raw.keys() - known):
        raise UserError(f"{path} has unknown keys {', '.join(odd)}; known: {', '.join(sorted(known))}")
    check_types(AdapterConfig, raw, str(path))
    try:
        return AdapterConfig(**raw)
    except TypeError as error:
        raise UserError(f"{path} is incomplete: {error}") from None


def recorded_prompt(adapters: Sequence[str | Path]) -> Prompt | None:
    """The prompt that adapters of one backbone were trained with, so that whoever loads the backbone can give it.

    Raises:
        UserError: no such adapter, or not an adapter.
    """
    prompts = (load_config(adapter).recorded_prompt() for adapter in adapters)
    return next((prompt for prompt in prompts if prompt is not None), None)


def from_pretrained(adapter: str | Path, pretrained: Pretrained, revision: str | None = None) -> MultiplexedClassifier:
    """Put an adapter on its backbone, in eval mode.

    Args:
        adapter: a folder or an id of the hub, see :func:`adapter_folder`.
        pretrained: the backbone that it was trained on. Where the method tuned it, the model gets a copy.
        revision: of the adapter on the hub: branch, tag or commit.

    Raises:
        UserError: no such adapter, another backbone, other labels, no readable weights, or missing, unexpected or
            misshaped weights.
    """
    folder = adapter_folder(adapter, revision)
    config = load_config(folder)
    check_base(config, pretrained, adapter)
    backbone: Backbone = pretrained.backbone
    method = build_method(config.method, BackboneShape.of(backbone), config.num_inputs, config.options)
    method.drop_training_parts()
    if method.tunes_backbone:
        backbone = copy.deepcopy(backbone)  # the one given stays what others were trained on
    model = MultiplexedClassifier(backbone, method, config.prefill_layers)
    weights = _load_weights(folder / WEIGHTS_NAME)
    expected = _answering_state(model)
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{folder / WEIGHTS_NAME} does not fit its config: {'; '.join(problems[:4])}; train it again")
    method.load_state_dict(
        {name.removeprefix("method."): value for name, value in weights.items() if name.startswith("method.")}
    )
    tuned = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    if tuned:
        backbone.load_state_dict(tuned)
    method.to(backbone.device)
    return model.requires_grad_(False).eval()


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); the folder is damaged, write it again") from None


def check_base(config: AdapterConfig, pretrained: Pretrained, folder: str | Path) -> None:
    """Refuse an adapter on another backbone than its own; warn of the same one in another dtype.

    Raises:
        UserError: naming both backbones.
    """
    for key in ("sha256", "revision"):
        wanted, given = config.base_model.get(key), pretrained.identity.get(key)
        if wanted and given and wanted != given:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']} ({key} {wanted[:12]}…), but the backbone "
                f"given is {pretrained.identity['name']} ({key} {given[:12]}…); load that backbone, or train the adapter on this one"
            )
        if wanted and given:
            break
    else:
        if config.base_model["name"] != pretrained.identity["name"]:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']}, but the backbone given is "
                f"{pretrained.identity['name']}; load that backbone"
            )
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


def push_to_hub(
    adapter: str | Path | MultiplexedClassifier,
    repository: str,
    config: AdapterConfig | None = None,
    revision: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    message: str = "Add adapter",
) -> str:
    """Put an adapter on the hub, in one commit; the token is that of ``HF_TOKEN`` or of ``hf auth login``.

    Args:
        adapter: a folder, or a model with its ``config``.
        repository: ``user/name``; made where it is missing.
        config: of a model, see :func:`describe`; a folder has its own.
        revision: branch; None is the default one.
        private: whether a new repository is private; None is the account's setting.
        base_model: id on the hub of the backbone, where the adapter was trained on a local copy: recorded with its
            revision, after its weights were found to be the same ones.
        message: of the commit.

    Returns:
        The commit, which ``from_pretrained(..., revision=commit)`` takes.

    Raises:
        UserError: no adapter, another base model, or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        if isinstance(adapter, MultiplexedClassifier):
            if config is None:
                raise UserError("a model alone does not say where it comes from; give its config too: describe(...)")
            save_pretrained(adapter, config, folder)
        else:
            config = load_config(adapter)
            shutil.copytree(adapter_folder(adapter), folder)
        if base_model is not None:
            _write_description(replace(config, base_model=_on_hub(config, base_model)), folder)
        files = [folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)]
        if gone := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{str(adapter)!r} has no {', '.join(gone)}; the folder is damaged, write it again")
        return hub.push(files, repository, revision, private, message)


def _on_hub(config: AdapterConfig, name: str) -> dict[str, str | None]:
    """The base model of a config under its id on the hub."""
    revision, sha256 = hub.weights_on_hub(name)
    wanted = config.base_model.get("sha256")
    if wanted is None or wanted != sha256:
        raise UserError(
            f"the adapter was trained on {config.base_model['name']} (sha256 {wanted}), but {name} on the hub has sha256 "
            f"{sha256}; push that model first, or leave base_model out"
        )
    return config.base_model | {"name": name, "revision": revision}


def model_card(config: AdapterConfig) -> str:
    """The README.md of an adapter folder."""
    template = resources.files("revmux").joinpath("model_card.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(config=config)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when all in it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / "old")
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old / "old", folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
