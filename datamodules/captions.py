"""Data module for pairs in any format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_clip.batch import JUDGED_AFTER
from lit_clip.distributed import gather_objects
from lit_clip.errors import InputError, require
from lit_clip.tools.levels import Window
from lit_clip.tools.untrusted import convert, shortened
from .caption_datamodule import CaptionDataModule
from .loading.augmentation import Augmentation, Transform
from .loading.bad_samples import BadSamples
from .open_source import open_source
from .pairs.batch_order import BatchOptions
from .pairs.kept import FilteredPairs, kept_pairs
from .pairs.mixture import Mixture
from .pairs.source import NO_CAPTION, CaptionOptions, Classes, Columns, ImageOptions, PairSource, ShardOptions

VALIDATION_SHARE = 0.1
FEW = 10  # pairs, of which one is ten points of recall
TRAINING_COLUMNS = ("negative", "weight", "title")  # which validation does not read


@dataclass(frozen=True)
class Splits:
    """Names of the splits to train and validate on.

    Attributes:
        train: that ``train`` is taken from; None: ``train``.
        val: that ``val`` is taken from; None: ``val``.
    """

    train: str | None = None
    val: str | None = None


# A mapping, not ``PairSource``: for that the command line reads a path as a configuration file.
if TYPE_CHECKING:
    Data = str | list[str] | list[dict[str, Any]] | dict[str, Any] | PairSource
else:
    Data = str | list[str] | list[dict[str, Any]] | dict[str, Any]


def _part(part: Mapping[str, Any]) -> tuple[Any, float, str | list[str] | None]:
    data, weight, keep = part.get("data"), part.get("weight", 1.0), part.get("keep")
    is_source = isinstance(data, str | list | Mapping | PairSource)
    others = isinstance(weight, int | float) and isinstance(keep, str | list | None)
    require(
        part.keys() <= {"data", "weight", "keep"} and is_source and others,
        "data: each part of a mixture needs data (a path) and weight (a number), and may have keep (a path or a list "
        f"of paths), not {dict(part)}",
    )
    return data, weight, keep


class Captions(CaptionDataModule):
    """Pairs from tables, folders, COCO's JSON, saved data sets or tar shards; the format is detected automatically.

    Rows without a caption (empty, ``nan``, ``none``, ``null``) are left out and counted.

    Args:
        train: a path; several paths, read one after the other; the parts of a mixture; or a source, such as a
            :class:`datamodules.CustomPairs`. Only needed by ``fit``.
        val: as ``train``; None: a tenth of the images of ``train``, chosen by ``seed`` if given.
        columns: of a table, and the folder that its paths start from.
        batch_size: pairs per step on each rank; the loss sees those of all ranks. None: 64 on all ranks together for
            fewer than 1,000 training pairs, 128 for fewer than 2,000, otherwise 256; validation encodes 64 at once.
            With ``captions.per_image: together`` these are images, as in ``global_batch_size``.
        num_workers: data worker processes on each rank.
        seed: of the order, the augmentation and the choice of validation images. None: that of ``seed_everything`` for
            the first two, and 0 without it; validation images are then the same whatever it is.
        augmentation: of the training images; or a list of transforms, see
            :class:`datamodules.loading.augmentation.TrainingTransform`.
        global_batch_size: pairs per training step on all ranks together; ``batch_size`` is then used for validation
            only. None: ``batch_size`` on each rank.
        splits: of data that come in splits.
        shards: how tar shards are read.
        bad_samples: whether they end the run or are skipped.
        captions: what becomes of long ones, and how many of an image an epoch reads.
        classes: reads ``train``, and ``val`` if it is a folder, as a folder of classes.
        patch_budgets: for a NaFlex model: each training batch draws one of these numbers of patches (SigLIP 2 had
            ``[128, 256, 576, 784, 1024]``), the same on all ranks. None: the model's, which is also validation's.
        keep: a table of ``lit-clip inspect``, ``overlap`` or ``score`` on ``train``, or several; only the pairs that
            all of them keep are used. Each part of a mixture has its own.
        batches: whether duplicates may share a batch, and which share of it are neighbours.
        images: which images of a thing that has several an epoch reads.
        window: of grey levels of more than 8 bits, which the model keeps: ``[low, high]`` become 0 and 255;
            ``{percentiles: [low, high]}`` of each image; or ``bit_depth``, the range of the file's bits. None: the
            model's, or ``bit_depth`` with a warning.
    """

    def __init__(
        self,
        train: Data | None = None,
        val: Data | None = None,
        columns: Columns | None = None,
        batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        augmentation: Augmentation | list[Transform] | None = None,
        global_batch_size: int | None = None,
        splits: Splits | None = None,
        shards: ShardOptions | None = None,
        bad_samples: BadSamples | None = None,
        captions: CaptionOptions | None = None,
        classes: Classes | None = None,
        patch_budgets: list[int] | None = None,
        keep: str | list[str] | None = None,
        batches: BatchOptions | None = None,
        images: ImageOptions | None = None,
        window: Window | None = None,
    ) -> None:
        nested = ((columns, Columns), (splits, Splits), (classes, Classes), (bad_samples, BadSamples))
        for value, kind in (*nested, (captions, CaptionOptions), (batches, BatchOptions), (images, ImageOptions)):
            wrong = f"data: {shortened(value)} must be {kind.__module__}.{kind.__name__}(...)"
            require(value is None or isinstance(value, kind), wrong)
        policies = (bad_samples, captions, patch_budgets, batches, images, window)
        super().__init__(batch_size, num_workers, seed, augmentation, global_batch_size, *policies)
        none = "data: set train, val or both to a table, a folder or tar shards, as in --data.train captions.csv"
        require(train is not None or val is not None, none)
        self.train, self.val, self.keep = train, val, keep
        self._versions: dict[str, str] = {}  # of addresses in the data, to be the same on all ranks and after a resume
        self._splits, self._classes, columns = splits or Splits(), classes or Classes(), columns or Columns()
        self.negative_column = columns.negative
        self._options = {"columns": columns, "shards": shards, "on_error": self.on_error, "option_prefix": "--data."}

    def prepare_data(self) -> None:
        needs_train = not self.trainer or self.trainer.state.fn == TrainerFn.FITTING or self.val is None
        for data, split in ((self.train if needs_train else None, "train"), (self.val, "validation")):
            if data is not None:
                source = self._source(data, split)
                source.prepare()
                self._versions.update(source.versions)

    def setup(self, stage: str) -> None:
        self._versions = gather_objects([self._versions])[0]  # an address may have changed since the first rank read it
        super().setup(stage)
        if stage == "fit":
            self._refuse_unread(getattr(getattr(self.trainer, "lightning_module", None), "loss", None))

    def _refuse_unread(self, loss: Any) -> None:
        """Raise :class:`InputError` for a column, or second images, that the loss does not read."""
        if not isinstance(loss, nn.Module):  # of a module of one's own
            return
        read = [name for part in loss.modules() for name in getattr(part, "reads", ())]
        columns, two = self._options["columns"], self.images.per_thing == "two"
        for given, name, option, ours in (
            (columns.weight, "weight", "columns.weight", "losses.WeightedContrastive"),
            (columns.title, "title", "columns.title", "training.losses.WithTitle"),
            (two, "other_image", "images.per_thing", "training.losses.OtherImageContrastive"),
        ):
            unread = f"data.{option}: {type(loss).__name__} does not read it; leave it out, or use lit_clip.{ours}"
            require(not given or name in read, unread)

    def state_dict(self) -> dict[str, Any]:
        versions = self._opened_versions()
        return super().state_dict() | ({"versions": versions} if versions else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Open the saved versions of the data again if an address has changed since the checkpoint."""
        super().load_state_dict(state_dict)
        saved = convert(state_dict.get("versions", {}), dict[str, str], f"{type(self).__name__}.versions")
        opened = self._opened_versions()
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and any(saved.get(name, version) != version for name, version in opened.items()):
            self._versions = {**opened, **saved}
            self.train_source, self.val_source = self.opened_sources(fit=True)

    def _opened_versions(self) -> dict[str, str]:
        sources = [source for source in (self.train_source, self.val_source) if source is not None]
        return {name: version for source in sources for name, version in source.versions.items()}

    def _source(self, data: Data, split: str) -> PairSource:
        """Return data of any form as one source; ``setup`` calls ``sources``, which opens each split by this."""
        options = self._options
        if split != "train":
            columns = replace(self._options["columns"], **dict.fromkeys(TRAINING_COLUMNS))
            options = {**self._options, "columns": columns}

        def opened(path: Any, keep: str | list[str] | None = None) -> PairSource:
            paths = [path] if isinstance(path, str) else [] if isinstance(path, Mapping | PairSource) else path
            of_classes = split == "train" or all(Path(each).expanduser().is_dir() for each in paths)
            source = open_source(
                path,
                split=self._splits.train if split == "train" else self._splits.val,
                default_split=split,
                classes=self._classes if of_classes else Classes(),
                **options,
                versions=self._versions,
            )
            return source if keep is None else kept_pairs(source, keep, "data.keep")

        keep = self.keep if split == "train" else None
        if isinstance(data, str | Mapping | PairSource):
            return opened(data, keep)
        parts = [_part(part) for part in data if isinstance(part, Mapping)]
        if not parts:
            return opened([str(path) for path in data], keep)
        bare = len(parts) < len(data)
        require(not bare, "data: each part of a mixture needs data and weight; there is a bare path among them")
        require(keep is None, "data.keep: each part of a mixture has its own; write it beside the part's weight")
        return Mixture([opened(part, table) for part, _, table in parts], [weight for _, weight, _ in parts])

    def _open(self, data: Data, split: str) -> PairSource:
        source = self._source(data, split)
        if isinstance(source, FilteredPairs):
            rank_zero_info(str(source))
        if source.left_out.counts:
            name = data if isinstance(data, str) else split
            first = f"; the first: {source.left_out.listed[0][0]}" if source.left_out.listed else ""
            rank_zero_info(f"{name}: {len(source)} pairs, {source.left_out} left out{first}")
            bad = sum(count for reason, count in source.left_out.counts.items() if reason != NO_CAPTION)
            found = len(source) + bad
            if self.on_error == "skip" and found >= JUDGED_AFTER and bad > self.max_skipped * found:
                raise InputError(
                    f"{name}: {source.left_out} cannot be used, {len(source)} pairs can; fix or remove them, "
                    f"or raise data.bad_samples.max_skipped (now {self.max_skipped:g})"
                )
        if self.on_error == "error":
            source.check()
        return source

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        require(self.train is not None or not fit, "data.train: not set; fit needs data to train on")
        if self.val is not None:
            train = self._open(self.train, "train") if fit and self.train is not None else None
            return train, self._open(self.val, "validation")
        assert self.train is not None
        groups = self.images.per_thing is not None
        train, val = self._open(self.train, "train").divide(VALIDATION_SHARE, self.split_seed, groups)
        of_all = " before data.keep" if self.keep is not None else ""
        few = "; too few to judge a model by, set data.val" if len(val) < FEW else ""
        rank_zero_info(
            f"data.val: not set; {len(val):,} of {len(train) + len(val):,} pairs, a tenth of the images{of_all}, "
            f"validate{few}"
        )
        return train if fit else None, val


class _Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoCaptions(LightningDataModule):
    """No pairs: ``lit-clip validate`` then runs only callbacks, such as ZeroShot, Retrieval and LinearProbe."""

    def val_dataloader(self) -> DataLoader[Any]:
        # Iterable: without a known length Lightning runs an empty epoch with all its hooks instead of skipping it.
        return DataLoader(_Empty())
