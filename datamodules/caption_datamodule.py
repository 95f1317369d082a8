"""Any source of (image, caption) pairs -> batches."""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.loading.augmentation import Augmentation
from datamodules.loading.bad_samples import OnError, Skipped, SkippingDataset, split_skipped
from datamodules.loading.sampling import (
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Position,
    StridedSampler,
    TrainingSample,
)
from datamodules.pairs.caption_lengths import SAMPLED, LongCaptions, caption_statistics, refuse_long
from datamodules.pairs.source import Pair as Pair
from datamodules.pairs.source import PairSource, Rows
from lit_clip.batch import CaptionBatch
from lit_clip.distributed import rank_and_world
from lit_clip.errors import InputError, require
from lit_clip.models.config import Preprocessing, Size, height_width
from lit_clip.models.preprocess import pixels
from lit_clip.models.tokenizer import TextTokenizer, Tokenize
from lit_clip.tools.images import LeastSize, decoding_at_least
from lit_clip.tools.workers import shield_worker


class _DecodedPair(NamedTuple):
    image: Tensor  # uint8 [3, S, S]
    caption: str
    key: str
    group: str


class TrainingPairs(Dataset[_DecodedPair]):
    """Augmented pairs. All randomness comes from (seed, epoch, sample), so it is the same on any worker or rank.

    Args:
        source: of the pairs.
        transform: of the images.
        seed: of the run.
        least_size: how large an image must be for ``transform``; None: as it is.
    """

    def __init__(
        self,
        source: PairSource,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        least_size: LeastSize | None = None,
    ) -> None:
        self.source, self.transform, self.seed, self.least_size = source, transform, seed, least_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: TrainingSample) -> _DecodedPair:
        seed = int(np.random.SeedSequence((self.seed, *sample)).generate_state(1, np.uint64)[0] >> 1)
        with decoding_at_least(self.least_size):
            image, *texts = self.source.load(sample.row, random.Random(seed))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device and log its stack
            return _DecodedPair(self.transform(image), *texts)


