"""The thread that owns the device: it takes waiting inputs from the queue, runs them, and returns the answers."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from revmux.backbone import HiddenState, TokenBatch
from revmux.labels import best_labels, order_labels
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, InferenceFailed
from revmux.serving.forward import Outcome, run_pass
from revmux.serving.limits import Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.part import Part, lay_out
from revmux.serving.parts import next_parts
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.scheduling import PLAIN, Group
from revmux.serving.task import Task
from revmux.serving.trunk import Trunk
from revmux.utils.out_of_memory import is_out_of_memory, release_memory

logger = logging.getLogger(__name__)


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
        try:
            parts, trunk = next_parts(self.queue, self.limits, window)
        except Exception as error:
            self._fail(self.queue.claim(window.tickets), error)
            return True
        seconds = []
        for part in parts:
            self._run(part, trunk if part.is_on_trunk else None)
            self._progress = ended = self.queue.clock()
            seconds.append(ended - started)
            started = ended
        self._charge(parts, seconds, trunk)
        return True

    def _charge(self, parts: Sequence[Part], seconds: list[float], trunk: Trunk | None) -> None:
        """Charge device time to the tasks. Each pays for the common layers by its number of inputs."""
        common = 0.0 if trunk is None else trunk.seconds
        if common:
            seconds[0] -= common  # the first part ran them
            inputs = [len(part.tickets) if part.is_on_trunk else 0 for part in parts]
            seconds = [own + common * number / sum(inputs) for own, number in zip(seconds, inputs)]
        for part, own in zip(parts, seconds):
            self.queue.charge(part.task, max(own, 0.0))

    def _run(self, part: Part, trunk: Trunk | None = None) -> None:
        """Run the groups of a part and answer them. After an out-of-memory error, retry them in smaller passes.

        Args:
            part: the part.
            trunk: the lower layers, if other tasks share them.
        """
        self._progress = started = self.queue.clock()
        task, lineup = part.task, part.lineup
        groups, rows = lay_out(part.shares)
        inputs = [ticket.tokens for ticket in rows]
        padded: Callable[[], TokenBatch] = partial(task.padder.lists, inputs)
        prefilled: Callable[[], HiddenState] | None = None
        if trunk is not None and trunk.is_usable:
            places = trunk.rows(inputs)
            padded = partial(trunk.tokens, places)
            prefilled = partial(trunk.states, task.backbone, places, part.depth)
            if part.first_branch is not None:
                prefilled = partial(trunk.ends, task.backbone, part.first_branch, len(rows))
        try:
            caps = [ticket.cap for ticket in rows]
            outcome = run_pass(task.backbone, lineup.stages, lineup.later_stages, padded, groups, caps, prefilled)
        except Exception as error:
            if trunk is not None:
                trunk.drop()
            retried = self._smaller(part, prefilled is not None, error)
            if not retried:
                self._fail(rows, error)
                return
            traceback.clear_frames(error.__traceback__)  # releases the tensors of the failed pass
        else:
            shared = trunk.answered(places) if trunk is not None and prefilled is not None else 0
            self._answer(part, outcome, started, shared, 0 if prefilled is None else len(rows))
            return
        release_memory(task.backbone.device)
        for smaller in retried:
            self._run(smaller)

    @staticmethod
    def _smaller(part: Part, had_trunk: bool, error: Exception) -> list[Part]:
        """What to run instead of a part that failed; nothing if its inputs themselves are at fault.

        Args:
            part: the part.
            had_trunk: whether it used states that were computed together with the inputs of other tasks.
            error: the error.
        """
        name, groups = part.task.name, len(part.shares)
        if had_trunk:  # another task may have caused the error, or the inputs of all tasks together were too many
            logger.warning("a pass of task %s with others failed and is retried alone", name, exc_info=error)
            return [replace(part, depth=0)]
        if groups == 1 or not is_out_of_memory(error):
            return []
        logger.warning(
            "a pass of %d groups of task %s ran out of memory and is retried as two passes; lower max_batch or "
            "max_batch_tokens",
            groups,
            name,
        )
        half = groups // 2
        return [replace(part, shares=part.shares[:half], depth=0), replace(part, shares=part.shares[half:], depth=0)]

    def _answer(
        self, part: Part, outcome: Outcome, started: float, shared_prefill: int = 0, joint_prefill: int = 0
    ) -> None:
        """Answer the inputs whose scores are valid. Run the others again, each alone."""
        task, lineup = part.task, part.lineup
        groups, tickets = lay_out(part.shares)
        routes = [route for route, members in part.shares for _ in members]
        answered = [row for row, valid in enumerate(outcome.valid) if valid]
        widths = {outcome.groups[row]: outcome.widths[row] for row in answered}  # N by group
        report = PassReport(
            task=task.name,
            widths=tuple(outcome.widths[row] for row in answered),
            groups=tuple(widths.values()),
            methods=tuple(outcome.methods[row] for row in answered),
            answered_by=tuple(outcome.answered_by[row] for row in answered),
            fell_back=tuple(outcome.fell_back[row] for row in answered),
            shared_prefill=shared_prefill,
            joint_prefill=joint_prefill,
            cost=lineup.pass_cost(groups, outcome.last, outcome.fell_back, shared_prefill * part.depth_cost),
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
        rankings = list(zip(*order_labels(outcome.scores)))  # once per pass, because it takes as long for one input
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
                    ranking=rankings[row],
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
            self._run(Part(task, lineup, [(PLAIN, [ticket]) for ticket in retried]))

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
                plain = run_pass(task.backbone, {}, [], partial(task.padder.lists, inputs), groups, [1] * len(others))
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
            failure = InferenceFailed(
                f"the model of task {ticket.task.name!r} failed on this input: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            ticket.future.set_exception(failure)
