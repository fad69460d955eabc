"""A bounded queue that the model pulls from: whenever it is free it takes all that waits, up to its bounds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, Overloaded


@dataclass(eq=False)
class Ticket:
    """One input that waits for its answer.

    Attributes:
        tokens: what the tokenizer gave, each a list of ``length`` numbers.
        cap: widest group that it allows.
        truncated: whether the text was cut.
        future: resolves to its answer.
        queued: when it was queued, seconds of :func:`time.perf_counter`.
    """

    tokens: dict[str, list[int]]
    cap: int
    truncated: bool = False
    future: Future[Answer] = field(default_factory=Future)
    queued: float = 0.0

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens["input_ids"])


class PullQueue:
    """Tickets in the order that they came.

    Args:
        limit: tickets that may wait.

    Attributes:
        dropped: tickets whose future was cancelled while they waited.
        rejected: tickets that found no room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self.rejected = 0
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def check_room(self, tickets: int) -> None:
        """Refuse before any work is spent on them.

        Raises:
            Overloaded: more tickets than there is room for.
            Draining: closed.
        """
        with self._changed:
            self._check(tickets)

    def _check(self, tickets: int) -> None:
        if self._closed:
            raise Draining("the server is shutting down and takes no more requests; ask another one")
        if len(self._waiting) + tickets > self.limit:
            self.rejected += tickets
            raise Overloaded(
                f"{len(self._waiting)} inputs wait and at most {self.limit} may: no room for {tickets}; ask again later"
            )

    def put(self, tickets: Sequence[Ticket], ahead: bool = False) -> None:
        """Queue all of the tickets, or none.

        Args:
            tickets: of one request.
            ahead: before all others and beyond the limit, for questions about the model's health.

        Raises:
            Overloaded: no room for all of them.
            Draining: closed.
        """
        with self._changed:
            self._check(0 if ahead else len(tickets))
            now = perf_counter()
            for ticket in tickets:
                ticket.queued = now
                self._waiting[ticket] = None
                if ahead:
                    self._waiting.move_to_end(ticket, last=False)
            self._changed.notify_all()
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._forget, ticket))

    def _forget(self, ticket: Ticket, future: Future[Answer]) -> None:
        if future.cancelled():
            with self._changed:
                self.dropped += 1
                self._waiting.pop(ticket, None)

    def take(self, max_inputs: int, max_tokens: int) -> tuple[list[Ticket], int] | None:
        """Wait for tickets and take what fits, first come, first served.

        Args:
            max_inputs: tickets at most.
            max_tokens: tokens at most; one ticket is always taken.

        Returns:
            The tickets, none of them cancelled, and how many waited in all; or None when the queue is closed
            and empty.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return None
                taken: list[Ticket] = []
                waiting, tokens = len(self._waiting), 0
                while self._waiting and len(taken) < max_inputs:
                    ticket = next(iter(self._waiting))
                    if taken and tokens + ticket.length > max_tokens:
                        break
                    del self._waiting[ticket]
                    if ticket.future.set_running_or_notify_cancel():
                        taken.append(ticket)
                        tokens += ticket.length
                if taken:
                    return taken, waiting

    def close(self) -> None:
        """Refuse new tickets; those that wait can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        """Take out all that wait, without the cancelled ones."""
        with self._changed:
            tickets = list(self._waiting)
            self._waiting.clear()
        return [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]
