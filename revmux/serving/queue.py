"""A queue with one bounded line per task, from which the model's thread pulls whenever it is free.

Within a task, inputs run in the order of their arrival, and each point of priority is a head start of
``priority_seconds``. Between tasks, the task that has used the least device time runs next (start-time fair queueing),
and each point of priority counts as ``priority_seconds`` less device time. Priorities are limited, so every input
eventually runs: later inputs of its task can overtake it only if they arrive within a limited time after it, and its
task waits only until the other tasks have used as much device time.
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

from revmux.serving.answer import Answer, Slot
from revmux.serving.errors import Draining, Expired, Overloaded
from revmux.serving.metrics import Metrics

if TYPE_CHECKING:
    from revmux.serving.task import Task

_AHEAD = float("inf")


@dataclass(eq=False, slots=True)
class Ticket:
    """One input that waits for its answer.

    Attributes:
        task: the task that answers it.
        tokens: output of the tokenizer: lists of ``length`` numbers by name.
        cap: widest group that the input allows; None allows any.
        priority: higher runs earlier.
        deadline: latest start of the forward pass, on the queue's clock; None sets no deadline.
        truncated: whether the text was cut.
        tokenize_seconds: time of tokenization.
        future: receives the answer: a future, or the input's slot in a :class:`revmux.serving.replies.Request`.
        joint: all tickets of a text that several tasks answer, one per task, all with the same ``tokens``; empty if no
            other task does.
        queued: time of queueing, on the queue's clock.
        order: sort key within the line of its task.
    """

    task: Task
    tokens: dict[str, list[int]]
    cap: int | None = None
    priority: float = 0
    deadline: float | None = None
    truncated: bool = False
    tokenize_seconds: float = 0.0
    future: Future[Answer] | Slot = field(default_factory=Future)
    joint: Sequence[Ticket] = ()
    queued: float = 0.0
    order: tuple[float, int] = (0.0, 0)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens["input_ids"])


@dataclass(frozen=True)
class Window:
    """The tickets that may run next: the first ones of one task. They stay in the queue until they are claimed.

    Attributes:
        tickets: at least one; the first one runs next.
        waiting: number of waiting tickets of all tasks.
    """

    tickets: list[Ticket]
    waiting: int


class PullQueue:
    """The waiting tickets of all tasks.

    Args:
        limit: maximum number of waiting tickets per task.
        metrics: counts the tickets that never run.
        priority_seconds: seconds that one point of priority is worth.
        clock: returns monotonic time in seconds.
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
        self._lines: dict[Task, list[Ticket]] = {}  # only tasks with waiting tickets
        self._reserved: Counter[Task] = Counter()  # reserved places of inputs that are not queued yet
        self._served: WeakKeyDictionary[Task, float] = WeakKeyDictionary()  # virtual device seconds
        self._virtual = 0.0  # virtual device seconds of the task that ran last
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return sum(self.depths().values())

    def depths(self) -> dict[str, int]:
        """Return the number of waiting tickets by task name. Tasks without waiting tickets are omitted."""
        with self._changed:
            found: Counter[str] = Counter()
            for task, line in self._lines.items():
                found[task.name] += len(line)
            return dict(found)

    @contextmanager
    def room(self, task: Task, tickets: int) -> Iterator[None]:
        """Reserve room for tickets that the caller prepares and puts within this context.

        Raises:
            Overloaded: the queue has no room for all tickets.
            Draining: the queue is closed.
        """
        self.reserve(task, tickets)
        try:
            yield
        finally:
            self.release(task, tickets)

    def reserve(self, task: Task, tickets: int) -> None:
        """Reserve room for tickets until :meth:`release`.

        Raises:
            Overloaded: the queue has no room for all tickets.
            Draining: the queue is closed.
        """
        with self._changed:
            self._check_open()
            waiting = len(self._lines.get(task, ())) + self._reserved[task]
            if waiting + tickets > self.limit:
                self.metrics.count(task.name, "rejected", tickets)
                raise Overloaded(
                    f"{waiting} inputs are waiting and the limit is {self.limit}: no room for {tickets} more in task "
                    f"{task.name!r}; retry later"
                )
            self._reserved[task] += tickets

    def release(self, task: Task, tickets: int) -> None:
        """Release room that was reserved."""
        with self._changed:
            self._reserved[task] -= tickets
            if not self._reserved[task]:
                del self._reserved[task]

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down and accepts no more requests; use another server")

    def put(self, tickets: Sequence[Ticket], ahead: bool = False) -> None:
        """Queue all tickets except cancelled ones, in one step. After an error none is queued.

        Args:
            tickets: tickets of any tasks, for which the caller has reserved room.
            ahead: put them before all others, for health checks, which reserve no room.

        Raises:
            Draining: the queue is closed.
        """
        if not tickets:
            return
        by_task: dict[Task, list[Ticket]] = {}
        for ticket in tickets:
            by_task.setdefault(ticket.task, []).append(ticket)
        with self._changed:
            self._check_open()
            queued = self.clock()
            for task, own in by_task.items():
                self._insert(task, own, queued, ahead)
            self._changed.notify_all()
        for ticket in tickets:
            if isinstance(ticket.future, Future):
                ticket.future.add_done_callback(partial(self._forget, ticket))

    def _insert(self, task: Task, tickets: Sequence[Ticket], queued: float, ahead: bool) -> None:
        """Put the tickets of a task into its line."""
        if task not in self._lines:
            self._lines[task] = []
            self._served[task] = max(self._served.get(task, 0.0), self._virtual)
        line = self._lines[task]
        for ticket in tickets:
            ticket.queued = queued
            ticket.priority = _AHEAD if ahead else ticket.priority
            ticket.order = (queued - ticket.priority * self.priority_seconds, next(self._numbers))
            if ticket.future.cancelled():
                self.metrics.count(task.name, "cancelled")
            elif not line or line[-1].order < ticket.order:
                line.append(ticket)
            else:
                insort(line, ticket, key=_order)
        if not line:
            del self._lines[task]

    def _forget(self, ticket: Ticket, future: Future[Answer]) -> None:
        if future.cancelled():
            with self._changed:
                self.metrics.count(ticket.task.name, "cancelled")
                self._remove(ticket)

    def withdraw(self, tickets: Sequence[Ticket]) -> None:
        """Remove the waiting tickets of a request that was cancelled."""
        with self._changed:
            removed = Counter(ticket.task.name for ticket in tickets if self._remove(ticket))
            for name, number in removed.items():
                self.metrics.count(name, "cancelled", number)

    def waiting(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Return those of the tickets that still wait."""
        with self._changed:
            return [ticket for ticket in tickets if self._place(ticket) is not None]

    def turns(self) -> list[Task]:
        """Return the tasks with waiting tickets, the one that runs next first."""
        with self._changed:
            return sorted(self._lines, key=self._turn)

    def first(self, task: Task, max_tickets: int) -> list[Ticket]:
        """Return the tickets of a task that run next. They stay in the queue until they are claimed."""
        with self._changed:
            return self._lines.get(task, [])[:max_tickets]

    def _place(self, ticket: Ticket) -> int | None:
        """The place of a ticket in the line of its task; None if it does not wait."""
        line = self._lines.get(ticket.task, [])
        index = bisect_left(line, ticket.order, key=_order)
        return index if index < len(line) and line[index] is ticket else None

    def _remove(self, ticket: Ticket) -> bool:
        """Remove a ticket from its line, and return whether it was still there."""
        index = self._place(ticket)
        if index is None:
            return False
        line = self._lines[ticket.task]
        del line[index]
        if not line:
            del self._lines[ticket.task]
        return True

    def window(self, max_tickets: int) -> Window | None:
        """Wait for tickets and return those that run next. Fail expired tickets with :class:`Expired`.

        Args:
            max_tickets: maximum number of tickets.

        Returns:
            Tickets of one task, or None if the queue is closed and empty.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                expired = self._take_expired()
                window = None
                if self._lines:
                    task = min(self._lines, key=self._turn)
                    self._virtual = self._served[task]
                    window = Window(self._lines[task][:max_tickets], sum(map(len, self._lines.values())))
                ended = self._closed and window is None
            for ticket in expired:
                waited = self.clock() - ticket.queued
                ticket.future.set_exception(
                    Expired(f"the deadline passed after {waited:.3f} s in the queue; retry later, or allow more time")
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
        """Remove tickets from the queue to run them.

        Args:
            tickets: tickets of a window, or of other tasks.

        Returns:
            The tickets that were still waiting. They can no longer be cancelled.
        """
        with self._changed:
            return [
                ticket for ticket in tickets if self._remove(ticket) and ticket.future.set_running_or_notify_cancel()
            ]

    def charge(self, task: Task, seconds: float) -> None:
        """Charge device time to a task."""
        with self._changed:
            self._served[task] = self._served.get(task, 0.0) + seconds

    def close(self) -> None:
        """Refuse new tickets. Waiting tickets can still be claimed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        """Remove all waiting tickets, and return those that are not cancelled."""
        with self._changed:
            tickets = [ticket for line in self._lines.values() for ticket in line]
            self._lines.clear()
        return [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]


def _order(ticket: Ticket) -> tuple[float, int]:
    return ticket.order
