"""Tasks with their adapters, one queue, and one thread that owns the device.

Requests are tokenized and checked before they are queued. Whenever the model is free it looks at what waits, chooses
the group width from it, and runs the forward pass of the input whose turn it is, with all that can share it::

    texts ─ encode ─ queue ─ window ─ groups ─ pass ─ (plain | prefill ─ multiplex ─ upper ─ answer) ─ futures
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from revmux.errors import UserError
from revmux.pretrained.encoder import Text
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LoadedAdapter
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, UnknownTask
from revmux.serving.limits import HIGHEST_PRIORITY, Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.model_thread import ModelThread
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.sharing import share_weights
from revmux.serving.task import Lineup, Task

logger = logging.getLogger(__name__)


class Engine:
    """Answers texts with frozen task models, plain or in groups.

    An answer of width 1 from the plain model is exact against one thing: ``pretrained.backbone.model``, the Hugging
    Face model, on the padded batch of token ids that the engine ran. On the same device, with the same data type,
    number of threads and PyTorch build, the scores are equal bit for bit. A text that had a pass to itself is a
    batch of one. The same text in a batch of another shape differs by rounding, as it does without this engine.

    Args:
        pretrained: the model of the first task, on the device where it is to run; the engine owns it from here on.
            None begins without a task.
        adapters: adapter folders trained on it, one for each N.
        limits: what may wait and run at once.
        max_length: tokens that an input may have; None is what all adapters were trained with.
        threads: CPU threads of the model; by default as many as PyTorch uses in the calling thread.
        task: name of the first task.
        threshold: see :meth:`add_task`.
        on_pass: called on the model's thread with a report of every pass, once its answers are given.

    Raises:
        UserError: as :meth:`add_task`.
    """

    def __init__(
        self,
        pretrained: Pretrained | None = None,
        adapters: Sequence[str | Path] = (),
        limits: Limits | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        task: str = "default",
        threshold: float | None = None,
        on_pass: Callable[[PassReport], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.threads = threads
        self._tasks: dict[str, Task] = {}  # replaced as a whole, so that other threads may read it
        self._changing = threading.Lock()
        self._metrics = Metrics()
        self._queue = PullQueue(self.limits.max_queue, self._metrics, self.limits.priority_seconds)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="revmux-tokenize")
        self._worker = ModelThread(self._queue, self._metrics, self.limits, threads, on_pass)
        self._probes: dict[Task, Future[Answer]] = {}
        self._probe_lock = threading.Lock()
        if pretrained is not None:
            self.add_task(task, pretrained, adapters, max_length, threshold)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Let the model take from the queue."""
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._worker.alive

    @property
    def silent_seconds(self) -> float:
        """Since a pass last began or ended: long where the model hangs, or where nobody asked."""
        return self._worker.silent_seconds

    @property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name, in the order in which they came."""
        return dict(self._tasks)

    def task(self, name: str | None = None) -> Task:
        """The task with this name; None is the only task.

        Raises:
            UnknownTask: no such task, or no name where there are several.
        """
        tasks = self._tasks
        if name is None and len(tasks) == 1:
            return next(iter(tasks.values()))
        if name is None or name not in tasks:
            raise UnknownTask(name, tasks)
        return tasks[name]

    def add_task(
        self,
        name: str,
        pretrained: Pretrained,
        adapters: Sequence[str | Path] = (),
        max_length: int | None = None,
        threshold: float | None = None,
    ) -> Task:
        """Serve one more task, also while others are being served.

        Weights that equal those of a task that is there already are kept once, see :mod:`revmux.serving.sharing`.

        Args:
            name: by which requests ask for it.
            pretrained: its task model, on the device where it is to run; the engine owns it from here on.
            adapters: adapter folders trained on it, one for each N.
            max_length: tokens that an input may have; None is what all adapters were trained with.
            threshold: confidence below which an answer falls back to the plain model, for all adapters; None is
                each adapter's own, 0 switches it off.

        Raises:
            UserError: a name that is taken, an adapter that does not fit, two of one N, a threshold that an adapter
                cannot serve, or limits too small for one group.
        """
        self._check_free(name)
        task = Task(name, pretrained, adapters, self.limits, max_length, threshold)
        self.change([task])
        return task

    def _check_free(self, name: str) -> None:
        if name in self._tasks:
            raise UserError(f"task {name!r} is served already; choose another name, or remove that task first")

    def change(
        self, add: Sequence[Task] = (), lineups: Mapping[str, Lineup] | None = None, remove: Collection[str] = ()
    ) -> None:
        """Add tasks, remove tasks, and give others new adapters: all of it at once, or nothing after an error.

        Args:
            add: loaded tasks of other names than those that stay.
            lineups: by name of a task that stays, as :meth:`revmux.serving.task.Task.lineup_with` gives them.
            remove: names of tasks that take no more requests; those that wait are still answered.

        Raises:
            UserError: a name that is taken.
            UnknownTask: no such task.
        """
        with self._changing:
            removed = [self.task(name) for name in remove]
            changed = [(self.task(name), lineup) for name, lineup in (lineups or {}).items()]
            others = [other.backbone for other in self._tasks.values()]
            for task in add:
                self._check_free(task.name)
                share_weights(task.backbone, others)
                others.append(task.backbone)
            for task, lineup in changed:
                task.lineup = lineup
            for task in add:
                self._metrics.add(task.name)
            kept = {name: task for name, task in self._tasks.items() if name not in remove}
            self._tasks = {**kept, **{task.name: task for task in add}}
        with self._probe_lock:
            for task in removed:
                self._probes.pop(task, None)
        for task in [*add, *(task for task, _ in changed)]:
            for adapter in task.lineup.adapters:
                _warn_if_useless(task, adapter)

    def remove_task(self, name: str) -> Task:
        """Take no more requests for a task; those that wait are still answered.

        Raises:
            UnknownTask: no such task.
        """
        task = self.task(name)
        self.change(remove=[name])
        return task

    def load(self, folder: str | Path, task: str | None = None) -> LoadedAdapter:
        """Serve with one more adapter, or with another one of the same N, without a pause.

        Raises:
            UnknownTask: no such task.
            UserError: the adapter does not fit.
        """
        with self._changing:
            own = self.task(task)
            adapter = own.load(folder)
        _warn_if_useless(own, adapter)
        return adapter

    def retire(self, num_inputs: int, task: str | None = None) -> LoadedAdapter:
        """Serve without the adapter of one N from now on; groups in flight finish with it.

        Raises:
            UnknownTask: no such task.
            UserError: it has no such adapter.
        """
        with self._changing:
            return self.task(task).retire(num_inputs)

    def submit(
        self,
        texts: Sequence[Text],
        truncate: bool = False,
        max_multiplex: int | None = None,
        *,
        task: Task | str | None = None,
        priority: float = 0,
        timeout: float | None = None,
    ) -> list[Future[Answer]]:
        """Tokenize in this thread and queue all texts, or none.

        Args:
            texts: strings, or pairs of strings.
            truncate: cut texts to the task's ``max_length`` tokens; otherwise longer ones are refused.
            max_multiplex: widest group that these texts may ride in; 1 is the plain model, no exit head either.
            task: the task or its name; None is the only task. A task that was looked up before answers even if it has
                been removed or another one has taken its name.
            priority: higher comes earlier, -10..10, see ``Limits.priority_seconds``.
            timeout: seconds from now by which the model must have started, else :class:`Expired` is the answer.

        Returns:
            A future an input; cancelling one that still waits takes it out of the queue.

        Raises:
            UnknownTask: no such task.
            TextError: a text that cannot be classified; none of them is queued.
            UserError: another value that is out of range.
            Overloaded: no room for all of them.
            Draining: :meth:`close` was called.
        """
        with self._admit(texts, truncate, max_multiplex, task, priority, timeout) as tokenize:
            tickets = tokenize()
            self._queue.put(tickets)
        return [ticket.future for ticket in tickets]

    async def answer(
        self,
        texts: Sequence[Text],
        truncate: bool = False,
        max_multiplex: int | None = None,
        *,
        task: Task | str | None = None,
        priority: float = 0,
        timeout: float | None = None,
    ) -> list[Answer]:
        """:meth:`submit` from an event loop, which is never blocked; cancelling the call cancels its texts.

        Raises:
            Expired: the deadline passed before the model started.
            InferenceFailed: the model failed on one of them; and as :meth:`submit`.
        """
        with self._admit(texts, truncate, max_multiplex, task, priority, timeout) as tokenize:
            tickets = await asyncio.get_running_loop().run_in_executor(self._pool, tokenize)
            self._queue.put(tickets)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets)))
        except BaseException:
            for ticket in tickets:
                ticket.future.cancel()
            raise

    @contextmanager
    def _admit(
        self,
        texts: Sequence[Text],
        truncate: bool,
        max_multiplex: int | None,
        asked: Task | str | None,
        priority: float,
        timeout: float | None,
    ) -> Iterator[Callable[[], list[Ticket]]]:
        """Check a request, keep room for it, and give what tokenizes it."""
        task = asked if isinstance(asked, Task) else self.task(asked)
        if max_multiplex is not None and max_multiplex < 1:
            raise UserError(f"max_multiplex is {max_multiplex}; choose 1 (the plain model) or more")
        if not abs(priority) <= HIGHEST_PRIORITY:  # NaN too, which has no place in an order
            raise UserError(
                f"priority is {priority}; choose -{HIGHEST_PRIORITY}..{HIGHEST_PRIORITY}, 0 is the usual one"
            )
        if timeout is not None and not timeout > 0:
            raise UserError(f"the timeout is {timeout} s; choose more than 0, or leave it out")
        deadline = None if timeout is None else self._queue.clock() + timeout

        def tokenize() -> list[Ticket]:
            tickets = []
            for text in texts:
                started = perf_counter()
                encoded = task.encoder.encode(text, truncate)
                ticket = Ticket(task, encoded.tokens, max_multiplex, priority, deadline, encoded.truncated)
                ticket.tokenize_seconds = perf_counter() - started
                tickets.append(ticket)
            return tickets

        with self._queue.room(task, len(texts)):
            self._metrics.count(task.name, "requests")
            yield tokenize

    def probe(self, task: str | None = None) -> Future[Answer]:
        """Ask the model one short text, ahead of the queue; questions at the same time share one answer.

        Args:
            task: name; None is the first one.

        Raises:
            UnknownTask: no such task.
            Draining: :meth:`close` was called.
        """
        asked = self.task(task or next(iter(self._tasks), None))
        with self._probe_lock:
            self._probes = {own: probe for own, probe in self._probes.items() if not probe.done()}
            if asked not in self._probes:
                ticket = Ticket(asked, asked.probe_tokens, cap=1)
                self._queue.put([ticket], ahead=True)
                self._probes[asked] = ticket.future
            return self._probes[asked]

    def stats(self) -> dict[str, Any]:
        """Counts since the start, summed, and by task under ``tasks``.

        ``inputs`` and ``groups`` (executions) are counted by width, inputs also by ``methods``, ``seconds`` by stage;
        ``waiting`` is the queue's depth now. ``rejected`` found no room, ``expired`` waited too long, ``cancelled`` were dropped by their
        clients: none of these ran.
        """
        snapshot = self._metrics.snapshot()
        depths = self._queue.depths()
        for name, counts in snapshot["tasks"].items():
            counts["waiting"] = depths.get(name, 0)
        return {"waiting": sum(depths.values()), **snapshot}

    def close(self, drain: bool = True) -> None:
        """Refuse new texts, answer those that wait, and end the thread.

        Args:
            drain: False fails those that wait with :class:`Draining`; what runs is still answered.
        """
        self._queue.close()
        if not drain or not self.alive:
            for ticket in self._queue.clear():
                ticket.future.set_exception(Draining("the server shut down before this input ran; ask another one"))
        if self.alive:
            self._worker.join()
        self._pool.shutdown()


def _warn_if_useless(task: Task, adapter: LoadedAdapter) -> None:
    if adapter.route not in task.lineup.routes:
        logger.warning(
            "adapter %s (N = %d) costs an input no less than a narrower one or the plain model and is never used",
            adapter.folder,
            adapter.route.width,
        )
