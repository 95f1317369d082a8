"""Any source of (image, caption) pairs -> batches."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.augmentation import Augmentation
from datamodules.sampling import EvaluationBatchSampler, GlobalBatchSampler, Sample, StridedSampler
from lit_clip.batch import CaptionBatch
from lit_clip.collectives import rank_and_world
from lit_clip.config import Preprocessing
from lit_clip.errors import InputError, require
from lit_clip.preemption import shield_worker
from lit_clip.preprocess import pixels
from lit_clip.tokenizer import TextTokenizer, Tokenize


class Pair(NamedTuple):
    """An image, a caption, what identifies the image, and the group of pairs that say the same, if there is one."""

    image: Image.Image
    caption: str
    key: str
    group: str = ""


class PairSource(ABC):
    """Numbered pairs."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs."""

    @abstractmethod
    def load(self, index: int, rng: random.Random | None) -> Pair:
        """One pair; where a picture has several captions ``rng`` draws one, and None asks for the first.

        Raises:
            InputError: the picture cannot be read.
        """


class _Item(NamedTuple):
    image: Tensor  # uint8 [3, S, S]
    caption: str
    key: str
    group: str


class TrainingPairs(Dataset[_Item]):
    """Augmented pairs. All randomness comes from (seed, epoch, sample), so it is the same on any worker or rank."""

    def __init__(self, source: PairSource, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> _Item:
        seed = int(np.random.SeedSequence((self.seed, *sample)).generate_state(1, np.uint64)[0] >> 1)
        image, *texts = self.source.load(sample.row, random.Random(seed))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device and log its stack
            return _Item(self.transform(image), *texts)


class ValidationPairs(Dataset[_Item]):
    """Pairs as the evaluation transform and the first caption make them."""

    def __init__(self, source: PairSource, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Item:
        image, *texts = self.source.load(index, None)
        return _Item(self.transform(image), *texts)


class _Collate:
    def __init__(self, tokenize: TextTokenizer) -> None:
        self.tokenize = tokenize

    def __call__(self, items: list[_Item]) -> CaptionBatch:
        captions = [item.caption for item in items]
        tokens = self.tokenize(captions)  # [B, context length]
        images, keys = torch.stack([item.image for item in items]), [item.key for item in items]
        groups = [item.group for item in items]
        return CaptionBatch(images, self.tokenize.trim(tokens), keys, captions, groups if any(groups) else ())


class CaptionDataModule(LightningDataModule, ABC):
    """Batches of a training and a validation source.

    Args:
        batch_size: pairs a step on each rank; the loss sees those of all ranks.
        global_batch_size: pairs a training step on all ranks together, however many they are; ``batch_size`` is then
            that of validation alone. None: ``batch_size`` on each rank.
        num_workers: processes that read and augment.
        seed: of the order and the augmentation.
        augmentation: in training.
        preprocessing: how the model wants its pictures; the command line takes it from the model.
        tokenize: texts -> int64 ``[N, L]``; the command line takes it from the model.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing | None = None,
        tokenize: TextTokenizer | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        require(batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"num_workers: {num_workers} must be at least 0")
        require(seed >= 0, f"seed: {seed} must be at least 0")
        if global_batch_size is not None:
            require(global_batch_size >= 1, f"global_batch_size: {global_batch_size} must be at least 1")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.global_batch_size = global_batch_size
        self.augmentation = augmentation or Augmentation()
        self.preprocessing = preprocessing or Preprocessing()
        self.tokenize = tokenize or Tokenize()
        self.train_source: PairSource | None = None
        self.val_source: PairSource | None = None

    @abstractmethod
    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        """The training source (only wanted if ``fit``) and the validation source."""

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        if trainer and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler: set it to false; the data module divides the samples")
        if self.val_source is None or (stage == "fit" and self.train_source is None):
            self.train_source, self.val_source = self.sources(stage == "fit")

    def _batches(self) -> GlobalBatchSampler:
        assert self.train_source is not None, "call setup('fit') first"
        pairs, wanted, batch_size = len(self.train_source), self.global_batch_size, self.train_batch_size
        if wanted is not None and pairs < wanted:
            world = self._rank_and_world()[1]
            raise InputError(
                f"global_batch_size: {wanted} pairs a step are more than the {pairs} training pairs; "
                f"set it to {pairs // world * world} or less, and the learning rate with it"
            )
        return GlobalBatchSampler(pairs, batch_size, *self._rank_and_world(), self.seed)

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else rank_and_world()

    @property
    def train_batch_size(self) -> int:
        """Pairs a training step on each rank.

        Raises:
            InputError: ``global_batch_size`` is not a multiple of the number of ranks.
        """
        if self.global_batch_size is None:
            return self.batch_size
        world = self._rank_and_world()[1]
        share, left = divmod(self.global_batch_size, world)
        if left:
            near = [pairs for pairs in (share * world, (share + 1) * world) if pairs]
            raise InputError(
                f"global_batch_size: {self.global_batch_size} pairs cannot be shared evenly by {world} processes; "
                f"near it: {' or '.join(map(str, near))}"
            )
        return share

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of an epoch, the same on every rank."""
        return len(self._batches())

    def _loader(self, dataset: Dataset[_Item], **sampling: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=_Collate(self.tokenize),
            worker_init_fn=shield_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else each pass draws a seed from the global generator
            **sampling,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        batches, source = self._batches(), self.train_source
        assert source is not None
        trainer: Any = self.trainer
        if getattr(trainer, "overfit_batches", 0):  # the same batch every time, augmented the same way
            batches.reshuffle = False
        transform = self.augmentation.transform(self.preprocessing)
        return self._loader(TrainingPairs(source, transform, self.seed), batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[Any]:
        source = self.val_source
        assert source is not None, "call setup first"
        batches = EvaluationBatchSampler(len(source), self.batch_size, *self._rank_and_world())
        return self._loader(ValidationPairs(source, pixels(self.preprocessing)), batch_sampler=batches)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        source = self.val_source
        assert source is not None, "call setup first"
        # Lightning makes a loader for prediction anew, and can do that with a sampler only.
        sampler = StridedSampler(len(source), *self._rank_and_world())
        pairs = ValidationPairs(source, pixels(self.preprocessing))
        return self._loader(pairs, sampler=sampler, batch_size=self.batch_size)
