"""Cosine similarities of images and their captions, on any number of processes; an interrupted run is resumed.

A row is an image with its captions, a pair is an image with one of them. Batches of rows are dealt to the ranks, as in
:mod:`lit_clip.embedding.encode`. A process holds a few bytes for each row.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.encode import Encoder, EncodingSettings, EncodingTask, PartWriter, predict
from lit_clip.embedding.feature_files import FeatureParts
from lit_clip.embedding.reading import (
    Batches,
    EncoderBatch,
    ImageBatches,
    ImageRows,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
    in_batches,
)
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import stable_hash
from lit_clip.tools.images import FIX_HINT, OnError, full_size
from lit_clip.tools.reading import reading

NOT_FINITE = "score is not finite"
SCORES = pa.schema(
    {
        "row": pa.int64(),
        "pair": pa.int64(),  # pair_hash; like all but row and reason null for a row that cannot be read
        "key": pa.string(),
        "caption": pa.string(),
        "score": pa.float32(),  # null where there is a reason
        "width": pa.int32(),
        "height": pa.int32(),
        "reason": pa.string(),
    }
)


def pair_hash(key: str, caption: str) -> int:
    """Return a 64-bit hash of an image's key and a caption."""
    return stable_hash(f"{key}\0{caption}")


class PairRows(ImageRows, Protocol):
    """Images with their captions, by row number."""

    def captions(self, row: int) -> list[str]:
        """Return the distinct captions of a row, at least one."""
        ...


class _Note(NamedTuple):
    key: str
    captions: list[str]
    width: int
    height: int


class _Texts(NamedTuple):
    """The distinct captions of a batch.

    Attributes:
        tokens: int64 ``[T, L]``.
        of_pair: number of each pair's caption, int64 ``[P]``.
        of_image: number of captions of each image, int64 ``[N]``.
    """

    tokens: Tensor
    of_pair: Tensor
    of_image: Tensor


class PairBatches(ImageBatches):
    """Batches of images as in :class:`ImageBatches`, with their captions as ``texts``."""

    def __init__(self, pairs: PairRows, batches: Batches, model: CLIP, stop: Path) -> None:
        super().__init__(pairs, batches, model.preprocessing, _name_and_size, stop)
        self.pairs, self.tokenizer = pairs, model.tokenizer

    def __getitem__(self, index: int) -> EncoderBatch:
        batch = super().__getitem__(index)
        return batch._replace(texts=_texts_of(batch.notes, self.tokenizer)) if batch.rows else batch

    def _read(self, row: int) -> tuple[list[Tensor], list[_Note]]:
        pixels, [(key, width, height)] = super()._read(row)
        return pixels, [_Note(key, self.pairs.captions(row), width, height)]


def _name_and_size(name: str, image: Image.Image) -> tuple[str, int, int]:
    return name, *full_size(image)[:2]


def _texts_of(notes: Sequence[_Note], tokenizer: TextTokenizer) -> _Texts:
    number: dict[str, int] = {}
    of_pair = [number.setdefault(caption, len(number)) for note in notes for caption in note.captions]
    counts = [len(note.captions) for note in notes]
    return _Texts(tokenizer.trim(tokenizer(list(number))), torch.tensor(of_pair), torch.tensor(counts))


class PairEncoder(Encoder):
    """:class:`Encoder` that returns the cosine similarity of each pair, float32 ``[P]``."""

    def predict_step(self, batch: EncoderBatch, batch_idx: int) -> Tensor:
        images = encode_batch(batch, self.task.encode, self.device, self.settings.batch_size)  # [N, D]
        if batch.texts is None:
            return images
        parts = batch.texts.tokens.to(self.device).split(self.settings.batch_size)
        texts = torch.cat([self.model.encode_text(tokens, normalize=True).float() for tokens in parts])  # [T, D]
        images = images.repeat_interleave(batch.texts.of_image.to(self.device), dim=0)  # [P, D]
        return (images * texts[batch.texts.of_pair.to(self.device)]).sum(dim=1)


