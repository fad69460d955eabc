"""What only a GPU can show: training in bfloat16 that is killed, replicas that share a GPU, and memory against its estimate.

make test-gpu runs these tests. Without a GPU they are skipped.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_http import free_port
from serving_models import load, plain_scores, text, write_adapter, write_model

from benchmarks.gpu.sizes import SIZES, TRAINED
from benchmarks.gpu.training import measure_training
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare
from serve_app.config import server_config
from serve_app.run import deploy, shutdown

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
DEVICE = "cuda"


def train(model: str, data: str, folder: Path, kill_after: int | None, results: Any = None) -> None:
    """Train RevMUX in bfloat16 from the newest checkpoint; after some steps the process kills itself."""
    backbone = BackboneConfig(model, max_length=16, dtype="bfloat16")
    optim = OptimConfig(3, 8, 5e-3, precision="bfloat16")
    recipe = Recipe(backbone, DataConfig(data), MethodConfig("revmux", 2, 1), optim, store=StoreConfig(budget_gb=0))

    def on_step(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    prepared = prepare(recipe, load_task(recipe.data), DEVICE)
    trainer = prepared.trainer(checkpoints=CheckpointFolder(folder), checkpoint_steps=2, on_step=on_step)
    first = trainer.resume()
    list(trainer.run())
    if results is not None:
        weights = {name: value.numpy() for name, value in trainer.trained_weights().items()}
        results.put((first, trainer.state.step, trainer.total_steps, weights))


def test_a_killed_run_in_bfloat16_resumes_and_ends_with_the_same_weights(
    tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    context = get_context("spawn")
    names = (str(tiny_model_folder), str(tiny_csv))

    def run(folder: str, kill_after: int | None = None) -> Any:
        results = context.Queue()
        process = context.Process(target=train, args=(*names, tmp_path / folder, kill_after, results))
        process.start()
        found = None if kill_after else results.get(timeout=600)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_after else 0)
        return found

    run("killed", kill_after=13)
    first, step, total, weights = run("killed")
    assert (first, step) == (12, total)
    begun, _, _, expected = run("unbroken")
    assert begun == 0
    assert weights.keys() == expected.keys()
    for name, value in weights.items():  # some kernels add in another order each time
        assert torch.allclose(torch.from_numpy(value), torch.from_numpy(expected[name]), atol=1e-2), name


@pytest.mark.cluster("serve")
def test_two_replicas_share_a_gpu_and_answer_as_the_plain_model(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    pretrained = load(model)
    adapters = [str(write_adapter(tmp_path, pretrained, 2))]
    config = server_config(
        model=str(model), adapters=adapters, port=free_port(), num_gpus=0.5, num_replicas=2, num_cpus=0.5, plain_load=1
    )
    try:
        url = deploy(config)

        def ask(index: int) -> str:
            reply = httpx.post(f"{url}/predict", json={"inputs": text(index)}, timeout=120)
            return str(reply.json()[0]["label"])

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(64)))
    finally:
        shutdown()
    names = pretrained.backbone.label_names
    expected = plain_scores(pretrained, [text(index) for index in range(64)]).argmax(-1).tolist()
    assert answers == [names[index] for index in expected]


def test_training_an_8b_llama_takes_the_memory_that_is_estimated() -> None:
    row = measure_training(TRAINED, torch.device(DEVICE), SIZES)
    assert row["loss"] > 0
    room = 1.1 * row["estimated_bytes"] + 1e9  # what the estimate tells users to leave free
    assert 0.8 * row["estimated_bytes"] <= row["peak_bytes"] <= room
