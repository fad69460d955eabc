"""Command lines of the jobs: parse typed settings from YAML and flags, and print a user's mistake on one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_MODELS, BackboneConfig
from revmux.training.recipes import DEFAULT_RECIPE, named_recipe
from revmux.utils.parser import Parser
from revmux.utils.redact import without_passwords
from tune_spaces.space import load_space

Config = TypeVar("Config")


class Unfinished(Exception):
    """A job did all that it could, but its result is not complete. It was reported already.

    Args:
        status: exit status of the command.
        message: one line for the user.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse(
    config_class: type[Config], description: str | None, argv: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """Parse the settings from ``--config FILE.yaml`` and flags; flags override the file.

    Args:
        config_class: a dataclass whose docstring is the help text of its settings.
        description: first part of ``--help``, the module's docstring.
        argv: command line without the program's name; by default that of this process.
        prog: the program's name in messages; by default ``python -m MODULE`` with the module of this process.
    """
    parser = Parser(
        prog=prog or _program(),
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        description=(description or "").strip(),
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below. Flags override it."
    )
    parser.add_class_arguments(config_class, as_group=True)
    namespace = parser.parse_args(argv)
    if "recipe" in namespace and (recipe := _recipe_of(parser, namespace)) != DEFAULT_RECIPE:
        parser.set_defaults({"recipe": recipe} | _recipe_defaults(parser, recipe))
        namespace = parser.parse_args(argv)
        if namespace.recipe != recipe:
            _refuse_recipe(parser, namespace, recipe)
    del namespace["config"]
    return config_class(**parser.instantiate(namespace).as_dict())


def _recipe_of(parser: Parser, namespace: Any) -> str:
    """The named recipe of a job: that of its search space, if the space sets one."""
    given = str(namespace.recipe)
    if "space" not in namespace:
        return given
    try:
        own = load_space(namespace.space).recipe
    except UserError as error:
        parser.error(str(error))
    if own is not None and given not in (DEFAULT_RECIPE, own):
        _refuse_recipe(parser, namespace, own)
    return own or given


def _refuse_recipe(parser: Parser, namespace: Any, own: str) -> None:
    """End the command because its recipe is not that of its space."""
    parser.error(
        f"--recipe is {namespace.recipe!r}, but the space {namespace.space!r} sets the recipe {own!r}; omit --recipe, or "
        "choose another space"
    )


def _recipe_defaults(parser: Parser, name: str) -> dict[str, Any]:
    """The optimizer and loss of a named recipe, by their names on the command line."""
    try:
        recipe = named_recipe(name)
    except UserError as error:
        parser.error(str(error))
    defaults = {"optim": asdict(recipe.optim_config()), "loss": asdict(recipe.loss_config())}
    return {f"{group}.{key}": value for group, settings in defaults.items() for key, value in settings.items()}


def _program() -> str | None:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def with_absolute_model(config: Config) -> Config:
    """Make the path of a local model absolute, since workers run in other working directories."""
    backbone = getattr(config, "backbone", None)
    if not isinstance(backbone, BackboneConfig) or backbone.model in EMBEDDED_MODELS:
        return config
    path = Path(backbone.model).expanduser()
    if not path.exists():
        return config
    return replace(config, backbone=replace(backbone, model=str(path.absolute())))  # type: ignore[type-var]


def run(
    job: Callable[[Any], object],
    config_class: type,
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parse the settings and run a job.

    Args:
        job: called with the settings. It checks them before it imports torch or Ray.
        config_class: see :func:`parse`.
        description: see :func:`parse`.
        argv: see :func:`parse`.
        prog: see :func:`parse`.

    Returns:
        0 on success; 2 after a ``UserError``, which is printed on one line; the status of :class:`Unfinished`, which is
        printed on one line too; 1 after any other error, with its traceback.
    """
    try:
        job(with_absolute_model(parse(config_class, description, argv, prog)))
    except UserError as error:
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return 2
    except Unfinished as error:
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return error.status
    except Exception:  # its message may contain the tracking URI
        print(without_passwords(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0