class ValidationPairs(Dataset[_DecodedPair]):
    """Pairs as the evaluation transform and the first caption make them."""

    def __init__(self, source: PairSource, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _DecodedPair:
        image, *texts = self.source.load(index, None)
        return _DecodedPair(self.transform(image), *texts)


class _Collate:
    """Joins what there is of a batch: with every sample skipped, no pairs."""

    def __init__(self, tokenize: TextTokenizer, image_size: Size, refuse_long: bool = False) -> None:
        self.tokenize, self.image_size, self.refuse_long = tokenize, height_width(image_size), refuse_long

    def __call__(self, samples: list[_DecodedPair | Skipped]) -> CaptionBatch:
        items, skipped = split_skipped(samples)
        if not items:
            images = torch.zeros(0, 3, *self.image_size, dtype=torch.uint8)
            return CaptionBatch(images, torch.zeros(0, 1, dtype=torch.long), [], skipped=skipped)
        captions = [item.caption for item in items]
        if self.refuse_long:
            refuse_long(captions, [item.key for item in items], self.tokenize)
        tokens = self.tokenize(captions)  # [B, context length]
        images = default_collate([item.image for item in items])  # in a worker in memory that it shares with the run
        keys = [item.key for item in items]
        groups = [item.group for item in items] if any(item.group for item in items) else ()
        lengths = self.tokenize.lengths(tokens).tolist()
        return CaptionBatch(images, tokens[:, : max(lengths)], keys, captions, groups, skipped, lengths)


def _tell_of_long_captions(source: PairSource, tokenize: TextTokenizer) -> None:
    if rank_and_world()[0]:
        return
    first = np.arange(min(len(source), SAMPLED))  # and no others: each shard of a store is fetched for its captions
    length = caption_statistics(Rows(source, first), tokenize)
    if length.truncated:
        rank_zero_info(
            f"captions: {length.truncated:.1%} of the first {length.captions} are cut at {tokenize.context_length} "
            f"tokens and lose {length.tokens_lost:.1f} on average (model.context_length, data.long_captions)"
        )


class Loader(DataLoader[Any]):
    """A loader that Lightning may go on with in the middle of an epoch: its sampler begins where that is."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module knows."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, likewise."""


class CaptionDataModule(LightningDataModule, ABC):
    """Batches of a training and a validation source.

    Args:
        batch_size: pairs a step on each rank; the loss sees those of all ranks.
        global_batch_size: pairs a training step on all ranks together, however many they are; ``batch_size`` is then
            that of validation alone. None: ``batch_size`` on each rank.
        num_workers: processes that read and augment.
        seed: of the order and the augmentation.
        augmentation: in training.
        preprocessing: how the model wants its images; the command line takes it from the model.
        tokenize: texts -> int64 ``[N, L]``; the command line takes it from the model.
        on_error: what a sample does that cannot be used: ``error`` ends the run and names it, ``skip`` leaves it out of
            its batch, counts it and lists it in the run's ``skipped.jsonl``. No other sample takes its place.
        max_skipped: with ``skip`` the run ends when a larger share of at least 100 samples was skipped.
        long_captions: captions of more tokens than the model reads are cut (``truncate``), or the first of them ends
            the run and is named (``error``).
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
        on_error: OnError = "error",
        max_skipped: float = 0.05,
        long_captions: LongCaptions = "truncate",
    ) -> None:
        super().__init__()
        require(batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"num_workers: {num_workers} must be at least 0")
        require(seed >= 0, f"seed: {seed} must be at least 0")
        if global_batch_size is not None:
            require(global_batch_size >= 1, f"global_batch_size: {global_batch_size} must be at least 1")
        require(on_error in get_args(OnError), f"on_error: {on_error!r} is neither error nor skip")
        require(0 <= max_skipped <= 1, f"max_skipped: {max_skipped} is no share; it must be from 0 to 1")
        require(long_captions in get_args(LongCaptions), f"long_captions: {long_captions!r} is no truncate or error")
        self.on_error, self.max_skipped, self.long_captions = on_error, max_skipped, long_captions
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.global_batch_size = global_batch_size
        self.augmentation = augmentation or Augmentation()
        self.preprocessing = preprocessing or Preprocessing()
        self.tokenize = tokenize or Tokenize()
        self._resumed: dict[str, Any] = {}  # the state of the checkpoint that training goes on from
        self._began_at, self._first_step = Position(), 0
        self._order_sum = (-1, 0)  # of an epoch
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
        if stage == "fit" and self.train_source is not None:
            _tell_of_long_captions(self.train_source, self.tokenize)

    def _batches(self, start: Position = Position()) -> GlobalBatchSampler:  # noqa: B008  # immutable
        assert self.train_source is not None, "call setup('fit') first"
        source, wanted, batch_size = self.train_source, self.global_batch_size, self.train_batch_size
        pairs = source.epoch_size
        if wanted is not None and pairs < wanted:
            world = self._rank_and_world()[1]
            raise InputError(
                f"global_batch_size: {wanted} pairs a step are more than the {pairs} training pairs; "
                f"set it to {pairs // world * world} or less, and the learning rate with it"
            )

        def order(epoch: int) -> np.ndarray:
            return source.order(epoch, self.seed)

        return GlobalBatchSampler(pairs, batch_size, *self._rank_and_world(), self.seed, order, start)

    def _setting(self, epoch: int) -> dict[str, int]:
        """What an epoch's batches follow from."""
        source = self.train_source
        assert source is not None, "call setup('fit') first"
        if self._order_sum[0] != epoch:  # a large set's order takes seconds
            rows = source.order(epoch, self.seed)[:1000].astype(np.int64)
            self._order_sum = (epoch, zlib.crc32(rows.tobytes()))
        return {
            "training pairs": source.epoch_size,
            "pairs a step (all processes)": self.train_batch_size * self._rank_and_world()[1],
            "data.seed": self.seed,
            "the order's checksum": self._order_sum[1],
        }

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data; Lightning puts it into every checkpoint."""
        if self.train_source is None:
            return {}
        position = self._position()
        return {**position._asdict(), "setting": self._setting(position.epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _position(self) -> Position:
        """From the number of optimiser steps: every batch is one, and nothing that is saved between two is ahead."""
        trainer: Any = self.trainer
        per_epoch = max(1, min(self.steps_per_epoch, int(min(trainer.num_training_batches, 2**62))))
        done = self._began_at.batch + trainer.global_step - self._first_step
        return Position(self._began_at.epoch + done // per_epoch, done % per_epoch)

    def _start(self) -> Position:
        """Where the checkpoint says that training is.

        Raises:
            InputError: in the middle of an epoch that these data and this batch size would divide otherwise.
        """
        start = Position(self._resumed["epoch"], self._resumed["batch"])
        then, now = self._resumed["setting"], self._setting(start.epoch)
        other = [f"{name} {then[name]} there and {now[name]} here" for name in now if then[name] != now[name]]
        if start.batch and other:
            raise InputError(
                f"the checkpoint was saved after {start.batch} batches of an epoch, whose rest cannot be found: "
                f"{', '.join(other)}; make them agree, or go on from a checkpoint of an epoch's end"
            )
        return start

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

    def _loader(self, dataset: Dataset[Any], **sampling: Any) -> DataLoader[Any]:
        return Loader(
            SkippingDataset(dataset) if self.on_error == "skip" else dataset,
            num_workers=self.num_workers,
            collate_fn=_Collate(self.tokenize, self.preprocessing.image_size, self.long_captions == "error"),
            worker_init_fn=shield_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else each pass draws a seed from the global generator
            **sampling,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
            raise InputError(
                "trainer.reload_dataloaders_every_n_epochs: leave it out; each epoch has its own order anyway"
            )
        overfit = bool(getattr(trainer, "overfit_batches", 0))
        batches = self._batches(self._start() if self._resumed and not overfit else Position())
        self._resumed, source = {}, self.train_source
        self._began_at, self._first_step = batches.start, getattr(self.trainer, "global_step", 0)
        assert source is not None
        if overfit:  # the same batch every time, augmented the same way
            batches.reshuffle = False
        transform = self.augmentation.transform(self.preprocessing)
        least_size = self.augmentation.least_size(self.preprocessing)
        return self._loader(TrainingPairs(source, transform, self.seed, least_size), batch_sampler=batches)

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
