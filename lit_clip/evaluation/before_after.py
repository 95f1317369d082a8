"""Compare a model before and after training on the same images: metrics, and differences with intervals.

Shapes: N rows of a set, I distinct images, T distinct captions, D embedding dimension.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.evaluation.intervals import Interval, UnitScores
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.retrieval.metrics import PairIndices, pair_scores, retrieval_ranks, similarities
from lit_clip.retrieval.retrieval_set import distinct_pairs, token_hashes
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.untrusted import convert, entries

HELD_OUT, NEIGHBOURS, CONFIDENCE = "held-out", 10, 0.95
JUDGED = ("R@1", "top-1")  # a line says if one is worse
HEAD = ("images", "before", "after", "difference (95 %)")
CAPTION = "R@k: recall@k, where equal captions count as one"
ADVICE = "try a tenth of --model.optimizer.lr, --model.freeze, fewer epochs, or lit-clip wise-ft between both models"


class PairFeatures(NamedTuple):
    """Distinct images and captions of all ranks' pairs, in an order that is independent of the ranks."""

    keys: list[str]  # [I]
    captions: list[str]  # [T]
    image: Tensor  # float32 [I, D]
    text: Tensor  # float32 [T, D]
    pairs: PairIndices


class Measured(NamedTuple):
    """Results of a model on a set, by name: scores of each image, averaged to a metric, and other numbers."""

    digest: str  # of images and captions
    scores: dict[str, Tensor]  # float64 [I]
    more: dict[str, Tensor]  # int64 [I, ...]

    @classmethod
    def from_state(cls, state: Any, where: str) -> "Measured":
        """Return the results stored in a checkpoint; raise :class:`InputError` for anything else."""
        types = {"digest": str, "scores": dict[str, Tensor], "more": dict[str, Tensor]}
        return cls(**convert(state, entries(types, total=True), where))


class Row(NamedTuple):
    """A metric of a set before and after; fractions."""

    what: str
    images: int
    before: float
    after: float
    interval: Interval  # of the difference

    @property
    def cells(self) -> list[str]:
        """Return the row as text: percentages, and the difference in points."""
        gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in (self.after - self.before, *self.interval)))
        return [self.what, f"{self.images:,}", f"{100 * self.before:.1f}", f"{100 * self.after:.1f}", gap]


@torch.no_grad()
def gather_pairs(
    encode: Callable[[CaptionBatch], tuple[Tensor, Tensor]],
    batches: Iterable[CaptionBatch],
    tokenizer: TextTokenizer,
    empty: tuple[Tensor, Tensor],
) -> PairFeatures:
    """Encode this rank's batches and return all ranks' pairs: equal keys are one image, equal tokens one caption.

    ``empty`` are features of no image and of no caption, for a rank without pairs.
    """
    parts, rows = [empty], list[tuple[str, int, str]]()
    for batch in (each for each in batches if each.keys):
        hashes = token_hashes(batch.tokens, tokenizer.context_length, tokenizer.pad_id).tolist()
        rows += zip(batch.keys, hashes, batch.captions or [""] * len(hashes), strict=True)
        parts.append(encode(batch))
    image_ND, text_ND = (distributed.gather_uneven(torch.cat(each)) for each in zip(*parts, strict=True))
    keys, hashes, captions = zip(*distributed.gather_objects(rows), strict=True)
    names, first_I, image_N = np.unique(np.array(keys), return_index=True, return_inverse=True)
    _, first_T, text_N = np.unique(np.array(hashes), return_index=True, return_inverse=True)
    pairs = distinct_pairs(image_N, text_N).to(image_ND.device)
    texts = [captions[row] for row in first_T]
    return PairFeatures(names.tolist(), texts, image_ND[first_I.tolist()], text_ND[first_T.tolist()], pairs)


