"""Faults in only one worker: the others stop soon, and the original error is the one that is reported."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch
import torch.distributed as dist
from mlflow import MlflowClient
from ray.exceptions import RayActorError
from ray.train import ControllerError

import ray_jobs.training.launch
import ray_jobs.training.worker
import revmux.utils.place
from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.launch import Trained, TrialHooks, launch
from ray_jobs.training.resource_wait import lacks_resources
from ray_jobs.training.worker import WorkerConfig
from ray_jobs.training.worker_errors import RestartPolicy, WorkerError, error_to_raise, first_error
from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.features.tokens import tokenize_task
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.trainer import Trainer
from revmux.utils.out_of_memory import is_out_of_memory

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: CLOSED, 1: OSError(5, "Input/output error")}, 1),
        ({0: dist.DistBackendError("NCCL error"), 1: CLOSED, 2: RuntimeError("CUDA error")}, 2),
        ({0: OSError(5, "Input/output error"), 1: UserError("full disk")}, 1),
        ({1: CLOSED, 2: CLOSED}, 1),
    ],
)
def test_the_original_failure_among_follow_up_failures_is_found(failures: dict[int, Exception], rank: int) -> None:
    assert first_error(failures) == (rank, failures[rank])


def test_out_of_memory_is_recognised_on_every_device() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.cluster("shared")
def test_a_gpu_that_ray_did_not_assign_is_not_used(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ray_jobs.training.worker.assigned_device() == torch.device("cpu")


def test_an_aborted_run_is_reported_on_one_line() -> None:
    given_up = WorkerError("worker 3 failed: KeyError: 'label'")
    assert error_to_raise(ControllerError(given_up)) is given_up
    assert str(error_to_raise(ControllerError(UserError("no room on worker 2")))) == "no room on worker 2"
    other = ControllerError(TypeError("a mistake in our code"))
    assert error_to_raise(other) is other


def test_failures_count_from_the_last_epoch_and_preemptions_never() -> None:
    policy, lost = RestartPolicy("run", max_failures=1), RayActorError(error_msg="lost")
    for _ in range(3):
        policy.after_exception(None, {0: CLOSED, 1: lost})
        policy.after_report(None, [{}], None)
    preempted = RayActorError(error_msg="taken away", preempted=True)
    for _ in range(3):
        policy.after_exception(None, {0: CLOSED, 1: preempted})
    policy.after_exception(None, {0: CLOSED, 1: lost})
    with pytest.raises(ControllerError) as ended:
        policy.after_exception(None, {0: CLOSED, 1: KeyError("label")})
    assert str(error_to_raise(ended.value)) == "worker 1 failed: KeyError: 'label'"


@pytest.fixture(scope="module")
def two_cores(ray_here: None) -> Iterator[None]:
    """A Ray cluster with two cores; functions of this file are pickled by value for its workers."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


Start = Callable[..., Trained]


@pytest.fixture
def start(
    two_cores: None,
    tiny_model_folder: Path,
    tiny_csv: Path,
    mlflow_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Start:
    """Return a function that launches a run whose second worker, if it has one, fails at its fifth step."""

    def run(fail: Callable[[], None] | None, hooks: TrialHooks | None = None, **cluster: Any) -> Trained:
        if fail is not None:
            monkeypatch.setattr(ray_jobs.training.worker, "train_worker", partial(one_fails, fail))
        recipe = Recipe(
            BackboneConfig(model=str(tiny_model_folder), max_length=16),
            DataConfig(source=str(tiny_csv)),
            MethodConfig("revmux", 2, 1),
            OptimConfig(epochs=2, batch_size=4),
            store=StoreConfig(root=str(tmp_path / "store")),
            shuffles=1,
        )
        shutil.copy(mlflow_database, tmp_path)
        tracker = Tracker(TrackingConfig(), tmp_path)
        settings = ClusterConfig(**{"workers": 2, "max_failures": 1, **cluster})
        tokens = tokenize_task(load_task(recipe.data), recipe.backbone, recipe.store)
        return launch(recipe, tokens, settings, tracker, tmp_path, "run", tmp_path / "adapter", hooks=hooks)

    return run


def one_fails(fail: Callable[[], None], config: WorkerConfig) -> Any:
    """One worker; the second one fails within its fifth step while the first waits for its share of the gradient."""
    from ray_jobs.training.worker import train_worker

    whole = Trainer._step

    def step(self: Trainer, groups: torch.Tensor, all_groups: torch.Tensor) -> Any:
        if self.rank == 1 and self.state.step == 4:
            fail()
        return whole(self, groups, all_groups)

    Trainer._step = step  # type: ignore[method-assign]
    return train_worker(config)


def raise_(error: Exception) -> None:
    raise error


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.cluster("shared")
@pytest.mark.timeout(300)  # the other workers' own time-out is half an hour
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("shard 7 is damaged; remove it"), "shard 7 is damaged; remove it"),
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "Tried to allocate 2 GiB.*--optim.accumulate",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_user_error_in_one_worker_ends_all_workers_at_once(
    error: Exception, words: str, start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=words):
        start(partial(raise_, error))
    reported = capfd.readouterr()
    # Ray may print its own stack traces on a busy machine, but none may end with this error.
    assert f"{type(error).__name__}: {error}" not in reported.out + reported.err
    assert (reported.out + reported.err).count("each), step") == 1, "it was retried"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("revmux").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("failures", [0, 1])
def test_other_errors_of_one_worker_are_retried_and_reported(
    failures: int, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerError, match=r"^worker 1 failed: OSError: \[Errno 5\] Input/output error"):
        start(partial(raise_, OSError(5, "Input/output error")), max_failures=failures)
    reported = capfd.readouterr()
    assert (reported.out + reported.err).count("each), step") == 1 + failures
    assert "run: worker 1 failed: OSError: [Errno 5] Input/output error" in reported.out + reported.err


@pytest.mark.cluster("shared")
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_lost_worker_is_reported_instead_of_the_broken_connection_of_its_peer(start: Start) -> None:
    with pytest.raises(WorkerError, match=r"^worker 1 failed: .*died"):
        start(kill_oneself, max_failures=0)


@pytest.mark.cluster("shared")
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to find the names of open files")
def test_checkpoints_are_removed_once_the_adapter_is_saved(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, remove, flushed, before = os.fsync, revmux.utils.place.remove_folder, [], []

    def note(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def note_and_remove(folder: Path) -> None:
        before.extend(flushed)
        remove(folder)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(revmux.utils.place, "remove_folder", note_and_remove)
    start(None, TrialHooks(report=lambda metrics: None), workers=1).forget()  # trains in this process
    names = [path.name for path in before]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert tmp_path in before[len(names) - names[::-1].index("adapter_model.safetensors") :], (
        "the adapter folder is synced after its rename"
    )
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.cluster("shared")
def test_a_run_reports_missing_machines_and_ends_after_the_limit(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    cores = ray.cluster_resources()["CPU"]
    with pytest.raises(UserError) as reported:
        start(kill_oneself, cpus_per_worker=cores, wait_minutes=0.02)
    asked = f"2 × {cores:g} CPU; the cluster has {cores:g} CPU"
    assert asked in str(reported.value)
    assert "--cluster.wait_minutes" in str(reported.value)


def test_resources_used_by_other_work_do_not_count_as_missing() -> None:
    assert not lacks_resources(2, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0})
    assert lacks_resources(2, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0})
    assert lacks_resources(1, {"GPU": 1.0}, {"CPU": 8.0})
