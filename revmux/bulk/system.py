"""The model and its adapters: found once by the driver, loaded by each worker."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from revmux.adapters.compatibility import check_model
from revmux.adapters.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    load_adapter_config,
    local_adapter_folder,
    recorded_backbone,
    recorded_dtype,
)
from revmux.bulk.config import BulkConfig
from revmux.bulk.location import absolute_location
from revmux.errors import UserError
from revmux.plan.files import PLAN_NAME, PLAN_VERSION
from revmux.pretrained.config import EMBEDDED_MODELS, BackboneConfig
from revmux.pretrained.identity import identity_of
from revmux.pretrained.loading import check_answers, load_pretrained
from revmux.serving.adapters import check_stages
from revmux.serving.limits import Limits
from revmux.serving.task import Task
from revmux.utils.copies import join_location
from revmux.utils.place import Place

_CPU_TOKENS, _GPU_TOKENS = 4096, 16384
"""Default number of tokens per pass. On a CPU, the states of more tokens do not fit into the caches."""
_ANY = 2**31 - 1


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter folder as bytes, which travels to workers on other machines.

    Attributes:
        source: folder, hub id or registry URI, as the user wrote it.
        files: content of its configuration and weights.
    """

    source: str
    files: dict[str, bytes]

    @classmethod
    def pack(cls, folder: Path, source: str) -> PackedAdapter:
        """Read an adapter folder.

        Raises:
            UserError: the folder does not contain an adapter.
        """
        load_adapter_config(folder)
        if not (folder / WEIGHTS_NAME).is_file():
            raise UserError(f"{source!r} has no {WEIGHTS_NAME}; the folder is damaged, save the adapter again")
        return cls(source, {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)})

    @property
    def sha256(self) -> str:
        """Hash of all files."""
        return hashlib.sha256(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()

    def unpack(self, folder: Path) -> Path:
        """Write the adapter to an existing folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@dataclass(frozen=True)
class System:
    """What classifies the rows.

    Attributes:
        backbone: the task model.
        identity: identity of its weights.
        adapters: one adapter for each N, or one for each stage of a ladder; empty for the plain model.
        threshold: confidence below which answers fall back, for all adapters; None is each adapter's own threshold.
        max_length: maximum number of tokens per input; None is the adapters' length, or the model's maximum.
        max_batch_tokens: maximum number of tokens per forward pass with several groups.
        promised_agreement: agreement with the plain model that the widest adapter of the first stage had in its evaluation;
            None if it was not measured.
    """

    backbone: BackboneConfig
    identity: dict[str, str | None]
    adapters: tuple[PackedAdapter, ...]
    threshold: float | None
    max_length: int | None
    max_batch_tokens: int
    promised_agreement: float | None

    def describe(self) -> dict[str, Any]:
        """The parts on which answers depend, as plain data."""
        prompt = self.backbone.prompt
        assert not isinstance(prompt, str)
        return {
            "model": self.identity,
            "dtype": self.backbone.dtype,
            "attention": self.backbone.attention,
            "prompt": None if prompt is None else prompt.to_dict(),
            "adapters": [adapter.sha256 for adapter in self.adapters],
            "threshold": self.threshold,
            "max_length": self.max_length,
            "max_batch_tokens": self.max_batch_tokens,
        }

    def load(self, device: str) -> Task:
        """Load the model with its adapters onto a device.

        Raises:
            UserError: a part does not fit another, or this machine has another model under the same name.
        """
        pretrained = load_pretrained(self.backbone)
        if pretrained.identity != self.identity:
            raise UserError(
                f"model {self.backbone.model!r} is {pretrained.identity} on this machine, but {self.identity} where the job "
                "started; name a model that is the same on all machines"
            )
        pretrained.backbone.freeze().to(device)
        limits = Limits(max_batch=_ANY, max_batch_tokens=_ANY)  # a single group may always run
        with tempfile.TemporaryDirectory() as folder:
            folders = []
            for index, adapter in enumerate(self.adapters):
                target = Path(folder) / str(index)
                target.mkdir()
                folders.append(adapter.unpack(target))
            return Task("classify", pretrained, folders, limits, self.max_length, self.threshold)


def unused_adapters(task: Task) -> list[str]:
    """A line for each adapter that no input uses, because it costs as much as the plain model or a narrower adapter."""
    return [
        f"adapter {adapter.config.method}, N = {adapter.config.num_inputs}, l = {adapter.config.prefill_layers} is not used: "
        f"its counted cost per input is {task.lineup.route(adapter).per_input:.2f} of the plain model, and a narrower system "
        "costs no more"
        for adapter in task.lineup.adapters
        if not task.lineup.uses(adapter)
    ]


def find_system(config: BulkConfig, adapters: Sequence[tuple[Path, str]] | None = None, device: str = "cpu") -> System:
    """Find the model and the adapters, and check that they fit. No weights are loaded.

    Args:
        config: the settings.
        adapters: local folders of the adapters with their names in messages. By default, those of the settings.
        device: where the model runs, on which the default number of tokens per pass depends.

    Raises:
        UserError: a part cannot be found or does not fit another.
    """
    if adapters is None:
        adapters = [(local_adapter_folder(source), source) for source in adapter_sources(config)]
    packed = tuple(PackedAdapter.pack(folder, source) for folder, source in adapters)
    configs = [load_adapter_config(folder) for folder, _ in adapters]
    max_length = config.max_length or min((own.max_length for own in configs), default=None)
    backbone = _backbone(config, [(own, source) for own, (_, source) in zip(configs, adapters)])
    # Without a length of the user or an adapter, the model's maximum is used, which is known once it is loaded.
    backbone = replace(backbone, max_length=max_length or 2)
    check_answers(backbone)
    identity = identity_of(backbone)
    check_stages([(source, own) for own, (_, source) in zip(configs, adapters)], config.threshold)
    for own, (_, source) in zip(configs, adapters):
        check_model(own, identity, source, backbone.model)
    agreements = [own.metrics.get("siso_agreement") for own in configs if own.stage == 1]
    return System(
        backbone,
        identity,
        packed,
        config.threshold,
        max_length,
        config.max_batch_tokens or (_CPU_TOKENS if torch.device(device).type == "cpu" else _GPU_TOKENS),
        agreements[-1] if agreements else None,
    )


def adapter_sources(config: BulkConfig) -> list[str]:
    """The adapters of the settings, narrowest first: folders, hub ids or URIs.

    Raises:
        UserError: the plan cannot be read or does not meet its goal.
    """
    if config.plan is not None:
        return [str(stage["adapter"]) for one in _read_plan(config.plan)["served"] for stage in one["stages"]]
    return [] if config.adapter is None else [config.adapter]


def _read_plan(plan: str) -> dict[str, Any]:
    """A plan's content, with the location of each adapter."""
    folder, name = _plan_file(plan)
    place = Place.open(folder)
    try:
        data = place.read(name)
        if data is None:
            raise FileNotFoundError(f"there is no {place.file(name)}")
        content: dict[str, Any] = json.loads(data.to_pybytes())
        met, served, version = content["is_met"], content["served"], content.get("version", 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read plan {plan!r} ({type(error).__name__}: {error}); name the folder of a plan, or its {PLAN_NAME}"
        ) from None
    if version > PLAN_VERSION:
        raise UserError(
            f"plan {plan!r} has version {version}, and this revmux reads versions up to {PLAN_VERSION}; "
            "run: pip install --upgrade revmux"
        )
    if not met or not served:
        raise UserError(f"plan {plan!r} does not meet its goal ({content['why_not']}); make another plan")
    for stage in (stage for one in served for stage in one["stages"]):
        stage["adapter"] = join_location(absolute_location(folder), stage["adapter"])
    return content


def _plan_file(plan: str) -> tuple[str, str]:
    """The folder of a plan, and the name of its file in it."""
    path, mark, query = plan.partition("?") if "://" in plan else (plan, "", "")
    folder, _, name = path.rpartition("/")
    return (f"{folder}{mark}{query}", name) if name.endswith(".json") else (plan, PLAN_NAME)


def _backbone(config: BulkConfig, adapters: Sequence[tuple[AdapterConfig, str]]) -> BackboneConfig:
    """The settings of the task model: those that the user gave, then those that the adapter or the plan records."""
    first = adapters[0] if adapters else None
    if config.model is not None:
        dtype = config.dtype or (recorded_dtype(first[0]) if first else "float32")
        backbone = BackboneConfig(config.model, config.revision, dtype=dtype)
    elif first is not None:
        backbone = recorded_backbone(*first)
        backbone = replace(backbone, dtype=config.dtype or backbone.dtype)
    else:
        assert config.plan is not None
        base = _read_plan(config.plan)["meta"]["backbone"]
        if base["revision"] is None and base["name"] not in EMBEDDED_MODELS:
            raise UserError(
                f"plan {config.plan!r} was made for the local model {base['name']!r}; name its folder: --model"
            )
        backbone = BackboneConfig(base["name"], base["revision"], dtype=config.dtype or "float32")
    prompt = config.prompt or next((own for one, _ in adapters if (own := one.recorded_prompt()) is not None), None)
    return replace(backbone, prompt=prompt)
