"""The server's settings. They are checked strictly: an unknown key is an error."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from revmux.adapters.config import MERGE_LIMIT
from revmux.data.prompt import load_prompt
from revmux.errors import UserError
from revmux.serving import Limits

ONLY_TASK = "default"
"""The name of the task if the configuration describes only one."""

FRONT_END_CPUS = 0.1
"""CPU cores that Ray reserves for a front end. It takes more under load, up to one."""

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_task_names(tasks: dict[str, Any]) -> dict[str, Any]:
    """Check that the names of the tasks can be part of a URL, and return the tasks.

    Raises:
        ValueError: a name cannot.
    """
    for name in tasks:
        if not TASK_NAME.fullmatch(name):
            raise ValueError(
                f"task name {name!r} is invalid; use letters, digits, '.', '_' and '-', with a letter or digit first"
            )
    return tasks


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _TaskSettings(_Strict):
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prompt: str | None = None
    adapters: list[str] = []
    max_length: int | None = Field(default=None, ge=2)
    threshold: float | None = Field(default=None, ge=0, le=1)

    @field_validator("adapters", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, value: str | None) -> str | None:
        if value is None:
            return None
        load_prompt(value)
        file = Path(value).expanduser()
        return str(file.resolve()) if file.is_file() else value

    @field_validator("adapters")
    @classmethod
    def _absolute(cls, value: list[str]) -> list[str]:
        return [absolute(item) for item in value]


def absolute(name: str) -> str:
    """Return the absolute path of a folder or file, because replicas run in other directories. Return other names unchanged."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.exists() else name


class TaskConfig(_TaskSettings):
    """One task: a frozen task model with its adapters.

    Args:
        model: Task model: a folder with a trained classification head or its URI, a Hugging Face id, models:/NAME@ALIAS or
            runs:/ID/PATH. Each may contain a PEFT adapter with a classification head.
        revision: Branch, tag or commit of the model on the hub. Ignored for folders. Default: the default branch.
        dtype: Data type of the frozen weights. Adapters stay in float32. Default: the type that the adapters were trained
            with, otherwise float32.
        prompt: Prompt with which a language model answers: the name of a shipped prompt, or a YAML file. Default: the
            prompt that the task model or the adapters were trained with.
        adapters: Adapters, one for each N, and one for each later stage of a ladder: folders or their URIs,
            models:/NAME@ALIAS or runs:/ID/PATH. On the command line, separate them with commas. Without adapters, every
            input runs alone.
        max_length: Maximum number of tokens per input. Default: the length that all adapters were trained with.
        threshold: Confidence below which an input goes on to the next stage of a ladder, or to the plain model. 0 makes all
            answers final. Default: each adapter's own threshold.
    """

    model: str

    @field_validator("model")
    @classmethod
    def _absolute_model(cls, value: str) -> str:
        return absolute(value)


