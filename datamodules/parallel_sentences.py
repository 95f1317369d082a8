"""Sentences and their translations: teach a text encoder another language without images."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.frozen_prefix import FrozenPrefix
from lit_clip.models.layers import tower_parameters
from lit_clip.tools.hashing import hash64
from lit_clip.training.frozen_features import Encoding, StoredImages, Texts, my_share, open_rows, store_texts
from lit_clip.weights.load import load_model
from .caption_datamodule import CaptionDataModule
from .captions import VALIDATION_SHARE
from .open_source import open_source
from .pairs.source import Columns, Derived, Pair, PairSource, Rows
from .pairs.stored_features import DistinctImageRows, tokenized

NO_IMAGES = "ParallelSentences: sentences have no images"

OUR_WORDS = {  # in place of those of images and captions, in messages
    "columns.image": "source",
    "columns.caption": "target",
    "an image and a caption": "a sentence and a translation",
    "(missing image)": "without a sentence",
    "without a caption": "without a translation",
    "no image; add a path": "no sentence; add one",
    "one image cannot": "one sentence cannot",
    "neither paths nor images; set source": "no texts; set data.source",
    "neither texts nor lists of texts; set target": "neither texts nor lists of texts; set data.target",
}


@contextmanager
def in_our_words() -> Iterator[None]:
    """Reword errors about a table: sentences and translations instead of images and captions."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for pairs, ours in OUR_WORDS.items():
            message = message.replace(pairs, ours)
        raise InputError(message) from error.__cause__


class ParallelPairs(Derived):
    """Sentences that a text encoder learns; the key of each is the sentence that it translates.

    With ``keep_source`` half of the training samples are the latter themselves. A sentence may have several
    translations; validation takes the first.
    """

    def __init__(self, source: PairSource, keep_source: bool) -> None:
        super().__init__([source])
        self.keep_source = keep_source

    def captions(self, index: int) -> list[str]:
        return [*self.source.captions(index), *([self.key(index)] if self.keep_source else [])]

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        require(not decoded, f"{NO_IMAGES}; use fit, validate or test, without callbacks.FrozenFeatures")
        texts, kept = self.source.captions(index), self.keep_source and rng is not None and rng.random() < 0.5
        key = self.key(index)
        return Pair(None, key if kept else texts[0] if rng is None else rng.choice(texts), key)

    def image_identity(self, index: int) -> object:
        return hash64(self.key(index))

    def image_names(self) -> Any:
        return self.source.image_names()


class ParallelSentences(CaptionDataModule):
    """Sentences and translations: a text encoder learns to give a translation its sentence's features.

    A teacher, such as the model before, encodes each sentence once, before the first step; its features take the place
    of images. The image encoder must be frozen: it plays no part and serves the new language as it is. Validation is
    that of images and captions, so ``val/text_to_image_recall@1`` is the share of translations whose own sentence is
    closest. Use it with :class:`lit_clip.losses.Alignment`.

    Args:
        train: a table (CSV, TSV, JSON lines or parquet), or several. Rows without one of the two are left out;
            a sentence that a parquet file lacks is an error.
        val: as ``train``; None: a tenth of the sentences of ``train``, chosen by ``seed`` if given.
        source: column of the sentences that the teacher reads.
        target: column of their translations, texts or lists of texts.
        teacher: anything :func:`lit_clip.load_model` opens whose features the image encoder's belong to; None: the
            model that is trained, with the weights of ``model.pretrained``.
        keep_source: half of the training samples are sentences of ``source`` with their own features, so that the text
            encoder keeps that language.

    The other arguments are those of :class:`datamodules.Captions`.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        source: str = "source",
        target: str = "target",
        teacher: str | None = None,
        keep_source: bool = True,
        batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, [], global_batch_size)
        self.train, self.val, self.columns = train, val, Columns(image=source, caption=target)
        self.teacher, self.keep_source = teacher, keep_source

    @in_our_words()
    def prepare_data(self) -> None:
        for data in (self.train, self.val):
            if data is not None:
                self._source(data).prepare()

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        train = self._opened(self.train) if fit or self.val is None else None
        if self.val is not None:
            return train and ParallelPairs(train, self.keep_source), ParallelPairs(self._opened(self.val), False)
        assert train is not None
        train, val = train.divide(VALIDATION_SHARE, self.split_seed)
        return ParallelPairs(train, self.keep_source) if fit else None, ParallelPairs(val, False)

    def _source(self, data: str | list[str]) -> PairSource:
        return open_source(data, columns=self.columns, on_error="skip", option_prefix="--data.")

    def _opened(self, data: str | list[str]) -> PairSource:
        source = self._source(data)
        left_out = source.left_out.counts.total()
        if left_out:
            first = source.left_out.listed[0][0]
            rank_zero_info(f"{first}: {left_out} rows without a sentence or a translation are left out, this one first")
        return source

    @in_our_words()
    def setup(self, stage: str) -> None:
        super().setup(stage)
        module: Any = getattr(self.trainer, "lightning_module", None)
        require(module is not None, "ParallelSentences: needs a trainer")
        trained = any(each.requires_grad for each in tower_parameters(module.model, "image").values())
        require(not trained, f"{NO_IMAGES} for the image encoder to learn; set model.freeze.image to all")
        if self.teacher is None:
            known = module.starts_trained
            require(known, "data.teacher: who reads the sentences of data.source? set it, or model.pretrained")
            teacher = deepcopy(module.model).eval()  # a resumed run's weights are not restored yet
        else:
            teacher = load_model(self.teacher)
        ours, theirs = module.model.config.embed_dim, teacher.config.embed_dim
        require(ours == theirs, f"data.teacher: {self.teacher} has {theirs} channels and the model {ours}")
        self.stored_images = self._encoded(teacher.requires_grad_(False))

    def _encoded(self, model: CLIP) -> StoredImages:
        """Encode the sentences that are not stored yet, on all ranks."""
        val = self.val_source
        assert val is not None
        train = self.train_source or Rows(val, np.zeros(0, np.int64))
        rows = DistinctImageRows(train, val, 1, ())
        firsts = [rows.origin(row) for row in range(rows.count)]
        sentences = [val.key(first) if isinstance(first, int) else train.key(first.row) for first in firsts]
        tokens, lengths = tokenized(model.tokenizer, sentences)
        trainer: Any = self.trainer
        model.to(trainer.strategy.root_device)
        encoding = Encoding(model, nullcontext, "32-true", self.evaluation_batch_size)
        folder, prefix = self.cache_folder / "frozen_features", FrozenPrefix("text")
        stored = open_rows(encoding, prefix, folder, rows.count, rows.identity)
        store_texts(encoding, prefix, stored, Texts(tokens, lengths, np.zeros(0)), my_share(stored))
        distributed.barrier()
        return StoredImages(rows, stored)

    def image_rows(self, augmentations: int) -> DistinctImageRows:
        raise InputError(f"{NO_IMAGES}, and their features are stored without callbacks.FrozenFeatures; remove it")
