"""Undocumented behaviour of Ray on which this project relies; a failing test names what a new version changed."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, ScalingConfig
from ray.train._internal.session import _TrainSession
from ray.train._internal.storage import StorageContext
from ray.train.torch import TorchConfig
from ray.train.v2._internal import constants as train_constants
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    RunningState,
    SchedulingState,
    TrainControllerState,
)
from ray.tune.experiment.trial import Trial
from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function

from ray_jobs import ray_internals
from ray_jobs.training.resource_wait import START_TIMEOUT, WorkerWait, start_timeout
from ray_jobs.training.worker_errors import describe_error, error_to_raise
from revmux import UserError
from serve_app.proxy import CALLBACK_VARIABLE


@pytest.fixture
def trial_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageContext:
    """A trial as Ray Tune stores it, without a cluster."""
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path))
    return StorageContext(str(tmp_path), experiment_dir_name="sweep", trial_dir_name="trial")


def test_only_one_file_imports_private_modules_of_ray() -> None:
    root = Path(__file__).parents[1]
    marks = ("ray._private", "._internal", "ray._raylet", "ray.air.execution")
    found = [
        path.relative_to(root).as_posix()
        for package in ("revmux", "ray_jobs", "serve_app", "tune_spaces", "benchmarks")
        for path in (root / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if "import" in line and any(mark in line for mark in marks)
    ]
    assert set(found) == {"ray_jobs/ray_internals.py"}


def test_the_name_of_the_submitted_job_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as NAME

    monkeypatch.delenv(NAME, raising=False)
    assert not ray_internals.in_submitted_job()
    monkeypatch.setenv(NAME, json.dumps({}))
    assert ray_internals.in_submitted_job()


def test_the_head_of_a_cluster_has_a_resource_of_its_own() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME as NAME

    assert ray_internals.is_head({"Resources": {NAME: 1.0}})
    assert not ray_internals.is_head({"Resources": {"CPU": 1.0, "node:10.0.0.2": 1.0}})


def test_a_job_supervisor_sets_that_variable() -> None:
    from ray.dashboard.modules.job import job_supervisor

    assert "RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps(" in inspect.getsource(job_supervisor)


def test_the_controller_calls_the_callback_with_the_arguments_used() -> None:
    assert ray_internals.ControllerCallback is ControllerCallback
    for name in (
        "after_controller_start",
        "on_controller_start_worker_group",
        "after_controller_state_update",
    ):
        declared = inspect.signature(getattr(ControllerCallback, name)).parameters
        ours = inspect.signature(getattr(WorkerWait, name)).parameters
        assert [(key, value.kind) for key, value in ours.items()] == [
            (key, value.kind) for key, value in declared.items()
        ]
        assert name in inspect.getsource(controller)


def test_an_attribute_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        _ = ray_internals.Nothing


def test_a_pending_user_error_ends_the_run() -> None:
    waiting = WorkerWait("run", minutes=1)

    def give_up(workers: int, each: object) -> None:
        raise UserError("no machines")

    waiting.resource_wait.check = give_up  # type: ignore[method-assign]
    with pytest.raises(ControllerError) as ended:
        waiting.on_controller_start_worker_group(
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}), num_workers=1
        )
    assert str(error_to_raise(ended.value)) == "no machines"


def test_only_the_running_state_means_that_workers_run() -> None:
    assert issubclass(RunningState, TrainControllerState)
    assert ray_internals.workers_are_running(RunningState())
    assert not ray_internals.workers_are_running(InitializingState())
    assert not ray_internals.workers_are_running(SchedulingState.__new__(SchedulingState))


def test_the_start_timeout_is_passed_on_to_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(START_TIMEOUT, raising=False)
    with start_timeout(7.5):
        assert train_constants.get_env_vars_to_propagate()[START_TIMEOUT] == "7.5"
    assert START_TIMEOUT not in os.environ
    monkeypatch.setenv(START_TIMEOUT, "9")
    with start_timeout(7.5):
        assert train_constants.get_env_vars_to_propagate()[START_TIMEOUT] == "9", "the user's own value is kept"


def test_the_address_of_the_cluster_is_passed_on_to_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    here = SimpleNamespace(gcs_address="192.0.2.1:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    for own in (None, "192.0.2.9:6379"):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if own is not None:
            monkeypatch.setenv("RAY_ADDRESS", own)
        with ray_internals.controllers_know_their_cluster():
            assert train_constants.get_env_vars_to_propagate()["RAY_ADDRESS"] == here.gcs_address
            assert canonicalize_bootstrap_address_or_die(None) == here.gcs_address, "by which the helper finds it"
        assert os.environ.get("RAY_ADDRESS") == own


def test_names_of_variables_that_the_jobs_set() -> None:
    from ray.serve._private import constants as serve_constants
    from ray.train import constants
    from ray.tune.trainable import function_trainable

    assert train_constants.ENABLE_PRINT_PATCH_ENV_VAR == "RAY_TRAIN_ENABLE_PRINT_PATCH"
    assert train_constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    assert train_constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR == "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    assert constants.TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S == "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
    assert TorchConfig().backend_cls.on_shutdown, "the controller reads this attribute when it stops the workers"
    assert "TUNE_FUNCTION_THREAD_TIMEOUT_S" in inspect.getsource(function_trainable)
    assert f'"{CALLBACK_VARIABLE}"' in inspect.getsource(serve_constants)


def test_errors_of_ray_train_are_recognised_by_their_class_names() -> None:
    inner = ValueError("the worker's own")
    failed = pickle.loads(pickle.dumps(WorkerHealthCheckFailedError("worker 1 is not healthy", inner)))  # noqa: S301
    assert str(ray_internals.unwrap_health_check(failed)) == str(inner)
    assert describe_error(failed) == "ValueError: the worker's own"
    assert ray_internals.unwrap_health_check(inner) is inner
    too_small = InsufficientClusterResourcesError("no node\nhas a GPU")
    assert ray_internals.is_cluster_too_small(too_small)
    assert not ray_internals.is_cluster_too_small(inner)
    reported = error_to_raise(ControllerError(too_small))
    assert isinstance(reported, UserError)
    assert str(reported) == "no node has a GPU"


def test_a_trial_sees_that_tune_stops_it(trial_storage: StorageContext) -> None:
    begun, ended = threading.Event(), threading.Event()
    asked: list[bool] = []

    def trial(config: dict[str, Any]) -> None:
        stopping = ray_internals.trial_stop_check()
        asked.append(stopping())
        begun.set()
        deadline = time.monotonic() + 30
        while not stopping() and time.monotonic() < deadline:
            ended.wait(0.01)
        asked.append(stopping())
        ended.set()

    trainable = wrap_function(trial)({}, storage=trial_storage)
    assert isinstance(trainable, FunctionTrainable)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trainable.train)
        assert begun.wait(30)
        trainable.stop()
        assert ended.wait(30)
    assert asked == [False, True]
    assert "stop_event.set()" in inspect.getsource(_TrainSession.finish)


def test_a_process_that_the_memory_monitor_ended_counts_as_lost() -> None:
    original = RayActorManager._actor_task_failed
    assert list(inspect.signature(original).parameters) == ["self", "tracked_actor_task", "exception"]
    reported: list[Exception] = []
    manager = RayActorManager.__new__(RayActorManager)
    manager._failed_actor_ids = set()
    manager._cleanup_actor = lambda tracked_actor: None
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: reported.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    with pytest.raises(RuntimeError):  # once Ray no longer raises here, the context manager can be removed
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("too large"))
    with ray_internals.retry_out_of_memory_trials():
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("too large"))
    assert [type(error) for error in reported] == [RayActorError]
    assert "too large" in str(reported[0])
    assert RayActorManager._actor_task_failed is original


def test_the_newest_failure_of_a_trial_is_read_from_tunes_error_file(trial_storage: StorageContext) -> None:
    trial = Trial("nothing", stub=True, storage=trial_storage)
    Path(trial.local_path).mkdir(parents=True, exist_ok=True)
    trial.handle_error(ValueError("the first"))
    for lost in (ActorDiedError(), ActorUnavailableError("RpcError: Socket closed", None)):
        trial.handle_error(lost)
        error = ray_internals.last_error(Path(trial.error_file).read_text())
        assert "the first" not in error
        assert ray_internals.process_was_lost(error)
    assert not ray_internals.process_was_lost(ray_internals.last_error("Failure # 1\nValueError: x"))


def test_failures_before_progress_are_forgotten_and_later_ones_count(trial_storage: StorageContext) -> None:
    trial = Trial("nothing", stub=True, storage=trial_storage, max_failures=1)
    Path(trial.local_path).mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        trial.handle_error(RayActorError(error_msg="lost"))
        assert trial.should_recover()
        ray_internals.forget_failures(trial)
    trial.handle_error(RayActorError(error_msg="lost"))
    trial.handle_error(RayActorError(error_msg="taken away", preempted=True))
    assert trial.should_recover()
    trial.handle_error(RayActorError(error_msg="lost"))
    assert not trial.should_recover()


def test_the_memory_monitor_still_writes_the_expected_text() -> None:
    raylet = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    if sys.platform == "win32" or not raylet.is_file():
        pytest.skip("Ray's raylet is elsewhere on this platform")
    assert ray_internals._MEMORY_MONITOR_TEXT.encode() in raylet.read_bytes()
    assert ray_internals.ended_by_memory_monitor(f"Task was killed due to the {ray_internals._MEMORY_MONITOR_TEXT}.")


def test_lines_of_the_clusters_processes_pass_the_filter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    monkeypatch.setenv("RAY_COLOR_PREFIX", "0")
    assert list(inspect.signature(worker.print_worker_logs).parameters) == ["data", "print_file", "ignore_prefix"]
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages), (
        "the raylet's lines use this function"
    )
    log = io.StringIO()
    data = {"pid": 7, "actor_name": "Worker", "ip": "a", "localhost": "a", "is_err": False, "lines": ["mine", "Ray's"]}
    with ray_internals.filter_worker_lines(lambda origin, line: line == "Ray's", log):
        worker.print_to_stdstream(data, ignore_prefix=False)
    assert capsys.readouterr().out == "(Worker pid=7) mine\n"
    assert log.getvalue() == "(Worker pid=7) Ray's\n"
