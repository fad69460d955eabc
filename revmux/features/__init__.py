"""What the frozen backbone says of each input alone, computed online or read from a store."""

from revmux.features.base import FeatureBatch, Features
from revmux.features.online import OnlineFeatures

__all__ = ["FeatureBatch", "Features", "OnlineFeatures"]
