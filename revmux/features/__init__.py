"""What the frozen backbone says of each input alone, computed online or read from a store."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from revmux.features.base import FeatureBatch, Features
    from revmux.features.cache_cli import StoreInfo, list_stores, remove_stores
    from revmux.features.config import StoreConfig
    from revmux.features.key import backbone_digest
    from revmux.features.online import OnlineFeatures
    from revmux.features.precision import Precision, measure_precision
    from revmux.features.store import FeatureStore, NotSeenError, StoreBuilder, open_features
    from revmux.features.writer import FeaturePass
else:
    from revmux.utils.lazy import lazy_attributes

    __getattr__ = lazy_attributes(
        __name__,
        {
            "revmux.features.base": ["FeatureBatch", "Features"],
            "revmux.features.cache_cli": ["StoreInfo", "list_stores", "remove_stores"],
            "revmux.features.config": ["StoreConfig"],
            "revmux.features.key": ["backbone_digest"],
            "revmux.features.online": ["OnlineFeatures"],
            "revmux.features.precision": ["Precision", "measure_precision"],
            "revmux.features.store": ["FeatureStore", "NotSeenError", "StoreBuilder", "open_features"],
            "revmux.features.writer": ["FeaturePass"],
        },
    )
