"""One worker: classifies units, and overlaps reading, the device and writing of different units."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from revmux.bulk.audit import choose_rows, position_hash
from revmux.bulk.formats import Rows, format_of
from revmux.bulk.job import Job
from revmux.bulk.location import open_source
from revmux.bulk.output import OutputFolder, UnitRecord, describe_answer, part_name
from revmux.bulk.score import NOT_FINITE, Answers, classify_tokens
from revmux.bulk.texts import Tokenizer, Tokens, find_problems
from revmux.bulk.units import Unit
from revmux.errors import UserError
from revmux.fallback import confidence
from revmux.labels import best_labels
from revmux.serving.task import Task

UNITS_IN_FLIGHT = 3
"""Units that a worker holds at once: one is read, one is on the device, one is written."""
BINS = 20
"""Intervals of the confidence histogram."""
_SAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Prepared:
    """A unit that was read and tokenized.

    Attributes:
        unit: the unit.
        rows: its rows.
        problems: by row, why it cannot be classified, or None.
        good: rows that can be classified.
        tokens: their tokens.
        truncated: number of truncated inputs.
        hashes: a hash of every row, for samples.
    """

    unit: Unit
    rows: Rows
    problems: list[str | None]
    good: list[int]
    tokens: Tokens
    truncated: int
    hashes: list[int]


@dataclass(frozen=True)
class Finished:
    """A finished unit.

    Attributes:
        number: its number.
        record: what it reports.
        device_seconds: time that the model ran.
    """

    number: int
    record: UnitRecord
    device_seconds: float


class Worker:
    """Classifies units. Call :meth:`run` from several threads: each step is done for one unit at a time, so that the
    steps of different units overlap.

    Args:
        job: the job.
        device: where the model runs.
        threads: number of CPU threads of the model; None is the number that PyTorch uses in the thread that calls the
            constructor.

    Raises:
        UserError: the model cannot be loaded or does not fit the input.
    """

    def __init__(self, job: Job, device: str, threads: int | None = None) -> None:
        self.job = job
        self.threads = threads or torch.get_num_threads()  # a new thread would start with OpenMP's own default
        self.task: Task = job.system.load(device)
        _check_pairs(self.task, job.columns.pair is not None)
        self._tokenizer = Tokenizer(self.task.pretrained, self.task.max_length)
        self._source = open_source(job.input)[0].filesystem
        self._output = OutputFolder(job.output)
        self._reading, self._device, self._writing = threading.Lock(), threading.Lock(), threading.Lock()

    def run(self, unit: Unit) -> Finished:
        """Classify a unit, and write its part and its record.

        Raises:
            UserError: the file changed, or the output cannot be written.
        """
        with self._reading:
            prepared = self._prepare(unit)
        with self._device:
            torch.set_num_threads(self.threads)
            answers = classify_tokens(self.task, prepared.tokens, self.job.system.max_batch_tokens)
            audited, plain = self._audit(prepared, answers)
        with self._writing:
            record = self._write(prepared, answers, audited, plain)
        seconds = answers.device_seconds + (0.0 if plain is None else plain.device_seconds)
        return Finished(unit.number, record, seconds)

    def _prepare(self, unit: Unit) -> Prepared:
        rows = format_of(unit.file).read(self._source, unit.file, unit.part, self.job.columns)
        if len(rows.texts) != unit.rows or (rows.kept.num_columns and len(rows.kept) != unit.rows):
            raise UserError(
                f"{unit.file!r} has {len(rows.texts)} rows where it had {unit.rows} when the job started; start again with "
                "another output"
            )
        problems = find_problems(rows)
        good = [row for row, problem in enumerate(problems) if problem is None]
        pairs = None if rows.pairs is None else [rows.pairs[row] for row in good]
        tokens, truncated = self._tokenizer.encode([rows.texts[row] for row in good], pairs)
        hashes = [position_hash(unit, row) for row in range(unit.rows)]
        return Prepared(unit, rows, problems, good, tokens, truncated, hashes)

    def _audit(self, prepared: Prepared, answers: Answers) -> tuple[list[int], Answers | None]:
        """The audited inputs, and the plain model's answers to those that have none yet."""
        if not self.job.audit:
            return [], None
        hashes = [prepared.hashes[row] for row in prepared.good]
        finite = [index for index, ok in enumerate(answers.finite) if ok]
        audited = choose_rows(hashes, self.job.audit, finite)
        others = [index for index in audited if not answers.is_plain(index)]
        if not others:
            return audited, None
        return audited, classify_tokens(
            self.task, prepared.tokens.take(others), self.job.system.max_batch_tokens, plain=True
        )

    def _write(self, prepared: Prepared, answers: Answers, audited: list[int], plain: Answers | None) -> UnitRecord:
        unit, names = prepared.unit, self.task.label_names
        problems = list(prepared.problems)
        for row, finite in zip(prepared.good, answers.finite, strict=True):
            problems[row] = None if finite else NOT_FINITE
        scores = apply_function(answers.scores, self.job.function)  # (M, C)
        best = scores.argmax(dim=1) if len(names) > 1 else torch.zeros(len(scores), dtype=torch.long)
        index = np.full(unit.rows, -1)
        index[prepared.good] = np.arange(len(prepared.good))
        index[[problem is not None for problem in problems]] = -1  # inputs without finite scores
        answered = [int(one) for one in index]

        def column(values: list[Any], kind: pa.DataType) -> pa.Array:
            return pa.array([None if one < 0 else values[one] for one in answered], kind)

        labels = [names[one] for one in best.tolist()]
        chosen = scores.gather(1, best[:, None]).squeeze(1).tolist() if len(scores) else []
        stages, methods = answers.stages, answers.methods
        widths = [1 if stage == 0 else width for stage, width in zip(stages, answers.widths)]
        added = {
            "label": column(labels, pa.string()),
            "score": column(chosen, pa.float32()),
            "scores": column(scores.tolist(), pa.list_(pa.float32())) if self.job.all_scores else None,
            "width": column(answers.widths, pa.int16()),
            "method": column(methods, pa.string()),
            "stage": column(stages, pa.int8()),
            "fell_back": column(answers.fell_back, pa.bool_()),
            "error": pa.array(problems, pa.string()),
        }
        kept = {name: prepared.rows.kept[name].combine_chunks() for name in self.job.columns.kept}
        added = {self.job.column_prefix + name: values for name, values in added.items() if values is not None}
        table = pa.table(kept | added, metadata={"revmux.labels": json.dumps(names, ensure_ascii=False)})
        name = part_name(unit, self.job.key)
        size, sha256 = self._output.write_part(name, table)
        used = [one for one in answered if one >= 0]
        histogram, _ = np.histogram(confidence(answers.scores[used]).numpy(), BINS, (0.0, 1.0))
        by = Counter(
            describe_answer(stages[one], "siso" if stages[one] == 0 else methods[one], widths[one]) for one in used
        )
        record = UnitRecord(
            part=name,
            rows=table.num_rows,
            bytes=size,
            sha256=sha256,
            errors=sum(problem is not None for problem in problems),
            truncated=prepared.truncated,
            labels=dict(sorted(Counter(labels[one] for one in used).items())),
            confidence=histogram.tolist(),
            answered_by=dict(sorted(by.items())),
            cost=answers.cost,
            audited=len(audited),
            agreed=_agreed(answers, audited, plain),
            sample=self._sample(prepared, problems, answered, labels, chosen),
            audit_cost=0.0 if plain is None else plain.cost,
        )
        self._output.write_record(unit, self.job.key, record)
        return record

    def _sample(
        self,
        prepared: Prepared,
        problems: list[str | None],
        answered: list[int],
        labels: list[str],
        scores: list[float],
    ) -> list[dict[str, Any]]:
        sample = []
        for row in choose_rows(prepared.hashes, self.job.sample_share, list(range(len(problems)))):
            parts = [prepared.rows.texts[row], *([] if prepared.rows.pairs is None else [prepared.rows.pairs[row]])]
            text = " | ".join("" if part is None else str(part)[:_SAMPLE_CHARACTERS] for part in parts)
            one = answered[row]
            sample.append(
                {
                    "hash": prepared.hashes[row],
                    "text": text.encode("utf-8", "replace").decode(),
                    "label": labels[one] if one >= 0 else None,
                    "score": round(scores[one], 4) if one >= 0 else None,
                    "error": problems[row],
                }
            )
        return sample


def _check_pairs(task: Task, pairs: bool) -> None:
    """Check that the model can classify the input's texts, or pairs of texts.

    Raises:
        UserError: it cannot.
    """
    task.encoder.encode(("ok", "ok") if pairs else "ok", truncate=True)
    recorded = [task.pretrained.pairs, *(adapter.config.pairs for adapter in task.lineup.adapters)]
    if True in recorded and not pairs:
        raise UserError("the model was trained on pairs of texts; name the column of the second text: --pair_column")


def apply_function(scores: Tensor, function: str | None) -> Tensor:
    """Convert scores (M, C) as :func:`revmux.labels.rank_labels` does for one input."""
    function = function or ("sigmoid" if scores.shape[-1] == 1 else "softmax")
    if function == "none":
        return scores
    return scores.softmax(-1) if function == "softmax" else scores.sigmoid()


def _agreed(answers: Answers, audited: list[int], plain: Answers | None) -> int:
    """Number of audited inputs with the plain model's label."""
    others = [index for index in audited if not answers.is_plain(index)]
    if plain is None:
        return len(audited)
    same = best_labels(answers.scores[others]) == best_labels(plain.scores)
    return len(audited) - len(others) + int(same.sum())
