"""Cosine similarities of images and their captions, on any number of processes; an interrupted run can be resumed.

A row is an image with its captions, a pair is an image with one of them. Batches of rows are dealt to the ranks, as in
:mod:`lit_clip.embedding.encode`. A process holds a few bytes for each row.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.encode import EncodingSettings, Finished, RowTask, encode
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.reading import (
    Batches,
    EncoderBatch,
    ImageBatches,
    ImageRows,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
)
from lit_clip.models.clip import CLIP
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.hashing import pair_hash
from lit_clip.tools.images import FIX_HINT, full_size

NOT_FINITE = "score is not finite"
SCORES = pa.schema(
    {
        "row": pa.int64(),
        "pair": pa.int64(),  # pair_hash; like all but row and finding null for a row that cannot be read
        "key": pa.string(),
        "caption": pa.string(),
        "score": pa.float32(),  # null where there is a finding
        "width": pa.int32(),
        "height": pa.int32(),
        "finding": pa.string(),
    }
)


class PairRows(ImageRows, Protocol):
    """Images by row number, each with at least one distinct caption."""

    def captions(self, row: int) -> list[str]: ...


class _Note(NamedTuple):
    key: str
    captions: list[str]
    width: int
    height: int


class _Texts(NamedTuple):
    tokens: Tensor  # int64 [T, L]
    of_pair: Tensor  # number of each pair's caption, int64 [P]
    of_image: Tensor  # number of captions of each image, int64 [N]


def _note_of(pairs: PairRows, row: int, key: str, image: Image.Image) -> _Note:
    return _Note(key, pairs.captions(row), *full_size(image)[:2])


def _texts_of(tokenizer: TextTokenizer, notes: Sequence[_Note]) -> _Texts:
    number: dict[str, int] = {}
    of_pair = [number.setdefault(caption, len(number)) for note in notes for caption in note.captions]
    counts = [len(note.captions) for note in notes]
    return _Texts(tokenizer.trim(tokenizer(list(number))), torch.tensor(of_pair), torch.tensor(counts))


@dataclass(frozen=True, kw_only=True)
class PairTask(RowTask):
    """Pairs to score; a part is a table with the columns ``SCORES``, stored as the bytes of a parquet file."""

    model: CLIP

    def step(self, batch: EncoderBatch, device: torch.device, batch_size: int) -> Tensor:
        """Return the cosine similarity of each pair, float32 ``[P]``."""
        images = encode_batch(batch, self.encode, device, batch_size)  # [N, D]
        if batch.texts is None:
            return images
        parts = batch.texts.tokens.to(device).split(batch_size)
        texts = torch.cat([self.model.encode_text(tokens, normalize=True).float() for tokens in parts])  # [T, D]
        images = images.repeat_interleave(batch.texts.of_image.to(device), dim=0)  # [P, D]
        scores = (images * texts[batch.texts.of_pair.to(device)]).sum(dim=1)
        if self.must_be_finite:
            check_finite(scores, batch.notes[0].key)
        return scores

    def part(self, finished: Finished) -> Arrays:
        notes = [(row, note) for batch, _ in finished for row, note in zip(batch.rows, batch.notes, strict=True)]
        pairs = [(row, note, caption) for row, note in notes for caption in note.captions]
        scores = np.concatenate([each for _, each in finished])
        finite = np.isfinite(scores)
        columns = {
            "row": [row for row, _, _ in pairs],
            "pair": [pair_hash(note.key, caption) for _, note, caption in pairs],
            "key": [note.key for _, note, _ in pairs],
            "caption": [caption for _, _, caption in pairs],
            "score": pa.array(scores, mask=~finite),
            "width": [note.width for _, note, _ in pairs],
            "height": [note.height for _, note, _ in pairs],
            "finding": [None if good else NOT_FINITE for good in finite.tolist()],
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns, SCORES), file)
        rows = [row for batch, _ in finished for row in batch.rows]
        return {"rows": np.array(rows), "table": np.frombuffer(file.getvalue(), dtype=np.uint8)}


def score_pairs(model: CLIP, pairs: PairRows, parts: Parts, settings: EncodingSettings) -> list[UnreadableRow] | None:
    """Score all rows that ``parts`` lacks; see :func:`lit_clip.embedding.encode.encode`."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        note, texts = partial(_note_of, pairs), partial(_texts_of, model.tokenizer)
        return ImageBatches(pairs, batches, model.preprocessing, note, stop, texts)

    finite = settings.on_error == "error"
    task = PairTask(range(len(pairs)), read, image_features(model), must_be_finite=finite, title="scoring", model=model)
    return encode(model, task, parts, settings)


def _tables(parts: Parts, *names: str) -> Iterator[pa.Table]:
    schema = pa.schema([SCORES.field(name) for name in names or SCORES.names])

    def read(arrays: Arrays) -> pa.Table:
        return pq.read_table(pa.BufferReader(arrays["table"]), columns=schema.names).cast(schema)

    return parts.read(read)


def scores_of(parts: Parts) -> np.ndarray:
    """Return the scores of all scored pairs, in any order, float32 ``[P]``."""
    found = [table["score"].drop_null().to_numpy() for table in _tables(parts, "score")]
    return np.concatenate([np.zeros(0, dtype=np.float32), *found])


def in_order(parts: Parts, rows: int, unreadable: Sequence[UnreadableRow]) -> Iterator[pa.Table]:
    """Yield all pairs of N rows by row and caption, and the unreadable rows; keep only overlapping parts in memory."""
    lines = [{"row": bad.row, "finding": bad.message.removesuffix(FIX_HINT)} for bad in unreadable]
    waiting, seen = pa.Table.from_pylist(lines, SCORES), np.zeros(rows, dtype=bool)
    for table in _tables(parts):
        ready = int(np.searchsorted(waiting["row"].to_numpy(), table["row"][0].as_py()))  # parts ascend by first row
        yield waiting[:ready]
        numbers = table["row"].to_numpy()
        table = table.filter(pa.array(~seen[numbers]))  # two runs at once may both have scored a row
        seen[numbers] = True
        waiting = pa.concat_tables([waiting[ready:], table])
        waiting = waiting.take(pa.array(np.argsort(waiting["row"].to_numpy(), kind="stable")))  # captions keep order
    yield waiting
