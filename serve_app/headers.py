"""The headers of a reply: how its inputs were computed, and how long each step took."""

from __future__ import annotations

from collections.abc import Sequence

from revmux.serving import Answer
from revmux.text import Text

MOST_LISTED = 256
"""Answers up to which headers have a value for each. Proxies and clients limit the size of headers."""


def reply_headers(
    texts: Sequence[Text], answers: Sequence[Answer], total_seconds: float, device: str
) -> list[tuple[bytes, bytes]]:
    """Build the headers of a reply, encoded for ASGI.

    The ``x-compute-…`` and ``x-…-time`` headers have the names of text-embeddings-inference. Times are in milliseconds,
    each the longest of all inputs. The ``x-revmux-…`` headers have one value per answer, separated by commas. Answers
    with the same ``x-revmux-group`` were in one group; groups are numbered within the request. The method ``siso`` is
    the plain model, and so is stage 0. A reply with more than :data:`MOST_LISTED` answers does not have these headers.

    Args:
        texts: the inputs of a request.
        answers: the answer to each input, of one task after the other.
        total_seconds: time since the request arrived.
        device: ``cpu`` or ``gpu``.
    """
    total = _milliseconds(total_seconds)
    characters = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
    found = {
        b"x-compute-type": device,
        b"x-compute-time": total,
        b"x-compute-characters": str(characters),
        b"x-compute-tokens": str(sum([answer.tokens for answer in answers])),
        b"x-total-time": total,
        b"x-tokenization-time": _milliseconds(max([answer.tokenize_seconds for answer in answers])),
        b"x-queue-time": _milliseconds(max([answer.queue_seconds for answer in answers])),
        b"x-inference-time": _milliseconds(max([answer.inference_seconds for answer in answers])),
    }
    if len(answers) <= MOST_LISTED:
        found |= _per_answer(answers)
    return [(name, value.encode("latin-1")) for name, value in found.items()]


def _per_answer(answers: Sequence[Answer]) -> dict[bytes, str]:
    numbers: dict[int, int] = {}
    for answer in answers:
        numbers.setdefault(answer.group, len(numbers) + 1)
    return {
        b"x-revmux-width": ",".join([str(answer.width) for answer in answers]),
        b"x-revmux-method": ",".join([answer.method for answer in answers]),
        b"x-revmux-stage": ",".join([str(answer.stage) for answer in answers]),
        b"x-revmux-group": ",".join([str(numbers[answer.group]) for answer in answers]),
        b"x-revmux-fallback": ",".join(["true" if answer.fell_back else "false" for answer in answers]),
        b"x-revmux-truncated": ",".join(["true" if answer.truncated else "false" for answer in answers]),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
