"""Keep records on disk while MLflow cannot be reached and send them later, so that jobs continue without the server.

Each record is one file in the outbox. Its name starts with a number that is one above the highest number present, so
the records of a run are sent in the order in which they were made, regardless of the machines' clocks. The next process
that reaches the server sends all waiting records. A record that can never be sent is moved to the folder ``quarantine``,
and later records are sent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from revmux.errors import UserError
from revmux.utils.copies import join_location
from revmux.utils.lease import RUN_LIFETIME
from revmux.utils.place import Place
from revmux.utils.redact import error_line
from revmux.utils.stored_folder import reading_folder, writing_folder

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

_log = logging.getLogger(__name__)
RETRY_SECONDS = 30.0
"""Seconds before the next attempt after the server did not answer."""
TRIES, GIVE_UP_SECONDS = 10, 3600.0
"""Attempts, and seconds since the first one, after which a record that fails while the server answers is quarantined."""
LOCAL = "local-"
"""Prefix of run ids created while the server was unreachable. The server's own ids replace them later."""
_RECORD = re.compile(r"[0-9].*\.json")
FILES, IDS, QUARANTINE = "files", "ids.json", "quarantine"
REFUSALS = frozenset(
    {
        "ALREADY_EXISTS",
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "MALFORMED_REQUEST",
        "NOT_FOUND",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)
"""MLflow's error codes for requests that it will never accept. Other errors, such as ``UNAUTHENTICATED``, may pass."""
_NOT_JSON = "API request to endpoint"
"""How MLflow's client begins its message about a reply that is not JSON."""
_MISTAKES = (AssertionError, AttributeError, LookupError, NameError, TypeError, UserError)


class _Unsendable(Exception):
    """A record that can never be sent; the message contains the reason."""


class Outbox:
    """Waiting records in a folder that all processes of a job reach.

    Args:
        folder: folder or URI, created with the first waiting record.
        client: MLflow's client.
    """

    def __init__(self, folder: str | Path, client: Any) -> None:
        self.folder, self.client = folder, client
        self.place = Place.open(str(folder))
        self.is_away = False
        self._retry_at = 0.0  # on the monotonic clock

    def __len__(self) -> int:
        return len(self._waiting())

    def _waiting(self) -> list[str]:
        """The names of the records, in the order in which they were made."""
        return [name for name in self.place.files() if _RECORD.fullmatch(name)]

    def send(self, call: str, run_id: str, **values: Any) -> None:
        """Send a record after all waiting records of its run; keep it if MLflow does not accept it now.

        Raises:
            MlflowException: MLflow refuses the record; see :func:`is_refusal`.
        """
        record = {"call": call, "run_id": run_id, "values": values}
        if self._can_be_sent_at_once(call, run_id):
            try:
                self._deliver(record)
            except Exception as error:
                if is_refusal(error):
                    raise
                self._note_failure(error)
            else:
                return
        self._keep(record)
        if time.monotonic() >= self._retry_at:
            self.flush()

    def _can_be_sent_at_once(self, call: str, run_id: str) -> bool:
        if self.is_away and time.monotonic() < self._retry_at:
            return False
        if call == "create" or self.resolve(run_id).startswith(LOCAL):
            return False
        return not any(_run_of(file) in (run_id, None) for file in self._waiting())

    def _note_failure(self, error: Exception) -> None:
        if not self._server_answers():
            self.went_away(error)
            return
        _log.warning(
            "MLflow did not accept a record (%s); it is kept in %s and sent again later", error_line(error), self.folder
        )
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def went_away(self, error: Exception) -> None:
        """Pause requests to the server that cannot be reached; logs once until the server is back."""
        if not self.is_away:
            _log.warning(
                "cannot reach MLflow (%s); records are kept in %s and sent when it is back",
                error_line(error),
                self.folder,
            )
        self.is_away, self._retry_at = True, time.monotonic() + RETRY_SECONDS

    def _keep(self, record: dict[str, Any]) -> None:
        number = 1 + max((int(file.partition("-")[0]) for file in self._waiting()), default=0)
        name = f"{number:020d}-{uuid.uuid4().hex[:8]}-{record['run_id']}"
        if record["call"] == "artifacts":  # keep a copy, since the original may change
            source, target = Path(record["values"]["path"]), Path(FILES, name)
            with writing_folder(join_location(str(self.folder), str(target))) as temporary:
                if source.is_dir():
                    shutil.copytree(source, temporary, dirs_exist_ok=True)
                else:
                    shutil.copy2(source, temporary)
                    target /= source.name
            record["values"]["path"] = str(target)
        self.place.create()
        self._write(f"{name}.json", record)

    def _write(self, name: str, content: Any) -> None:
        self.place.put(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def flush(self) -> int:
        """Send waiting records; returns how many are left."""
        if not self._waiting():
            return 0
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(self.place.exclusive("lock", wait=False, lifetime=RUN_LIFETIME))
                except UserError:  # another process is sending them
                    return len(self)
                while self._send_waiting():
                    pass
        except OSError as error:
            _log.warning("cannot send the records in %s (%s)", self.folder, error_line(error))
        return len(self)

    def _send_waiting(self) -> bool:
        """Try each waiting record once. Return whether a run was created after one of its records had its turn."""
        held: set[str] = set()  # runs with an earlier record that could not be sent
        early: set[str] = set()  # runs with a record before the one that creates them
        failures = 0
        for file in self._waiting():
            record: dict[str, Any] = {}
            try:
                record = self._read(file)
                if self._is_held(record, held, early):
                    continue
                self._deliver(record)
            except Exception as error:
                if not record and isinstance(error, OSError):
                    raise
                if isinstance(error, _Unsendable) or is_refusal(error):
                    self._quarantine(file, error)
                elif not self._server_answers():
                    self.went_away(error)
                    return False
                elif self._is_given_up(file, record):
                    self._quarantine(file, error)
                else:
                    failures += 1
                    if (
                        record["call"] != "artifacts"
                    ):  # no record depends on artifacts, and their store may be unreachable for long
                        held.add(record["run_id"])
            else:
                self._remove(file)
        self.is_away = False
        self._retry_at = time.monotonic() + RETRY_SECONDS if failures else 0.0
        return any(not self.resolve(run_id).startswith(LOCAL) for run_id in early)

    def _is_held(self, record: dict[str, Any], held: set[str], early: set[str]) -> bool:
        """Whether a record must wait for an earlier record of its run, or its run for the sweep's run.

        A network file system can show a worker an old listing of the folder. The number of its record may then not be
        above that of the record that creates the run.

        Raises:
            _Unsendable: its run was never created.
        """
        if record["call"] == "create":
            tags = record["values"]["tags"].values()
            waits = any(tag in held and self.resolve(tag).startswith(LOCAL) for tag in tags if isinstance(tag, str))
        else:
            waits = record["run_id"] in held
            if not waits and self.resolve(record["run_id"]).startswith(LOCAL):
                if not self._creation_waits(record["run_id"]):
                    raise _Unsendable("the record that creates its run is missing")
                early.add(record["run_id"])
                waits = True
        if waits:
            held.add(record["run_id"])
        return waits

    def _creation_waits(self, run_id: str) -> bool:
        for file in self._waiting():
            with suppress(_Unsendable):
                if _run_of(file) == run_id and self._read(file)["call"] == "create":
                    return True
        return False

    def _server_answers(self) -> bool:
        try:
            self.client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _is_given_up(self, file: str, record: dict[str, Any]) -> bool:
        now = time.time()
        failed = record.setdefault("failed", {"tries": 0, "since": now})
        failed["tries"] += 1
        if failed["tries"] >= TRIES and now - failed["since"] >= GIVE_UP_SECONDS:
            return True
        self._write(file, record)
        return False

    def _quarantine(self, file: str, error: Exception) -> None:
        folder, copied = self.place.child(QUARANTINE), f"{FILES}/{_stem(file)}"
        folder.create()
        self.place.move(file, folder)
        for name in self.place.child(copied).files_below():
            self.place.move(f"{copied}/{name}", folder)
        self.place.child(copied).remove_all()
        _log.warning(
            "a record in the outbox cannot be sent to MLflow (%s); it was moved to %s, and later records are sent",
            error_line(error),
            folder.file(file),
        )

    def _remove(self, file: str) -> None:
        with suppress(FileNotFoundError):
            self.place.remove_file(file)
        self.place.child(f"{FILES}/{_stem(file)}").remove_all()

    def _deliver(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param

        run_id, values = self.resolve(record["run_id"]), record["values"]
        match record["call"]:
            case "create":
                tags = {key: self.resolve(value) for key, value in values["tags"].items()}
                made = self.client.create_run(values["experiment_id"], values["start_time"], tags, values["name"])
                self._write(IDS, self._ids() | {record["run_id"]: made.info.run_id})
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
                with self._artifacts(values["path"]) as path:
                    if not path.exists():
                        raise _Unsendable(f"{values['path']} is missing")
                    log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
                    log(run_id, str(path), values["artifact_path"])
            case unknown:
                raise _Unsendable(f"unknown kind {unknown!r}")

    @contextmanager
    def _artifacts(self, path: str) -> Iterator[Path]:
        """The file or folder of a record: an absolute path, or a copy in this folder."""
        if os.path.isabs(path):
            yield Path(path)
            return
        files, name, *below = Path(path).parts
        with reading_folder(join_location(str(self.folder), f"{files}/{name}")) as copied:
            yield copied.joinpath(*below)

    def _read(self, file: str) -> dict[str, Any]:
        """Read a record.

        Raises:
            _Unsendable: the file is damaged or cannot be read.
            OSError: the object store of the outbox cannot be reached.
        """
        try:
            record = json.loads(self.place.get(file))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not self.place.local:
                raise
            raise _Unsendable(f"the file is damaged: {error}") from None
        kinds = {"call": str, "run_id": str, "values": dict}
        if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
            raise _Unsendable("the file is damaged: it does not contain a record")
        return record

    def _ids(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.place.get(IDS)))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            self._quarantine(IDS, error)
            return {}

    def resolve(self, run_id: str) -> str:
        """The server's id of a run."""
        return self._ids().get(run_id, run_id) if run_id.startswith(LOCAL) else run_id


def _stem(file: str) -> str:
    return file.removesuffix(".json")


def _run_of(file: str) -> str | None:
    """The run id in a record's file name; None for a file of an older version."""
    parts = _stem(file).split("-", 2)
    return parts[2] if len(parts) == 3 else None


class BufferedClient:
    """MLflow's client with writes that go through the outbox. Reads go directly to the server.

    Args:
        uri: URI of the store.
        outbox: folder or URI for waiting records.
    """

    def __init__(self, uri: str, outbox: str | Path) -> None:
        from mlflow import MlflowClient

        # By default a request is retried for minutes while a training step waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self.plain = MlflowClient(uri)
        self.outbox = Outbox(outbox, self.plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def get_run(self, run_id: str) -> Any:
        """Return a run by its local id or the server's id."""
        return self.plain.get_run(self.outbox.resolve(run_id))

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        """Create a run; with a local id if the server cannot be reached."""
        started = int(time.time() * 1000)
        self.outbox.flush()
        known = {key: self.outbox.resolve(value) for key, value in tags.items()}
        try:
            return self.plain.create_run(experiment_id, started, known, run_name)
        except Exception as error:
            if is_refusal(error):
                raise
            self.outbox.went_away(error)
            run_id = f"{LOCAL}{uuid.uuid4().hex}"
            self.outbox.send(
                "create", run_id, experiment_id=experiment_id, start_time=started, tags=dict(tags), name=run_name
            )
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        """Log metrics and parameters."""
        self.outbox.send(
            "batch",
            run_id,
            metrics=[[metric.key, repr(float(metric.value)), metric.timestamp, metric.step] for metric in metrics],
            params=[[param.key, str(param.value)] for param in params],
        )

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Set a tag."""
        self.outbox.send("tag", run_id, key=key, value=str(value))

    def update_run(self, run_id: str, status: str) -> None:
        """Set the status of a run that has not ended."""
        self.outbox.send("status", run_id, status=status, ended=None)

    def set_terminated(self, run_id: str, status: str) -> None:
        """End a run."""
        self.outbox.send("status", run_id, status=status, ended=int(time.time() * 1000))
        if not self.outbox.is_away:
            self.outbox.flush()  # this process may record nothing more

    def log_inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        """Log the data sets that a run read."""
        for found in datasets:
            dataset = {key: getattr(found.dataset, key) for key in ("name", "digest", "source_type", "source")}
            self.outbox.send("input", run_id, dataset=dataset, tags={tag.key: tag.value for tag in found.tags})

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Log the files of a folder."""
        self.outbox.send("artifacts", run_id, path=os.path.abspath(local_dir), artifact_path=artifact_path)

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Log a file."""
        self.outbox.send("artifacts", run_id, path=os.path.abspath(local_path), artifact_path=artifact_path)


def dataset_input(dataset: dict[str, str], tags: dict[str, str]) -> DatasetInput:
    """Create MLflow's object for a data set."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(**dataset), [InputTag(key, value) for key, value in tags.items()])


def is_refusal(error: Exception) -> bool:
    """Whether a retry cannot help: MLflow refused the request, or the error is a bug in this code that must not be hidden.

    Other errors may pass: a server or object store that is unreachable, overloaded, or rejects the credentials.
    """
    from mlflow.exceptions import MlflowException

    if type(error) is MlflowException and str(error).startswith(_NOT_JSON):
        return False  # MLflow answers in JSON, so this page is from a proxy in front of it
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    return isinstance(error, _MISTAKES)
