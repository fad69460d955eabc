"""The HTTP application of one replica on a real socket, without Ray."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from serving_models import load, write_adapter, write_model
from starlette.types import ASGIApp

from serve_app.config import AppConfig
from serve_app.ray_environment import ProxyKind, ray_environment
from serve_app.service import Service

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


USUAL = {"plain_load": 1, "max_texts": 64, "max_body_bytes": 100_000, "body_seconds": 0.4}
"""Settings of a server with the tasks of :func:`write_tasks`."""


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60, **more)


def figures(url: str, **headers: str) -> dict[tuple[str, ...], float]:
    """Return the samples of /metrics by name and label values (sorted by label name, without the replica's)."""
    text = httpx.get(f"{url}/metrics", headers=headers, timeout=60).text
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "replica")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@contextmanager
def serving(settings: Mapping[str, Any], replica: str = "0") -> Iterator[Service]:
    """A replica that serves what the settings of :class:`AppConfig` name."""
    config = AppConfig.model_validate(settings)
    service = Service(config, replica)
    try:
        service.serve(config.served)
        yield service
    finally:
        service.close()


@contextmanager
def held_in_a_pass(settings: Mapping[str, Any]) -> Iterator[tuple[Service, threading.Event]]:
    """A service in a forward pass that continues once the event is set."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    with serving(settings) as service:
        service.engine.task().backbone.layer(0).register_forward_pre_hook(wait)
        future = service.engine.submit(["w1"])[0]
        assert inside.wait(60)
        try:
            yield service, go_on
        finally:
            go_on.set()
            assert future.result(60)


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
