"""Texts to tokens, in many threads at once, each text by itself."""

from __future__ import annotations
