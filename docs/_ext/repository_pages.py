"""README, CONTRIBUTING and CHANGELOG as pages, and links that hold both on GitHub and in the documentation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PAGES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def rebase_links(text: str, folder: Path, docs: Path) -> str:
    """Rewrite the links of a Markdown text for a page at the top of ``docs``.

    Files that are pages become links to the page, other files downloads. A link to a folder becomes plain text, because
    no page shows it. A link to a missing file stays, so that Sphinx reports it.

    Args:
        text: Markdown.
        folder: folder of the file that holds the text.
        docs: folder of the documentation.
    """
    pages = {docs.parent / source: docs / f"{page}.md" for page, source in PAGES.items()}

    def rebased(match: re.Match[str]) -> str:
        label, target, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        if target.is_dir():
            return label
        return f"[{label}]({os.path.relpath(pages.get(target, target), docs)}{anchor})"

    return _LINK.sub(rebased, text)


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the file of the repository in front of its page, and rewrite the links of guides."""
    docs = Path(app.srcdir)
    if page in PAGES:
        path = docs.parent / PAGES[page]
        app.env.note_dependency(str(path))
        source[0] = rebase_links(path.read_text(encoding="utf-8"), path.parent, docs) + "\n" + source[0]
    elif "/" not in page:
        source[0] = rebase_links(source[0], docs, docs)


def setup(app: Sphinx) -> dict[str, Any]:
    """Rewrite pages as Sphinx reads them."""
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True}
