"""The compared systems, titled as in the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from revmux.methods import ExitHead, method_class
from revmux.training.config import MethodConfig
from revmux.training.recipe import exit_head_config

WIDTHS = (2, 4, 8, 16)
WARMUP = 60  # steps on the retrieval loss alone, for systems published with a warm-up


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        title: name on the page.
        method: registered name of the method.
        options: options of the method.
        from_embeddings: whether all layers are shared (l = 0), as published; otherwise l is half of the layers.
        widths: values of N.
        tuned: whether the backbone is tuned too.
    """

    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    from_embeddings: bool = False
    widths: tuple[int, ...] = WIDTHS
    tuned: bool = False

    def config(self, num_inputs: int, num_layers: int) -> MethodConfig:
        """Return the method settings at one N on a backbone of ``num_layers`` layers."""
        shared_above = 0 if self.from_embeddings else num_layers // 2
        layers = shared_above if self.exit_layer is None else self.exit_layer
        return MethodConfig(self.method, num_inputs, layers, self.options)

    @property
    def exit_layer(self) -> int | None:
        """Layer of an exit head; None for other systems."""
        option = method_class(self.method).exit_option
        return None if option is None else int(self.options[option])


SYSTEMS = (
    System("Vanilla adapters", "vanilla-adapter"),
    System("Only multiplexer reversible", "only-multiplexer-reversible"),
    System("RevMUX", "revmux"),
    System("RevMUX, tuned", "revmux", {"tune_backbone": True}, tuned=True),
    System("DataMUX, tuned", "datamux", {"warmup_steps": WARMUP}, from_embeddings=True, tuned=True),
    System(
        "MUX-BERT, tuned",
        "mux-plm",
        {"warmup_steps": WARMUP},
        from_embeddings=True,
        widths=(2, 4, 5, 8, 10, 16),
        tuned=True,
    ),
    System("Token split", "token-split"),
)


def exit_head(layer: int) -> System:
    """Return the baseline of all systems: a trained head at one layer of the frozen backbone."""
    return System(f"Exit head, layer {layer}", ExitHead.name, exit_head_config(layer).options, widths=(1,))