class ScoreParts(FeatureParts):
    """Finished scores of an unfinished output, as parquet files with the columns ``SCORES``."""

    def save(self, table: pa.Table) -> None:
        """Write a part."""
        self.folder.mkdir(exist_ok=True)  # another run with the same output may have removed it
        with replacing(self.folder / f"{uuid.uuid4().hex}.parquet") as draft:
            pq.write_table(table.replace_schema_metadata({"model": self.model}), draft, write_page_checksum=True)

    def models(self) -> set[str]:
        found: set[str] = set()
        for path in self.folder.glob("*.parquet"):
            with suppress(InputError), reading(path, "table of scores"):
                found.add((pq.read_schema(path).metadata or {})[b"model"].decode())
        return found

    def _paths(self) -> Iterator[Path]:
        """Yield the parts of this model."""
        for path in sorted(self.folder.glob("*.parquet")):
            with reading(path, "table of scores", hint="remove it"):
                ours = (pq.read_schema(path).metadata or {}).get(b"model") == self.model.encode()
            if ours:
                yield path

    def _columns(self, path: Path, *names: str) -> pa.Table:
        with reading(path, "table of scores", hint="remove it"):
            file = pq.ParquetFile(path, page_checksum_verification=True)
            return file.read(columns=list(names or SCORES.names)).cast(_schema_of(names))

    def remove_damaged(self) -> None:
        """Remove parts that cannot be read, so that their rows are encoded again."""
        for path in self.folder.glob("*.parquet"):
            try:
                self._columns(path)
            except InputError:
                path.unlink(missing_ok=True)

    def finished_rows(self, rows: int) -> np.ndarray:
        """Return which of N rows need not be encoded again, bool ``[N]``."""
        done = np.zeros(rows, dtype=bool)
        for path in self._paths():
            done[self._columns(path, "row")["row"].to_numpy()] = True
        return done

    def scores(self) -> np.ndarray:
        """Return the scores of all pairs that have one, in no particular order, float32 ``[P]``."""
        found = [self._columns(path, "score")["score"].drop_null().to_numpy() for path in self._paths()]
        return np.concatenate([np.zeros(0, dtype=np.float32), *found])

    def in_order(self, rows: int, unreadable: Sequence[UnreadableRow]) -> Iterator[pa.Table]:
        """Yield all pairs by row and caption; holds only the parts that overlap.

        Args:
            rows: N.
            unreadable: the rows that are in no part.
        """
        spans = sorted((int(self._columns(path, "row")["row"][0].as_py()), path) for path in self._paths())
        stops = [first for first, _ in spans[1:]] + [rows]
        waiting, seen = _unreadable_table(unreadable), np.zeros(rows, dtype=bool)
        for (_, path), stop in zip(spans, stops, strict=False):
            table = self._columns(path)
            numbers = table["row"].to_numpy()
            table = table.filter(pa.array(~seen[numbers]))  # two runs at once may both have scored a row
            seen[numbers] = True
            waiting = _by_row(pa.concat_tables([waiting, table]))
            ready = int(np.searchsorted(waiting["row"].to_numpy(), stop))
            yield waiting[:ready]
            waiting = waiting[ready:]


def _schema_of(names: Sequence[str]) -> pa.Schema:
    return pa.schema([SCORES.field(name) for name in names or SCORES.names])


def _by_row(table: pa.Table) -> pa.Table:
    """Sort by row; the captions of a row stay in their order."""
    return table.take(pa.array(np.argsort(table["row"].to_numpy(), kind="stable")))


def _unreadable_table(unreadable: Sequence[UnreadableRow]) -> pa.Table:
    lines = [{"row": bad.row, "reason": bad.message.removesuffix(FIX_HINT)} for bad in unreadable]
    return pa.Table.from_pylist(lines, SCORES)


class ScoreWriter(PartWriter):
    """:class:`PartWriter` for the scores of :class:`PairEncoder`."""

    def __init__(self, parts: ScoreParts, on_error: OnError) -> None:
        super().__init__((), parts, on_error, "scoring")
        self.score_parts = parts
        self._tables: list[pa.Table] = []

    def _collect(self, task: EncodingTask, batch: EncoderBatch, outputs: Tensor) -> None:
        if self.on_error == "error":
            check_finite(outputs, batch.notes[0].key)
        self._tables.append(_score_table(batch, outputs.cpu().numpy()))

    def _write(self) -> None:
        if self._tables:
            self.score_parts.save(pa.concat_tables(self._tables))
        self._tables = []
        super()._write()


def _score_table(batch: EncoderBatch, scores: np.ndarray) -> pa.Table:
    """Return the pairs of a batch with their scores ``[P]``."""
    pairs = [
        (row, note, caption) for row, note in zip(batch.rows, batch.notes, strict=True) for caption in note.captions
    ]
    finite = np.isfinite(scores).tolist()
    columns = {
        "row": [row for row, _, _ in pairs],
        "pair": [pair_hash(note.key, caption) for _, note, caption in pairs],
        "key": [note.key for _, note, _ in pairs],
        "caption": [caption for _, _, caption in pairs],
        "score": [score if good else None for score, good in zip(scores.tolist(), finite, strict=True)],
        "width": [note.width for _, note, _ in pairs],
        "height": [note.height for _, note, _ in pairs],
        "reason": [None if good else NOT_FINITE for good in finite],
    }
    return pa.table(columns, SCORES)


def score_pairs(
    model: CLIP, pairs: PairRows, parts: ScoreParts, settings: EncodingSettings
) -> list[UnreadableRow] | None:
    """Write into ``parts`` the scores of all rows that are not there.

    Returns:
        On rank 0 the rows that could not be read; None on other ranks, which have nothing left to do.

    Raises:
        UnreadableError: a row cannot be read and ``on_error`` is ``error``.
        KeyboardInterrupt: after the finished scores have been written.
    """
    parts.remove_damaged()
    done = parts.finished_rows(len(pairs))
    batches: list[Sequence[int]] = []
    for batch in in_batches(range(len(pairs)), settings.batch_size):
        missing = [row for row in batch if not done[row]]
        if missing:  # a range takes less memory than a list
            batches.append(batch if len(missing) == len(batch) else missing)
    if not batches:
        return []
    task = EncodingTask(
        (), lambda batches, stop: PairBatches(pairs, batches, model, stop), image_features(model), must_be_finite=False
    )
    return predict(PairEncoder(model, task, batches, parts.stop, settings), ScoreWriter(parts, settings.on_error))


def check_all_scored(parts: ScoreParts, rows: int, unreadable: Sequence[UnreadableRow]) -> None:
    """Raise :class:`InputError` unless every row is scored or known to be unreadable, and one is scored."""
    scored = int(parts.finished_rows(rows).sum())
    missing = rows - scored - len(unreadable)
    require(
        missing == 0,
        f"the scores of {missing} of {rows} rows are gone: another run with the same output has ended meanwhile; "
        "run this one again",
    )
    if not scored:
        raise InputError(f"none of {rows} pairs could be read; the first: {unreadable[0].message}")
