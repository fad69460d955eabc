"""What a method is called in tables, plots and sentences, so that no other code compares its name."""

from __future__ import annotations

from typing import ClassVar


class MethodNaming:
    """The words and marks of a method; a method overrides those that do not suit it.

    Attributes:
        name: the registered name.
        title: heading in tables and legends; the name if empty.
        marks: marker in matplotlib and in plotly.
        is_plain: whether this is the plain model, without adapters.
        fixed_num_inputs: the only N that makes sense, or None.
        exit_option: the option that holds the method's own layer, where prefill and exit are one; None where l is free.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    marks: ClassVar[tuple[str, str]] = ("D", "diamond")
    is_plain: ClassVar[bool] = False
    fixed_num_inputs: ClassVar[int | None] = None
    exit_option: ClassVar[str | None] = None

    @classmethod
    def multiplexes(cls) -> bool:
        """Whether several inputs can share a pass."""
        return cls.fixed_num_inputs != 1

    @classmethod
    def legend(cls) -> str:
        """The method without its settings, in a legend: ``revmux``, ``exit head``."""
        return cls.title or cls.name

    @classmethod
    def point_name(cls, num_inputs: int, prefill_layers: int) -> str:
        """The settings alone, beside a mark that shows the method: ``N=2 l=3``."""
        return f"N={num_inputs} l={prefill_layers}"

    @classmethod
    def system_name(cls, num_inputs: int, prefill_layers: int) -> str:
        """Method and settings in a table: ``revmux N=2 l=3``."""
        return f"{cls.legend()} {cls.point_name(num_inputs, prefill_layers)}"

    @classmethod
    def in_words(cls, num_inputs: int, prefill_layers: int) -> str:
        """Method and settings in a sentence."""
        return f"{cls.legend()} with N = {num_inputs} inputs per pass, each alone through the first {prefill_layers} layers"
