"""One model is created at a time in a process."""

from __future__ import annotations

import threading

CREATION = threading.RLock()
"""Held while Transformers creates or loads a model.

Meanwhile Transformers replaces methods of its base class (``no_tie_weights``). If two threads load at the same time, the
second one restores the replacement, and from then on no model of the process ties its weights.
"""
