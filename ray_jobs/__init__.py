"""Thin Ray jobs around revmux: each is a command, and a function of one typed configuration."""

from revmux.utils.collection import collect_rarely

collect_rarely()
