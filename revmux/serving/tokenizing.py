"""Threads that tokenize requests. Each takes all requests that wait, so a busy server tokenizes many texts in one call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import perf_counter

from revmux.errors import TextError
from revmux.pretrained.encoder import Encoded
from revmux.serving.errors import Draining
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.replies import Request
from revmux.serving.task import Task
from revmux.text import Text

TEXTS_AT_ONCE = 256
"""A thread takes no further request once it has this many texts, so that their inputs can run."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizeJob:
    """An admitted request that waits to be tokenized.

    Attributes:
        request: receives the answers, task by task, or the error of a text.
        tasks: the tasks that answer each text.
        texts: its texts, for which the queue of each task has reserved places.
        truncate: whether long texts are truncated.
        cap: widest group that the inputs allow; None allows any.
        priority: priority of the inputs.
        deadline: latest start of the forward pass, on the queue's clock; None sets no deadline.
    """

    request: Request
    tasks: tuple[Task, ...]
    texts: Sequence[Text]
    truncate: bool
    cap: int | None
    priority: float
    deadline: float | None


class Tokenizers:
    """Tokenizes requests and queues their inputs.

    Args:
        queue: the queue of inputs.
        threads: number of threads.
    """

    def __init__(self, queue: PullQueue, threads: int = 2) -> None:
        self._queue = queue
        self._jobs: SimpleQueue[TokenizeJob | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"revmux-tokenize-{number}", daemon=True)
            for number in range(threads)
        ]
        self._starting = threading.Lock()
        self._is_closed = False

    def put(self, job: TokenizeJob) -> None:
        """Tokenize a request and queue its inputs. Errors go to the request."""
        if self._threads[-1].ident is None:
            self._start()
        self._jobs.put(job)
        if self._is_closed:
            self._refuse_waiting()

    def _start(self) -> None:
        with self._starting:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()

    def close(self) -> None:
        """Tokenize the waiting requests, end the threads, and refuse requests that arrive later."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._is_closed = True
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None:
                job.request.fail(
                    Draining("the server is shutting down and accepts no more requests; use another server")
                )
                self._release(job)

    def _release(self, job: TokenizeJob) -> None:
        for task in job.tasks:
            self._queue.release(task, len(job.texts))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs, texts, ended = [job], len(job.texts), False
            while texts < TEXTS_AT_ONCE:
                try:
                    more = self._jobs.get_nowait()
                except Empty:
                    break
                if more is None:
                    ended = True
                    break
                jobs.append(more)
                texts += len(more.texts)
            together: dict[tuple[tuple[Task, ...], bool], list[TokenizeJob]] = {}
            for one in jobs:
                together.setdefault((one.tasks, one.truncate), []).append(one)
            for same in together.values():
                self._tokenize(same)
            if ended:
                return

    def _tokenize(self, jobs: Sequence[TokenizeJob]) -> None:
        """Tokenize requests of the same tasks and queue their inputs. If this fails, find the request that causes it."""
        try:
            self._queue.put(self._encode(jobs))
        except BaseException as error:  # a panic of a tokenizer is no Exception
            if len(jobs) > 1:
                for job in jobs:
                    self._tokenize([job])
                return
            if not isinstance(error, Draining):
                logger.exception("a request failed before it was queued")
            jobs[0].request.fail(error if isinstance(error, Exception) else RuntimeError(str(error)))
        for job in jobs:
            self._release(job)

    def _encode(self, jobs: Sequence[TokenizeJob]) -> list[Ticket]:
        texts = [text for job in jobs for text in job.texts]
        started = perf_counter()
        encoders = {task.encoder for task in jobs[0].tasks}  # tasks with equal tokenizers have the same one
        encoded = {encoder: encoder.encode_many(texts, jobs[0].truncate) for encoder in encoders}
        seconds = (perf_counter() - started) / len(texts)
        tickets: list[Ticket] = []
        first = 0
        for job in jobs:
            last = first + len(job.texts)
            tickets += self._tickets(job, [encoded[task.encoder][first:last] for task in job.tasks], seconds)
            first = last
        return tickets

    @staticmethod
    def _tickets(job: TokenizeJob, found: Sequence[Sequence[Encoded | TextError]], seconds: float) -> list[Ticket]:
        """The tickets of a request, task by task; none if one of its texts has an error, which fails the request.

        Args:
            job: the request.
            found: for each of its tasks, the result for each text.
            seconds: time of tokenization per text.
        """
        tickets: list[Ticket] = []
        slots = iter(job.request.slots())
        for task, results in zip(job.tasks, found):
            for one in results:
                if isinstance(one, TextError):
                    job.request.fail(one if len(job.tasks) == 1 else type(one)(f"task {task.name!r}: {one}"))
                    return []
                tickets.append(
                    Ticket(task, one.tokens, job.cap, job.priority, job.deadline, one.truncated, seconds, next(slots))
                )
        if len(job.tasks) > 1:
            for text in range(len(job.texts)):
                _join(tickets[text :: len(job.texts)])
        job.request.tickets = tickets
        return tickets


def _join(tickets: Sequence[Ticket]) -> None:
    """Let the tickets of one text know those of other tasks with the same tokens."""
    known: list[list[Ticket]] = []
    for ticket in tickets:
        same = next((others for others in known if others[0].tokens == ticket.tokens), None)
        if same is None:
            known.append([ticket])
        else:
            ticket.tokens = same[0].tokens
            same.append(ticket)
    for same in known:
        if len(same) > 1:
            for ticket in same:
                ticket.joint = same
