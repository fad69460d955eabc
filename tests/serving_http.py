"""The HTTP application of one replica on a real socket, without Ray."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from serving_models import load, write_adapter, write_model
from starlette.types import ASGIApp

from serve_app.ray_environment import ProxyKind, ray_environment

TOPICS = ["sport", "art", "science"]

HOSTILE: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "not JSON": (b"inputs=w1", 422),
    "half": (b'{"inputs": "w', 422),
    "not UTF-8": (b'{"inputs": "\xff\xfe"}', 422),
    "UTF-16": ('{"inputs": "w1"}'.encode("utf-16"), 422),
    "lone surrogate": (rb'{"inputs": "\ud800"}', 422),
    "nul": (rb'{"inputs": "\u0000"}', 200),
    "deep list": (b'{"inputs": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 422),
    "deep object": (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, 422),
    "huge number": (b'{"inputs": "w1", "max_multiplex": ' + b"9" * 10_000 + b"}", 422),
    "infinite": (b'{"inputs": "w1", "priority": 1e999}', 422),
    "not a number": (b'{"inputs": "w1", "priority": NaN}', 422),
    "doubled key": (b'{"inputs": "", "inputs": "w1"}', 200),
    "a list": (b'["w1"]', 422),
    "null": (b"null", 422),
    "too long": (b'{"inputs": "' + b"w " * 60_000 + b'"}', 413),
}
"""Hostile bodies, with the status that each must get from a server with one task."""


def write_tasks(folder: Path) -> dict[str, dict[str, object]]:
    """Two tasks with their own labels: ``mood`` with adapters for N = 2 and 4, ``topic`` with N = 2."""
    tasks: dict[str, dict[str, object]] = {}
    for name, widths in {"mood": (2, 4), "topic": (2,)}.items():
        (folder / name).mkdir()
        model = write_model(folder / name)
        if name == "topic":
            config = json.loads((model / "config.json").read_text())
            config |= {"id2label": dict(enumerate(TOPICS)), "label2id": {label: i for i, label in enumerate(TOPICS)}}
            (model / "config.json").write_text(json.dumps(config))
        home = folder / f"{name}-adapters"
        home.mkdir()
        adapters = [str(write_adapter(home, load(model), width)) for width in widths]
        tasks[name] = {"model": str(model), "adapters": adapters}
    return tasks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """Run an application; yield its base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    started = threading.Event()
    original = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def ray_with_proxy(kind: ProxyKind) -> Iterator[None]:
    """A Ray that starts within this context has this HTTP proxy. HAProxy's files are in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="revmux-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in ray_environment(kind, Path(folder)).items():
            patch.setenv(name, value)
        yield


def connected(url: str) -> socket.socket:
    """Open a connection on which raw bytes can be sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def talk(url: str, *pieces: bytes, pause: threading.Event | None = None) -> bytes:
    """Send raw bytes and read until the server closes the connection or has answered in full.

    Args:
        url: base URL.
        pieces: sent one after the other, until the server closes the connection.
        pause: whether to wait for 50 ms between pieces.
    """
    with connected(url) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            if pause is not None and pause.wait(0.05):
                break
        return read_reply(connection)


def read_reply(connection: socket.socket) -> bytes:
    """Read the server's reply, in full or until the connection closes."""
    reply = b""
    try:
        while not _complete(reply) and (got := connection.recv(65536)):
            reply += got
    except ConnectionResetError:
        pass
    return reply


def _complete(reply: bytes) -> bool:
    head, found, body = reply.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found) and bool(lengths) and len(body) >= int(lengths[0].partition(b":")[2])
