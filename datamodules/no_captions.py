"""Data module without pairs, for ``validate`` runs that only run callbacks."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset


class _Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoCaptions(LightningDataModule):
    """No pairs: ``lit-clip validate`` then only runs callbacks, such as ZeroShot, Retrieval and LinearProbe."""

    def val_dataloader(self) -> DataLoader[Any]:
        # Iterable: without a known length Lightning runs an empty epoch with all its hooks instead of skipping it.
        return DataLoader(_Empty())
