"""Load one served task: fetch its adapters, then load its model and apply them."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from revmux.adapters.config import CONFIG_NAME, WEIGHTS_NAME, load_adapter_config, recorded_dtype, recorded_prompt
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.shared_base import SharedBases
from revmux.serving import Limits
from revmux.serving.adapters import LineupPlace, admitted, check_stages, place_of
from revmux.serving.task import Task
from serve_app.config import TaskConfig
from serve_app.sources import fetch_adapter, fetch_model


class FetchedAdapter(NamedTuple):
    """An adapter: its name in the operator's configuration, its local folder, and a digest of its files."""

    source: str
    folder: Path
    digest: str


FetchedAdapters = dict[LineupPlace, FetchedAdapter]
"""The adapters of a task by their place in the line-up."""


def fetch_adapters(task: TaskConfig, downloads: Path, max_multiplex: int | None) -> FetchedAdapters:
    """Fetch the adapters of a task, and return those that ``max_multiplex`` allows.

    Args:
        task: the configuration of the task.
        downloads: an existing folder, see :func:`serve_app.sources.fetch_adapter`.
        max_multiplex: the application's limit on N.

    Raises:
        UserError: an adapter cannot be fetched, or the stages do not form a ladder.
    """
    folders = {source: fetch_adapter(source, downloads) for source in task.adapters}
    described = [(source, load_adapter_config(folders[source])) for source in task.adapters]
    check_stages(described, task.threshold)
    return {
        place_of(config): FetchedAdapter(source, folders[source], _digest(folders[source]))
        for source, config in admitted(described, max_multiplex)
    }


def load_task(
    name: str,
    task: TaskConfig,
    adapters: FetchedAdapters,
    limits: Limits,
    device: str,
    bases: SharedBases,
    downloads: Path,
) -> Task:
    """Load a task.

    Args:
        name: its name.
        task: its configuration.
        adapters: its adapters.
        limits: the limits of the engine.
        device: the device where it runs.
        bases: the base models of the application's tasks.
        downloads: an existing folder, see :func:`serve_app.sources.fetch_model`.

    Raises:
        UserError: the model cannot be loaded, or an adapter does not fit.
    """
    # The engine applies max_length to inputs. Loading only needs a valid value.
    folders = [adapter.folder for adapter in adapters.values()]
    prompt = task.prompt or recorded_prompt(folders)
    dtype = task.dtype or (recorded_dtype(load_adapter_config(folders[0])) if folders else "float32")
    model = fetch_model(task.model, downloads)
    backbone = BackboneConfig(model, task.revision, task.max_length or 2, dtype, prompt=prompt)
    pretrained = load_pretrained(backbone, bases=bases)
    if model != task.model:
        pretrained = replace(pretrained, identity={**pretrained.identity, "name": task.model})
    tensors = chain(pretrained.backbone.parameters(), pretrained.backbone.buffers())
    if any(tensor.device.type != device for tensor in tensors):
        pretrained.backbone.to(device)  # writes to all tensors, so not to those that another task reads now
    return Task(name, pretrained, folders, limits, task.max_length, task.threshold)


def _digest(folder: Path) -> str:
    """A digest of the files of an adapter."""
    found = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with suppress(FileNotFoundError), (folder / name).open("rb") as file:  # loading reports a missing file
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
