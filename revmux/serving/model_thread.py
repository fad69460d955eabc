"""The thread that owns the device: it takes waiting inputs from the queue, runs them, and returns the answers."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from revmux.backbone import HiddenState, TokenBatch
from revmux.labels import best_labels
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, InferenceFailed
from revmux.serving.forward import Outcome, pad, run_pass
from revmux.serving.limits import Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.queue import PullQueue, Ticket, Window
from revmux.serving.scheduling import PLAIN, ForwardPass, Group, Route, next_pass
from revmux.serving.task import Lineup, Task
from revmux.serving.trunk import Trunk
from revmux.utils.out_of_memory import is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

Share = tuple[Route, list[Ticket]]
"""One group: its route through the model, and the tickets of its 1..N distinct members."""


@dataclass(frozen=True)
class Part:
    """What one task runs in a pass.

    Attributes:
        task: the task.
        lineup: its adapters when the pass was formed.
        shares: its groups, at least one.
        depth: number of layers that it can leave to the trunk of the pass; 0 if it runs all layers itself.
    """

    task: Task
    lineup: Lineup
    shares: list[Share]
    depth: int = 0

    @property
    def tickets(self) -> list[Ticket]:
        """The members of all groups."""
        return [ticket for _, members in self.shares for ticket in members]


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
        parts, trunk = self._next_parts(window)
        for part in parts:
            shared = trunk if part.depth else None
            self._run(part.task, part.lineup, part.shares, shared, part.depth)
            self._progress = ended = self.queue.clock()
            self.queue.charge(part.task, ended - started)
            started = ended
        return True

    def _next_parts(self, window: Window) -> tuple[list[Part], Trunk | None]:
        """Claim the tickets of the next pass.

        These are the window's first ticket, the other tickets of its task that can share its pass, and the tickets of
        other tasks for the same texts, if those tasks have the lower layers in common.

        Returns:
            The parts of the pass, and the trunk if there are several.
        """
        tickets = window.tickets
        task, lineup = tickets[0].task, tickets[0].task.lineup
        try:
            forward = self._pass_of(tickets, window.waiting, lineup)
            if forward.stem == PLAIN.stem:  # a plain pass is shared if every task answers all of its texts
                same = _tasks(tickets[0])
                kept = [group for group in forward.groups if _tasks(tickets[group.members[0]]) == same]
                forward = replace(forward, groups=tuple(kept))
        except Exception as error:
            self._fail(self.queue.claim(tickets), error)
            return [], None
        first = Part(task, lineup, self._claim(forward, tickets))
        others = self._other_parts(first, window.waiting)
        for ticket in (ticket for part in (first, *others) for ticket in part.tickets):
            ticket.joint = ()  # otherwise the tickets of a text would keep each other in memory
        if not others:
            return [first] if first.shares else [], None
        deepest = max(part.depth for part in others)
        first = replace(first, depth=_prefill_layers(lineup, first.shares[0][0]) or deepest)
        rows = [ticket.tokens for ticket in _lay_out(first.shares)[1]]
        return [first, *others], Trunk(rows, task.padder, [first.depth, *(part.depth for part in others if part.depth)])

    def _pass_of(self, tickets: Sequence[Ticket], waiting: int, lineup: Lineup) -> ForwardPass:
        """The pass of the first ticket."""
        caps, lengths = [ticket.cap for ticket in tickets], [ticket.length for ticket in tickets]
        return next_pass(lengths, caps, waiting, lineup.routes, self.limits.plain_load, self.limits.max_batch_tokens)

    def _claim(self, forward: ForwardPass, tickets: Sequence[Ticket]) -> list[Share]:
        """Claim the tickets of a pass. If a member of a group was cancelled, the remaining ones fill its slot."""
        claimed = set(self.queue.claim([tickets[index] for group in forward.groups for index in group.members]))
        shares: list[Share] = []
        for group in forward.groups:
            members = [tickets[index] for index in group.members if tickets[index] in claimed]
            if members:
                shares.append((group.route, members))
        return shares

    def _other_parts(self, first: Part, waiting: int) -> list[Part]:
        """Claim tickets of other tasks for the texts of a part, as far as their groups can go on from its states."""
        rows = first.tickets
        route = first.shares[0][0] if rows else PLAIN
        if route != PLAIN and not _prefill_layers(first.lineup, route):
            return []  # the states depend on the slot, or no layer is shared
        asked: dict[Task, list[Ticket]] = {}
        for ticket in rows:
            for other in ticket.joint:
                if other.task is not first.task:
                    asked.setdefault(other.task, []).append(other)
        room = self.limits.max_batch - len(rows)
        parts: list[Part] = []
        for task, candidates in asked.items():
            common = first.task.layers_in_common(task)
            tickets = self.queue.waiting(candidates) if common else []
            lineup = task.lineup
            while tickets and len(tickets) <= room:
                forward = self._pass_of(tickets, waiting, lineup)
                members = {index for group in forward.groups for index in group.members}
                depth = _prefill_layers(lineup, forward.groups[0].route)
                if forward.stem == PLAIN.stem:
                    # Only then does every layer run the same batch as without sharing, and scores are equal bit for bit.
                    depth = common if len(members) == len(rows) else 0
                if 0 < depth <= common and (shares := self._claim(forward, tickets)):
                    room -= len(members)
                    complete = sum(len(found) for _, found in shares) == len(rows)
                    parts.append(Part(task, lineup, shares, depth if complete or forward.stem != PLAIN.stem else 0))
                tickets = [ticket for index, ticket in enumerate(tickets) if index not in members]
        return parts

    def _run(
        self, task: Task, lineup: Lineup, shares: Sequence[Share], trunk: Trunk | None = None, depth: int = 0
    ) -> None:
        """Run groups in one pass and answer them. After an out-of-memory error, retry them in smaller passes.

        Args:
            task: the task.
            lineup: its adapters.
            shares: the groups.
            trunk: the lower layers, if other tasks share them.
            depth: number of layers that the trunk runs.
        """
        self._progress = started = self.queue.clock()
        groups, rows = _lay_out(shares)
        inputs = [ticket.tokens for ticket in rows]
        padded: Callable[[], TokenBatch] = partial(pad, inputs, task.padder)
        prefilled: Callable[[], HiddenState] | None = None
        shared_prefill = 0
        if trunk is not None and trunk.is_usable:
            places = trunk.rows(inputs)
            padded = partial(trunk.tokens, places)
            prefilled = partial(trunk.states, task.backbone, places, depth)
            shared_prefill = len(rows) if trunk.is_computed else 0
        try:
            caps = [ticket.cap for ticket in rows]
            outcome = run_pass(task.backbone, lineup.stages, lineup.later_stages, padded, groups, caps, prefilled)
        except Exception as error:
            if trunk is not None:
                trunk.drop()
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
            self._answer(task, lineup, shares, outcome, started, shared_prefill)
            return
        release_memory(task.backbone.device)
        half = len(shares) // 2
        self._run(task, lineup, shares[:half])
        self._run(task, lineup, shares[half:])

    def _answer(
        self,
        task: Task,
        lineup: Lineup,
        shares: Sequence[Share],
        outcome: Outcome,
        started: float,
        shared_prefill: int,
    ) -> None:
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
            shared_prefill=shared_prefill,
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
            failure = InferenceFailed(
                f"the model of task {ticket.task.name!r} failed on this input: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            ticket.future.set_exception(failure)


def _tasks(ticket: Ticket) -> set[Task]:
    """The tasks that answer the text of a ticket; empty if there is only one."""
    return {other.task for other in ticket.joint}


def _prefill_layers(lineup: Lineup, route: Route) -> int:
    """Number of layers that inputs of a group run through as in the plain model; 0 if their states depend on the slot.

    The plain model has no such number, and counts as 0 too.
    """
    if route == PLAIN:
        return 0
    model = lineup.stages[route.width].model
    return 0 if model.method.prepares_tokens else model.prefill_layers


def _lay_out(shares: Sequence[Share]) -> tuple[list[Group], list[Ticket]]:
    """Return groups whose members are consecutive rows of one pass, and the tickets in these rows."""
    groups: list[Group] = []
    rows: list[Ticket] = []
    for route, members in shares:
        groups.append(Group(route, tuple(range(len(rows), len(rows) + len(members)))))
        rows += members
    return groups, rows
