"""Nothing to train on: for ``validate`` runs that are about the callbacks."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lit_clip.models.config import Preprocessing


class _Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoCaptions(LightningDataModule):
    """No pairs: ``lit-clip validate`` then runs the zero-shot callback and nothing else.

    Args:
        preprocessing: not used; every data module is told the model's.
        tokenize: not used, likewise.
    """

    def __init__(self, preprocessing: Preprocessing | None = None, tokenize: Any = None) -> None:
        super().__init__()

    def val_dataloader(self) -> DataLoader[Any]:
        # Iterable: its length is unknown, so Lightning runs an (empty) epoch with all its hooks instead of skipping it.
        return DataLoader(_Nothing())
