"""What MLflow could not take is kept on disk and sent later, in order: a tracking server that goes away ends no job.

Each record is a file of its own in the outbox, named by time, so that processes on several machines may write side by
side. Whoever reaches the server next sends what waits there first.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from revmux.utils.files import write_json

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

_log = logging.getLogger(__name__)
RETRY_SECONDS = 30.0
LOCAL = "local-"
"""How ids of runs begin that were made while the server was away; when it is back they get ids of its own."""
FILES, IDS = "files", "ids.json"


class Outbox:
    """Records that wait, in a folder that all processes of a job reach.

    Args:
        folder: made when the first record waits.
        client: of MLflow.
    """

    def __init__(self, folder: Path, client: Any) -> None:
        self.folder, self.client = folder, client
        self.away_since: float | None = None

    def __len__(self) -> int:
        return len(self._waiting())

    def _waiting(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.json")) if self.folder.is_dir() else []

    def send(self, call: str, run_id: str, **values: Any) -> None:
        """Send a record, after all that waits; keep it where the server is away."""
        record = {"call": call, "run_id": run_id, "values": values}
        if not self._waiting() and not run_id.startswith(LOCAL):
            try:
                self._deliver(record)
            except Exception as error:
                if is_refusal(error):
                    raise
                self._went_away(error)
            else:
                return
        self._keep(record)
        if self.away_since is None or time.monotonic() - self.away_since > RETRY_SECONDS:
            self.flush()

    def _went_away(self, error: Exception) -> None:
        if self.away_since is None:
            reason = str(error).splitlines()[0][:200]
            _log.warning(
                "MLflow took no record (%s); records wait in %s and are sent when it is back", reason, self.folder
            )
        self.away_since = time.monotonic()

    def _keep(self, record: dict[str, Any]) -> None:
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        if record["call"] == "artifacts":  # what is sent later must not have changed, or gone
            source, target = Path(record["values"]["path"]), self.folder / FILES / name
            target.mkdir(parents=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                target = Path(shutil.copy2(source, target))
            record["values"]["path"] = str(target)
        write_json(self.folder / f"{name}.json", record)

    def flush(self) -> int:
        """Send what waits; returns how much still does."""
        if not self._waiting():
            return 0
        try:
            with FileLock(str(self.folder / "lock"), timeout=0):
                self._send_waiting()
        except Timeout:  # another process is at it
            pass
        return len(self)

    def _send_waiting(self) -> None:
        for file in self._waiting():
            record = json.loads(file.read_text())
            try:
                self._deliver(record)
            except Exception as error:
                if not is_refusal(error):
                    self._went_away(error)
                    return
                _log.warning("MLflow refused a record that had waited (%s); it is dropped", str(error).splitlines()[0])
            file.unlink()
            if record["call"] == "artifacts":
                shutil.rmtree(self.folder / FILES / file.stem, ignore_errors=True)
        self.away_since = None

    def _deliver(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param

        run_id, values = self.resolve(record["run_id"]), record["values"]
        match record["call"]:
            case "create":
                tags = {key: self.resolve(value) for key, value in values["tags"].items()}
                made = self.client.create_run(values["experiment_id"], values["start_time"], tags, values["name"])
                ids = self._ids() | {record["run_id"]: made.info.run_id}
                write_json(self.folder / IDS, ids)
            case "batch":
                metrics = [Metric(key, float(value), when, step) for key, value, when, step in values["metrics"]]
                self.client.log_batch(run_id, metrics, [Param(key, value) for key, value in values["params"]])
            case "tag":
                self.client.set_tag(run_id, values["key"], values["value"])
            case "status":
                if values["ended"] is None:
                    self.client.update_run(run_id, status=values["status"])
                else:
                    self.client.set_terminated(run_id, values["status"], values["ended"])
            case "input":
                self.client.log_inputs(run_id, [dataset_input(values["dataset"], values["tags"])])
            case "artifacts":
                path = Path(values["path"])
                log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
                log(run_id, str(path), values["artifact_path"])

    def _ids(self) -> dict[str, str]:
        file = self.folder / IDS
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def resolve(self, run_id: str) -> str:
        """The server's id of a run."""
        return self._ids().get(run_id, run_id) if run_id.startswith(LOCAL) else run_id


class PatientClient:
    """MLflow's client as far as runs are written; what is read is asked of the server itself.

    Args:
        uri: of the store.
        outbox: folder of records that wait.
    """

    def __init__(self, uri: str, outbox: Path) -> None:
        from mlflow import MlflowClient

        # By default a request is tried for minutes, while a training step waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self.plain = MlflowClient(uri)
        self.outbox = Outbox(outbox, self.plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def get_run(self, run_id: str) -> Any:
        """A run by either of its ids."""
        return self.plain.get_run(self.outbox.resolve(run_id))

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        """A run; where the server is away one with an id of our own."""
        started = int(time.time() * 1000)
        self.outbox.flush()
        try:
            return self.plain.create_run(experiment_id, started, tags, run_name)
        except Exception as error:
            if is_refusal(error):
                raise
            run_id = f"{LOCAL}{uuid.uuid4().hex}"
            self.outbox.send(
                "create", run_id, experiment_id=experiment_id, start_time=started, tags=dict(tags), name=run_name
            )
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        """Metrics and parameters."""
        self.outbox.send(
            "batch",
            run_id,
            metrics=[[metric.key, repr(float(metric.value)), metric.timestamp, metric.step] for metric in metrics],
            params=[[param.key, str(param.value)] for param in params],
        )

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """A tag."""
        self.outbox.send("tag", run_id, key=key, value=str(value))

    def update_run(self, run_id: str, status: str) -> None:
        """The status of a run that goes on."""
        self.outbox.send("status", run_id, status=status, ended=None)

    def set_terminated(self, run_id: str, status: str) -> None:
        """The end of a run."""
        self.outbox.send("status", run_id, status=status, ended=int(time.time() * 1000))

    def log_inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        """The data sets that a run read."""
        for found in datasets:
            dataset = {key: getattr(found.dataset, key) for key in ("name", "digest", "source_type", "source")}
            self.outbox.send("input", run_id, dataset=dataset, tags={tag.key: tag.value for tag in found.tags})

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """A folder."""
        self.outbox.send("artifacts", run_id, path=local_dir, artifact_path=artifact_path)

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """A file."""
        self.outbox.send("artifacts", run_id, path=local_path, artifact_path=artifact_path)


def dataset_input(dataset: dict[str, str], tags: dict[str, str]) -> DatasetInput:
    """MLflow's own object for a data set."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(**dataset), [InputTag(key, value) for key, value in tags.items()])


def is_refusal(error: Exception) -> bool:
    """Whether the server answered and said no: to ask again would not help."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException):
        return bool(error.get_http_status_code() < 500)
    if isinstance(error, MlflowException):
        return error.error_code in (
            "INVALID_PARAMETER_VALUE",
            "RESOURCE_DOES_NOT_EXIST",
            "BAD_REQUEST",
            "INVALID_STATE",
        )
    return not isinstance(error, OSError) and not type(error).__module__.startswith(
        ("requests", "sqlalchemy", "urllib3")
    )
