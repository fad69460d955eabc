"""Keep the frozen backbone of a run in memory for the next run of the same process, as the trials of a sweep need it."""

from __future__ import annotations

from revmux.pretrained.pretrained import Pretrained

_kept: dict[str, tuple[Pretrained, str]] = {}
"""At most one backbone with its digest: a second one could exceed the memory of a GPU."""


def take_backbone(key: str) -> tuple[Pretrained, str] | None:
    """Remove the kept backbone, and return it with its digest if it has this key. The caller may then change it."""
    found = _kept.pop(key, None)
    _kept.clear()
    return found


def keep_backbone(key: str, pretrained: Pretrained, digest: str) -> None:
    """Keep a backbone that nothing will change.

    Args:
        key: everything that determines the backbone: its settings, its classes and its device.
        pretrained: frozen.
        digest: its :func:`revmux.features.key.backbone_digest`.
    """
    _kept.clear()
    _kept[key] = (pretrained, digest)
