"""``lit-clip score``: score the similarity of each training pair, and choose which pairs to keep.

A row is an image with its captions, a pair is an image with one of them. Batches of rows are dealt to the ranks, as in
:mod:`lit_clip.embedding.encode`. A process holds a few bytes for each row.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.encode import EncodingSettings, Finished, RowTask, check_complete, encode, work_on
from lit_clip.embedding.feature_files import check_output
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.reading import (
    Batches,
    EncoderBatch,
    ImageBatches,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
)
from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.atomic import Share, claimed
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import pair_hash
from lit_clip.tools.images import FIX_HINT, full_size
from ..open_source import open_data
from ..pairs.batches import SourcePairs
from ..pairs.decisions import ALL_PAIRS, label_of
from ..pairs.findings import DataOptions
from ..pairs.score_files import SCORES, PairFilters, ScoreFile, write_scores
from ..pairs.source import Classes

NOT_FINITE = "score is not finite"


def score(
    given: DataOptions,
    *,
    output: str,
    model: str | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    min_caption_words: int | None = None,
    min_image_dim: int | None = None,
    classes: Classes = Classes(),  # noqa: B008  # immutable
    settings: EncodingSettings = EncodingSettings(),  # noqa: B008  # immutable
    share: str | None = None,
) -> None:
    """Score how well each caption fits its image, and choose the pairs to train on.

    The score is the cosine similarity of the features. The table has for each pair the score, the decision
    to keep or to drop it, and the filters that drop it; fit --data.keep and shard --keep read the others. The same
    command resumes an interrupted run.

    Args:
        given: the data.
        data: anything that training takes; or a table that this command wrote, to filter it anew without a model.
        output: scores.parquet.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        fraction: keep this fraction of the pairs, those with the highest scores.
        threshold: instead of fraction, the least score.
        min_caption_words: keep captions of at least so many words.
        min_image_dim: keep images whose shorter side has at least so many pixels.
        classes: of a folder of classes.
        settings: how images and captions are read and encoded.
        share: i/n, such as 3/16: score the third sixteenth, beside other jobs; when all have ended, the same command
            without it joins their work.
    """
    path, part = Path(output), Share.typed(share)
    filters = PairFilters(fraction, threshold, min_caption_words, min_image_dim)
    check_output(path, [".parquet"])
    if len(given.data) == 1 and ScoreFile.is_one(Path(given.data[0])):
        has = f"{given.data[0]} has scores already"
        require(model is None, f"--model: {has}; leave it out, or give the data themselves")
        require(share is None, f"--share: {has}, and filtering takes no jobs; leave it out")
        with claimed(path):
            file = ScoreFile(Path(given.data[0]))
            counts = write_scores(path, file.pairs(), file.scores(), filters, file.metadata, file.label)
    else:
        require(not given.data or model is not None, "--model: not given; it is needed to score pairs")
        opened = open_data(given, settings.on_error, classes, default_split="train")
        source = opened.every
        with work_on(path, str(model), opened.stamp(path), settings, part) as (clip, parts, metadata):
            unreadable = score_pairs(clip, SourcePairs(source), parts, settings)
            if unreadable is None or parts.shared():
                return
            check_complete(int(parts.rows(len(source)).sum()), len(source), unreadable, "rows")
            metadata |= {"data": json.dumps(given.data)}
            pairs, scores = in_order(parts, len(source), unreadable), scores_of(parts)
            counts = write_scores(path, pairs, scores, filters, metadata, label_of(source, ALL_PAIRS))
            parts.remove()
    for name, count in counts.removed.items():
        if count:
            stderr().print(f"{name}: {count:,} removed")
    stderr().print(f"{output}: {counts.pairs:,} pairs, {counts.kept:,} kept")


class _Note(NamedTuple):
    key: str
    captions: list[str]
    width: int
    height: int


class _Texts(NamedTuple):
    tokens: Tensor  # int64 [T, L]
    of_pair: Tensor  # number of each pair's caption, int64 [P]
    of_image: Tensor  # number of captions of each image, int64 [N]


def _note_of(pairs: SourcePairs, row: int, key: str, image: Image.Image) -> _Note:
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


def score_pairs(
    model: CLIP, pairs: SourcePairs, parts: Parts, settings: EncodingSettings
) -> list[UnreadableRow] | None:
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
