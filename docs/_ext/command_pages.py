"""One page per command, made from the command's own ``--help`` when the documentation is built."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from ray_jobs import console

COLUMNS = "110"


def help_of(command: list[str]) -> str:
    """What ``revmux COMMAND --help`` prints.

    Raises:
        ExtensionError: the command ends with another status than 0.
    """
    printed, status = io.StringIO(), 0
    with mock.patch.dict(os.environ, {"COLUMNS": COLUMNS, "NO_COLOR": "1"}), contextlib.redirect_stdout(printed):
        try:
            status = console.main([*command, "--help"])
        except SystemExit as end:
            status = int(end.code or 0)
    if status:
        raise ExtensionError(f"revmux {' '.join(command)} --help ends with status {status}")
    return printed.getvalue().rstrip()


def write_pages(app: Sphinx) -> None:
    """Write ``commands/NAME.md`` for each command and an index of them; touch only pages that change."""
    folder = Path(app.srcdir) / "commands"
    folder.mkdir(exist_ok=True)
    names = [name for commands in console.COMMANDS.values() for name in commands]
    pages = {name: f"# `revmux {name}`\n\n```text\n{help_of([name])}\n```\n" for name in names}
    pages["index"] = "\n".join(
        ["# Commands\n", "```text", help_of([]), "```\n", "```{toctree}", ":hidden:\n", *names, "```\n"]
    )
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for documents."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
