"""Send concurrent requests to a running server, and count what it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import requests

from revmux.data.task import TaskData
from revmux.training.config import PLAIN_METHOD


@dataclass(frozen=True)
class LiveAnswer:
    """One answer of the server.

    Attributes:
        text: the text that was sent.
        label: the most probable class.
        score: its probability.
        truth: the class in the data.
        width: number of inputs in the group that answered it.
        method: method that answered it, or ``plain model``.
    """

    text: str
    label: str
    score: float
    truth: str
    width: int
    method: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the class in the data."""
        return self.label == self.truth


def ask(url: str, task: TaskData, count: int) -> list[LiveAnswer]:
    """Send ``count`` test texts at the same time.

    Args:
        url: base URL of the server.
        task: the task whose test split is sent.
        count: number of requests.
    """

    def one(row: dict[str, Any]) -> LiveAnswer:
        inputs = [[row["text"], row["text_pair"]]] if "text_pair" in row else row["text"]
        reply = requests.post(f"{url}/predict", json={"inputs": inputs, "truncate": True}, timeout=120)
        reply.raise_for_status()
        answer = reply.json()
        best = answer[0][0] if isinstance(answer[0], list) else answer[0]
        truth = task.label_names[row["label"]]
        width, method = int(reply.headers["x-revmux-width"]), reply.headers["x-revmux-method"]
        method = "plain model" if method == PLAIN_METHOD else method
        return LiveAnswer(row["text"], best["label"], best["score"], truth, width, method)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, islice(cycle(task.test), count)))


def examples(answers: list[LiveAnswer], shown: int) -> Iterator[LiveAnswer]:
    """Some of the answers, spread evenly."""
    yield from answers[:: max(1, len(answers) // shown)][:shown]


def answered_by(answers: list[LiveAnswer]) -> str:
    """How many answers came from each method at each width, as text."""
    counted = sorted(Counter((answer.width, answer.method) for answer in answers).items())
    return ", ".join(
        f"{number} by {method} {'alone' if width == 1 else f'in groups of {width}'}"
        for (width, method), number in counted
    )
