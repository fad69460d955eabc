"""The thread that owns the device: it takes waiting inputs from the queue, runs them, and returns the answers."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch

from revmux.labels import best_labels
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, InferenceFailed
from revmux.serving.forward import Outcome, pad, run_pass
from revmux.serving.limits import Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.queue import PullQueue, Ticket, Window
from revmux.serving.scheduling import PLAIN, Group, Route, next_pass
from revmux.serving.task import Lineup, Task
from revmux.utils.out_of_memory import is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

Share = tuple[Route, list[Ticket]]
"""One group: its route through the model, and the tickets of its 1..N distinct members."""


class ModelThread:
    """Runs inputs from a queue until the queue is closed and empty.

    Args:
        queue: the queue of tickets.
        metrics: counts the passes.
        limits: limits of the engine.
        threads: number of CPU threads of the model; None is the number that PyTorch uses in the thread that calls the
            constructor.
        on_pass: called with a report of every pass, after its answers are returned.
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
        self.threads = threads or torch.get_num_threads()  # a new thread would start with OpenMP's own default
        self.on_pass = on_pass
        self._group_numbers = itertools.count()
        self._random = random.Random()
        self._progress = queue.clock()
        self._thread = threading.Thread(target=self._work, name="revmux-model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the thread, without that of threads that PyTorch starts. 0 where the system does not report it."""
        if not self.alive or self._thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    @property
    def silent_seconds(self) -> float:
        """Seconds since a pass last began or ended."""
        return self.queue.clock() - self._progress

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread ends, which it does once the queue is closed and empty."""
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                while self._serve():
                    pass
        except BaseException:
            # A bug outside of a pass. Nobody else takes inputs from the queue, so the waiting ones would hang.
            self.queue.close()
            for ticket in self.queue.clear():
                ticket.future.set_exception(Draining("the model's thread has ended; use another server"))
            raise

    def _serve(self) -> bool:
        """Wait for a window and run one pass from it. Return False if the queue is closed and empty."""
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
        """Run the pass of the window's first ticket, together with the other tickets that can share it."""
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
        shares: list[Share] = []
        for group in forward.groups:  # if a member was cancelled, the remaining ones fill its slot
            members = [tickets[index] for index in group.members if tickets[index] in claimed]
            if members:
                shares.append((group.route, members))
        if shares:
            self._run(task, lineup, shares)

    def _run(self, task: Task, lineup: Lineup, shares: Sequence[Share]) -> None:
        """Run groups in one pass and answer them. After an out-of-memory error, retry them in smaller passes."""
        self._progress = started = self.queue.clock()
        groups, rows = _lay_out(shares)
        inputs = [ticket.tokens for ticket in rows]
        try:
            caps = [ticket.cap for ticket in rows]
            outcome = run_pass(
                task.backbone, lineup.stages, lineup.later_stages, partial(pad, inputs, task.padder), groups, caps
            )
        except Exception as error:
            if len(shares) == 1 or not is_out_of_memory(error):
                self._fail(rows, error)
                return
            traceback.clear_frames(error.__traceback__)  # releases the tensors of the failed pass
            logger.warning(
                "a pass of %d groups of task %s ran out of memory and is retried as two passes; lower max_batch or "
                "max_batch_tokens",
                len(shares),
                task.name,
            )
        else:
            self._answer(task, lineup, shares, outcome, started)
            return
        release_memory(task.backbone.device)
        half = len(shares) // 2
        self._run(task, lineup, shares[:half])
        self._run(task, lineup, shares[half:])

    def _answer(self, task: Task, lineup: Lineup, shares: Sequence[Share], outcome: Outcome, started: float) -> None:
        """Answer the inputs whose scores are valid. Run the others again, each alone."""
        tickets = [ticket for _, members in shares for ticket in members]
        routes = [route for route, members in shares for _ in members]
        answered = [row for row, valid in enumerate(outcome.valid) if valid]
        widths = {outcome.groups[row]: outcome.widths[row] for row in answered}  # N by group
        report = PassReport(
            task=task.name,
            widths=tuple(outcome.widths[row] for row in answered),
            groups=tuple(widths.values()),
            methods=tuple(outcome.methods[row] for row in answered),
            answered_by=tuple(outcome.answered_by[row] for row in answered),
            fell_back=tuple(outcome.fell_back[row] for row in answered),
            tokens=sum(ticket.length for ticket in tickets),
            padded_tokens=outcome.padded_tokens,
            tokenize_seconds=tuple(tickets[row].tokenize_seconds for row in answered),
            queue_seconds=tuple(started - tickets[row].queued for row in answered),
            steps=outcome.steps,
            seconds=self.queue.clock() - started,
        )
        self.metrics.record(report)
        numbers = dict(zip(widths, self._group_numbers))
        scores = outcome.scores.unbind()  # R times (C,)
        for index, row in enumerate(answered):
            ticket = tickets[row]
            ticket.future.set_result(
                Answer(
                    scores=scores[row],
                    width=report.widths[index],
                    method=report.methods[index],
                    stage=report.answered_by[index],
                    queue_seconds=report.queue_seconds[index],
                    inference_seconds=report.seconds,
                    truncated=ticket.truncated,
                    fell_back=report.fell_back[index],
                    tokenize_seconds=ticket.tokenize_seconds,
                    tokens=ticket.length,
                    group=numbers[outcome.groups[row]],
                    started=started,
                    steps=outcome.steps,
                )
            )
        self._report(report)
        self._audit(task, tickets, outcome, answered)
        invalid = [(route, ticket) for route, ticket, valid in zip(routes, tickets, outcome.valid) if not valid]
        if broken := [ticket for route, ticket in invalid if route == PLAIN]:
            self._fail(broken, ArithmeticError("the scores of this input are not finite"))
        if retried := [ticket for route, ticket in invalid if route != PLAIN]:
            logger.warning(
                "%d inputs of task %s are in groups with scores that are not finite; each is run again alone",
                len(retried),
                task.name,
            )
            self._run(task, lineup, [(PLAIN, [ticket]) for ticket in retried])

    def _audit(self, task: Task, tickets: Sequence[Ticket], outcome: Outcome, answered: Sequence[int]) -> None:
        """Run a share of the inputs that adapters answered through the plain model too, and count how often the labels agree.

        An input that fell back counts as agreed. Inputs that only the plain model ran, such as probes, are not audited.
        """
        adapted = [row for row in answered if outcome.methods[row] != PLAIN.method]
        chosen = [row for row in adapted if self._random.random() < self.limits.audit]
        others = [row for row in chosen if outcome.answered_by[row] > 0]
        agreed = len(chosen) - len(others)
        try:
            if others:
                groups = [Group(PLAIN, (index,)) for index in range(len(others))]
                inputs = [tickets[row].tokens for row in others]
                plain = run_pass(task.backbone, {}, [], partial(pad, inputs, task.padder), groups, [1] * len(others))
                agreed += int((best_labels(plain.scores) == best_labels(outcome.scores[others])).sum())
        except Exception:
            logger.exception("the audit of a pass of task %s failed; its answers were already returned", task.name)
            return
        if chosen:
            self.metrics.count(task.name, "audited", len(chosen))
            self.metrics.count(task.name, "agreed", agreed)

    def _report(self, report: PassReport) -> None:
        if self.on_pass is None:
            return
        try:
            self.on_pass(report)
        except Exception:
            logger.exception("on_pass failed; the answers of the pass were already returned")

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        logger.error("%d inputs failed", len(tickets), exc_info=error)
        # Clients keep the error for a while. Its frames would keep all tensors of the pass alive.
        traceback.clear_frames(error.__traceback__)
        for ticket in tickets:
            self.metrics.count(ticket.task.name, "failed")
            failure = InferenceFailed(f"the model failed on this input: {type(error).__name__}: {error}")
            failure.__cause__ = error
            ticket.future.set_exception(failure)


def _lay_out(shares: Sequence[Share]) -> tuple[list[Group], list[Ticket]]:
    """Return groups whose members are consecutive rows of one pass, and the tickets in these rows."""
    groups: list[Group] = []
    rows: list[Ticket] = []
    for route, members in shares:
        groups.append(Group(route, tuple(range(len(rows), len(rows) + len(members)))))
        rows += members
    return groups, rows
