"""The model card of an adapter folder."""

from __future__ import annotations

from importlib import resources

import jinja2

from revmux.adapters.config import AdapterConfig


def model_card(config: AdapterConfig) -> str:
    """The README.md of an adapter folder."""
    template = resources.files("revmux.adapters").joinpath("model_card.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(config=config)
