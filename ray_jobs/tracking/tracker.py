"""Record runs in MLflow: one store for all jobs, child runs under a sweep, the same keys on every run."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.paths import own_folder
from ray_jobs.tracking.command_line import command_line
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.outbox import BufferedClient, is_refusal
from ray_jobs.tracking.pyfunc import MODEL_NAME, save_pyfunc
from revmux.errors import UserError
from revmux.utils.copies import is_uri, join_location
from revmux.utils.extras import require
from revmux.utils.lease import RUN_LIFETIME
from revmux.utils.place import Place
from revmux.utils.redact import error_line, redact_logs, without_passwords
from revmux.utils.run_info import git_commit

if TYPE_CHECKING:
    from mlflow.entities import Run


class Tracker:
    """One experiment in one tracking store.

    Args:
        config: store and experiment.
        storage: the job's storage, a folder or URI. A folder contains the default store.
        command: command to record with every run; by default that of this process.

    Raises:
        UserError: mlflow is not installed, or the store cannot be opened.
    """

    def __init__(self, config: TrackingConfig, storage: str | Path, command: str | None = None) -> None:
        require("mlflow", "mlflow")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        redact_logs("mlflow")
        logging.getLogger("mlflow.store.db.utils").setLevel(
            logging.CRITICAL
        )  # it prints a traceback for what it raises
        self.command = command or command_line()
        own, location = own_folder(storage), str(storage)
        self.uri = config.uri or f"sqlite:///{own / 'mlflow.db'}"
        self.outbox, self.running = join_location(location, "outbox"), Place.open(join_location(location, "running"))
        try:
            self.client = BufferedClient(self.uri, self.outbox)
            experiment = self.client.get_experiment_by_name(config.experiment)
            if experiment is None:
                files = join_location(location, "mlartifacts") if is_uri(location) else (own / "mlartifacts").as_uri()
                self.experiment_id = self.client.create_experiment(
                    config.experiment, artifact_location=files if is_database(self.uri) else None
                )
            else:
                self.experiment_id = experiment.experiment_id
        except Exception as error:
            remedy = "name a running server or a database with --tracking.uri"
            if isinstance(error, ModuleNotFoundError) and self.uri.startswith("postgresql"):
                # The default driver of a bare postgresql:// depends on SQLAlchemy's version.
                remedy = "run: pip install 'revmux[postgres]', and name its driver: postgresql+psycopg2://..."
            raise UserError(
                f"cannot open the MLflow store {without_passwords(self.uri)!r} "
                f"({type(error).__name__}: {error_line(error)}); {remedy}"
            ) from None
        self.client.outbox.flush()
        self.end_abandoned()

    @contextmanager
    def run(
        self, name: str, params: Mapping[str, Any], parent: str | None = None, resume: str | None = None
    ) -> Iterator[str]:
        """Open a run for the body and yield its id. It ends FINISHED, FAILED if the body raises, KILLED if it is stopped.

        Args:
            name: name shown in MLflow.
            params: nested settings, logged flat, as ``optim.learning_rate``. A resumed run keeps its parameters and lists
                changed ones in its tag ``revmux.changed``.
            parent: run id of the sweep to which this trial belongs.
            resume: id of a run to resume.

        Raises:
            UserError: the storage cannot be written.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags = {"revmux.command": self.command[:5000], "mlflow.source.git.commit": git_commit() or "unknown"}
        if parent is not None:
            tags[MLFLOW_PARENT_RUN_ID] = parent
        run_id = resume or self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        with ExitStack() as stack:
            try:
                self.running.create()
                stack.enter_context(self.running.exclusive(run_id, lifetime=RUN_LIFETIME))
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.running.path} ({error_line(error)}); free some space there or choose another --storage"
                ) from error
            if resume is not None:
                self.client.update_run(run_id, status="RUNNING")
            self._log_params(run_id, flatten(params), resume is not None)
            try:
                yield run_id
            except BaseException as error:
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                with suppress(MlflowException, OSError):  # a full disk or an unreachable server must not hide the error
                    self._end(run_id, status)
                raise
            self._end(run_id, "FINISHED")

    def _end(self, run_id: str, status: str) -> None:
        self.client.set_terminated(run_id, status)
        self._remove_marker(run_id)

    def _remove_marker(self, run_id: str) -> None:
        if self.running.local:  # elsewhere the lease removes its file itself
            Path(self.running.file(run_id)).unlink(missing_ok=True)

    def _log_params(self, run_id: str, params: Mapping[str, Any], resumed: bool) -> None:
        from mlflow.entities import Param

        logged: dict[str, str] = {}
        if resumed:
            try:
                logged = self.client.get_run(run_id).data.params
            except Exception as error:
                if is_refusal(error):
                    raise
        texts = {key: without_passwords(str(value))[:500] for key, value in params.items()}
        changed = [f"{key}: {logged[key]} → {text}" for key, text in texts.items() if logged.get(key, text) != text]
        if changed:  # MLflow's parameters cannot be changed
            self.client.set_tag(run_id, "revmux.changed", "; ".join(changed)[:5000])
        self.client.log_batch(run_id, params=[Param(key, text) for key, text in texts.items() if key not in logged])

    def end_abandoned(self) -> None:
        """Mark runs of this storage as KILLED if their process was killed, that is, no longer holds the run's lock."""
        for run_id in self.running.files():
            with ExitStack() as stack:
                try:
                    stack.enter_context(self.running.exclusive(run_id, wait=False, lifetime=RUN_LIFETIME))
                except UserError:  # its process is alive
                    continue
                try:
                    status = self.client.get_run(run_id).info.status
                except Exception as error:
                    if not is_refusal(error):
                        continue  # the server cannot be reached
                    status = "unknown"  # deleted, or in another store
                if status == "RUNNING":
                    when = time.strftime("%Y-%m-%d %H:%M:%S")
                    self.client.set_tag(
                        run_id, "revmux.killed", f"its process ended without reporting a status; found at {when}"
                    )
                    self.client.set_terminated(run_id, "KILLED")
                self._remove_marker(run_id)

    def children(self, parent: str) -> list[Run]:
        """The trials of a sweep, oldest first."""
        mine = f"tags.`mlflow.parentRunId` = '{parent}'"
        found: list[Run] = []
        token = None
        while token != "":
            page = self.client.search_runs([self.experiment_id], mine, order_by=["start_time"], page_token=token)
            found, token = [*found, *page], page.token or ""
        return found

    def has_run(self, run_id: str | None) -> bool:
        """Whether the store contains a run that was not deleted."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            return run_id is not None and bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        return False

    def child_ids(self, parent: str) -> dict[str, str]:
        """The run id of each trial of a sweep, by the name of the trial; empty if the server cannot be reached."""
        try:
            return {str(run.info.run_name): run.info.run_id for run in reversed(self.children(parent))}
        except Exception as error:
            if is_refusal(error):
                raise
            return {}  # the outbox keeps new records

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log scalars at a step."""
        log_metrics(self.client, run_id, metrics, step)

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        """Log a folder as an artifact."""
        self.client.log_artifacts(run_id, str(folder), name)

    def register(
        self,
        run_id: str,
        adapter: Path,
        name: str,
        tags: Mapping[str, Any],
        backbone: str | None = None,
        pairs: bool = False,
        artifact: str = MODEL_NAME,
    ) -> str:
        """Register an adapter as the next version of a model.

        The server and ``mlflow.pyfunc.load_model`` load it as ``models:/NAME/VERSION``.

        Args:
            run_id: the run that trained the adapter.
            adapter: folder of the adapter.
            name: name of the registered model, created if missing.
            tags: tags by which users choose a version.
            backbone: see :func:`ray_jobs.tracking.pyfunc.save_pyfunc`.
            pairs: whether an input is a pair of texts.
            artifact: name of the artifact in the run; different settings of one run need different names.

        Returns:
            The version.
        """
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            self.log_folder(run_id, save_pyfunc(adapter, Path(folder) / MODEL_NAME, backbone, pairs), artifact)
        with suppress(MlflowException):  # it exists
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{artifact}"
        texts = {key: str(value) for key, value in tags.items()}
        return str(self.client.create_model_version(name, source, run_id, tags=texts).version)

    def log_data(self, run_id: str, identity: Mapping[str, Any]) -> None:
        """Log the data set that a run read as MLflow input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = str(identity["source"])
        dataset = Dataset(name=source, digest=str(identity["sha256"])[:12], source_type="local", source=source)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def is_database(uri: str) -> bool:
    """Whether a tracking URI names a database, which does not store artifacts. A server chooses its artifact location."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    return uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES


def log_metrics(client: BufferedClient, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Log scalars at a step."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(name, float(value), now, step) for name, value in metrics.items()])


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses and mappings as ``a.b.c: value``."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: leaf for name, part in value.items() for key, leaf in flatten(part, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
