"""A replica of the server with many tasks, without HTTP."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from safetensors import safe_open

from benchmarks.serving.workloads import texts_of_length
from benchmarks.tasks.adapters import file_bytes, write_adapters
from benchmarks.tasks.settings import Settings
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.shared_base import SharedBases
from serve_app.config import AppConfig
from serve_app.service import Service

Send = Callable[[int], Awaitable[object]]
"""Sends the request of a number and waits for its answers."""


class Replica:
    """A service that has loaded as many tasks as its memory has room for.

    Args:
        service: the service.
        settings: settings of the benchmark.

    Attributes:
        names: the tasks that were loaded at the start.
        cold: the others.
        bytes_per_task: what each task but the first one added to the memory of the process, all files and objects included.
        file_bytes: size of the files of an adapter.
    """

    def __init__(self, service: Service, settings: Settings, grown: int, folder: Path) -> None:
        self.service = service
        self.settings = settings
        self.names = list(service.engine.tasks)
        self.cold = service.tasks.not_loaded
        self.bytes_per_task = grown / (len(self.names) - 1)
        self.file_bytes = file_bytes(folder)
        tokenizer = service.engine.tasks[self.names[0]].pretrained.tokenizer
        self.texts = texts_of_length(tokenizer, settings.tokens, 64)

    def text(self, number: int) -> str:
        """Return the text of a request."""
        return self.texts[number % len(self.texts)]

    async def ask(self, number: int, names: list[str]) -> object:
        """Send one request that names tasks."""
        tasks = await self.service.tasks.several(names)
        return await self.service.engine.answer_tasks([self.text(number)], tasks)

    def per_second(self, send: Send, requests: int, clients: int) -> float:
        """Return the requests per second of clients that each wait for their answers before they send again."""

        async def run() -> float:
            numbers = iter(range(requests))

            async def client() -> None:
                for number in numbers:
                    await send(number)

            started = perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return requests / (perf_counter() - started)

        return asyncio.run(run())


@contextmanager
def replica(settings: Settings, folder: Path) -> Iterator[Replica]:
    """Write the adapters, and start a replica whose memory has room for ``settings.tasks`` of them."""
    folders = write_adapters(settings, folder, settings.tasks + settings.cold)
    tasks = {f"task-{path.name}": {"model": str(path), "max_length": max(settings.tokens, 8)} for path in folders}
    limit = (_base_bytes(folders[0]) + (settings.tasks + 0.5) * _weight_bytes(folders[0])) / 1e9
    config = AppConfig.model_validate({"tasks": tasks, "memory_gb": limit, "threads": settings.threads})
    service = Service(config)
    try:
        first = next(iter(config.served))
        service.serve({first: config.served[first]})
        before = resident_bytes()
        service.serve(config.served)
        yield Replica(service, settings, resident_bytes() - before, folders[0])
    finally:
        service.close()


def resident_bytes() -> int:
    """Return the resident size of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def _base_bytes(folder: Path) -> int:
    backbone = load_pretrained(BackboneConfig(str(folder)), bases=SharedBases()).backbone
    everything = sum(tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers()))
    return everything - _weight_bytes(folder)


def _weight_bytes(folder: Path) -> int:
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).nbytes for name in weights.keys())  # noqa: SIM118  # it is no dictionary
