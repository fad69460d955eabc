"""Faults: killed workers, drivers and machines, and full disks. Training still ends with the same result."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polling
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from numeric import assert_close
from polling import check_end
from ray_machines import Machines, cluster_of_machines, environment_in, kill_all, kill_group, processes_named
from safetensors.torch import load_file
from torch import Tensor

from revmux import UserError
from revmux.adapters.config import WEIGHTS_NAME
from revmux.adapters.folder import save_adapter
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import prepare
from revmux.training.recipes import named_recipe
from revmux.training.trainer import Trainer, load_weights

ROOT = Path(__file__).parents[1]
EPOCHS, EVERY = 14, 7
TRAIN_WORKER = "RayTrainWorker"


def recipe(model: Path, data: Path, store: Path, epochs: int = EPOCHS, dropout: float = 0.1, batch: int = 4) -> Recipe:
    named = named_recipe()
    return Recipe(
        backbone=BackboneConfig(model=str(model), max_length=16),
        data=DataConfig(source=str(data)),
        method=MethodConfig("revmux", 2, 1, named.options_of("revmux", {"dropout": dropout})),
        optim=named.optim_config(epochs=epochs, batch_size=batch),
        loss=named.loss_config(),
        store=StoreConfig(root=str(store)),
        shuffles=2,
    )


@dataclass
class Ended:
    """The result of an undisturbed run, and the store of its features."""

    store: Path
    weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    steps_per_epoch: int = 0


def run_undisturbed(
    model: str, data: str, folder: str, epochs: int = EPOCHS, dropout: float = 0.1, batch: int = 4
) -> dict[str, Any]:
    """Train the same recipe without Ray, in each process of a gloo group."""
    asked = recipe(Path(model), Path(data), Path(folder) / "store", epochs, dropout, batch)
    prepared = prepare(asked, load_task(DataConfig(source=data)))
    trainer = prepared.trainer()
    list(trainer.run())
    load_weights(prepared.model, trainer.best)
    save_adapter(prepared.model, prepared.adapter_config({}), Path(folder) / f"adapter-{trainer.rank}")
    state = trainer.state
    return {"history": state.history, "steps": state.step, "steps_per_epoch": trainer.steps_per_epoch}


@pytest.fixture(scope="module")
def undisturbed(
    run_workers: Callable, tiny_model_folder: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_workers(run_undisturbed, 2, str(tiny_model_folder), str(tiny_csv), str(folder))[0]
    assert ended["steps_per_epoch"] % EVERY, "a checkpoint must fall within an epoch"
    return Ended(folder / "store", load_file(folder / "adapter-0" / WEIGHTS_NAME), **ended)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen, log: Path) -> Any:
    """Return the condition's value once it is true; fail with the log if the process ends before."""

    def ended() -> str | None:
        return None if process.poll() is None else f"ended with status {process.returncode}: {log.read_text()}"

    return polling.wait_until(condition, 200, every=0.02, failure=ended)


@dataclass
class TrainJob:
    """``python -m ray_jobs.train`` in a separate process, with its own storage.

    Without the address of a cluster, it also has its own HOME and starts its own cluster.
    """

    folder: Path
    model: Path
    data: Path
    flags: list[str] = field(default_factory=list)
    address: str | None = None

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def environment(self) -> dict[str, str]:
        if self.address is not None:
            return os.environ | {"RAY_ADDRESS": self.address}
        return environment_in(self.folder)

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        command = [
            sys.executable,
            "-m",
            "ray_jobs.train",
            "--data.source",
            str(self.data),
            "--storage",
            str(self.storage),
        ]
        command += ["--backbone.model", str(self.model), "--backbone.max_length", "16", "--shuffles", "2"]
        command += ["--num_inputs", "[2]", "--method.prefill_layers", "1", "--method.options", '{"dropout": 0.1}']
        command += ["--optim.epochs", str(EPOCHS), "--optim.batch_size", "4", "--checkpoint.steps", str(EVERY)]
        command += self.flags
        with self.log.open("w") as output:
            process = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        family: list[psutil.Process] = []
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            kill_group(process)
            psutil.wait_procs(kill_all(family))

    def checkpoint_within_epoch(self, steps_per_epoch: int, after: int = 0) -> int | None:
        """Return the step of a finished checkpoint within an epoch."""
        for manifest in self.storage.glob("checkpoints/*/step-*.json"):
            step = int(manifest.stem.partition("-")[2])
            if step > after and step % steps_per_epoch:
                return step
        return None

    def starts(self) -> list[int]:
        """Return the steps at which the workers began, for each start."""
        lines = [line.partition("each), step ")[2] for line in self.log.read_text().splitlines()]
        return [int(line.split()[0]) for line in lines if line]

    def finished_like(self, undisturbed: Ended) -> None:
        """Check for the same steps, losses per epoch and weights, and that the checkpoints are removed."""
        log = self.log.read_text()
        assert f"step {undisturbed.steps}/{undisturbed.steps}" in log
        weights = load_file(self.storage / "adapters/revmux-n2-l1" / WEIGHTS_NAME)
        assert weights.keys() == undisturbed.weights.keys()
        assert all(torch.equal(value, undisturbed.weights[name]) for name, value in weights.items())
        client = MlflowClient(f"sqlite:///{self.storage}/mlflow.db")
        experiment = client.get_experiment_by_name("revmux")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])  # the run in which training started
        assert run.info.status == "FINISHED"
        assert run.data.metrics.keys() > {
            "system/cpu_utilization_percentage",
            "live/seconds_left",
            "tokens_per_second",
        }
        for name in ("train_loss", "selection_accuracy"):
            points = client.get_metric_history(run.info.run_id, name)
            curve = {point.step: point.value for point in points}
            expected = {epoch: metrics[name] for epoch, metrics in enumerate(undisturbed.history, start=1)}
            assert curve == pytest.approx(expected, rel=1e-5)
        assert not list(self.storage.glob("checkpoints/*"))


