"""Jobs and the server on a cluster that has no machine at first: it starts machines on demand and lets them go."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from polling import wait_until
from ray_machines import Machines, cluster_of_machines, environment_in, kill_group, processes_named
from serving_http import free_port

ROOT = Path(__file__).parents[1]
RAYLET = "raylet/raylet"
"""Each machine has one such process."""
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A cluster whose machines have one core each."""
    with (
        tempfile.TemporaryDirectory(prefix="scale-") as folder,  # not pytest's: Ray's socket paths must stay short
        cluster_of_machines(Path(folder), environment_in(Path(folder)), scaling={"CPU": 1}) as machines,
    ):
        wait_until(lambda: processes_named(RAYLET, machines.head.pid))
        yield machines


def started_machines(machines: Machines) -> int:
    return len(processes_named(RAYLET, machines.head.pid)) - 1


def flags(machines: Machines, model: Path, data: Path) -> list[str]:
    """Flags that all jobs on the labelled data have."""
    found = [f"--backbone.model={model}", "--backbone.max_length=16", f"--data.source={data}"]
    return [*found, f"--storage={machines.folder}/runs", f"--cluster.address={machines.address}"]


def run(machines: Machines, *command: str) -> str:
    """Run a command to its end, while the number of machines is watched; returns its output and checks the number."""
    assert started_machines(machines) == 0
    log, most = machines.folder / "job.log", 0
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=machines.environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def ended() -> bool:
        nonlocal most
        most = max(most, started_machines(machines))
        return process.poll() is not None

    try:
        wait_until(ended, 400, every=0.5)
    finally:
        kill_group(process)
    text = log.read_text()
    assert process.returncode == 0, text
    assert most > 0, text
    wait_until(lambda: started_machines(machines) == 0)
    return text


def test_features(machines: Machines, tiny_model_folder: Path, tiny_csv: Path) -> None:
    text = run(machines, "ray_jobs.features", *flags(machines, tiny_model_folder, tiny_csv), "--layers=[1]")
    assert "the feature pass: waiting for more machines: 1 × 1 CPU; the cluster has 0 CPU" in text


def test_train(machines: Machines, tiny_model_folder: Path, tiny_csv: Path) -> None:
    method = ["--method.name=exit-head", "--num_inputs=[1]", "--method.prefill_layers=1", "--optim.epochs=1"]
    text = run(machines, "ray_jobs.train", *flags(machines, tiny_model_folder, tiny_csv), *method)
    assert "the feature pass: waiting for more machines: 1 × 1 CPU; the cluster has 0 CPU" in text
    assert "2 workers (gloo, cpu, 1 thread each), step 0" in text


def test_tune(machines: Machines, tiny_model_folder: Path, tiny_csv: Path) -> None:
    space = machines.folder / "space.yaml"
    space.write_text('{"methods": ["exit-head"], "exit_layers": [1, 2], "epochs": 1}')
    more = [f"--space={space}", "--optim.batch_size=8", "--concurrent_trials=2"]
    text = run(machines, "ray_jobs.tune", *flags(machines, tiny_model_folder, tiny_csv), *more)
    assert ": waiting for more machines: 1 × 1 CPU; the cluster has 0 CPU" in text
    assert "2 of 2 trials done" in text


def test_classify(machines: Machines, tiny_model_folder: Path, tiny_csv: Path) -> None:
    folders = [f"--output={machines.folder}/out", f"--storage={machines.folder}/runs", "--column_prefix=predicted_"]
    model = [f"--model={tiny_model_folder}", f"--input={tiny_csv}", f"--cluster.address={machines.address}"]
    text = run(machines, "ray_jobs.classify", *model, *folders)
    assert "classify: waiting for more machines: 1 × 1 CPU; the cluster has 0 CPU" in text


def test_serve(machines: Machines, tiny_model_folder: Path) -> None:
    port, log = free_port(), machines.folder / "serve.log"
    script = machines.folder / "serve.py"
    script.write_text(
        f"""
import logging
import ray
from serve_app.config import server_config
from serve_app.run import deploy, shutdown

logging.basicConfig()
ray.init(address="{machines.address}", logging_level="error")
print(deploy(server_config(model="{tiny_model_folder}", port={port}, num_cpus=1)), flush=True)
input()
shutdown()
"""
    )
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, script],
            cwd=ROOT,
            env=machines.environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: "http://" in log.read_text(),
            400,
            every=0.5,
            failure=lambda: log.read_text() if server.poll() is not None else None,
        )
        assert (
            "1 replicas need 1 CPU each, 1 in total, but the cluster has 0; waiting for more machines"
            in log.read_text()
        )
        assert started_machines(machines) == 1
        reply = httpx.post(f"http://127.0.0.1:{port}/predict", json={"inputs": "w1 w3"}, timeout=60)
        assert reply.status_code == 200
        server.communicate(b"\n", timeout=120)
        assert server.returncode == 0, log.read_text()
    finally:
        kill_group(server)
    wait_until(lambda: started_machines(machines) == 0)