def retrieval_scores(image_ID: Tensor, text_TD: Tensor, pairs: PairIndices) -> tuple[dict[str, Tensor], Tensor]:
    """Return each image's recall scores, with equal captions as one, and the rank of its best caption.

    Some images have more captions than others: an image's score of text to image is what its captions contribute to
    the recall of all captions, to first order, so that images can be drawn with replacement.
    """
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    image_E, rows_E, found = pairs.image.cpu(), pairs.rows.double().cpu(), dict[str, Tensor]()
    rows_I = torch.zeros(len(image_ID), dtype=torch.float64).index_add_(0, image_E, rows_E)
    for k in (1, 5):
        right_E = (ranks.merged_text < min(k, len(image_ID)))[pairs.text].cpu()
        right_I = torch.zeros_like(rows_I).index_add_(0, image_E, rows_E * right_E)
        recall = right_I.sum() / rows_I.sum()
        found[f"image to text R@{k}"] = (ranks.merged_image < min(k, len(text_TD))).double().cpu()
        found[f"text to image R@{k}"] = recall + (right_I - recall * rows_I) / rows_I.mean()
    return found, ranks.merged_image.cpu()


def measure(pairs: PairFeatures, before: Measured | None = None, neighbours: bool = False) -> Measured:
    """Measure held-out pairs; with ``neighbours``, also the share of neighbours kept from ``before``."""
    scores, ranks = retrieval_scores(pairs.image, pairs.text, pairs.pairs)
    near = [similarities(some, pairs.text).argmax(dim=1) for some in pairs.image.split(1024)]
    more = {"rank": ranks, "caption": torch.cat(near).cpu()}
    if neighbours and len(pairs.image) > NEIGHBOURS:
        found = [similarities(some, pairs.image).topk(NEIGHBOURS + 1).indices for some in pairs.image.split(1024)]
        more["near"] = torch.cat(found).cpu()
        earlier = more["near"] if before is None else before.more["near"]
        if earlier.shape == more["near"].shape:  # each image is its own first neighbour
            kept = (more["near"][:, :, None] == earlier[:, None]).any(dim=2).double().sum(dim=1).sub(1).clamp(min=0)
            scores[f"{NEIGHBOURS} nearest images stay"] = kept / NEIGHBOURS
    digest = hex_digest([pairs.keys, pairs.captions, pairs.pairs.image.tolist(), pairs.pairs.text.tolist()])
    return Measured(digest, scores, more)


def compare(before: Mapping[str, Measured], after: Mapping[str, Measured]) -> list[Row]:
    """Return a row for each metric of each set that was measured twice on the same images and captions."""
    rows = []
    for name, ours in after.items():
        theirs = before.get(name)
        for metric, score in ours.scores.items() if theirs and theirs.digest == ours.digest else ():
            earlier = theirs.scores.get(metric) if theirs else None
            if earlier is not None and earlier.shape == score.shape:
                interval = UnitScores((score - earlier).numpy().round(12)).bootstrap(CONFIDENCE)
                rows.append(Row(f"{name} {metric}", len(score), float(earlier.mean()), float(score.mean()), interval))
    return rows


def worse_line(rows: Sequence[Row], start: str) -> str:
    """Return a line about metrics that fell by more than their interval; empty if none did."""
    worse = [row.cells for row in rows if row.interval[1] < 0 and row.what.endswith(JUDGED)]
    told = [f"{what}: {before} -> {after} % {gap.partition(' ')[2]}" for what, _, before, after, gap in worse]
    return f"worse than {start} on {', '.join(told)}; {ADVICE}" if told else ""


def table_of(rows: Sequence[Row], start: str) -> Table:
    """Return the rows as a table for the terminal."""
    columns = [Column("%", overflow="fold"), *(Column(name, justify="right") for name in HEAD)]
    table = Table(*columns, title=f"Before and after; before: {start}", show_edge=False, caption=CAPTION)
    for row in rows:
        table.add_row(*row.cells)
    return table