@pytest.fixture
def job(tiny_model_folder: Path, tiny_csv: Path) -> Iterator[TrainJob]:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:  # not pytest's: Ray's socket paths must stay short
        yield TrainJob(Path(folder), tiny_model_folder, tiny_csv)


@pytest.mark.cluster("shared")
@pytest.mark.timeout(600)
def test_training_resumes_after_a_worker_is_killed_within_an_epoch(
    job: TrainJob, undisturbed: Ended, ray_here: None
) -> None:
    job.address = ray.get_runtime_context().gcs_address
    job.flags += ["--store.root", str(undisturbed.store)]
    with job.started() as process:
        step = wait_until(lambda: job.checkpoint_within_epoch(undisturbed.steps_per_epoch), process, job.log)
        workers = processes_named(TRAIN_WORKER, os.getpid())
        assert len(workers) == 2
        workers[1].kill()
        check_end(process, job.log)
    assert f"2 workers (gloo, cpu, 1 thread each), step 0 of {undisturbed.steps}" in job.log.read_text()
    first, resumed = job.starts()
    assert first == 0
    assert resumed >= step
    job.finished_like(undisturbed)


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_same_command_resumes_after_its_driver_was_killed(job: TrainJob, undisturbed: Ended) -> None:
    with job.started() as process:
        step = wait_until(lambda: job.checkpoint_within_epoch(undisturbed.steps_per_epoch), process, job.log)
        workers = processes_named(TRAIN_WORKER, process.pid)
        process.kill()
        left = psutil.wait_procs(workers, timeout=60)[1]
        assert not left, "workers still run after their driver was killed"
    with job.started() as process:
        check_end(process, job.log)
    (resumed,) = job.starts()
    assert resumed >= step
    job.finished_like(undisturbed)


@pytest.mark.cluster("shared")
@pytest.mark.timeout(600)
def test_a_job_that_was_killed_trains_no_finished_width_again(
    job: TrainJob, undisturbed: Ended, ray_here: None
) -> None:
    job.address = ray.get_runtime_context().gcs_address
    job.flags += ["--store.root", str(undisturbed.store), "--num_inputs", "[2,4]", "--register", "mood"]
    job.flags += ["--optim.batch_size", "8", "--optim.epochs", "2"]
    finished = job.storage / "checkpoints"
    with job.started() as process:
        wait_until(lambda: list(finished.glob("revmux-n2-*/finished.json")), process, job.log)
        process.kill()
    with job.started() as process:
        check_end(process, job.log)
    assert "revmux-n2-l1: trained before this job was stopped" in job.log.read_text()
    assert len(job.starts()) == 1
    client = MlflowClient(f"sqlite:///{job.storage}/mlflow.db")
    assert [version.tags["num_inputs"] for version in client.search_model_versions("name='mood'")] == ["4", "2"]
    assert not list(finished.glob("*"))


