"""Jobs as users submit them: a real head with token authentication, results outside the working copy, MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from polling import wait_until
from ray_machines import kill_all, processes_named
from tiny_models import write_tiny_model

from ray_jobs.paths import absolute_path
from revmux import UserError

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
FIGURES = {"accuracy_mean", "accuracy_std", "siso_accuracy", "siso_agreement", "cost_counted"}
BY_LENGTH = {f"{name}_served" for name in (*(FIGURES - {"cost_counted"}), "cost_grouped")}
"""Figures with groups by length."""
EVALUATED = FIGURES | BY_LENGTH | {"cost_grouped"}


@dataclass(frozen=True)
class Head:
    """A running head: its address, the environment of a shell that submits jobs, and a persistent folder."""

    address: str
    environment: dict[str, str]
    folder: Path
    gcs: str
    process: int

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def submit(
        self, job: str, *flags: str | Path, authenticated: bool = True, entrypoint: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in self.environment.items() if authenticated or key != "RAY_AUTH_MODE"}
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", str(ROOT), *entrypoint, "--"]
        command += ["python", "-m", f"ray_jobs.{job}", *map(str, flags)]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def serve(self, verb: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
        """Run Ray Serve's own command line against the same address."""
        command = [str(Path(RAY).with_name("serve")), verb, "--address", self.address, *map(str, flags)]
        return subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def runs(self, storage: Path | None = None) -> dict[str, Run]:
        """Return the runs in MLflow by name."""
        client = MlflowClient(f"sqlite:///{storage or self.storage}/mlflow.db")
        experiment = client.get_experiment_by_name("revmux")
        assert experiment is not None
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def status(url: str) -> int | None:
    """Return the HTTP status of a request without a token, None if there is no server."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="jobs-"))  # not pytest's: Ray's socket paths must stay short
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_prestart_worker_first_driver": "0",  # jobs with a working directory cannot use such workers
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard, client, agent = free_ports(4)
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}/ray"]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        while not (status(f"{address}/api/version") and listens(agent)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                pytest.fail(f"the head ended: {log.read_text()}")
        yield Head(address, environment, folder, f"127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # only its own process group, so that other Ray clusters keep running
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def settings(tiny_csv: Path, head: Head) -> list[str | Path]:
    return ["--data.source", tiny_csv, "--backbone.max_length", "16", "--storage", head.storage]


@pytest.fixture(scope="module")
def task_model(head: Head, settings: list[str | Path], tiny_model_folder: Path) -> Path:
    """The output of the finetune job."""
    flags = ["--backbone.model", tiny_model_folder, "--optim.epochs", "1", "--optim.batch_size", "8"]
    done = head.submit("finetune", *flags, *settings, "--cluster.workers", "1")
    assert done.returncode == 0, done.stdout
    return head.storage / "task-model"


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_submission_without_the_token_is_refused(head: Head) -> None:
    assert status(f"{head.address}/api/jobs/") == 401
    refused = head.submit("finetune", "--help", authenticated=False)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_user_error_ends_the_job_with_status_2_and_one_line(head: Head, settings: list[str | Path]) -> None:
    failed = head.submit("finetune", *settings, "--data.text_column", "reviews")
    assert failed.returncode != 0
    assert "failed with exit code 2" in failed.stdout
    assert "Traceback" not in failed.stdout
    reported = {line for line in failed.stdout.splitlines() if line.startswith("error:")}
    assert len(reported) == 1
    assert "unknown text_column 'reviews'" in reported.pop()


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_training_writes_its_result_outside_the_working_copy_and_records_its_run(
    head: Head, tiny_csv: Path, tiny_model_folder: Path
) -> None:
    storage = head.folder / "trained"
    flags = ["--data.source", tiny_csv, "--backbone.model", tiny_model_folder, "--backbone.max_length", "16"]
    flags += ["--num_inputs", "[2]", "--method.prefill_layers", "1", "--optim.epochs", "1", "--optim.batch_size", "8"]
    flags += ["--storage", storage, "--register", "reviews", "--cluster.workers", "1", "--cluster.cpus_per_worker", "2"]
    trained = head.submit("train", *flags)
    assert trained.returncode == 0, trained.stdout
    assert "cpu, 2 threads each" in trained.stdout, (
        "a worker uses its share of the CPUs, not OMP_NUM_THREADS of the environment"
    )
    assert json.loads((storage / "adapters/revmux-n2-l1/adapter_config.json").read_text())["num_inputs"] == 2
    copies = list(head.folder.glob("ray/session_2*/runtime_resources/working_dir_files/*/"))
    assert copies
    assert not [path for copy in copies for path in copy.rglob("*") if path.suffix in (".db", ".safetensors")]
    ((name, run),) = head.runs(storage).items()
    assert (name, run.info.status) == ("revmux-n2-l1", "FINISHED")
    assert run.data.metrics.keys() > FIGURES
    assert next(iter(run.data.metrics)) == "accuracy_mean"  # MLflow's comparison plots start with the first metric
    version = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_model_version("reviews", "1")
    assert (version.run_id, version.tags["num_inputs"]) == (run.info.run_id, "2")
    assert (Path(version.source.removeprefix("file://")) / "artifacts/adapter/adapter_config.json").is_file()


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_finetune_train_and_evaluate_write_results_and_record_runs(
    head: Head, settings: list[str | Path], task_model: Path
) -> None:
    flags = ["--backbone.model", task_model, *settings]
    small = ["--num_inputs", "[2]", "--method.prefill_layers", "1", "--optim.epochs", "1", "--optim.batch_size", "8"]
    trained = head.submit("train", *flags, *small, "--cluster.workers", "2")
    assert trained.returncode == 0, trained.stdout
    adapter = head.storage / "adapters/revmux-n2-l1"
    evaluated = head.submit("evaluate", *flags, "--adapter", adapter)
    assert evaluated.returncode == 0, evaluated.stdout

    assert (task_model / "model.safetensors").is_file()
    figures = json.loads((head.storage / "evaluate-revmux-n2-l1.json").read_text())["metrics"]
    assert figures.keys() == EVALUATED

    runs = head.runs()
    assert runs.keys() == {"task-model", "revmux-n2-l1", "evaluate-revmux-n2-l1"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["evaluate-revmux-n2-l1"].data.metrics.keys() == EVALUATED
    assert runs["revmux-n2-l1"].data.metrics["accuracy_mean"] == pytest.approx(figures["accuracy_mean"])
    assert runs["task-model"].data.params.keys() - runs["revmux-n2-l1"].data.params.keys() == {
        "recipe.method.options.tune_backbone"
    }


@contextmanager
def driver_machine(head: Head) -> Iterator[int]:
    """A second machine for drivers and one worker; yields the id of the process whose descendants are its processes."""
    (agent,) = free_ports(1)
    command = [
        RAY,
        "start",
        "--block",
        f"--address={head.gcs}",
        "--num-cpus=1",
        f"--dashboard-agent-listen-port={agent}",
    ]
    command += ["--min-worker-port=0", "--max-worker-port=0", '--resources={"driver": 1, "worker": 1}']
    with (head.folder / "driver.log").open("w") as output:
        process = subprocess.Popen(
            command, env=head.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: listens(agent), failure=lambda: "the machine ended" if process.poll() is not None else None)
        yield process.pid
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        psutil.wait_procs(kill_all(family))
        process.wait()


def peak_memory(process: psutil.Process) -> int:
    """The most bytes that a running process has ever held."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line[:6] == "VmHWM:"]
    return 1024 * int(line.split()[1])


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_large_model_needs_no_memory_on_the_head(head: Head, tiny_csv: Path, tmp_path: Path) -> None:
    """Only a worker holds the model: neither the head, nor the driver, which runs where it was submitted to."""
    model = write_tiny_model(tmp_path / "large", vocab_size=700_000, hidden_size=512)
    size = (model / "model.safetensors").stat().st_size
    peaks: dict[str, dict[int, int]] = {"head": {}, "driver": {}, "machine": {}}

    def measure(machine: int) -> None:
        trees = {"driver": processes_named("ray_jobs.features", machine), "head": processes_named("", head.process)}
        for name, processes in (trees | {"machine": processes_named("", machine)}).items():
            for process in processes:
                with suppress(OSError, ValueError, psutil.NoSuchProcess):
                    peaks[name][process.pid] = peak_memory(process)

    flags = ["--backbone.model", model, "--backbone.max_length", "16", "--data.source", tiny_csv, "--layers", "[1]"]
    flags += ["--storage", head.storage, "--cluster.workers", "1", "--cluster.resources_per_worker", "{worker: 1}"]
    with driver_machine(head) as machine, ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(head.submit, "features", *flags, entrypoint=["--entrypoint-resources", '{"driver": 1}'])
        wait_until(lambda: measure(machine) or submitted.done(), 600)
        done = submitted.result()
    assert done.returncode == 0, done.stdout
    assert peaks["driver"]
    assert max(peaks["machine"].values()) > size, (peaks, size)
    assert max((peaks["driver"] | peaks["head"]).values()) < size, (peaks, size)
    # The machines of this test share an address, by which a driver finds its node; it therefore finds the head here.
    assert "runs on the cluster's head" in done.stdout


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_trials_of_a_sweep_are_runs_with_the_same_metric_names(
    head: Head, settings: list[str | Path], tiny_model_folder: Path
) -> None:
    space = head.folder / "space.yaml"
    space.write_text("{num_inputs: [2, 4], prefill_layers: [1], infonce_weight: [0.25], epochs: 1}")
    flags = ["--backbone.model", tiny_model_folder, *settings, "--optim.batch_size", "8", "--concurrent_trials", "1"]
    swept = head.submit("tune", *flags, "--space", space, "--cluster.workers", "1")
    assert swept.returncode == 0, swept.stdout
    (table,) = head.storage.glob("sweeps/*/sweep.json")
    assert [row["status"] for row in json.loads(table.read_text())] == ["done", "done"], swept.stdout
    runs = head.runs()
    trials = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == runs["sweep"].info.run_id]
    first, second = trials
    assert first.data.params.keys() == second.data.params.keys()
    assert first.data.metrics.keys() == second.data.metrics.keys() > FIGURES


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_configuration_written_by_a_plan_is_deployed_from_the_registry(
    head: Head, tiny_csv: Path, tiny_model_folder: Path
) -> None:
    """README's commands: a plan, ``serve deploy`` of the file that it wrote, and requests over HTTP."""
    space, storage = head.folder / "planned.yaml", head.folder / "planned"
    space.write_text("{num_inputs: [2, 4], prefill_layers: [1], infonce_weight: [0.25], epochs: 1}")
    (port,) = free_ports(1)
    flags = ["--backbone.model", tiny_model_folder, "--backbone.max_length", "16", "--data.source", tiny_csv]
    flags += ["--space", space, "--optim.batch_size", "8", "--shuffles", "1", "--store.root", head.folder / "store"]
    # Costs are counted, so the widest is the cheapest regardless of the machine's load.
    flags += ["--measure.throughput_inputs", "0", "--measure.thresholds", "[0.0]", "--port", port]
    planned = head.submit("plan", "--goal.allowance", "100", "--storage", storage, *flags)
    assert planned.returncode == 0, planned.stdout
    page = storage / "plans/plan/serve.yaml"
    assert f"serve deploy {page}" in planned.stdout
    (application,) = yaml.safe_load(page.read_text())["applications"]
    assert application["args"]["adapters"][-1] == "models:/plan@champion"
    widths = [one["num_inputs"] for one in json.loads((page.parent / "plan.json").read_text())["served"]]
    assert widths[-1] == 4

    deployed = head.serve("deploy", page)
    assert deployed.returncode == 0, deployed.stdout
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status(f"{url}/health") == 200, 300)
        reported = requests.get(f"{url}/info", timeout=60).text
        assert all(f'"num_inputs":{width}' in reported.replace(" ", "") for width in widths)
        alone = requests.post(f"{url}/predict", json={"inputs": "w1 w5"}, timeout=60)
        assert (alone.status_code, alone.headers["x-revmux-width"]) == (200, "1")
        many = requests.post(f"{url}/predict", json={"inputs": [["w1 w5"]] * 32}, timeout=60)
        assert (many.status_code, len(many.json())) == (200, 32)
        assert max(int(width) for width in many.headers["x-revmux-width"].split(",")) == widths[-1]
    finally:
        assert head.serve("shutdown", "--yes").returncode == 0


@pytest.mark.parametrize("path", ["runs", "./runs", "s3://bucket/runs"])
def test_results_of_a_submitted_job_need_an_absolute_folder(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=f"storage '{path}' is"):
        absolute_path(path, "storage")
    assert absolute_path("/mnt/revmux", "storage") == Path("/mnt/revmux")


def test_results_of_a_local_job_may_be_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert absolute_path("runs", "storage") == tmp_path / "runs"
