"""``lit-clip score``: score the similarity of each training pair, and choose which pairs to keep."""

import json
from pathlib import Path

from lit_clip.embedding.encode import EncodingSettings, check_complete, work_on
from lit_clip.embedding.feature_files import check_output
from lit_clip.embedding.pair_scores import in_order, score_pairs, scores_of
from lit_clip.errors import require
from lit_clip.tools.claims import Share, claimed
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import check_precision
from ..pairs.batches import SourcePairs
from ..pairs.decisions import ALL_PAIRS, label_of
from ..pairs.findings import DataOptions
from ..pairs.score_files import PairFilters, ScoreFile, write_scores
from ..pairs.source import Classes
from .opened import open_data


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
        check_precision(settings.precision, settings.accelerator)
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
