"""Base class of data modules: it makes batches from any source of (image, caption) pairs."""

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import rank_and_world
from lit_clip.errors import require
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.models.tokenizer import CLIPTokenizer, TextTokenizer
from lit_clip.tools.levels import Window, check_window
from lit_clip.tools.untrusted import Count, convert, entries, shortened
from lit_clip.tools.workers import SharedMemoryCollate, shield_worker
from lit_clip.training.lightning.strategies import divides_samples
from lit_clip.training.run_hooks import RunHooks
from .loading.augmentation import Augmentation, TrainingTransform, Transform, check_transforms
from .loading.bad_samples import BadSamples, SkippingDataset
from .loading.sampling import (
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Position,
    TrainingSample,
    checked_budgets,
    default_batch_size,
    permutation,
)
from .pairs.batch_order import BatchOptions, BatchOrder
from .pairs.batches import Collate, SourcePairs, TrainingPairs, ValidationPairs
from .pairs.image_captions import captions_per_image, chosen_pairs, joined
from .pairs.kept import digest_of_kept
from .pairs.reports import FittingCaptions, report_captions, report_images
from .pairs.source import CaptionOptions, ImageOptions, PairSource
from .pairs.stored_features import StoredPairs, WithStoredFeatures

EVALUATION_BATCH_SIZE = 64


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_copy_stream(move: Callable[[], CaptionBatch], device: torch.device) -> CaptionBatch:
    """Move a batch on a separate CUDA stream; on other devices, call the transfer directly.

    Lightning fetches a batch just before its step, and the host queues steps ahead of the device. On the stream of the
    steps the copy would start after the step before it; on its own it starts at once, so no batch has to be fetched
    earlier and the order of the data is the same. ``move`` does not wait for the device: its tensors are pinned.
    """
    if device.type != "cuda":
        return move()
    copying, computing = _stream_of(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        batch = move()
    computing.wait_stream(copying)
    for value in batch:
        if isinstance(value, Tensor):
            value.record_stream(computing)  # its memory is used again only after the step
    return batch


class ResumableLoader(DataLoader[Any]):
    """Data loader that counts as stateful, so that Lightning resumes inside an epoch; its sampler has the position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class CaptionDataModule(WithStoredFeatures, LightningDataModule, ABC):
    """Load the pairs of a training and a validation source in batches.

    The arguments are those of :class:`datamodules.Captions` of the same names.

    Attributes:
        preprocessing: of images for the model; ``setup`` takes it from the trainer's module. Set it for use without a
            trainer; until then it is CLIP's.
        tokenize: texts -> int64 ``[N, L]``, likewise.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        augmentation: Augmentation | list[Transform] | None = None,
        global_batch_size: int | None = None,
        bad_samples: BadSamples | None = None,
        captions: CaptionOptions | None = None,
        patch_budgets: list[int] | None = None,
        batches: BatchOptions | None = None,
        images: ImageOptions | None = None,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        check_window(window, "data.window")
        require(batch_size is None or batch_size >= 1, f"batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"num_workers: {num_workers} must be at least 0")
        require(seed is None or seed >= 0, f"seed: {seed} must be at least 0")
        if global_batch_size is not None:
            require(global_batch_size >= 1, f"global_batch_size: {global_batch_size} must be at least 1")
        self.captions, self.batches = captions or CaptionOptions(), batches or BatchOptions()
        self.images = images or ImageOptions()
        one_caption = self.images.per_thing not in ("two", "together") or self.captions.per_image == "all"
        reads = f"data.images.per_thing: {self.images.per_thing} reads one caption; leave captions.per_image out"
        require(one_caption, reads)
        self.lists_captions = self.lists_captions and self.captions.long != "sentences"
        self.patch_budgets = checked_budgets(patch_budgets)
        self.on_error, self.max_skipped = astuple(bad_samples or BadSamples())
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # seed_everything's
        self.split_seed = seed or 0  # runs with other seeds are compared by the same validation pairs
        self.global_batch_size = global_batch_size
        self.augmentation = Augmentation() if augmentation is None else augmentation
        if not isinstance(self.augmentation, Augmentation):
            check_transforms(self.augmentation)
        self.preprocessing, self.window = Preprocessing(), window
        self.tokenize: TextTokenizer = CLIPTokenizer()
        self._resumed: dict[str, Any] = {}  # state from the checkpoint that training resumes from
        self._start_position, self._start_step = Position(), 0
        self._order_checksum = (-1, 0)  # epoch, checksum
        self.train_source: PairSource | None = None
        self.val_source: PairSource | None = None
        self.batch_order: BatchOrder | None = None  # None: the source's own order

    @abstractmethod
    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        """Open the training source (only needed if ``fit``) and the validation source."""

    def opened_sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        """Open the sources, and choose or join the training rows of each image or thing as the options say."""
        train, val = self.sources(fit)
        if train is not None:
            train = chosen_pairs(train, self.captions.per_image, self.images.per_thing)
        if train is not None and self.batches.reorder:
            from .pairs.related_rows import name_pairs, stored_neighbours

            self._names = name_pairs(train, self.num_workers)
            features = self.batches.features
            near = stored_neighbours(features, self._names) if features else None
            self.batch_order = BatchOrder(train, self.batches, self.seed, self._names.shared, near)
        return train, val

    @property
    def position(self) -> Position:
        """Position in the data at which training starts."""
        return Position(self._resumed["epoch"], self._resumed["batch"]) if self._resumed else Position()

    def neighbour_images(self) -> SourcePairs:
        """Return each image of the training source once; the neighbours of pairs are found among them."""
        from .pairs.related_rows import distinct_images

        assert self.batch_order is not None, "needs batches.hard"
        return SourcePairs(self.batch_order.source, distinct_images(self._names).tolist())

    def use_neighbours(self, images: np.ndarray, nearest: np.ndarray) -> None:
        """Fill the hard places of the next epochs, from rows of :meth:`neighbour_images` and places in ``images``."""
        from .pairs.related_rows import neighbours_of_images

        assert self.batch_order is not None, "needs batches.hard"
        self.batch_order.use(neighbours_of_images(self._names, images, nearest))

    @property
    def captions_if_together(self) -> float:
        """Mean number of captions per image if ``captions.per_image`` were ``together``."""
        source = self.train_source
        if source is None or self.captions.per_image == "together":
            return self.captions_per_image
        return captions_per_image(joined(source))

    @property
    def captions_per_image(self) -> float:
        """Mean number of captions per image in a step."""
        return 1.0 if self.train_source is None else captions_per_image(self.train_source)

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        require(
            not (trainer and divides_samples(trainer)),
            "trainer.use_distributed_sampler: the data module itself divides the samples among processes; pass "
            "Trainer(use_distributed_sampler=False)",
        )
        module = getattr(trainer, "lightning_module", None)
        self.adopt(module)
        if self.val_source is None or (stage == "fit" and self.train_source is None):
            self.train_source, self.val_source = self.opened_sources(stage == "fit")
        if stage == "fit" and self.train_source is not None and self.val_source is not None:
            report_captions(self.train_source, self.tokenize, self.captions.long, getattr(module, "loss", None))
            report_images(self.train_source, self.val_source, self.seed, self.preprocessing)

    def adopt(self, module: Any) -> None:
        """Take preprocessing and tokenizer from a module; set the window of its model, and so of its checkpoints."""
        self.preprocessing = getattr(module, "preprocessing", self.preprocessing)
        self.tokenize = getattr(module, "tokenize", self.tokenize)
        if self.window is None:
            return
        self.preprocessing = replace(self.preprocessing, window=self.window)
        if isinstance(module, RunHooks):
            module.model.preprocessing = self.preprocessing
            module.model.config = replace(module.model.config, preprocessing=self.preprocessing)
            module.hparams["architecture"] = module.model.config.to_dict()

    def _batches(self, start: Position = Position()) -> GlobalBatchSampler:  # noqa: B008  # immutable
        assert self.train_source is not None, "call setup('fit') first"
        source, (rank, world) = self.train_source, self._rank_and_world()
        batch_size, pairs = self.train_batch_size, source.pairs_per_epoch
        require(
            self.global_batch_size is None or pairs >= self.global_batch_size,
            f"global_batch_size: {self.global_batch_size} pairs per step are more than the {pairs} training pairs; "
            f"set it to at most {max(1, pairs // world) * world}, and adjust the learning rate",
        )
        order: Callable[[int], np.ndarray] = partial(source.order, seed=self.seed)
        if self.batch_order is not None and pairs >= batch_size * world:
            order = partial(self.batch_order.order, size=batch_size * world)
            pairs = self.batch_order.batches(batch_size * world) * batch_size * world
        return GlobalBatchSampler(pairs, batch_size, rank, world, self.seed, order, start, self.patch_budgets)

    def _settings(self, epoch: int) -> dict[str, Any]:
        """Return all settings that determine the batches of an epoch; None for an unset one."""
        source = self.train_source
        assert source is not None, "call setup('fit') first"
        if self._order_checksum[0] != epoch:  # computing the order of a large set takes seconds
            rows = source.order(epoch, self.seed)[:1000].astype(np.int64)
            self._order_checksum = (epoch, zlib.crc32(rows.tobytes()))
        return {
            "training pairs": source.pairs_per_epoch,
            "pairs per step (all ranks)": self.train_batch_size * self._rank_and_world()[1],
            "data.seed": self.seed,
            "checksum of the order": self._order_checksum[1],
            "data.patch_budgets": self.patch_budgets or None,
            "data.images.per_thing": self.images.per_thing,
            "data.captions.per_image": self.captions.per_image if self.captions.per_image != "all" else None,
            "digest of the pairs that data.keep keeps": digest_of_kept(source) or None,
            "digest of data.batches": self.batch_order.digest if self.batch_order is not None else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training in the data; Lightning saves it in every checkpoint."""
        if self.train_source is None:
            return {}
        position = self._position()
        settings = {name: value for name, value in self._settings(position.epoch).items() if value is not None}
        return {**position._asdict(), "settings": settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        types = {"epoch": Count, "batch": Count, "settings": dict[str, Any]}
        convert(state_dict, entries(types), type(self).__name__)
        require(not state_dict or {*Position._fields, "settings"} <= state_dict.keys(), "holds no position in the data")
        self._resumed = state_dict

    def _position(self) -> Position:
        """Return the position by optimiser steps, one batch each: prefetched batches do not count."""
        trainer: Any = self.trainer
        per_epoch = max(1, min(self.steps_per_epoch, int(min(trainer.num_training_batches, 2**62))))
        done = self._start_position.batch + trainer.global_step - self._start_step
        return Position(self._start_position.epoch + done // per_epoch, done % per_epoch)

    def _start(self) -> Position:
        start = self.position
        saved, now = self._resumed["settings"], self._settings(start.epoch)
        there = {name: saved.get(name) for name in now}
        changed = [
            f"{name} {shortened(there[name])} there and {now[name]} here" for name in now if there[name] != now[name]
        ]
        require(
            not (start.batch and changed),
            f"checkpoint: saved after {start.batch} batches of an epoch that cannot be continued: "
            f"{', '.join(changed)}; make them agree, or resume from a checkpoint of an epoch's end",
        )
        return start

    def _rank_and_world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else rank_and_world()

    @property
    def train_batch_size(self) -> int:
        """Pairs per training step on each rank."""
        world = self._rank_and_world()[1]
        if self.global_batch_size is None:
            pairs = 0 if self.train_source is None else self.train_source.pairs_per_epoch
            return self.batch_size or default_batch_size(pairs, world)
        per_rank, remainder = divmod(self.global_batch_size, world)
        nearest = [str(pairs) for pairs in (per_rank * world, (per_rank + 1) * world) if pairs]
        require(
            not remainder,
            f"global_batch_size: {self.global_batch_size} pairs cannot be divided evenly among {world} processes; "
            f"set it to {' or '.join(nearest)}",
        )
        return per_rank

    @property
    def evaluation_batch_size(self) -> int:
        """Pairs that each rank encodes at once outside of training; results do not depend on this number."""
        return self.batch_size or EVALUATION_BATCH_SIZE

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in an epoch, the same on every rank."""
        return len(self._batches())

    def _fitting(self, source: PairSource) -> PairSource:
        # By now the model has the tokenizer of the checkpoint that it was restored from, which may be another one.
        self.tokenize = getattr(getattr(self.trainer, "lightning_module", None), "tokenize", self.tokenize)
        return FittingCaptions(source, self.tokenize) if self.captions.long == "sentences" else source

    def _loader(self, dataset: Dataset[Any], stored: bool = True, **sampling: Any) -> DataLoader[Any]:
        images, texts = (self.stored_images, self.stored_texts) if stored else (None, None)
        return ResumableLoader(
            SkippingDataset(dataset) if self.on_error == "skip" else dataset,
            num_workers=self.num_workers,
            collate_fn=SharedMemoryCollate(Collate(self.tokenize, self.preprocessing.shape, images, texts)),
            worker_init_fn=shield_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else every epoch draws a seed from the global generator
            **sampling,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        move = super().transfer_batch_to_device
        return on_copy_stream(lambda: move(batch, device, dataloader_idx), device)

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        option = "reload_dataloaders_every_n_epochs"
        own = f"trainer.{option}: leave it out; every epoch has its own order without it"
        require(not getattr(trainer, option, 0), own)
        overfit = bool(getattr(trainer, "overfit_batches", 0))
        start = self._start() if self._resumed else Position()
        batches = self._batches(Position(batch=start.batch) if overfit else start)
        self._resumed, source = {}, self.train_source
        self._start_position, self._start_step = batches.start, getattr(self.trainer, "global_step", 0)
        assert source is not None
        if overfit:  # the same batches in every epoch, augmented the same way
            batches.reshuffle = False
        source = self._fitting(source)
        if self.stored_images:
            require(not self.patch_budgets, "data.patch_budgets: FrozenFeatures encodes each image once; leave one out")
            pairs = StoredPairs(source, self.stored_images, self.seed, self.training_pairs(source))
            return self._loader(pairs, batch_sampler=batches)
        return self._loader(self.training_pairs(source), batch_sampler=batches)

    def training_once(self, stored: int, decoded: int, epoch: int = 0) -> DataLoader[Any]:
        """Load this rank's share of randomly drawn training pairs once: ``stored`` pairs if images are stored.

        Otherwise so many whose images are ``decoded``, without augmentation. Each epoch draws the same pairs, with
        other versions of stored images.
        """
        assert self.train_source is not None, "call setup('fit') first"
        source, (rank, world) = self._fitting(self.train_source), self._rank_and_world()
        rows: list[Any] = permutation(len(source), 0, self.seed).tolist()
        pairs: Dataset[Any] = self.validation_pairs(source)
        if self.stored_images and self.stored_images.stored:
            pairs = StoredPairs(source, self.stored_images, self.seed)
            rows, decoded = [TrainingSample(epoch, row) for row in rows], stored
        return self._loader(pairs, sampler=rows[:decoded][rank::world], batch_size=self.evaluation_batch_size)

    def training_pairs(self, source: PairSource) -> TrainingPairs:
        """Return the training samples with decoded images."""
        transform = TrainingTransform(self.augmentation, self.preprocessing, self.patch_budgets)
        return TrainingPairs(source, transform, self.seed)

    def validation_pairs(self, source: PairSource) -> ValidationPairs:
        """Return the validation samples with decoded images."""
        return ValidationPairs(source, pixels(self.preprocessing))

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.val_source is not None, "call setup first"
        source = self._fitting(self.val_source)
        batches = EvaluationBatchSampler(len(source), self.evaluation_batch_size, *self._rank_and_world())
        if self.stored_images and self.stored_images.stored:
            return self._loader(StoredPairs(source, self.stored_images, self.seed), batch_sampler=batches)
        return self._loader(self.validation_pairs(source), batch_sampler=batches)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        assert self.val_source is not None, "call setup first"
        source = self._fitting(self.val_source)
        # Lightning recreates a loader for prediction, which only works with a sampler.
        rank, world = self._rank_and_world()
        sampling = {"sampler": range(rank, len(source), world), "batch_size": self.evaluation_batch_size}
        return self._loader(self.validation_pairs(source), stored=False, **sampling)
