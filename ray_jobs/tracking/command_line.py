"""The command that started this process, in a form that the user can run again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from revmux.utils.redact import without_passwords


def command_line() -> str:
    """Interpreter, module or script, and arguments; passwords in URIs are removed because MLflow records it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif Path(sys.argv[0]).name == "revmux":  # the console script
        start = ["revmux"]
    else:
        start = ["python", sys.argv[0]]
    return without_passwords(shlex.join([*start, *sys.argv[1:]]))
