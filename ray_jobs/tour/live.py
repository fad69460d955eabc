"""Send concurrent requests to a running server and print answers with the width of their groups."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import requests

from revmux.data.task import TaskData


def show_live_answers(url: str, task: TaskData, count: int, shown: int = 8) -> None:
    """Send ``count`` test texts concurrently, then print some of the answers and the number of answers per width.

    Args:
        url: base URL of the server.
        task: the task whose test split is sent.
        count: number of concurrent requests.
        shown: number of answers to print.
    """
    rows = list(islice(cycle(task.test), count))

    def ask(row: dict[str, Any]) -> tuple[str, int]:
        inputs = [[row["text"], row["text_pair"]]] if "text_pair" in row else row["text"]
        reply = requests.post(f"{url}/predict", json={"inputs": inputs, "truncate": True}, timeout=120)
        reply.raise_for_status()
        answer = reply.json()
        best = answer[0][0] if isinstance(answer[0], list) else answer[0]
        return best["label"], int(reply.headers["x-revmux-width"])

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask, rows))
    print("   width  answer          truth           text")
    for row, (label, width) in list(zip(rows, answers))[:: max(1, count // shown)][:shown]:
        print(f"   {width:>5}  {label:<14}  {task.label_names[row['label']]:<14}  {row['text'][:60]}")
    correct = sum(label == task.label_names[row["label"]] for row, (label, _) in zip(rows, answers))
    widths = ", ".join(
        f"{number} in groups of {width}" for width, number in sorted(Counter(w for _, w in answers).items())
    )
    print(f"   {count} of {count} answered, {correct} correct: {widths}")
