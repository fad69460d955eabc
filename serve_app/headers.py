"""The headers of a reply: how its inputs were computed, and how long each step took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from revmux.pretrained.encoder import Text
from revmux.serving import Answer


def reply_headers(
    texts: Sequence[Text], answers: Sequence[Answer], total_seconds: float, device: str
) -> dict[str, str]:
    """Build the headers of a reply.

    The ``x-compute-…`` and ``x-…-time`` headers have the names of text-embeddings-inference. Times are in milliseconds,
    each the longest of all inputs. The ``x-revmux-…`` headers have one value per input, separated by commas. Inputs
    with the same ``x-revmux-group`` were in one group; groups are numbered within the request. The method ``siso`` is
    the plain model, and so is stage 0.

    Args:
        texts: the inputs of a request.
        answers: the answer to each input.
        total_seconds: time since the request arrived.
        device: ``cpu`` or ``gpu``.
    """
    numbers: dict[int, int] = {}
    for answer in answers:
        numbers.setdefault(answer.group, len(numbers) + 1)
    return {
        "x-compute-type": device,
        "x-compute-time": _milliseconds([total_seconds]),
        "x-compute-characters": str(sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)),
        "x-compute-tokens": str(sum(answer.tokens for answer in answers)),
        "x-total-time": _milliseconds([total_seconds]),
        "x-tokenization-time": _milliseconds(answer.tokenize_seconds for answer in answers),
        "x-queue-time": _milliseconds(answer.queue_seconds for answer in answers),
        "x-inference-time": _milliseconds(answer.inference_seconds for answer in answers),
        "x-revmux-width": ",".join(str(answer.width) for answer in answers),
        "x-revmux-method": ",".join(answer.method for answer in answers),
        "x-revmux-stage": ",".join(str(answer.stage) for answer in answers),
        "x-revmux-group": ",".join(str(numbers[answer.group]) for answer in answers),
        "x-revmux-fallback": ",".join(str(answer.fell_back).lower() for answer in answers),
        "x-revmux-truncated": ",".join(str(answer.truncated).lower() for answer in answers),
    }


def _milliseconds(seconds: Iterable[float]) -> str:
    return f"{1000 * max(seconds):.1f}"
