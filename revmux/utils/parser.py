"""The command line parser of every command: plain help, and one line for a mistake."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside each setting, and the example command on its own line."""

    def _expand_help(self, action: Action) -> str:
        return plain_types(super()._expand_help(action))


def plain_types(text: str) -> str:
    """The help of a setting with its type in words: ``int ≥ 1`` for ``Annotated[int, Ge(ge=1)]``."""

    def bounded(found: re.Match[str]) -> str:
        bounds = re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([^)]*)\)", found.group(2))
        signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
        return " ".join([found.group(1), " and ".join(f"{signs[kind]} {bound}" for kind, bound in bounds)])

    text = re.sub(r"Annotated\[(\w+)(?: \| null)?, ((?:[GL][et]\([^)]*\)(?:, )?)+)\]", bounded, text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found.group(1).replace("'", ""), text)
    text = re.sub(r"Union\[([^\[\]]*)\]", lambda found: " or ".join(found.group(1).split(", ")), text)
    text = re.sub(r"Optional\[(.*)\](?=, default|\))", r"\1 or null", text).replace(" | null", " or null")
    return text.replace("``", "").replace(", default: null)", ")")


class Parser(ArgumentParser):
    """jsonargparse's parser, which answers a mistake with one line on stderr and status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake, with the nearest setting where one is misspelled, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(
            f"error: {one_line(message, parser._option_string_actions)}; see {parser.prog.replace(' [options]', '')} --help\n"
        )
        self.exit(2)


def one_line(message: str, known: Iterable[str] = ()) -> str:
    """A message of jsonargparse on one line, in plain words.

    Args:
        message: as jsonargparse gives it, often over several lines.
        known: the settings that there are, such as ``--optim.epochs``.
    """
    text, options = " ".join(message.split()).rstrip("."), list(known)
    if found := re.match(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
        words = found.group(1).split()
        name = next((word.partition("=")[0] for word in words if word.startswith("-")), words[0])
        return f"unknown setting {name}{did_you_mean(name, options)}"
    if found := re.match(r"the following arguments are required: (.*)", text, re.IGNORECASE):
        names = [f"--{name}" if f"--{name}" in options else name.upper() for name in found.group(1).split(", ")]
        return f"{', '.join(names)} is required; give a value"
    if found := re.match(r"argument (?:\w+\.)*subcommand: invalid choice: (.+?) \(choose from (.*)\)", text):
        valid = found.group(2).replace("'", "")
        return f"unknown command {found.group(1)}{did_you_mean(found.group(1).strip(chr(39)), valid.split(', '))}; known: {valid}"
    if found := re.match(r'expected "[\w.]+" to be one of \{(.*)\}, but', text):
        return f"no command given; known: {found.group(1).replace(',', ', ')}"
    if found := re.match(r"Parser key \"?'?([\w.]+)'?\"?: ?(.*)", text):
        return _invalid_value(found.group(1), found.group(2))
    return text


def _invalid_value(setting: str, reason: str) -> str:
    """``--optim.epochs is many; valid: a whole number`` of what jsonargparse says of a value's type."""
    value = re.search(r".*(?:Got|Given) value: (.*)", reason)
    kinds = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\])", reason)
    words = [
        _WORDS.get(kind, kind.removeprefix("typing.Literal[").removesuffix("]").replace("'", "")) for kind in kinds
    ]
    # Of a range that pydantic checks.
    words += [bound.strip() for bound in re.findall(r"Input should be ([^\[]*)\[type=", reason)]
    if value is None or not words:
        return f"--{setting}: {reason}"
    return f"--{setting} is {value.group(1)}; valid: {' or '.join(dict.fromkeys(words))}"


_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'list'>": "a list such as [2,4]",
    "<class 'dict'>": "a mapping such as {name: value}",
    "<class 'NoneType'>": "null",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the nearest of the known names, or nothing where none is near.

    A name without its group, such as ``--epochs`` for ``--optim.epochs``, counts as near.
    """
    options = list(known)
    same_end = [option for option in options if option.endswith("." + name.lstrip("-"))]
    near = same_end or difflib.get_close_matches(name, options, n=3, cutoff=0.75)
    return f"; did you mean {' or '.join(near)}?" if near else ""
