"""Samples with images or captions encoded once: stored activations, and a teacher's features beside them.

:class:`callbacks.FrozenFeatures` fills the files; here is which row of a file belongs to which sample.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip.errors import BadSample, require
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.images import OnError
from lit_clip.tools.own_files import default_cache_dir
from lit_clip.tools.workers import Mapped, loader
from ..loading.augmentation import Augmentation, described_augmentation
from ..loading.sampling import TrainingSample, sample_seed
from .source import CaptionOptions, Pair, PairSource

if TYPE_CHECKING:
    from lit_clip.tools.stored_rows import StoredRows
    from lit_clip.training.frozen_features import ImageBatch, StoredImages, StoredTexts, Texts

TOKENIZED_AT_ONCE = 4096


class DistinctImageRows:
    """The file row of each sample's image; equal images share a row. The identity covers images and settings."""

    def __init__(self, train: PairSource, val: PairSource, versions: int, settings: Sequence[object]) -> None:
        self.versions = versions  # augmented, of each training image
        self._train, self._first_train, train_images = _distinct_images(train)
        self._val, self._first_val, val_images = _distinct_images(val)
        self.trained = len(self._first_train) * versions  # these rows come first
        self.count = self.trained + len(self._first_val)
        self.trained_identity = hex_digest([*settings, versions, *train_images])
        self.identity = hex_digest([*settings, versions, len(train_images), *train_images, *val_images])

    def training(self, row: int, version: int) -> int:
        return int(self._train[row]) * self.versions + version

    def validation(self, row: int) -> int:
        return self.trained + int(self._val[row])

    def origin(self, row: int) -> TrainingSample | int:
        """Return the origin of a row's image: a training sample with the version as epoch, or a validation row."""
        if row >= self.trained:
            return int(self._first_val[row - self.trained])
        image, version = divmod(row, self.versions)
        return TrainingSample(version, int(self._first_train[image]))


def _distinct_images(source: PairSource) -> tuple[np.ndarray, np.ndarray, list[object]]:
    """Return each row's image number, and the first row and the identity of each image."""
    numbers: dict[object, int] = {}
    first, image_of = [], np.empty(len(source), dtype=np.int64)
    for row in range(len(source)):
        try:
            identity = source.image_identity(row)
        except BadSample as error:  # loading it will raise or skip it
            identity = ("unusable", row, error.where)
        number = numbers.setdefault(identity, len(numbers))
        if number == len(first):
            first.append(row)
        image_of[row] = number
    return image_of, np.array(first, dtype=np.int64), list(numbers)


class ImageReader:
    """Read batches of a file's images, each from the training or the validation data set.

    Unless ``skip`` is set, an image that cannot be read is an error.
    """

    def __init__(self, rows: DistinctImageRows, training: Dataset[Any], validation: Dataset[Any], skip: bool) -> None:
        self.rows, self.training, self.validation, self.skip = rows, training, validation, skip

    def __call__(self, wanted: Sequence[int]) -> "ImageBatch":
        from lit_clip.training.frozen_features import ImageBatch

        images, unusable = dict[int, Tensor](), list[int]()
        for row in wanted:
            origin = self.rows.origin(row)
            dataset = self.training if isinstance(origin, TrainingSample) else self.validation
            try:
                images[row] = dataset[origin].image
            except BadSample:
                if not self.skip:
                    raise
                unusable.append(row)
        pixels = torch.stack(list(images.values())) if images else torch.zeros(0)
        return ImageBatch(np.array(list(images), np.int64), pixels, unusable)


class StoredPairs(Dataset[Pair]):
    """Samples with stored activations, or with the images that a teacher saw; and the teachers' features.

    The captions are drawn as in a plain run. A training sample draws from the run's ``seed``; a validation sample is a
    row, and has no teacher's features. ``decoded`` are the training samples with images.
    """

    def __init__(
        self, source: PairSource, images: "StoredImages", seed: int, decoded: Dataset[Pair] | None = None
    ) -> None:
        self.source = source
        self.images = images
        self.seed = seed
        self.decoded = decoded

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: TrainingSample | int) -> Pair:
        from lit_clip.training.teacher import stored_name

        rows, stored, teachers = self.images
        if isinstance(sample, TrainingSample):
            index, rng = sample.row, random.Random(sample_seed(self.seed, sample))
            text = self.source.text(index, rng)
            row = rows.training(index, rng.randrange(rows.versions) if rows.versions > 1 else 0)
        else:
            index, rng = sample, None
            text, row = self.source.text(index, rng), rows.validation(index)
        if stored is not None:
            image = self._read(stored, row, index)
        else:
            assert self.decoded is not None
            image = self.decoded[rows.origin(row)].image
        of_image = {stored_name(each.name, "image"): self._read(each.images, row, index) for each in teachers if rng}

        def taught(text: Pair) -> Pair:
            extra = {**text.extra, **of_image}
            for teacher in teachers if rng else ():
                if teacher.texts:
                    extra[stored_name(teacher.name, "text")] = teacher.texts.of_text(text.caption)
            return text._replace(extra=extra, more=text.more and [taught(each) for each in text.more])

        return taught(text)._replace(image=image)

    def _read(self, stored: "StoredRows", row: int, index: int) -> Tensor:
        found = stored.read(row)
        if found is None:
            pair = self.source.load(index, None)  # says what is wrong with it
            raise BadSample(pair.key, "not stored", f"its image was not readable before; delete {stored.folder}")
        return found


