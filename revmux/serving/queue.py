"""Bounded lines, one a task, that the model pulls from whenever it is free.

Within a task inputs come in the order of their arrival, a point of priority being worth a head start of some seconds.
Between tasks the one comes next that has had the least of the device's time (start-time fair queueing), a point of
priority being worth as many seconds of it. An input can thus be put off only by what came before it or within its head
start after it, and a task only until the others have had as much as it: none waits for ever.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, Expired, Overloaded
from revmux.serving.metrics import Metrics

if TYPE_CHECKING:
    from revmux.serving.task import Task

_AHEAD = float("inf")


@dataclass(eq=False)
class Ticket:
    """One input that waits for its answer.

    Attributes:
        task: that it is for.
        tokens: what the tokenizer gave, each a list of ``length`` numbers.
        cap: widest group that it allows; None is any.
        priority: higher comes first.
        deadline: second after which it must not be started any more; None waits as long as it takes.
        truncated: whether the text was cut.
        tokenize_seconds: what tokenizing took.
        future: resolves to its answer.
        queued: when it was queued, seconds of the queue's clock.
        order: its place in the line of its task.
    """

    task: Task
    tokens: dict[str, list[int]]
    cap: int | None = None
    priority: float = 0
    deadline: float | None = None
    truncated: bool = False
    tokenize_seconds: float = 0.0
    future: Future[Answer] = field(default_factory=Future)
    queued: float = 0.0
    order: tuple[float, int] = (0.0, 0)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens["input_ids"])


@dataclass(frozen=True)
class Window:
    """What may run next: the first tickets of one task. They stay in the queue until they are claimed.

    Attributes:
        tickets: at least one, the first is the one whose turn it is.
        waiting: tickets of all tasks.
    """

    tickets: list[Ticket]
    waiting: int


class PullQueue:
    """Tickets of all tasks.

    Args:
        limit: tickets of one task that may wait.
        metrics: where those are counted that never run.
        priority_seconds: what a point of priority is worth.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        limit: int,
        metrics: Metrics,
        priority_seconds: float = 1.0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.limit = limit
        self.metrics = metrics
        self.priority_seconds = priority_seconds
        self.clock = clock
        self._lines: dict[Task, list[Ticket]] = {}  # none of them empty
        self._coming: Counter[Task] = Counter()  # inputs that were let in and are not queued yet
        self._served: WeakKeyDictionary[Task, float] = WeakKeyDictionary()  # virtual seconds of the device
        self._virtual = 0.0  # those of the task that ran last
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return sum(self.depths().values())

    def depths(self) -> dict[str, int]:
        """Tickets that wait, by the name of their task; without the tasks that have none."""
        with self._changed:
            found: Counter[str] = Counter()
            for task, line in self._lines.items():
                found[task.name] += len(line)
            return dict(found)

    @contextmanager
    def room(self, task: Task, tickets: int) -> Iterator[None]:
        """Keep room for tickets that are to be put inside of the context, once work was spent on them.

        Raises:
            Overloaded: more tickets than there is room for.
            Draining: closed.
        """
        with self._changed:
            self._check(task, tickets, self._coming[task])
            self._coming[task] += tickets
        try:
            yield
        finally:
            with self._changed:
                self._coming[task] -= tickets
                if not self._coming[task]:
                    del self._coming[task]

    def _check(self, task: Task, tickets: int, coming: int = 0) -> None:
        if self._closed:
            raise Draining("the server is shutting down and takes no more requests; ask another one")
        waiting = len(self._lines.get(task, ())) + coming
        if waiting + tickets > self.limit:
            self.metrics.count(task.name, "rejected", tickets)
            raise Overloaded(
                f"{waiting} inputs wait and at most {self.limit} may: no room for {tickets}; ask again later"
            )

    def put(self, tickets: Sequence[Ticket], ahead: bool = False) -> None:
        """Queue all of the tickets, or none; inside of :meth:`room` there is room.

        Args:
            tickets: of one task.
            ahead: before all others and beyond the limit, for questions about the model's health.

        Raises:
            Overloaded: no room for all of them.
            Draining: closed.
        """
        if not tickets:
            return
        task = tickets[0].task
        with self._changed:
            self._check(task, 0 if ahead else len(tickets))
            if task not in self._lines:
                self._lines[task] = []
                self._served[task] = max(self._served.get(task, 0.0), self._virtual)
            for ticket in tickets:
                ticket.queued = self.clock()
                ticket.priority = _AHEAD if ahead else ticket.priority
                ticket.order = (ticket.queued - ticket.priority * self.priority_seconds, next(self._numbers))
                insort(self._lines[task], ticket, key=_order)
            self._changed.notify_all()
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._forget, ticket))

    def _forget(self, ticket: Ticket, future: Future[Answer]) -> None:
        if future.cancelled():
            with self._changed:
                self.metrics.count(ticket.task.name, "cancelled")
                self._remove(ticket)

    def _remove(self, ticket: Ticket) -> bool:
        """Whether it was still in its line."""
        line = self._lines.get(ticket.task, [])
        place = bisect_left(line, ticket.order, key=_order)
        if place == len(line) or line[place] is not ticket:
            return False
        del line[place]
        if not line:
            del self._lines[ticket.task]
        return True

    def window(self, most: int) -> Window | None:
        """Wait for tickets and look at those whose turn it is; tickets that have expired are told so.

        Args:
            most: tickets at most.

        Returns:
            Tickets of one task; or None when the queue is closed and empty.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                expired = self._take_expired()
                window = None
                if self._lines:
                    task = min(self._lines, key=self._turn)
                    self._virtual = self._served[task]
                    window = Window(self._lines[task][:most], sum(map(len, self._lines.values())))
                ended = self._closed and window is None
            for ticket in expired:
                waited = self.clock() - ticket.queued
                ticket.future.set_exception(
                    Expired(
                        f"the deadline passed after {waited:.3f} s in the queue; ask again later, or allow more time"
                    )
                )
            if window is not None or ended:
                return window

    def _turn(self, task: Task) -> tuple[float, tuple[float, int]]:
        head = self._lines[task][0]
        return self._served[task] - head.priority * self.priority_seconds, head.order

    def _take_expired(self) -> list[Ticket]:
        now = self.clock()
        late = [
            ticket
            for line in self._lines.values()
            for ticket in line
            if ticket.deadline is not None and ticket.deadline <= now
        ]
        late = [ticket for ticket in late if self._remove(ticket) and ticket.future.set_running_or_notify_cancel()]
        for ticket in late:
            self.metrics.count(ticket.task.name, "expired")
        return late

    def claim(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Take tickets out of the queue to run them.

        Args:
            tickets: of a window.

        Returns:
            Those that still waited; they cannot be cancelled any more.
        """
        with self._changed:
            return [
                ticket for ticket in tickets if self._remove(ticket) and ticket.future.set_running_or_notify_cancel()
            ]

    def charge(self, task: Task, seconds: float) -> None:
        """Book time of the device on a task."""
        with self._changed:
            self._served[task] = self._served.get(task, 0.0) + seconds

    def close(self) -> None:
        """Refuse new tickets; those that wait can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        """Take out all that wait, without the cancelled ones."""
        with self._changed:
            tickets = [ticket for line in self._lines.values() for ticket in line]
            self._lines.clear()
        return [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]


def _order(ticket: Ticket) -> tuple[float, int]:
    return ticket.order
