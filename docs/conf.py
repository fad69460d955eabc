"""Sphinx configuration: the guides, one page per command, and the API reference. Run it with ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from revmux.version import __version__  # noqa: E402

project = "RevMUX"
author = "the RevMUX contributors"
copyright = "the RevMUX contributors, Apache-2.0"
version = release = __version__

extensions = [
    "command_pages",
    "repository_pages",
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build", "examples", "api/modules.rst"]
html_theme = "furo"
html_title = f"RevMUX {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": str(ROOT / "revmux"),
        "destination": "api",
        "exclude_patterns": [str(ROOT / "revmux" / "__main__.py")],
        "separate_modules": True,
        "module_first": True,
        "include_private": False,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_default_options = {"ignore-module-all": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = False
