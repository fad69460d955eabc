"""One page per command, made from the command's own ``--help`` when the documentation is built."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

COMMANDS = {
    "revmux": ["revmux"],
    "revmux-cost": ["revmux", "cost"],
    "revmux-memory": ["revmux", "memory"],
    "revmux-methods": ["revmux", "methods"],
    "revmux-cache": ["revmux", "cache"],
    "revmux-push": ["revmux", "push"],
    "finetune": ["ray_jobs.finetune"],
    "features": ["ray_jobs.features"],
    "train": ["ray_jobs.train"],
    "tune": ["ray_jobs.tune"],
    "plan": ["ray_jobs.plan"],
    "evaluate": ["ray_jobs.evaluate"],
    "quickstart": ["ray_jobs.quickstart"],
    "serve": ["serve_app"],
}
COLUMNS = "110"


def help_of(command: list[str]) -> str:
    """What ``python -m COMMAND --help`` prints.

    Runs in this process, so that all commands together import torch and Ray once.

    Raises:
        ExtensionError: the command ends with another status than 0.
    """
    printed = io.StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", [command[0], *command[1:], "--help"]),
            mock.patch.dict(os.environ, {"COLUMNS": COLUMNS, "NO_COLOR": "1"}),
            contextlib.redirect_stdout(printed),
        ):
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (0, None):
            raise ExtensionError(f"python -m {' '.join(command)} --help ends with status {end.code}") from None
    return printed.getvalue().rstrip()


def write_pages(app: Sphinx) -> None:
    """Write ``commands/NAME.md`` for each command and an index of them; touch only pages that change."""
    folder = Path(app.srcdir) / "commands"
    folder.mkdir(exist_ok=True)
    pages = {
        name: f"# `python -m {' '.join(words)}`\n\n```text\n{help_of(words)}\n```\n" for name, words in COMMANDS.items()
    }
    pages["index"] = "\n".join(["# Commands\n", "```{toctree}", *COMMANDS, "```\n"])
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for documents."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
