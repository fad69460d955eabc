"""Display names of a method in tables, plots and sentences, so that no other code depends on its registered name."""

from __future__ import annotations

from typing import ClassVar


class MethodNaming:
    """The display names and plot markers of a method. A method overrides the defaults that do not fit.

    Attributes:
        name: the registered name.
        title: name in tables and legends. If empty, ``name`` is used.
        marks: the plot markers in matplotlib and in plotly.
        is_plain: whether this is the plain model, without adapters.
        fixed_num_inputs: the only supported N, or None.
        exit_option: the option that sets the layer of a method whose prefill ends at its exit layer. None if l is
            independent.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    marks: ClassVar[tuple[str, str]] = ("D", "diamond")
    is_plain: ClassVar[bool] = False
    fixed_num_inputs: ClassVar[int | None] = None
    exit_option: ClassVar[str | None] = None

    @classmethod
    def multiplexes(cls) -> bool:
        """Whether several inputs can share a forward pass."""
        return cls.fixed_num_inputs != 1

    @classmethod
    def legend(cls) -> str:
        """The method without its settings, for a legend: ``revmux``, ``exit head``."""
        return cls.title or cls.name

    @classmethod
    def point_name(cls, num_inputs: int, prefill_layers: int) -> str:
        """The settings alone, for a label next to the method's plot marker: ``N=2 l=3``."""
        return f"N={num_inputs} l={prefill_layers}"

    @classmethod
    def system_name(cls, num_inputs: int, prefill_layers: int) -> str:
        """Method and settings, for a table: ``revmux N=2 l=3``."""
        return f"{cls.legend()} {cls.point_name(num_inputs, prefill_layers)}"

    @classmethod
    def describe(cls, num_inputs: int, prefill_layers: int) -> str:
        """Method and settings, as part of a sentence."""
        return f"{cls.legend()} with N = {num_inputs} inputs per pass and a prefill of {prefill_layers} layers"
