"""Deliver the answers of the model's thread to an event loop, with one wake-up for all requests that a pass completes."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence

from revmux.serving.answer import Answer, Slot
from revmux.serving.queue import Ticket


class Delivery:
    """Delivers completed requests to one event loop.

    Args:
        loop: the event loop in which the requests wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.lock = threading.Lock()
        self._completed: deque[Request] = deque()
        self._is_scheduled = False

    def add(self, request: Request) -> None:
        """Deliver a completed request soon. The caller holds the lock."""
        self._completed.append(request)
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed, so nobody waits
                self._completed.clear()

    def _deliver(self) -> None:
        with self.lock:
            completed, self._completed = self._completed, deque()
            self._is_scheduled = False
        for request in completed:
            if request.future.done():
                continue
            if request.error is not None:
                request.future.set_exception(request.error)
            else:
                request.future.set_result([answer for answer in request.answers if answer is not None])


class Request:
    """The answers to all inputs of one request. It is complete once every input has an answer, or one has an error.

    Args:
        delivery: the delivery to the event loop in which the request waits.
        inputs: number of inputs.

    Attributes:
        future: resolves to the answers in the event loop.
        tickets: the inputs, set before they are queued.
        cancelled: whether nobody waits any more.
    """

    __slots__ = ("answers", "cancelled", "delivery", "error", "future", "missing", "tickets")

    def __init__(self, delivery: Delivery, inputs: int) -> None:
        self.delivery = delivery
        self.future: asyncio.Future[list[Answer]] = delivery.loop.create_future()
        self.answers: list[Answer | None] = [None] * inputs
        self.missing = inputs
        self.error: BaseException | None = None
        self.tickets: Sequence[Ticket] = ()
        self.cancelled = False

    def slots(self) -> list[Slot]:
        """One slot per input."""
        return [_InputSlot(self, place) for place in range(len(self.answers))]

    def answer(self, place: int, answer: Answer) -> None:
        """Set the answer to one input. May be called from any thread."""
        with self.delivery.lock:
            self.answers[place] = answer
            self.missing -= 1
            if not self.missing and self.error is None:
                self.delivery.add(self)

    def fail(self, error: BaseException) -> None:
        """Fail the whole request, unless it has failed already. May be called from any thread."""
        with self.delivery.lock:
            if self.error is None:
                self.error = error
                self.delivery.add(self)


class _InputSlot:
    """The slot of one input of a request."""

    __slots__ = ("place", "request")

    def __init__(self, request: Request, place: int) -> None:
        self.request = request
        self.place = place

    def cancelled(self) -> bool:
        return self.request.cancelled

    def set_running_or_notify_cancel(self) -> bool:
        return not self.request.cancelled

    def set_result(self, result: Answer, /) -> None:
        self.request.answer(self.place, result)

    def set_exception(self, exception: BaseException, /) -> None:
        self.request.fail(exception)
