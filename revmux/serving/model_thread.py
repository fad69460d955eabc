"""The one thread that owns the device: it takes what waits, runs it, and gives the answers."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence

import torch

from revmux.serving.answer import Answer
from revmux.serving.errors import InferenceFailed
from revmux.serving.forward import run_pass
from revmux.serving.limits import Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.queue import PullQueue, Ticket, Window
from revmux.serving.scheduling import Group, next_pass
from revmux.serving.task import Lineup, Task

logger = logging.getLogger(__name__)


class ModelThread:
    """Pulls from a queue until it is closed and empty.

    Args:
        queue: where tickets wait.
        metrics: where passes are counted.
        limits: of one pass.
        threads: CPU threads of the model; None leaves the process's setting.
        on_pass: called with a report of every pass, once its answers are given.
    """

    def __init__(
        self,
        queue: PullQueue,
        metrics: Metrics,
        limits: Limits,
        threads: int | None = None,
        on_pass: Callable[[PassReport], None] | None = None,
    ) -> None:
        self.queue = queue
        self.metrics = metrics
        self.limits = limits
        self.threads = threads
        self.on_pass = on_pass
        self._group_numbers = itertools.count()
        self._progress = queue.clock()
        self._thread = threading.Thread(target=self._work, name="revmux-model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def silent_seconds(self) -> float:
        """Since a pass last began or ended."""
        return self.queue.clock() - self._progress

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the queue is closed and empty."""
        self._thread.join()

    def _work(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while self._serve():
                pass

    def _serve(self) -> bool:
        """Wait for a window and run from it; False when the queue has ended."""
        window = self.queue.window(self.limits.max_batch)
        if window is None:
            return False
        self._progress = started = self.queue.clock()
        task = window.tickets[0].task
        self._step(task, task.lineup, window)
        self._progress = self.queue.clock()
        self.queue.charge(task, self._progress - started)
        return True

    def _step(self, task: Task, lineup: Lineup, window: Window) -> None:
        """Run the pass of the ticket whose turn it is, with the others of the window that can share it."""
        tickets, limits = window.tickets, self.limits
        try:
            caps = [ticket.cap for ticket in tickets]
            lengths = [ticket.length for ticket in tickets]
            forward = next_pass(
                lengths, caps, window.waiting, lineup.routes, limits.plain_load, limits.max_batch_tokens
            )
        except Exception as error:
            self._fail(self.queue.claim(tickets), error)
            return
        claimed = set(self.queue.claim([tickets[index] for group in forward.groups for index in group.members]))
        groups: list[Group] = []
        rows: list[Ticket] = []
        for group in forward.groups:  # a group that lost a cancelled member is filled by those that are left
            members = [tickets[index] for index in group.members if tickets[index] in claimed]
            if members:
                groups.append(Group(group.route, tuple(range(len(rows), len(rows) + len(members)))))
                rows += members
        if rows:
            self._run(task, lineup, groups, rows)

    def _run(self, task: Task, lineup: Lineup, groups: Sequence[Group], rows: Sequence[Ticket]) -> None:
        started = self.queue.clock()
        inputs = [ticket.tokens for ticket in rows]
        try:
            outcome = run_pass(task.backbone, lineup.models, lineup.thresholds, task.padder, groups, inputs)
        except Exception as error:
            self._fail(rows, error)
            return
        report = PassReport(
            task=task.name,
            widths=tuple(group.width for group in groups for _ in group.members),
            groups=tuple(group.width for group in groups),
            methods=tuple(group.route.method for group in groups for _ in group.members),
            fell_back=tuple(outcome.fell_back),
            tokens=sum(ticket.length for ticket in rows),
            padded_tokens=outcome.padded_tokens,
            tokenize_seconds=tuple(ticket.tokenize_seconds for ticket in rows),
            queue_seconds=tuple(started - ticket.queued for ticket in rows),
            stages=outcome.stages,
            seconds=self.queue.clock() - started,
        )
        self.metrics.record(report)
        numbers = [number for group, number in zip(groups, self._group_numbers) for _ in group.members]
        for place, ticket in enumerate(rows):
            ticket.future.set_result(
                Answer(
                    scores=outcome.scores[place],
                    width=report.widths[place],
                    method=report.methods[place],
                    queue_seconds=report.queue_seconds[place],
                    inference_seconds=report.seconds,
                    truncated=ticket.truncated,
                    fell_back=report.fell_back[place],
                    tokenize_seconds=ticket.tokenize_seconds,
                    tokens=ticket.length,
                    group=numbers[place],
                )
            )
        self._tell(report)

    def _tell(self, report: PassReport) -> None:
        if self.on_pass is None:
            return
        try:
            self.on_pass(report)
        except Exception:
            logger.exception("on_pass failed; the answers of the pass were given")

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        logger.error("a batch of %d inputs failed", len(tickets), exc_info=error)
        for ticket in tickets:
            self.metrics.count(ticket.task.name, "failed")
            failure = InferenceFailed(f"the model failed on this batch: {type(error).__name__}: {error}")
            failure.__cause__ = error
            ticket.future.set_exception(failure)