def tokenized(tokenize: TextTokenizer, texts: Sequence[str]) -> tuple[Tensor, np.ndarray]:
    """Return padded tokens, int64 ``[N, context length]``, and the texts' lengths."""
    starts = range(0, len(texts), TOKENIZED_AT_ONCE)
    tokens = torch.cat([tokenize(texts[start : start + TOKENIZED_AT_ONCE]) for start in starts])
    return tokens, tokenize.lengths(tokens).numpy()


class WithStoredFeatures:
    """The part of a data module that replaces images and captions by stored activations.

    :class:`callbacks.FrozenFeatures` asks for every image and caption of ``fit``, encodes what is not stored yet, and
    sets ``stored_images`` and ``stored_texts``. Sources with ``lists_captions`` list every caption that they draw; only
    those are stored.
    """

    lists_captions = True
    stored_images: "StoredImages | None" = None
    stored_texts: "StoredTexts | None" = None
    train_source: PairSource | None
    val_source: PairSource | None
    augmentation: Augmentation | list[Any]
    tokenize: TextTokenizer
    captions: CaptionOptions
    seed: int
    num_workers: int
    on_error: OnError

    evaluation_batch_size: Any  # images or captions that are encoded at once
    training_pairs: Any  # source -> samples with decoded images
    validation_pairs: Any

    @property
    def cache_folder(self) -> Path:
        """Folder for files that are made from the data."""
        return default_cache_dir()

    @property
    def _fit_sources(self) -> tuple[PairSource, PairSource]:
        assert self.train_source is not None
        assert self.val_source is not None, "call setup('fit') first"
        return self.train_source, self.val_source

    def image_rows(self, augmentations: int) -> DistinctImageRows:
        """Give each distinct image of ``fit`` a row per version (0: no versions); read no image."""
        fixed = not isinstance(self.augmentation, Augmentation) and not self.augmentation
        require(
            fixed or augmentations > 0,
            "FrozenFeatures: data.augmentation changes an image at random each time, so it cannot be encoded once; set "
            "data.augmentation to [], or FrozenFeatures.augmentations to a number of fixed versions of each image",
        )
        require(
            not fixed or augmentations <= 1,
            f"FrozenFeatures.augmentations: {augmentations} versions would be the same without data.augmentation; "
            "set it to 0",
        )
        settings = () if fixed else (self.seed, described_augmentation(self.augmentation))
        if settings and self.captions.per_image == "together":  # rows are images, so that others are drawn
            settings = (*settings, "together")
        return DistinctImageRows(*self._fit_sources, max(1, augmentations), settings)

    def image_reader(self, rows: DistinctImageRows) -> ImageReader:
        train, val = self._fit_sources
        datasets = self.training_pairs(train), self.validation_pairs(val)
        return ImageReader(rows, *datasets, skip=self.on_error == "skip")

    def images_once(self, rows: DistinctImageRows, wanted: np.ndarray) -> "DataLoader[ImageBatch]":
        from lit_clip.embedding.reading import in_batches

        batches = in_batches(wanted.tolist(), self.evaluation_batch_size)
        return loader(Mapped(self.image_reader(rows), batches), self.num_workers)

    def distinct_texts(self, teachers: TextTokenizer | None = None) -> "Texts":
        """Tokenize every caption of ``fit``, equal tokens once; read no image where possible.

        With a teacher's tokenizer, every training caption, equal texts once.
        """
        from lit_clip.training.frozen_features import Texts, text_hashes, token_hashes

        sources = self._fit_sources[:1] if teachers else self._fit_sources
        captions: dict[str, None] = {}
        for source in sources:
            for row in range(len(source)):
                with suppress(BadSample):  # loading it will raise or skip it
                    captions.update(dict.fromkeys(source.captions(row)))
        tokens, lengths = tokenized(teachers or self.tokenize, list(captions))
        hashes = text_hashes(list(captions)) if teachers else token_hashes(tokens, lengths)
        hashes, kept = np.unique(hashes, return_index=True)
        return Texts(tokens[torch.from_numpy(kept), : int(lengths.max())], lengths[kept], hashes)
