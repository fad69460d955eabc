"""Command lines of the jobs: a typed configuration from YAML and flags, and one line for a mistake."""

from __future__ import annotations

import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_NAME, BackboneConfig
from revmux.utils.redact import without_passwords

Config = TypeVar("Config")


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside each setting, and the example command on its own line."""


def parse(config_class: type[Config], description: str | None, argv: Sequence[str] | None = None) -> Config:
    """The configuration from ``--config FILE.yaml`` and flags; flags win.

    Args:
        config_class: a dataclass, whose docstring is the help.
        description: head of ``--help``, the module's docstring.
        argv: command line without the program's name; the process's own by default.
    """
    parser = ArgumentParser(description=(description or "").strip(), formatter_class=HelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with the settings below; flags win over it")
    parser.add_class_arguments(config_class, as_group=True)
    namespace = parser.parse_args(argv)
    del namespace["config"]
    return config_class(**parser.instantiate(namespace).as_dict())


def at_its_place(config: Config) -> Config:
    """A job whose model folder is named from the root: trials and replicas run in folders of their own."""
    backbone = getattr(config, "backbone", None)
    if not isinstance(backbone, BackboneConfig) or backbone.model == EMBEDDED_NAME:
        return config
    folder = Path(backbone.model).expanduser()
    if not folder.is_dir():
        return config
    return replace(config, backbone=replace(backbone, model=str(folder.absolute())))  # type: ignore[type-var]


def run(
    job: Callable[[Any], object], config_class: type, description: str | None, argv: Sequence[str] | None = None
) -> int:
    """Parse and run a job.

    Returns:
        0; 2 for a mistake of the caller's, told in one line; 1 for any other error, with its traceback.
    """
    try:
        job(at_its_place(parse(config_class, description, argv)))
    except UserError as error:
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return 2
    except Exception:  # its message may name the tracking URI
        print(without_passwords(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0
