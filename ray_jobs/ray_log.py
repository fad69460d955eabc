"""Write Ray's own messages to a file, so that the terminal shows only what the job prints."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray_jobs.ray_internals import filter_worker_lines

RAY_LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d [\d:,.]+ [A-Z] "  # Ray's C++ code
    r"|\d{4}-\d\d-\d\d [\d:,.]+\s+[A-Z]+ \S+\.py:\d+ -- "  # Ray's Python code
    r"|(DEBUG|INFO) \d{4}-\d\d-\d\d [\d:,.]+ .* -- "  # Ray Serve
)
RAY_ACTORS = ("ServeController", "ProxyActor", "PlacementGroupCleaner")


def is_from_ray(origin: Mapping[str, Any], line: str) -> bool:
    """Whether a line that a process of the cluster printed comes from Ray itself.

    Args:
        origin: ``pid`` and ``actor_name`` of the process.
        line: the line without its newline.
    """
    if origin.get("pid") == "raylet" or origin.get("actor_name") in RAY_ACTORS:
        return True
    return RAY_LINE.match(line) is not None


@contextmanager
def redirect_ray_messages(file: Path) -> Iterator[None]:
    """Inside the context, append Ray's messages to a file; everything else is still shown.

    Ray's messages are the records of its loggers, the lines of its own processes, and anything that native code of this
    process writes to standard error. Python's ``sys.stderr`` still writes to the terminal.

    Args:
        file: created with its folder if missing.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(file.open("a", buffering=1, encoding="utf-8"))
        stack.enter_context(_redirect_logger("ray", log))
        stack.enter_context(filter_worker_lines(is_from_ray, log))
        stack.enter_context(_redirect_native_stderr(log.fileno()))
        yield


@contextmanager
def _redirect_logger(name: str, log: Any) -> Iterator[None]:
    logger, handler = logging.getLogger(name), logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"))
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield
    finally:
        logger.handlers = before


@contextmanager
def _redirect_native_stderr(descriptor: int) -> Iterator[None]:
    sys.stderr.flush()
    terminal, before = os.dup(2), sys.stderr
    moved: list[logging.StreamHandler[Any]] = []  # libraries keep the stream that they found when they were imported
    own = open(terminal, "w", buffering=1, encoding=before.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        os.dup2(descriptor, 2)
        if _descriptor_of(before) == 2:  # pytest and notebooks replace sys.stderr
            sys.stderr = own
            moved = [handler for handler in _stream_handlers() if handler.stream is before]
            for handler in moved:
                handler.setStream(own)
        yield
    finally:
        own.flush()
        sys.stderr = before
        for handler in moved:
            handler.setStream(before)
        os.dup2(terminal, 2)
        own.close()
        os.close(terminal)


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict))]
    return [handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]


def _descriptor_of(stream: Any) -> int | None:
    try:
        number: int = stream.fileno()
    except (OSError, AttributeError, ValueError):
        return None
    return number
