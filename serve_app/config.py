"""What an operator sets, checked strictly: an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from revmux.data.prompt import load_prompt
from revmux.errors import UserError
from revmux.serving import Limits

ONLY_TASK = "default"
"""The name of the task where an operator describes only one."""

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


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
    """A folder by its absolute path, any other name as it is: replicas run in directories of their own."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


class TaskConfig(_TaskSettings):
    """One task: a frozen task model with its adapters.

    Args:
        model: a local folder with a trained classification head, or a Hugging Face id.
        revision: branch, tag or commit on the hub; ignored for folders.
        dtype: type of the frozen weights; by default what the adapters were trained with, else float32. Adapters stay
            in float32.
        prompt: by which a language model answers: a shipped prompt's name or a YAML file; by default what the task
            model or the adapters were trained with.
        adapters: adapter folders, ``models:/name@alias`` or ``runs:/id/path``, one for each N; on a
            command line separated by commas. Without any, every input runs alone.
        max_length: tokens that an input may have; by default what all adapters were trained with.
        threshold: confidence below which a group's answer falls back to the plain model; by default each adapter's
            own, 0 switches it off.
    """

    model: str

    @field_validator("model")
    @classmethod
    def _absolute_model(cls, value: str) -> str:
        return absolute(value)


class Autoscaling(_Strict):
    """Replicas that follow the queue, by Serve's own autoscaler.

    Args:
        min_replicas: at least; 0 lets a quiet server hold no model, and its first request wait for one.
        max_replicas: at most.
        target_ongoing_requests: requests, waiting and running, that one replica should have.
        upscale_delay_s: seconds of more load before replicas are added.
        downscale_delay_s: seconds of less load before replicas are drained.
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
    """The application; where it listens is the Serve instance's business.

    Args:
        model: the frozen task model, where there is one task: a local folder with a trained classification head, or
            a Hugging Face id.
        revision: branch, tag or commit on the hub; ignored for folders.
        dtype: type of the frozen weights; by default what the adapters were trained with, else float32. Adapters stay
            in float32.
        prompt: by which a language model answers: a shipped prompt's name or a YAML file; by default what the task
            model or the adapters were trained with.
        adapters: adapter folders, ``models:/name@alias`` or ``runs:/id/path``, one for each N; on a
            command line separated by commas. Without any, every input runs alone.
        max_length: tokens that an input may have; by default what all adapters were trained with.
        threshold: confidence below which a group's answer falls back to the plain model; by default each adapter's
            own, 0 switches it off.
        tasks: several tasks by name, each with the settings above.
        max_multiplex: widest group; by default as wide as the adapters are; 1 serves the plain model alone.
        max_queue: inputs of a task that may wait in a replica; beyond, requests are answered 429.
        max_batch: inputs of a forward pass.
        max_batch_tokens: tokens of a forward pass, padding included.
        plain_load: while what waits costs no more than this many plain inputs, the plain model answers every input.
        priority_seconds: seconds of waiting that a point of a request's priority is worth.
        max_points_lost: an adapter that lost more points of accuracy in its own evaluation, and has no threshold, is
            warned of when it is loaded.
        max_texts: inputs that one request may hold.
        max_body_bytes: bytes that one request may hold.
        body_seconds: time that the body of a request may take to arrive.
        stuck_seconds: time that a forward pass may take; a replica whose model is silent for longer is replaced.
        token_file: file with bearer tokens, one a line; without it every client is served.
        token_env: environment variable with a bearer token, set where the replicas run.
        drain_seconds: time that a stopping replica has to answer the requests that it holds.
        num_replicas: copies of the model.
        autoscaling: replicas that follow the queue, instead of ``num_replicas``.
        num_cpus: cores of each copy.
        num_gpus: GPUs of each copy, fractions too; 0 runs on the CPU.
        threads: CPU threads of the model; by default one a core.
    """

    model: str | None = None
    tasks: dict[TaskName, TaskConfig] = {}
    max_multiplex: int | None = Field(default=None, ge=1)
    max_queue: int = Field(default=512, ge=1)
    max_batch: int = Field(default=128, ge=1)
    max_batch_tokens: int = Field(default=16384, ge=1)
    plain_load: float = Field(default=4.0, ge=0)
    priority_seconds: float = Field(default=1.0, gt=0)
    max_points_lost: float = Field(default=2.0, ge=0)
    max_texts: int = Field(default=32, ge=1)
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    body_seconds: float = Field(default=10.0, gt=0)
    stuck_seconds: float = Field(default=120.0, gt=0)
    token_file: str | None = None
    token_env: str | None = None
    drain_seconds: float = Field(default=20.0, ge=0)
    num_replicas: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = None
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_or_several(self) -> AppConfig:
        if self.model is None:
            if not self.tasks:
                raise ValueError("nothing to serve; name a model, or several tasks each with its model")
            single = [name for name in _TaskSettings.model_fields if name in self.model_fields_set]
            if any(getattr(self, name) != _TaskSettings.model_fields[name].default for name in single):
                raise ValueError(f"{', '.join(single)} describe a single task; write them under each of tasks")
        elif self.tasks:
            raise ValueError("model and tasks are both given; write the model under tasks too, or leave tasks out")
        return self

    @model_validator(mode="after")
    def _requests_fit_the_queue(self) -> AppConfig:
        if self.max_texts > self.max_queue:
            raise ValueError(
                f"max_texts ({self.max_texts}) exceeds max_queue ({self.max_queue}), so the largest requests would never "
                "find room; lower max_texts or raise max_queue"
            )
        return self

    @field_validator("token_file")
    @classmethod
    def _absolute_file(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().resolve())

    @property
    def served(self) -> dict[str, TaskConfig]:
        """The tasks by name, also where there is only one."""
        if self.model is None:
            return dict(self.tasks)
        own = {name: getattr(self, name) for name in _TaskSettings.model_fields}
        return {ONLY_TASK: TaskConfig(model=self.model, **own)}

    def limits(self) -> Limits:
        """The engine's part of the bounds."""
        return Limits(
            self.max_multiplex,
            self.max_queue,
            self.max_batch,
            self.max_batch_tokens,
            self.plain_load,
            self.priority_seconds,
        )


class LiveConfig(_Strict):
    """What may change while replicas run, Serve's ``user_config``.

    Args:
        tasks: all tasks that are to be served from now on.
    """

    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)


def live_tasks(user_config: Any) -> dict[str, TaskConfig]:
    """The tasks of Serve's ``user_config``.

    Raises:
        UserError: an unknown key or an illegal value, on one line.
    """
    try:
        return LiveConfig.model_validate(user_config).tasks
    except ValidationError as error:
        raise UserError(f"user_config: {explain(error)}; known keys: {', '.join(LiveConfig.model_fields)}") from None


class ServerConfig(AppConfig):
    """The application with the address that it listens on.

    Args:
        host: interface; 127.0.0.1 is this machine alone, 0.0.0.0 every machine that reaches it.
        port: TCP port.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)


def server_config(**settings: Any) -> ServerConfig:
    """A checked configuration.

    Raises:
        UserError: an unknown key or an illegal value, on one line.
    """
    try:
        return ServerConfig(**settings)
    except ValidationError as error:
        raise UserError(
            f"server configuration: {explain(error)}; known keys: {', '.join(ServerConfig.model_fields)}"
        ) from None


def explain(error: ValidationError) -> str:
    """What pydantic found, on one line: places and reasons."""
    return "; ".join(
        ": ".join(filter(None, [".".join(map(str, found["loc"])), found["msg"]])) for found in error.errors()
    )
