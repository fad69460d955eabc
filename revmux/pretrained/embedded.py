"""What RevMUX brings from packages of the package registry by name: models and example data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from revmux.data.config import SENTIMENT
from revmux.errors import UserError, one_of
from revmux.pretrained.config import EMBEDDED_NAME, EMBEDDED_PACKAGE, SMOLLM2_NAME
from revmux.pretrained.gguf import SMOLLM2, packaged_model
from revmux.pretrained.location import locate
from revmux.utils.source_package import cached_archive

EVERYTHING = "all"


@dataclass(frozen=True)
class Embedded:
    """Something that is found by name and needs no hub.

    Attributes:
        package: its package and version.
        about: what it is, with its licence.
        is_here: whether it can be used without a network.
        bring: bring it, and return where it is.
    """

    package: str
    about: str
    is_here: Callable[[], bool]
    bring: Callable[[], Path]


def _sentences() -> Path:
    from revmux.data.sources.sentiment import archive  # imports datasets

    return archive()


EMBEDDED: dict[str, Embedded] = {
    EMBEDDED_NAME: Embedded(
        f"{EMBEDDED_PACKAGE.replace('_', '-')}==0.1.0",
        "encoder, 6 layers, d = 384 (Apache-2.0); the default backbone",
        lambda: importlib.util.find_spec(EMBEDDED_PACKAGE) is not None,
        lambda: Path(locate(EMBEDDED_NAME)),
    ),
    SMOLLM2_NAME: Embedded(
        f"{SMOLLM2.package}=={SMOLLM2.version}",
        "SmolLM2-135M-Instruct, a LLaMA, 30 layers, d = 576 (Apache-2.0); 93 MB to download, 540 MB on disk",
        SMOLLM2.is_converted,
        lambda: packaged_model(SMOLLM2),
    ),
    SENTIMENT: Embedded(
        "vaderSentiment==3.3.2",
        "the example task: 23,703 sentences that people rated (MIT); 2.5 MB",
        lambda: cached_archive("vaderSentiment", "3.3.2").is_file(),
        _sentences,
    ),
}
"""Everything that is embedded, by name."""


def list_embedded() -> str:
    """A table of everything that is embedded, and whether it is on this machine."""
    lines = [f"{'NAME':<18}  {'LOCAL':<5}  {'PACKAGE':<28}  DESCRIPTION"]
    for name, item in EMBEDDED.items():
        lines.append(f"{name:<18}  {'yes' if item.is_here() else 'no':<5}  {item.package:<28}  {item.about}")
    return "\n".join(lines)


def fetch_embedded(name: str) -> str:
    """Bring something by name, or everything with ``all``. What is here already stays.

    Returns:
        A line per name with its place.

    Raises:
        UserError: an unknown name, or something cannot be brought; with ``all``, the rest is brought first.
    """
    if name not in (*EMBEDDED, EVERYTHING):
        raise one_of("name", name, (*EMBEDDED, EVERYTHING), "choose one of these")
    lines, errors = [], []
    for each in EMBEDDED if name == EVERYTHING else [name]:
        try:
            lines.append(f"{each}: {EMBEDDED[each].bring()}")
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))
    return "\n".join(lines)
