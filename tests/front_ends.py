"""Front ends and engines in one process, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvloop

from revmux.serving import Answer
from serve_app.backend import Backend, TaskNames
from serve_app.config import AppConfig
from serve_app.engine_server import EngineServer
from serve_app.front_end import FrontEnd
from serve_app.protocol import RequestOptions
from serve_app.service import Service
from serve_app.wire import Address

T = TypeVar("T")
SECONDS = 60


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in the event loop of Serve's replicas, which differs from Python's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main, SECONDS))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def engines(*services: Service) -> AsyncIterator[list[EngineServer]]:
    """Engines with these services, named engine-0, engine-1 and so on."""
    servers = [EngineServer(service, "127.0.0.1", "127.0.0.1") for service in services]
    for server in servers:
        await server.start()
    try:
        yield servers
    finally:
        for server in servers:
            stop(server)


def stop(server: EngineServer) -> None:
    """End all that an engine's process holds, as its death would."""
    assert server._server is not None
    server._server.close()
    for session in list(server.sessions):
        session.connection.abort()


@asynccontextmanager
async def front_end(
    config: AppConfig, find: Callable[[], Awaitable[list[Address]]], name: str = "front-1"
) -> AsyncIterator[FrontEnd]:
    made = FrontEnd(config, name, find)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def attached(service: Service) -> AsyncIterator[tuple[FrontEnd, EngineServer]]:
    async with engines(service) as [server], front_end(service.config, addresses([server])) as made:
        yield made, server


def addresses(servers: Sequence[EngineServer]) -> Callable[[], Awaitable[list[Address]]]:
    """Finds those of the servers that are running, also if the sequence has changed."""

    async def find() -> list[Address]:
        return [
            server.address()._replace(engine=f"engine-{number}")
            for number, server in enumerate(servers)
            if server._server is not None and server._server.is_serving()
        ]

    return find


async def classify(backend: Backend, names: TaskNames, texts: list[Any], **options: Any) -> list[list[Answer]]:
    found = await backend.classify(names, texts, RequestOptions(**options))
    return [one.answers for one in found]
