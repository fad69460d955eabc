"""What an operator sets, checked strictly: an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from revmux.errors import UserError
from revmux.serving import Limits


class AppConfig(BaseModel):
    """The application; where it listens is the Serve instance's business.

    Args:
        model: the frozen task model: a local folder with a trained classification head, or a Hugging Face id.
        revision: branch, tag or commit on the hub; ignored for folders.
        dtype: type of the frozen weights; adapters stay in float32.
        adapters: adapter folders, ``models:/name@alias`` or ``runs:/id/path``, one for each N; on a
            command line separated by commas. Without any, every input runs alone.
        max_length: tokens that an input may have; by default what all adapters were trained with.
        max_multiplex: widest group; by default as wide as the adapters are.
        max_queue: inputs that may wait in a replica; beyond, requests are answered 429.
        max_batch: inputs that the model takes from the queue at once.
        max_batch_tokens: tokens that it takes at once, padding included.
        plain_load: while what waits costs no more than this many plain inputs, every input runs alone.
        max_texts: inputs that one request may hold.
        max_body_bytes: bytes that one request may hold.
        num_replicas: copies of the model.
        num_cpus: cores of each copy.
        num_gpus: GPUs of each copy, fractions too; 0 runs on the CPU.
        threads: CPU threads of the model; by default one a core.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    adapters: list[str] = []
    max_length: int | None = Field(default=None, ge=2)
    max_multiplex: int | None = Field(default=None, ge=1)
    max_queue: int = Field(default=512, ge=1)
    max_batch: int = Field(default=128, ge=1)
    max_batch_tokens: int = Field(default=16384, ge=1)
    plain_load: float = Field(default=4.0, ge=0)
    max_texts: int = Field(default=32, ge=1)
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @field_validator("adapters", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("model", "adapters")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        # A replica need not run in the directory that the operator stands in.
        if isinstance(value, list):
            return [cls._absolute(item) for item in value]
        folder = Path(value).expanduser()
        return str(folder.resolve()) if folder.is_dir() else value

    def limits(self) -> Limits:
        """The engine's part of the bounds."""
        return Limits(self.max_multiplex, self.max_queue, self.max_batch, self.max_batch_tokens, self.plain_load)


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
