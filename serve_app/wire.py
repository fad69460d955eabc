"""The connection between a front end and its engine: messages in JSON, in frames on a TCP stream.

A frame is the number of its bytes (4 bytes, big-endian) and a JSON list of messages, each an object. Everything that is
sent while one turn of the event loop lasts, or while the other side does not read, is in one frame, so a busy connection
costs few system calls. Nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple, cast

import orjson
import torch

from revmux.errors import EmptyText, TextError, UserError
from revmux.serving import Answer, Draining, Expired, InferenceFailed, Overloaded, UnknownTask
from serve_app.errors import TooLarge, Unhealthy

VERSION = 3
"""Version of the messages. A front end uses only engines of the same version."""

FRAME_BYTES = 2**26
"""Maximum size of a frame, and so of a message."""

HELLO_BYTES = 2**10
"""Maximum size of the first frame of a connection, which has not proved yet that it may send any."""

HELLO_SECONDS = 5.0
"""Time in which a new connection must prove that, and get its first answer."""

Message = dict[str, Any]

logger = logging.getLogger(__name__)

_HEAD = 4
_SCORES, _STARTED, _STEPS = map(Answer._fields.index, ("scores", "started", "steps"))
_SILENCE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
"""Options that end a connection, after about ten seconds, whose other machine is gone; as far as the system has them."""


class Address(NamedTuple):
    """Where an engine listens. Whoever has it may use the engine.

    Attributes:
        engine: name of the engine's replica.
        node: name of its machine.
        host: host to connect to.
        port: TCP port.
        secret: proves that a front end may connect.
        version: version of its messages.
        front_ends: names of the connected front ends.
        is_draining: whether it is about to stop.
    """

    engine: str
    node: str
    host: str
    port: int
    secret: str
    version: int
    front_ends: tuple[str, ...]
    is_draining: bool


class Connection(asyncio.Protocol):
    """One end of a connection. All methods belong to the event loop.

    Args:
        on_message: called with each message, in their order. If it raises, the connection ends.
        on_lost: called once when the connection has ended.
        limit: maximum size of the frames that this end accepts, in bytes.
    """

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None], limit: int) -> None:
        self.limit = limit
        self.is_open = False
        self.frames_sent = 0
        self._on_message = on_message
        self._on_lost = on_lost
        self._received = bytearray()
        self._waiting: list[bytes] = []
        self._is_paused = False
        self._is_scheduled = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. The event loop calls this first."""
        self._transport = cast(asyncio.Transport, transport)  # that of uvloop is no subclass
        self.is_open = True
        _watch(transport.get_extra_info("socket").fileno())

    def data_received(self, data: bytes) -> None:
        """Take apart what arrived, and pass on each message."""
        self._received += data
        try:
            while self.is_open and (frame := self._take()) is not None:
                messages = orjson.loads(frame)
                if not isinstance(messages, list):
                    raise TypeError("a frame must be a list of messages")
                for message in messages:
                    self._on_message(message)
        except Exception as error:
            logger.warning(
                "a connection between a front end and its engine was closed: %s: %s", type(error).__name__, error
            )
            self.abort()

    def _take(self) -> bytes | None:
        """Remove the next frame from what arrived, if it is complete."""
        if len(self._received) < _HEAD:
            return None
        size = int.from_bytes(self._received[:_HEAD], "big")
        if size > self.limit:
            raise ValueError(f"it announced a frame of {size} bytes, at most {self.limit} are allowed")
        if len(self._received) < _HEAD + size:
            return None
        frame = bytes(self._received[_HEAD : _HEAD + size])
        del self._received[: _HEAD + size]
        return frame

    def send(self, message: Message) -> None:
        """Send a message with the next frame. Once the connection has ended, this does nothing.

        Raises:
            TooLarge: the message is larger than a frame.
        """
        encoded = orjson.dumps(message)
        if len(encoded) + 2 > FRAME_BYTES:
            raise TooLarge(
                f"a message of {len(encoded)} bytes between front end and engine exceeds {FRAME_BYTES}; send fewer or "
                "shorter texts per request"
            )
        if not self.is_open:
            return
        self._waiting.append(encoded)
        if not self._is_scheduled and not self._is_paused:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False
        if self._transport is None or self._is_paused or not self.is_open:
            return
        waiting, self._waiting = self._waiting, []
        for frame in in_frames(waiting, FRAME_BYTES):
            self.frames_sent += 1
            self._transport.write(frame)

    def pause_writing(self) -> None:
        """Collect messages until the other side has read. The event loop calls this."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Send what was collected. The event loop calls this."""
        self._is_paused = False
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the owner that the connection has ended. The event loop calls this once."""
        self.is_open = False
        self._waiting.clear()
        self._on_lost()

    def close(self) -> None:
        """End the connection after everything is sent."""
        self._is_paused = False
        self._flush()
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()


def in_frames(messages: Sequence[bytes], limit: int) -> Iterator[bytes]:
    """Put encoded messages into as few frames as possible.

    Args:
        messages: JSON objects.
        limit: maximum size of a frame in bytes.
    """
    batch: list[bytes] = []
    size = 2
    for message in messages:
        if batch and size + len(message) + 1 > limit:
            yield _frame(batch)
            batch, size = [], 2
        batch.append(message)
        size += len(message) + 1
    if batch:
        yield _frame(batch)


def _frame(messages: Sequence[bytes]) -> bytes:
    content = b"[" + b",".join(messages) + b"]"
    return len(content).to_bytes(_HEAD, "big") + content


def _watch(descriptor: int) -> None:
    """Let the system end a connection whose other machine is gone."""
    with socket.socket(fileno=os.dup(descriptor)) as same:  # the socket of uvloop sets no options
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _SILENCE.items():
            if (option := getattr(socket, name, None)) is not None:
                same.setsockopt(socket.IPPROTO_TCP, option, value)


def pack_answers(answers: Sequence[Answer], traced: bool) -> list[list[Any]]:
    """Return the answers of one task for JSON.

    Numbers keep all their bits. The start becomes the time since then, because machines have different clocks. Answers of
    one pass keep the same start.

    Args:
        answers: the answers.
        traced: whether the steps are wanted.
    """
    now, found = perf_counter(), []
    for answer in answers:
        fields: list[Any] = list(answer)
        fields[_SCORES] = answer.scores.tolist()
        fields[_STARTED] = now - answer.started
        fields[_STEPS] = dict(answer.steps) if traced else {}
        found.append(fields)
    return found


def unpack_answers(packed: Sequence[Sequence[Any]]) -> list[Answer]:
    """Return the answers of one task from the result of :func:`pack_answers`."""
    now, found = perf_counter(), [Answer(*fields) for fields in packed]
    rows = torch.tensor([answer.scores for answer in found], dtype=torch.float32)  # (B, C)
    return [answer._replace(scores=row, started=now - answer.started) for answer, row in zip(found, rows)]


_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(EmptyText, TextError, UserError, UnknownTask, TooLarge),
        *(InferenceFailed, Overloaded, Expired, Draining, Unhealthy),
    )
}


class EngineFailed(RuntimeError):
    """The engine failed for a reason that its log shows."""


def pack_error(error: Exception) -> Message:
    """Return an error for JSON: the name of its nearest known class, and its message. Others are only named."""
    for kind in type(error).__mro__:
        if _ERRORS.get(kind.__name__) is kind:
            return {"error": kind.__name__, "message": str(error)}
    return {"error": EngineFailed.__name__, "message": f"the engine raised {type(error).__name__}, see its log"}


def unpack_error(message: Message) -> Exception:
    """Return the error of :func:`pack_error`, which becomes the same reply as in the engine's process."""
    kind = _ERRORS.get(message["error"], EngineFailed)
    # Not through the constructor, since it may take other arguments than the message.
    return kind.__new__(kind, message["message"])
