"""Data sets on the Hugging Face Hub."""

from __future__ import annotations

from datasets import Dataset, DatasetDict, load_dataset

from revmux.data.config import SENTIMENT, SUFFIXES, DataConfig
from revmux.data.sources.base import SOURCES, Source
from revmux.errors import UserError
from revmux.utils.redact import error_line


@SOURCES.register("hub")
class HubSource(Source):
    """A data set on the hub, with ``--data.subset`` as its configuration."""

    is_last_resort = True

    def claims(self, source: str) -> bool:
        """True for every name."""
        return True

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits of the data set, under their names on the hub."""
        try:
            loaded = load_dataset(config.source, config.subset)
        except Exception as error:
            raise UserError(
                f"unknown data {config.source!r} ({type(error).__name__}: {error_line(error)}); name "
                f"'{SENTIMENT}', a file ({', '.join(SUFFIXES)}), a folder with train and dev files, or a hub data set"
            ) from None
        return (
            {str(name): split for name, split in loaded.items()} if isinstance(loaded, DatasetDict) else {"all": loaded}
        )

    def name(self, config: DataConfig) -> str:
        """The id of the data set, with the subset."""
        return "/".join(filter(None, [config.source, config.subset]))
