"""``lit-clip score``: the similarity of each pair of the training data, and which pairs are kept."""

import json
from pathlib import Path
from typing import Any

from lit_clip import load_model
from lit_clip.embedding.encode import claimed_by_first
from lit_clip.embedding.encoding_task import EncodingSettings, check_complete
from lit_clip.embedding.feature_files import check_output
from lit_clip.embedding.pair_scores import in_order, score_pairs, scored_rows, scores_of
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.precision import check_precision
from lit_clip.errors import InputError, require
from lit_clip.tools.claims import claimed
from lit_clip.tools.console import stderr
from lit_clip.tools.shares import Share
from lit_clip.version import __version__
from lit_clip.weights.fingerprint import fingerprint
from ..open_source import open_source, stamp_of_data
from ..pairs.batches import SourcePairs
from ..pairs.decisions import ALL_PAIRS, label_of
from ..pairs.score_files import Filtered, PairFilters, ScoreFile, write_scores
from ..pairs.source import Classes, Columns


def score(
    data: list[str],
    *,
    output: str,
    model: str | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    min_caption_words: int | None = None,
    min_image_dim: int | None = None,
    columns: Columns = Columns(),  # noqa: B008  # immutable
    split: str | None = None,
    classes: Classes = Classes(),  # noqa: B008  # immutable
    settings: EncodingSettings = EncodingSettings(),  # noqa: B008  # immutable
    share: str | None = None,
) -> None:
    """Score how well each caption fits its image, and choose the pairs to train on.

    The score is the cosine similarity of the features. The table has for each pair the score, the decision
    to keep or to drop it, and the filters that drop it; fit --data.keep and shard --keep read the others. The same
    command resumes an interrupted run.

    Args:
        data: anything that training takes; or a table that this command wrote, to filter it anew without a model.
        output: scores.parquet.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        fraction: keep this fraction of the pairs, those with the highest scores.
        threshold: instead of fraction, the least score.
        min_caption_words: keep captions of at least so many words.
        min_image_dim: keep images whose shorter side has at least so many pixels.
        columns: of a table.
        split: of data that come in splits; train by default.
        classes: of a folder of classes.
        settings: how images and captions are read and encoded.
        share: i/n, such as 3/16: score the third sixteenth, beside other jobs; when all have ended, the same command
            without it joins their work.
    """
    filters = PairFilters(fraction, threshold, min_caption_words, min_image_dim)
    options = {"columns": columns, "split": split, "classes": classes}
    counts = _scored_or_filtered(data, model, options, Path(output), settings, filters, Share.typed(share))
    for name, count in counts.removed.items() if counts else ():
        if count:
            stderr().print(f"{name}: {count:,} removed")
    if counts:
        stderr().print(f"{output}: {counts.pairs:,} pairs, {counts.kept:,} kept")


def _scored_or_filtered(
    data: list[str],
    model: str | None,
    options: dict[str, Any],
    path: Path,
    settings: EncodingSettings,
    filters: PairFilters,
    share: Share,
) -> Filtered | None:
    """Write the table; None on other ranks than the first, and for a share."""
    check_output(path, [".parquet"])
    require(bool(data), "no data: name a table, a folder or shards before the options")
    if len(data) == 1 and ScoreFile.is_one(Path(data[0])):
        require(model is None, f"--model: {data[0]} has scores already; leave it out, or give the data themselves")
        require(share == Share(), f"--share: {data[0]} has scores already, and filtering takes no jobs; leave it out")
        with claimed(path):
            file = ScoreFile(Path(data[0]))
            return write_scores(path, file.pairs(), file.scores(), filters, file.metadata, file.label)
    if model is None:
        raise InputError("--model: not given; it is needed to score pairs")
    check_precision(settings.precision, settings.accelerator)
    source = open_source(data, **options, default_split="train", option_prefix="--", on_error=settings.on_error)
    source.prepare()
    if source.left_out.counts:
        stderr().print(f"{source.left_out} left out")
    stamp = stamp_of_data(data, options, source, [path])
    clip = load_model(model)
    name = fingerprint(clip).model
    with claimed_by_first(path, settings, share):
        parts = Parts.resumed(path, f"{name} {stamp}", settings.precision, share)
        unreadable = score_pairs(clip, SourcePairs(source), parts, settings)
        if unreadable is None or parts.shared():
            return None
        check_complete(int(scored_rows(parts, len(source)).sum()), len(source), unreadable, "rows")
        metadata = {"model": model, "model_sha256": name, "precision": settings.precision, "lit_clip": __version__}
        metadata |= {"data": json.dumps(list(data))}
        pairs, scores = in_order(parts, len(source), unreadable), scores_of(parts)
        counts = write_scores(path, pairs, scores, filters, metadata, label_of(source, ALL_PAIRS))
        parts.remove()
        return counts
