"""What the frozen backbone says of each input alone, computed online or read from a store."""

from revmux.features.base import FeatureBatch, Features
from revmux.features.cache_cli import StoreInfo, list_stores, remove_stores
from revmux.features.config import StoreConfig
from revmux.features.key import backbone_digest
from revmux.features.online import OnlineFeatures
from revmux.features.precision import Precision, measure_precision
from revmux.features.store import FeatureStore, NotSeenError, StoreBuilder, open_features
from revmux.features.writer import FeaturePass

__all__ = [
    "FeatureBatch",
    "FeaturePass",
    "FeatureStore",
    "Features",
    "NotSeenError",
    "OnlineFeatures",
    "Precision",
    "StoreBuilder",
    "StoreConfig",
    "StoreInfo",
    "backbone_digest",
    "list_stores",
    "measure_precision",
    "open_features",
    "remove_stores",
]
