"""The engine: tasks with their adapters, one queue, and one thread that owns the device.

Requests are checked and tokenized before they are queued. Whenever the model is free, its thread looks at the waiting
inputs and chooses the group width by their number. It then runs the forward pass of the input that is next, together
with all inputs that can share this pass::

    texts ─ encode ─ queue ─ window ─ groups ─ pass ─ (plain | prefill ─ multiplex ─ upper ─ answer) ─ futures

Inputs whose answer is unsure go on in the same pass, see :mod:`revmux.ladder`. Inputs of several tasks pass the lowest
layers that these have in common in one batch, and a text that several tasks answer passes them once, see
:mod:`revmux.serving.parts`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter
from typing import Any

from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LoadedAdapter
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, UnknownTask
from revmux.serving.limits import HIGHEST_PRIORITY, WIDEST, Limits
from revmux.serving.metrics import Metrics, PassReport
from revmux.serving.model_thread import ModelThread
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.replies import Delivery, Request
from revmux.serving.shared_weights import WeightPool
from revmux.serving.task import Lineup, Task
from revmux.serving.tokenizing import TokenizeJob, Tokenizers
from revmux.text import Text

logger = logging.getLogger(__name__)


class Engine:
    """Classifies texts with frozen task models, alone or in groups.

    The plain model's answers (method ``siso``) equal those of ``pretrained.backbone.model``, the Hugging Face model, on
    the padded batch of token ids that the engine ran. The scores are equal bit for bit on the same device, with the
    same data type, number of threads and PyTorch build. A text that runs alone is a batch of one. In a batch of another
    shape, the scores of the same text differ by rounding, as they do without this engine.

    Args:
        pretrained: the model of the first task, on the device where it runs. From now on it belongs to the engine.
            None starts without a task.
        adapters: adapter folders trained on this model: one for each N in stage 1, and one for each later stage.
        limits: limits on waiting and running inputs.
        max_length: maximum number of tokens per input; None is the length that all adapters were trained with.
        threads: number of CPU threads of the model; None is the number that PyTorch uses in the calling thread.
        task: name of the first task.
        threshold: see :meth:`add_task`.
        on_pass: called on the model's thread with a report of every pass, after its answers are returned.

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
        self._weights = WeightPool()
        self._metrics = Metrics()
        self._queue = PullQueue(self.limits.max_queue, self._metrics, self.limits.priority_seconds)
        self._tokenizers = Tokenizers(self._queue)
        self._last_delivery: Delivery | None = None
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
        """Start the model's thread, which takes inputs from the queue."""
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._worker.alive

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the model's thread so far."""
        return self._worker.cpu_seconds

    @property
    def silent_seconds(self) -> float:
        """Seconds since a pass last began or ended. A large value means that the model hangs or has had no requests."""
        return self._worker.silent_seconds

    @property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name, in the order in which they were added."""
        return dict(self._tasks)

    def task(self, name: str | None = None) -> Task:
        """Return the task with this name; None is the only task.

        Raises:
            UnknownTask: there is no such task, or there are several and no name is given.
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
        """Add a task. Other tasks are served meanwhile.

        What equals that of an existing task is kept in memory once: weights, see
        :mod:`revmux.serving.shared_weights`, and the tokenizer.

        Args:
            name: name of the task in requests.
            pretrained: the task model, on the device where it runs. From now on it belongs to the engine.
            adapters: adapter folders trained on this model: one for each N in stage 1, and one for each later stage.
            max_length: maximum number of tokens per input; None is the length that all adapters were trained with.
            threshold: confidence below which an input goes on to the next stage or to the plain model, for all
                adapters. None uses each adapter's own threshold, 0 makes all answers final.

        Raises:
            UserError: the name is in use, an adapter does not fit, two adapters have the same N or stage, the stages do
                not form a ladder, an adapter does not support the threshold, or the limits are too small for one group.
        """
        self._check_free(name, self._tasks)
        task = Task(name, pretrained, adapters, self.limits, max_length, threshold)
        self.change([task])
        return task

    @staticmethod
    def _check_free(name: str, tasks: Collection[str]) -> None:
        if name in tasks:
            raise UserError(f"task {name!r} is already served; choose another name, or remove that task first")

    def change(
        self, add: Sequence[Task] = (), lineups: Mapping[str, Lineup] | None = None, remove: Collection[str] = ()
    ) -> None:
        """Add tasks, remove tasks and replace the adapters of others in one step. After an error nothing has changed.

        Args:
            add: loaded tasks, with names that no remaining task has.
            lineups: new line-ups from :meth:`revmux.serving.task.Task.lineup_with`, by name of the remaining task.
            remove: names of the tasks that accept no more requests. Their waiting requests are still answered.

        Raises:
            UserError: a name is in use.
            UnknownTask: there is no such task.
        """
        with self._changing:
            removed = [self.task(name) for name in remove]
            changed = [(self.task(name), lineup) for name, lineup in (lineups or {}).items()]
            others = list(self._tasks.values())
            kept = {name: task for name, task in self._tasks.items() if name not in remove}
            for task in add:
                self._check_free(task.name, kept)
                kept[task.name] = task
            for task in add:
                task.join(others, self._weights)
                others.append(task)
            for task, lineup in changed:
                task.lineup = lineup
            for task in add:
                self._metrics.add(task.name)
            self._tasks = kept
        with self._probe_lock:
            for task in removed:
                self._probes.pop(task, None)
        for task in [*add, *(task for task, _ in changed)]:
            for adapter in task.lineup.adapters:
                _warn_if_unused(task, adapter)

    def remove_task(self, name: str) -> Task:
        """Accept no more requests for a task. Its waiting requests are still answered.

        Raises:
            UnknownTask: there is no such task.
        """
        task = self.task(name)
        self.change(remove=[name])
        return task

    def load(self, folder: str | Path, task: str | None = None) -> LoadedAdapter:
        """Add an adapter, or replace the one with the same N or of the same later stage, without interrupting requests.

        Raises:
            UnknownTask: there is no such task.
            UserError: the adapter does not fit.
        """
        with self._changing:
            resolved = self.task(task)
            adapter = resolved.load(folder)
        _warn_if_unused(resolved, adapter)
        return adapter

    def retire(self, num_inputs: int, task: str | None = None, stage: int = 1) -> LoadedAdapter:
        """Stop using the adapter of a stage with this N. Groups that are already running finish with it.

        Raises:
            UnknownTask: there is no such task.
            UserError: the stage has no adapter with this N, or a later stage needs it.
        """
        with self._changing:
            return self.task(task).retire(num_inputs, stage)

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
        """Tokenize the texts in the calling thread and queue them. After an error none is queued.

        Args:
            texts: strings, or pairs of strings.
            truncate: cut texts to the task's ``max_length`` tokens; otherwise longer texts are refused.
            max_multiplex: widest group that these texts may share; 1 is the plain model, without an exit head.
            task: the task or its name; None is the only task. A :class:`Task` object is used even if it has been
                removed or replaced by another task of the same name.
            priority: -10..10, higher runs earlier, see ``Limits.priority_seconds``.
            timeout: seconds within which the forward pass must start; otherwise the future raises :class:`Expired`.

        Returns:
            One future per input. Cancelling the future of a waiting input removes the input from the queue.

        Raises:
            UnknownTask: there is no such task.
            TextError: a text cannot be classified.
            UserError: another value is out of range.
            Overloaded: the queue has no room for all texts.
            Draining: :meth:`close` was called.
        """
        resolved = task if isinstance(task, Task) else self.task(task)
        deadline = self._check_request(max_multiplex, priority, timeout)
        futures: list[Future[Answer]] = [Future() for _ in texts]
        with self._queue.room(resolved, len(texts)):
            self._metrics.count(resolved.name, "requests")
            tickets = []
            for text, future in zip(texts, futures):
                started = perf_counter()
                encoded = resolved.encoder.encode(text, truncate)
                seconds = perf_counter() - started
                tickets.append(
                    Ticket(
                        resolved, encoded.tokens, max_multiplex, priority, deadline, encoded.truncated, seconds, future
                    )
                )
            self._queue.put(tickets)
        return futures

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
        """Do the same as :meth:`submit` without blocking the event loop. Cancelling the call cancels its texts.

        Raises:
            Expired: the timeout passed before the forward pass started.
            InferenceFailed: the model failed on one of the texts.
            UnknownTask, TextError, UserError, Overloaded, Draining: as in :meth:`submit`.
        """
        resolved = task if isinstance(task, Task) else self.task(task)
        [answers] = await self.answer_tasks(
            texts, [resolved], truncate, max_multiplex, priority=priority, timeout=timeout
        )
        return answers

    async def answer_tasks(
        self,
        texts: Sequence[Text],
        tasks: Sequence[Task | str],
        truncate: bool = False,
        max_multiplex: int | None = None,
        *,
        priority: float = 0,
        timeout: float | None = None,
    ) -> list[list[Answer]]:
        """Answer the same texts with several tasks.

        The texts are tokenized once for all tasks with equal tokenizers. Tasks whose models have their lowest layers in
        common run these layers once per text.

        Args:
            texts: as for :meth:`answer`, and so are the other arguments.
            tasks: different tasks or their names.

        Returns:
            The answers of each task, in the order of ``tasks``.

        Raises:
            UserError: a task is named twice. Other errors are those of :meth:`answer`; an error of one task fails the
                whole call.
        """
        resolved = tuple(task if isinstance(task, Task) else self.task(task) for task in tasks)
        if len({task.name for task in resolved}) < len(resolved):
            twice = Counter(task.name for task in resolved).most_common(1)[0][0]
            raise UserError(f"task {twice!r} is named twice; name each task once")
        deadline = self._check_request(max_multiplex, priority, timeout)
        if not texts or not resolved:
            return [[] for _ in resolved]
        request = Request(self._delivery(), len(resolved) * len(texts))
        self._reserve(resolved, len(texts))
        for task in resolved:
            self._metrics.count(task.name, "requests")
        self._tokenizers.put(TokenizeJob(request, resolved, texts, truncate, max_multiplex, priority, deadline))
        try:
            answers = await request.future
        except BaseException:
            request.cancelled = True
            self._queue.withdraw(request.tickets)
            raise
        return [answers[start : start + len(texts)] for start in range(0, len(answers), len(texts))]

    def _reserve(self, tasks: Sequence[Task], inputs: int) -> None:
        """Reserve room for inputs in the queue of every task, or of none."""
        reserved = 0
        try:
            for task in tasks:
                self._queue.reserve(task, inputs)
                reserved += 1
        finally:
            if reserved < len(tasks):
                for task in tasks[:reserved]:
                    self._queue.release(task, inputs)

    def _delivery(self) -> Delivery:
        """The delivery to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._last_delivery is None or self._last_delivery.loop is not loop:
            self._last_delivery = Delivery(loop)
        return self._last_delivery

    def _check_request(self, max_multiplex: int | None, priority: float, timeout: float | None) -> float | None:
        """Check the options of a request, and return its deadline on the queue's clock."""
        if max_multiplex is not None and not 1 <= max_multiplex <= WIDEST:
            raise UserError(f"max_multiplex is {max_multiplex}; choose 1 (the plain model) or more, at most {WIDEST}")
        if not abs(priority) <= HIGHEST_PRIORITY:  # true for NaN too, which cannot be ordered
            raise UserError(f"priority is {priority}; choose -{HIGHEST_PRIORITY}..{HIGHEST_PRIORITY}, the default is 0")
        if timeout is not None and not timeout > 0:
            raise UserError(f"the timeout is {timeout} s; choose a value above 0, or omit it")
        return None if timeout is None else self._queue.clock() + timeout

    def probe(self, task: str | None = None) -> Future[Answer]:
        """Classify one short text ahead of the queue, as a health check. Concurrent probes of a task share one answer.

        Args:
            task: name of the task; None is the first task.

        Raises:
            UnknownTask: there is no such task.
            Draining: :meth:`close` was called.
        """
        probed = self.task(task or next(iter(self._tasks), None))
        with self._probe_lock:
            self._probes = {other: probe for other, probe in self._probes.items() if not probe.done()}
            if probed not in self._probes:
                future: Future[Answer] = Future()
                self._queue.put([Ticket(probed, probed.probe_tokens, cap=1, future=future)], ahead=True)
                self._probes[probed] = future
            return self._probes[probed]

    def stats(self) -> dict[str, Any]:
        """Return counts since the start: totals, and the counts of each task under ``tasks``.

        ``inputs`` and ``groups`` are counted by width, ``methods`` counts inputs by method, ``ladder`` counts them by
        the stage that answered (0 is the plain model), and ``seconds`` sums time by step. ``waiting`` is the current
        depth of the queue. Inputs that never ran are counted as ``rejected`` (the queue was full), ``expired`` (the
        timeout passed) or ``cancelled`` (by the client).
        """
        snapshot = self._metrics.snapshot()
        depths = self._queue.depths()
        for name, counts in snapshot["tasks"].items():
            counts["waiting"] = depths.get(name, 0)
        return {"waiting": sum(depths.values()), **snapshot}

    def close(self, drain: bool = True) -> None:
        """Refuse new texts, answer the waiting ones, and end the model's thread.

        Args:
            drain: False fails the waiting texts with :class:`Draining`. Texts that are already running are answered.
        """
        self._queue.close()
        if not drain or not self.alive:
            for ticket in self._queue.clear():
                ticket.future.set_exception(Draining("the server shut down before this input ran; use another server"))
        if self.alive:
            self._worker.join()
        self._tokenizers.close()


def _warn_if_unused(task: Task, adapter: LoadedAdapter) -> None:
    if task.lineup.uses(adapter):
        return
    if adapter.config.stage == 1:
        reason = "its cost per input is no lower than that of a narrower adapter or of the plain model"
    else:
        reason = "no adapter of stage 1 that has a threshold is used"
    logger.warning("adapter %s (%s) is never used: %s", adapter.folder, adapter.place, reason)