@pytest.fixture
def machines(job: TrainJob) -> Iterator[Machines]:
    with cluster_of_machines(job.folder, job.environment) as machines:
        job.flags += ["--cluster.address", machines.address]
        yield machines


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_resumes_after_a_node_is_lost_and_replaced(
    job: TrainJob, undisturbed: Ended, machines: Machines
) -> None:
    second = machines.add()
    with job.started() as process:
        step = wait_until(lambda: job.checkpoint_within_epoch(undisturbed.steps_per_epoch), process, job.log)
        assert processes_named(TRAIN_WORKER, second.pid), "one worker per node"
        machines.lose(second)
        machines.add()
        check_end(process, job.log)
    first, *resumed = job.starts()  # the other worker may fail, and start, before the node counts as lost
    assert first == 0
    assert resumed[-1] >= step
    job.finished_like(undisturbed)


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_shrinks_and_grows_with_the_cluster(
    job: TrainJob, machines: Machines, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    """Four workers, two after a loss, and four again when machines have joined: the weights of an undisturbed run."""
    epochs, batch = 90, 8
    # Dropout depends on the rank.
    run_undisturbed(str(tiny_model_folder), str(tiny_csv), str(tmp_path), epochs, dropout=0.0, batch=batch)
    job.flags += ["--cluster.workers", "4", "--cluster.min_workers", "2", "--cluster.resize_minutes", "0.05"]
    job.flags += ["--optim.epochs", str(epochs), "--optim.batch_size", str(batch)]
    job.flags += ["--method.options", '{"dropout": 0.0}']
    _, *lost = [machines.add() for _ in range(3)]

    def sizes() -> list[str]:
        return re.findall(r"(\d) workers? \(.*each\), step", job.log.read_text())

    with job.started() as process:
        wait_until(lambda: list(job.storage.glob("checkpoints/*/step-*.json")), process, job.log)
        wait_until(lambda: sizes()[-1] == "4", process, job.log)  # machines may join after the start
        for machine in lost:
            machines.lose(machine)
        wait_until(lambda: sizes()[-1] == "2", process, job.log)
        for _ in lost:
            machines.add()
        wait_until(lambda: sizes()[-1] == "4", process, job.log)
        check_end(process, job.log)
    assert max(job.starts()) > 0  # it continued from a checkpoint
    weights, expected = (
        load_file(folder / WEIGHTS_NAME) for folder in (job.storage / "adapters/revmux-n2-l1", tmp_path / "adapter-0")
    )
    for name, value in expected.items():
        assert_close(weights[name], value, layers=50)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], Any]]:
    """Mount a disk of 4 MB; yield a function that fills it completely and returns one that frees it."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")

    def fill() -> Callable[[], None]:
        ballast = folder / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return ballast.unlink

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a killed process may still hold open files


@contextmanager
def small_files(folder: Path) -> Iterator[Callable[[], Any]]:
    """Limit files to 10 kB once the disk is "full"; same interface as :func:`small_disk`."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> Callable[[], None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, former[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, former)

    try:
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("disk", [small_disk, small_files])
def test_a_full_disk_is_reported_and_keeps_the_previous_checkpoint(
    disk: Callable, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    def trainer(folder: Path | None, on_step: Callable | None = None) -> Trainer:
        prepared = prepare(short, load_task(short.data))
        checkpoints = None if folder is None else CheckpointFolder(folder)
        return prepared.trainer(checkpoints=checkpoints, checkpoint_steps=4, on_step=on_step)

    def fill_at_10(step: int, total: int, metrics: dict) -> None:
        if step == 10:
            free.append(fill())

    short = recipe(tiny_model_folder, tiny_csv, tmp_path / "store")
    short = replace(short, optim=replace(short.optim, epochs=2))
    unbroken = trainer(None)
    list(unbroken.run())
    (tmp_path / "disk").mkdir()
    free: list[Callable] = []
    with disk(tmp_path / "disk") as fill:
        folder = tmp_path / "disk" / "run"
        with pytest.raises(UserError) as reported:
            list(trainer(folder, fill_at_10).run())
        assert f"cannot write the checkpoint of step 12 to {folder} (" in str(reported.value)
        assert "free some space there" in str(reported.value)
        assert "resumes from step 8" in str(reported.value)
        assert not list(folder.glob(".*")), "a partial file is left"
        free[0]()
        again = trainer(folder)
        assert again.resume() == 8
        list(again.run())
    assert again.state.step == unbroken.state.step
    expected = unbroken.trained_weights()
    assert all(torch.equal(value, expected[name]) for name, value in again.trained_weights().items())


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_on_a_full_disk_ends_with_one_line_and_resumes_when_there_is_space(
    job: TrainJob, undisturbed: Ended
) -> None:
    job.storage.mkdir()
    with small_disk(job.storage) as fill:
        with job.started() as process:
            wait_until(lambda: job.checkpoint_within_epoch(undisturbed.steps_per_epoch), process, job.log)
            free = fill()
            check_end(process, job.log, 2)
        log = job.log.read_text()
        (line,) = [line for line in log.splitlines() if line.startswith("error:")]
        assert "No space left on device" in line
        assert "free some space there" in line
        assert "Traceback" not in log
        free()
        with job.started() as process:
            check_end(process, job.log)
        assert job.starts()[0] > 0
        job.finished_like(undisturbed)
