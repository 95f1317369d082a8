"""Read and encode the images of an evaluation set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip import distributed
from lit_clip.embedding.encode import Encoder
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet
from lit_clip.models.preprocess import pixels
from lit_clip.module import LitCLIP
from lit_clip.tools.images import FIX_HINT, Bad, OnError, loader
from lit_clip.tools.workers import shield_worker


class _Item(NamedTuple):
    row: int
    images: Tensor | None  # uint8 [F, 3, S, S]
    reason: str  # for which there are none


class _Items(Dataset[_Item]):
    def __init__(self, images: ImageSet, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> _Item:
        try:
            images = [self.transform(image) for image in self.images.images(index)]
            return _Item(index, torch.stack(images), "")
        except Exception as error:  # decoders answer a broken file with whatever they trip over
            reason = str(error).partition("\n")[0] or type(error).__name__
            ours = isinstance(error, InputError)
            return _Item(index, None, reason if ours else f"{self.images.key(index)}: cannot be read ({reason})")


class Encoded(NamedTuple):
    """Features of a set, the same on every rank.

    Attributes:
        rows: the N images that could be read, ascending.
        features: float32 ``[N, D]`` on the CPU.
    """

    rows: list[int]
    features: Tensor


class Reader:
    """Reads images and encodes them, batch by batch on all ranks: a batch is the same on any number of them.

    Args:
        batch_size: images encoded at once on each rank.
        num_workers: processes that read images.
        on_error: what an image that cannot be read does.
        who: the callback, for messages.
    """

    def __init__(self, batch_size: int, num_workers: int, on_error: OnError, who: str) -> None:
        require(batch_size >= 1, f"{who}.batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"{who}.num_workers: {num_workers} must be at least 0")
        self.batch_size, self.num_workers, self.who = batch_size, num_workers, who
        self.on_error: OnError = on_error
        self._told: set[str] = set()

    def encode(self, module: LitCLIP, images: ImageSet, encode: Callable[[Tensor], Tensor], name: str) -> Encoded:
        """Features of all images of a set; all ranks must ask.

        Args:
            module: whose preprocessing.
            images: of the set.
            encode: normalised ``[B, 3, H, W]`` -> ``[B, D]``.
            name: of the set, for messages.

        Raises:
            InputError: on all ranks, an image that cannot be read unless it may be skipped, or none at all.
        """
        rank, world = distributed.rank_and_world()
        batches = torch.arange(len(images)).split(1 if images.several else self.batch_size)
        loader: Any = DataLoader(
            _Items(images, pixels(module.preprocessing)),
            batch_sampler=[rows.tolist() for rows in batches[rank::world]],
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),  # training's own numbers stay what they are
        )
        rows: list[int] = []
        features: list[Tensor] = []
        bad: list[tuple[int, str]] = []
        for items in loader:
            read = [item for item in items if item.images is not None]
            rows += [item.row for item in read]
            features += self._features(module, [item.images for item in read], encode)
            bad += [(item.row, item.reason) for item in items if item.images is None]
        self._judge(distributed.gather_objects(bad), len(images), name)
        return _gathered(module, rows, features)

    def _features(self, module: LitCLIP, items: list[Tensor], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of each item ``[D]``, the mean of its images."""
        if not items:
            return []
        parts = torch.cat(items).split(self.batch_size)
        features = torch.cat([encode(module.model.normalize(part.to(module.device))).float() for part in parts])
        return [part.mean(dim=0) for part in features.split([len(item) for item in items])]

    def _judge(self, bad: list[tuple[int, str]], size: int, name: str) -> None:
        if not bad:
            return
        _, reason = min(bad)
        require(
            self.on_error == "skip",
            f"{name}: {reason.removesuffix(FIX_HINT)}{FIX_HINT}, or set {self.who}.on_error to skip",
        )
        require(len(bad) < size, f"{name}: none of {size} images could be read; {reason}")
        if name not in self._told:
            self._told.add(name)
            rank_zero_warn(f"{self.who}: {name}: {len(bad)} of {size} images are left out; the first: {reason}")


def _gathered(module: LitCLIP, rows: list[int], features: list[Tensor]) -> Encoded:
    """All ranks' rows in order; a rank that has none learns from the others how wide they are."""
    width = distributed.maximum(len(features[0]) if features else 0)
    mine = torch.stack(features) if features else torch.zeros(0, width, device=module.device)
    all_rows = distributed.gather_uneven(torch.tensor(rows, dtype=torch.long, device=module.device)).cpu()
    order = all_rows.argsort()
    return Encoded(all_rows[order].tolist(), distributed.gather_uneven(mine).cpu()[order])


class _Batch(NamedTuple):
    inputs: Tensor | None  # uint8 [F, 3, H, W]
    counts: list[int]  # images of each row
    rows: list[int]
    bad: list[Bad]


class _SetBatches(Dataset[_Batch]):
    """One item is one batch, decoded and cropped."""

    def __init__(self, images: ImageSet, batches: Sequence[list[int]], transform: Any, stop: Path) -> None:
        self.images, self.batches, self.transform, self.stop = images, batches, transform, stop

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> _Batch:
        images, counts, rows, bad = [], [], [], []
        for row in self.batches[index] if not self.stop.exists() else ():
            try:
                mine = [self.transform(image) for image in self.images.images(row)]
                require(bool(mine), f"{self.images.key(row)}: has no image")
            except Exception as error:  # decoders answer a broken file with whatever they trip over
                reason = str(error).partition("\n")[0] or type(error).__name__
                ours = reason if isinstance(error, InputError) else f"{self.images.key(row)}: cannot be read ({reason})"
                bad.append(Bad(str(row), ours))
                continue
            images += mine
            counts.append(len(mine))
            rows.append(row)
        return _Batch(torch.stack(images) if images else None, counts, rows, bad)


class SetEncoder(Encoder):
    """Both kinds of features side by side, ``[B, W + D]``."""

    def __init__(self, images: ImageSet, batch_size: int, *words: Any) -> None:
        super().__init__(*words)
        self.images, self.batch_size = images, batch_size

    def predict_dataloader(self) -> DataLoader[Any]:
        transform = pixels(self.model.preprocessing)
        batches: Any = _SetBatches(self.images, self.my_batches, transform, self.stop)
        return loader(batches, self.num_workers, pin_memory=self.device.type == "cuda")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch.inputs is None:
            return torch.empty(0, 0)
        features = torch.cat([self._both(images) for images in batch.inputs.split(self.batch_size)])  # [F, W + D]
        if len(batch.rows) == len(features):
            return features
        return torch.stack([part.mean(dim=0) for part in features.split(batch.counts)])

    def _both(self, images: Tensor) -> Tensor:
        before, after = self.model.image_features(self.model.normalize(images))
        return torch.cat([before.float(), torch.nn.functional.normalize(after.float(), dim=1)], dim=1)
