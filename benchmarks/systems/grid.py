"""The systems that are compared, as the rows of the paper's tables name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from revmux.methods import ExitHead, method_class
from revmux.training.config import MethodConfig
from revmux.training.recipe import exit_head_config

WIDTHS = (2, 4, 8, 16)
WARMUP = 60  # steps on retrieval alone, for the systems that are published with it


@dataclass(frozen=True)
class System:
    """One line of a table.

    Attributes:
        title: what the page calls it.
        method: registered name.
        options: settings of the method.
        from_embeddings: whether it shares all layers (l = 0) as published; else l is half the layers.
        widths: values of N.
        tuned: whether the backbone moves too.
    """

    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    from_embeddings: bool = False
    widths: tuple[int, ...] = WIDTHS
    tuned: bool = False

    def config(self, num_inputs: int, num_layers: int) -> MethodConfig:
        """The system at one N on a backbone of ``num_layers`` layers."""
        shared_above = 0 if self.from_embeddings else num_layers // 2
        layers = shared_above if self.exit_layer is None else self.exit_layer
        return MethodConfig(self.method, num_inputs, layers, self.options)

    @property
    def exit_layer(self) -> int | None:
        """Layer of an exit head; None for all other systems."""
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
    """The rival of all of them: a trained head at one layer of the frozen backbone."""
    return System(f"Exit head, layer {layer}", ExitHead.name, exit_head_config(layer).options, widths=(1,))