class Autoscaling(_Strict):
    """Autoscaling of the replicas by Ray Serve.

    Args:
        min_replicas: Minimum number of replicas. With 0, an idle server has no model loaded, and its next request waits
            until one is.
        max_replicas: Maximum number of replicas.
        target_ongoing_requests: Target number of waiting and running requests per replica.
        upscale_delay_s: Seconds of higher load before replicas are added.
        downscale_delay_s: Seconds of lower load before replicas are drained.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=32.0, gt=0)
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) exceeds max_replicas ({self.max_replicas})")
        return self


class AppConfig(_TaskSettings):
    """Settings of the application. The address that it listens on is a setting of the Serve instance.

    Args:
        model: Frozen task model, if there is one task: a folder with a trained classification head or its URI, a Hugging Face
            id, models:/NAME@ALIAS or runs:/ID/PATH.
        revision: Branch, tag or commit of the model on the hub. Ignored for folders. Default: the default branch.
        dtype: Data type of the frozen weights. Adapters stay in float32. Default: the type that the adapters were trained
            with, otherwise float32.
        prompt: Prompt with which a language model answers: the name of a shipped prompt, or a YAML file. Default: the
            prompt that the task model or the adapters were trained with.
        adapters: Adapters, one for each N, and one for each later stage of a ladder: folders or their URIs,
            models:/NAME@ALIAS or runs:/ID/PATH. On the command line, separate them with commas. Without adapters, every
            input runs alone.
        max_length: Maximum number of tokens per input. Default: the length that all adapters were trained with.
        threshold: Confidence below which an input goes on to the next stage of a ladder, or to the plain model. 0 makes all
            answers final. Default: each adapter's own threshold.
        tasks: Several tasks by name, each with the settings above. Names consist of letters, digits, '.', '_' and '-'.
        max_multiplex: Maximum width of a group. 1 serves the plain model alone. Default: the widest adapter.
        max_queue: Maximum number of inputs of one task that wait in a replica. The server answers further requests with
            429.
        max_ongoing_requests: Maximum number of requests that a replica holds. Serve sends further requests to other
            replicas, and answers 429 if all are full. Default: max_queue + max_batch.
        max_batch: Maximum number of inputs per forward pass.
        max_batch_tokens: Maximum number of tokens per forward pass, including padding.
        plain_load: The plain model answers every input as long as the waiting work costs no more than this many plain
            inputs.
        share_plain: Whether inputs that the plain model answers share a prefill with those of other tasks. Their answers then
            differ from the plain model's by rounding.
        priority_seconds: Seconds of waiting time that one point of a request's priority is worth.
        audit: Share of the inputs answered by adapters that also run through the plain model. /metrics shows how often
            the labels agree.
        memory_gb: Maximum memory of all tasks of a replica together, in gigabytes (10^9 bytes). Tasks beyond this limit
            are loaded when a request first names them, and the least recently used tasks are removed. While a task is
            being loaded, its whole model takes additional memory. Default: all tasks are loaded at startup.
        merge_limit_mib: Maximum size, in MiB, of an adapter's copy of the weights into which its LoRA is merged. Merged
            LoRA adds no time per pass. 0 leaves LoRA unmerged.
        max_points_lost: Points of accuracy that an adapter may have lost in its own evaluation. The server logs a
            warning when it loads an adapter that lost more and has no threshold.
        max_texts: Maximum number of inputs per request.
        max_body_bytes: Maximum size of a request's body in bytes.
        body_seconds: Maximum number of seconds for the body of a request to arrive.
        stuck_seconds: Number of seconds in which no forward pass begins or ends, after which a replica is replaced.
        token_file: File with bearer tokens, one per line. If neither token_file nor token_env is set, requests need no
            token.
        token_env: Name of an environment variable that contains a bearer token, set on the nodes where the replicas
            run.
        drain_seconds: Seconds that a stopping replica gets to answer the requests that it holds.
        num_replicas: Number of replicas, each with its own copy of the model.
        front_ends: Number of processes per replica that handle HTTP, so that Python's work for HTTP does not limit a
            fast model. With 1, the process of the model itself handles HTTP. Values above 1 cannot be combined with
            autoscaling.
        autoscaling: Autoscaling of the replicas, instead of num_replicas. Default: none.
        num_cpus: CPU cores per replica.
        num_gpus: GPUs per replica; fractions are allowed. 0 runs on the CPU.
        threads: Number of CPU threads of the model. Default: one per core.
    """

    model: str | None = None
    tasks: dict[str, TaskConfig] = {}
    max_multiplex: int | None = Field(default=None, ge=1)
    max_queue: int = Field(default=512, ge=1)
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    max_batch: int = Field(default=128, ge=1)
    max_batch_tokens: int = Field(default=16384, ge=1)
    plain_load: float = Field(default=4.0, ge=0)
    share_plain: bool = False
    priority_seconds: float = Field(default=1.0, gt=0)
    audit: float = Field(default=0.0, ge=0, le=1)
    memory_gb: float | None = Field(default=None, gt=0)
    merge_limit_mib: int = Field(default=MERGE_LIMIT // 2**20, ge=0)
    max_points_lost: float = Field(default=2.0, ge=0)
    max_texts: int = Field(default=32, ge=1)
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    body_seconds: float = Field(default=10.0, gt=0)
    stuck_seconds: float = Field(default=120.0, gt=0)
    token_file: str | None = None
    token_env: str | None = None
    drain_seconds: float = Field(default=20.0, ge=0)
    num_replicas: int = Field(default=1, ge=1)
    front_ends: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = None
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @field_validator("tasks")
    @classmethod
    def _names(cls, value: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        return check_task_names(value)

    @model_validator(mode="after")
    def _one_or_several(self) -> AppConfig:
        if self.model is None:
            if not self.tasks:
                raise ValueError("nothing to serve; set model, or tasks with a model for each task")
            single = [name for name in _TaskSettings.model_fields if name in self.model_fields_set]
            if any(getattr(self, name) != _TaskSettings.model_fields[name].default for name in single):
                raise ValueError(f"{', '.join(single)} apply to a single task; with tasks, set them for each task")
        elif self.tasks:
            raise ValueError("model and tasks are both given; add the model to tasks, or omit tasks")
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_requests_fit_the_queue(cls, values: Any) -> Any:
        limit = values.get("max_queue") if isinstance(values, dict) else None
        if isinstance(limit, int) and "max_texts" not in values and 1 <= limit < cls.model_fields["max_texts"].default:
            return values | {"max_texts": limit}
        return values

    @model_validator(mode="after")
    def _requests_fit_the_queue(self) -> AppConfig:
        if self.max_texts > self.max_queue:
            raise ValueError(
                f"max_texts ({self.max_texts}) exceeds max_queue ({self.max_queue}), so the largest requests would "
                "always be refused; lower max_texts or raise max_queue"
            )
        return self

    @model_validator(mode="after")
    def _a_full_replica_passes_requests_on(self) -> AppConfig:
        held = len(self.served) * (self.max_queue + self.max_batch)
        if self.ongoing_requests > held:
            raise ValueError(
                f"max_ongoing_requests ({self.ongoing_requests}) exceeds what the queues and a forward pass can hold "
                f"({held}), so a full replica would never pass requests to another; choose at most {held}, or omit it"
            )
        return self

    @model_validator(mode="after")
    def _front_ends_have_a_fixed_number_of_engines(self) -> AppConfig:
        if self.autoscaling is not None and self.front_ends > 1:
            raise ValueError(
                f"front_ends ({self.front_ends}) and autoscaling are both given, but Serve would not see the requests that "
                "front ends pass on; set front_ends to 1, or num_replicas instead of autoscaling"
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_busy_before_more_start(self) -> AppConfig:
        if self.autoscaling is None:
            return self
        target = self.autoscaling.target_ongoing_requests
        if target <= self.plain_load:
            raise ValueError(
                f"autoscaling.target_ongoing_requests ({target:g}) is not above plain_load ({self.plain_load:g}), so "
                "replicas would be added before any of them answers in groups; raise it, to several times plain_load"
            )
        if target > self.ongoing_requests:
            raise ValueError(
                f"autoscaling.target_ongoing_requests ({target:g}) exceeds max_ongoing_requests "
                f"({self.ongoing_requests}), so no replica would ever be added; lower it"
            )
        return self

    @property
    def ongoing_requests(self) -> int:
        """Maximum number of requests that a replica holds."""
        return self.max_ongoing_requests or self.max_queue + self.max_batch

    @field_validator("token_file")
    @classmethod
    def _absolute_file(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().resolve())

    @property
    def served(self) -> dict[str, TaskConfig]:
        """The tasks by name, even if there is only one."""
        if self.model is None:
            return dict(self.tasks)
        settings = {name: getattr(self, name) for name in _TaskSettings.model_fields}
        return {ONLY_TASK: TaskConfig(model=self.model, **settings)}

    def limits(self) -> Limits:
        """Return the limits that the engine enforces."""
        return Limits(
            max_multiplex=self.max_multiplex,
            max_queue=self.max_queue,
            max_batch=self.max_batch,
            max_batch_tokens=self.max_batch_tokens,
            plain_load=self.plain_load,
            priority_seconds=self.priority_seconds,
            audit=self.audit,
            merge_limit=self.merge_limit_mib * 2**20,
            share_plain=self.share_plain,
        )


class LiveConfig(_Strict):
    """Settings that can change while replicas run: Serve's ``user_config``.

    Args:
        tasks: all tasks to serve.
    """

    tasks: dict[str, TaskConfig] = Field(min_length=1)

    @field_validator("tasks")
    @classmethod
    def _names(cls, value: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        return check_task_names(value)


def live_tasks(user_config: Any) -> dict[str, TaskConfig]:
    """Return the tasks of Serve's ``user_config``.

    Raises:
        UserError: a key is unknown or a value is invalid.
    """
    try:
        return LiveConfig.model_validate(user_config).tasks
    except ValidationError as error:
        raise UserError(f"user_config: {explain(error)}; known keys: {', '.join(LiveConfig.model_fields)}") from None


class ServerConfig(AppConfig):
    """Settings of the application, and the address that it listens on.

    Args:
        host: Interface to listen on. 127.0.0.1 accepts connections from this machine only, 0.0.0.0 from every machine that
            can reach it.
        port: TCP port to listen on.
        proxy: HTTP proxy of the Ray that this command starts: haproxy, or python for Serve's own proxy, which answers
            several times fewer requests per second. An existing cluster keeps its proxy. Default: haproxy on Linux,
            where Ray ships it.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    proxy: Literal["haproxy", "python"] | None = None

    @property
    def busy_requests(self) -> int | None:
        """Number of requests from which a replica is busy, so that others help with its tasks; None without such tasks.

        If all replicas hold all tasks, others help as soon as they have less to do. If not, a task that moves has to be
        loaded, so they help when groups form.
        """
        most = self.autoscaling.max_replicas if self.autoscaling else self.num_replicas
        if most == 1 or len(self.served) == 1:
            return None
        return 1 if self.memory_gb is None else max(8, math.ceil(2 * self.plain_load))


def server_config(**settings: Any) -> ServerConfig:
    """Build and check the server's configuration.

    Raises:
        UserError: a key is unknown or a value is invalid.
    """
    try:
        return ServerConfig(**settings)
    except ValidationError as error:
        raise UserError(
            f"server configuration: {explain(error)}; known keys: {', '.join(ServerConfig.model_fields)}"
        ) from None


MOST_ERRORS, TOO_MANY_ERRORS = 8, 1000
"""The most errors that :func:`explain` explains, and those that it looks at. A request could have one per key."""


def explain(error: ValidationError) -> str:
    """Return pydantic's first errors on one line, each with its location and reason, and the number of the others."""
    if (number := error.error_count()) > TOO_MANY_ERRORS:
        return f"{number} keys or values are invalid"
    explained = [
        ": ".join(filter(None, [".".join(map(str, found["loc"]))[:80], found["msg"].removeprefix("Value error, ")]))
        for found in error.errors()[:MOST_ERRORS]
    ]
    return "; ".join([*explained, *([f"and {number - MOST_ERRORS} more"] if number > MOST_ERRORS else [])])
