"""Wait for a condition with a deadline, so that no test waits for a fixed time."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
_NEVER = threading.Event()


def wait_until(
    condition: Callable[[], T],
    seconds: float = 120,
    *,
    every: float = 0.05,
    failure: Callable[[], str | None] = lambda: None,
) -> T:
    """Return the value of ``condition`` as soon as it is true.

    Args:
        condition: called until it returns a true value.
        seconds: deadline after which the test fails.
        every: seconds between two calls.
        failure: fails the test at once if it returns a message.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if message := failure():
            pytest.fail(message)
        if time.monotonic() > deadline:
            pytest.fail(f"{getattr(condition, '__name__', condition)} was not true within {seconds:g} s")
        _NEVER.wait(every)
    return found


def check_end(process: subprocess.Popen, log: Path, status: int = 0, seconds: float = 300) -> None:
    """Wait for the end of a process and check its exit status; a failure shows the log.

    Args:
        process: writes to the log.
        log: its output.
        status: the expected exit status.
        seconds: deadline after which the test fails.
    """
    try:
        ended = process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the process still runs after {seconds:g} s:\n{log.read_text()}")
    assert ended == status, log.read_text()
