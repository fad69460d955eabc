"""One backbone, its adapters, and one thread that owns the device.

Requests are tokenized and checked before they are queued. Whenever the model is free it takes all that waits,
chooses the group width from it, and answers::

    texts ─ encode ─ queue ─ take ─ groups ─ passes ─ (plain | prefill ─ multiplex ─ upper ─ answer) ─ futures
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from revmux.backbone import TokenBatch
from revmux.errors import UserError
from revmux.model import gather_rows
from revmux.pretrained import Pretrained
from revmux.serving.adapters import load_adapters
from revmux.serving.answer import Answer
from revmux.serving.errors import Draining, InferenceFailed
from revmux.serving.limits import Limits
from revmux.serving.plan import PLAIN, ForwardPass, Group, choose_width, form_groups, form_passes, useful_routes
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.texts import Encoder, Text

logger = logging.getLogger(__name__)


class Engine:
    """Answers texts with one frozen backbone, plain or in groups.

    Args:
        pretrained: the backbone, on the device where it is to run; the engine owns it from here on.
        adapters: adapter folders trained on it, one for each N.
        limits: what may wait and run at once.
        max_length: tokens that an input may have; None is what all adapters were trained with.
        threads: CPU threads of the model; None leaves the process's setting.

    Attributes:
        adapters: those that are loaded.
        routes: the widths that may run, narrowest first.
        label_names: classes in the order of the scores.

    Raises:
        UserError: an adapter that does not fit, two of one N, or limits too small for one group.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        adapters: Sequence[str | Path] = (),
        limits: Limits | None = None,
        max_length: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.pretrained = pretrained
        self.backbone = pretrained.backbone.freeze()
        self.label_names = self.backbone.label_names
        self.limits = limits or Limits()
        self.threads = threads
        self.adapters = load_adapters(adapters, pretrained, self.limits.max_multiplex)
        self.routes = useful_routes([adapter.route for adapter in self.adapters])
        self._models = {adapter.route.width: adapter.model for adapter in self.adapters}
        self._stems = {route.width: route.stem for route in self.routes}
        self.max_length = self._checked_length(max_length)
        self._encoder = Encoder(pretrained.tokenizer, self.max_length)
        self._padder = copy.deepcopy(pretrained.tokenizer)
        self._queue = PullQueue(self.limits.max_queue)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="revmux-tokenize")
        self._worker = threading.Thread(target=self._work, name="revmux-model", daemon=True)
        self._probe_tokens = self._encoder.encode("ok", truncate=True).tokens
        self._probe: Future[Answer] | None = None
        self._probe_lock = threading.Lock()
        self._inputs: Counter[int] = Counter()
        self._groups: Counter[int] = Counter()
        self._failed = 0
        for adapter in self.adapters:
            if adapter.route not in self.routes:
                logger.warning(
                    "adapter %s (N = %d) costs an input more than a narrower group does and is never used",
                    adapter.folder,
                    adapter.route.width,
                )

    def _checked_length(self, max_length: int | None) -> int:
        added = max((model.method.added_tokens for model in self._models.values()), default=0)
        most = self.backbone.max_length - added
        if max_length is None:
            max_length = min([adapter.config.max_length for adapter in self.adapters] + [most])
        if not 2 <= max_length <= most:
            raise UserError(f"max_length is {max_length}; this backbone with these adapters takes 2..{most}")
        widest = self.routes[-1].width
        if widest > self.limits.max_batch or widest * max_length > self.limits.max_batch_tokens:
            raise UserError(
                f"one group of {widest} inputs of {max_length} tokens exceeds max_batch ({self.limits.max_batch}) or "
                f"max_batch_tokens ({self.limits.max_batch_tokens}); raise these, or lower max_multiplex or max_length"
            )
        return max_length

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
        return self._worker.is_alive()

    def submit(
        self, texts: Sequence[Text], truncate: bool = False, max_multiplex: int | None = None
    ) -> list[Future[Answer]]:
        """Tokenize in this thread and queue all texts, or none.

        Args:
            texts: strings, or pairs of strings.
            truncate: cut texts to ``max_length`` tokens; otherwise longer ones are refused.
            max_multiplex: widest group that these texts may ride in; 1 is the plain model.

        Returns:
            A future an input; cancelling one that still waits takes it out of the queue.

        Raises:
            TextError: a text that cannot be classified; none of them is queued.
            Overloaded: no room for all of them.
            Draining: :meth:`close` was called.
        """
        self._queue.check_room(len(texts))
        tickets = self._tickets(texts, truncate, max_multiplex)
        self._queue.put(tickets)
        return [ticket.future for ticket in tickets]

    def _tickets(self, texts: Sequence[Text], truncate: bool, max_multiplex: int | None) -> list[Ticket]:
        cap = self.routes[-1].width if max_multiplex is None else max_multiplex
        if cap < 1:
            raise UserError(f"max_multiplex is {cap}; choose 1 (the plain model) or more")
        encoded = [self._encoder.encode(text, truncate) for text in texts]
        return [Ticket(item.tokens, cap, item.truncated) for item in encoded]

    async def answer(
        self, texts: Sequence[Text], truncate: bool = False, max_multiplex: int | None = None
    ) -> list[Answer]:
        """:meth:`submit` from an event loop, which is never blocked; cancelling the call cancels its texts.

        Raises:
            InferenceFailed: the model failed on one of them; and as :meth:`submit`.
        """
        self._queue.check_room(len(texts))
        tokenize = asyncio.get_running_loop().run_in_executor(self._pool, self._tickets, texts, truncate, max_multiplex)
        tickets = await tokenize
        self._queue.put(tickets)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets)))
        except BaseException:
            for ticket in tickets:
                ticket.future.cancel()
            raise

    def probe(self) -> Future[Answer]:
        """Ask the model one short text, ahead of the queue; questions at the same time share one answer.

        Raises:
            Draining: :meth:`close` was called.
        """
        with self._probe_lock:
            if self._probe is None or self._probe.done():
                ticket = Ticket(self._probe_tokens, cap=1)
                self._queue.put([ticket], ahead=True)
                self._probe = ticket.future
            return self._probe

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``inputs`` and ``groups`` (executions) by width, and what never ran."""
        return {
            "waiting": len(self._queue),
            "inputs": dict(self._inputs),
            "groups": dict(self._groups),
            "failed": self._failed,
            "rejected": self._queue.rejected,
            "cancelled": self._queue.dropped,
        }

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

    def _work(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        limits = self.limits
        with torch.inference_mode():
            while (taken := self._queue.take(limits.max_batch, limits.max_batch_tokens)) is not None:
                tickets, waiting = taken
                try:
                    passes = self._plan(tickets, waiting)
                except Exception as error:
                    self._fail(tickets, error)
                    continue
                for forward in passes:
                    self._run(forward, tickets)

    def _plan(self, tickets: Sequence[Ticket], waiting: int) -> list[ForwardPass]:
        width = choose_width(waiting, self.routes, self.limits.plain_load)
        lengths = [ticket.length for ticket in tickets]
        groups = form_groups(lengths, [ticket.cap for ticket in tickets], width, self.routes)
        return form_passes(groups, lengths, self._stems, self.limits.max_batch_tokens)

    def _run(self, forward: ForwardPass, tickets: Sequence[Ticket]) -> None:
        started = perf_counter()
        rows = [tickets[index] for group in forward.groups for index in group.members]
        try:
            scores = self._scores(forward, rows)  # (R, C)
            if not bool(scores.isfinite().all()):
                raise ArithmeticError("scores are not finite")
        except Exception as error:
            self._fail(rows, error)
            return
        seconds = perf_counter() - started
        widths = [group.width for group in forward.groups for _ in group.members]
        self._inputs.update(widths)
        self._groups.update(group.width for group in forward.groups)
        for ticket, width, own in zip(rows, widths, scores):
            ticket.future.set_result(Answer(own, width, started - ticket.queued, seconds, ticket.truncated))

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        logger.error("a batch of %d inputs failed", len(tickets), exc_info=error)
        self._failed += len(tickets)
        for ticket in tickets:
            failure = InferenceFailed(f"the model failed on this batch: {type(error).__name__}: {error}")
            failure.__cause__ = error
            ticket.future.set_exception(failure)

    def _scores(self, forward: ForwardPass, rows: Sequence[Ticket]) -> Tensor:
        """The label scores of one forward pass, (R, C) float32 on the CPU, in the order of its groups' members."""
        tokens = self._pad(rows)  # (R, S) each
        if forward.stem == PLAIN.stem:
            return self.backbone(tokens).float().cpu()
        by_width: dict[int, list[tuple[int, Group]]] = {}
        start = 0
        for group in forward.groups:
            by_width.setdefault(group.width, []).append((start, group))
            start += len(group.members)
        scores = torch.zeros(len(rows), len(self.label_names), device=self.backbone.device)
        prefilled = None
        for width, starts in by_width.items():
            model = self._models[width]
            slots = torch.stack([slot_rows(first, group) for first, group in starts]).to(self.backbone.device)  # (G, N)
            if model.method.prepares_tokens:
                output = model.run_tokens(tokens, slots)
            else:
                prefilled = model.prefill(tokens) if prefilled is None else prefilled
                output = model.run_groups(prefilled, slots)
            # Zero for the rows of other widths, and the mean for a row that fills several slots.
            scores += gather_rows(output.scores, slots, len(rows)).float()
        return scores.cpu()

    def _pad(self, rows: Sequence[Ticket]) -> TokenBatch:
        columns = {name: [ticket.tokens[name] for ticket in rows] for name in rows[0].tokens}
        padded = self._padder.pad(columns, return_tensors="pt")
        return {name: tensor.to(self.backbone.device) for name, tensor in padded.items()}


def slot_rows(first: int, group: Group) -> Tensor:
    """The rows in the N slots of a group whose members lie at ``first`` and after it; members repeat to fill it."""
    return first + torch.arange(group.width) % len(group.members)
