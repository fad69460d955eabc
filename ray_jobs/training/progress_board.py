"""Progress of running work, collected in one small actor, so that the job that started the work can show it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

NAME = "revmux-progress"
INTERVAL_S = 0.4


@dataclass(frozen=True)
class Progress:
    """The progress of one piece of work.

    Attributes:
        done: units that are done.
        total: all units.
        note: a short text, such as the loss.
    """

    done: int
    total: int
    note: str = ""


class Board:
    """The actor: the latest progress of each piece of work, by its title."""

    def __init__(self) -> None:
        self.work: dict[str, Progress] = {}

    def post(self, title: str, progress: Progress) -> None:
        """Replace the progress of one piece of work."""
        self.work[title] = progress

    def read(self) -> dict[str, Progress]:
        """All progress so far."""
        return dict(self.work)


@contextmanager
def board() -> Iterator[Any]:
    """Inside the context, workers of this job post their progress. Yields the handle of the actor."""
    actor: Any = ray.remote(num_cpus=0)(Board).options(name=NAME).remote()
    ray.get(actor.read.remote())  # workers find it by its name
    try:
        yield actor
    finally:
        ray.kill(actor)


class Poster:
    """Posts the progress of one piece of work, if its job has a board.

    Args:
        title: name of the work.
    """

    def __init__(self, title: str) -> None:
        self.title, self.last = title, -1e9
        self.board = None
        if ray.is_initialized():
            with suppress(ValueError):  # no board
                self.board = ray.get_actor(NAME)

    def post(self, done: int, total: int, note: str = "") -> None:
        """Post unless the last time was a moment ago. This does not wait for the board."""
        now = time.perf_counter()
        if self.board is not None and (now - self.last >= INTERVAL_S or done >= total):
            self.last = now
            self.board.post.remote(self.title, Progress(done, total, note))
