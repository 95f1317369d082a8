"""``lit-clip mine``: captions that a model finds similar to an image although they are another's, in a table.

The options mean what they do in sentence-transformers' ``mine_hard_negatives``, whose names are in brackets.
"""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from lit_clip.embedding.encode import EncodingSettings, Work, features_of, image_task, text_task, work_on
from lit_clip.embedding.feature_files import Identity, check_output
from lit_clip.embedding.index import CHUNK, nearest_in
from lit_clip.errors import InputError, require
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import stderr
from lit_clip.tools.hardware import best_device
from ..loading.store import StoreFolder
from ..open_source import open_data, readable_rows
from ..pairs.batches import SourcePairs
from ..pairs.columns import ColumnPairs
from ..pairs.findings import DataOptions
from ..pairs.related_rows import caption_hash
from ..pairs.source import PairSource, Row

IMAGES = 256  # that are compared with all captions at once


@dataclass(frozen=True)
class MiningWindow:
    """Range of an image's nearest captions that are its hard negatives.

    Args:
        num_negatives: of an image, at most; training draws one of them in each epoch.
        skip: leave out this many of the most similar captions, which may fit the image [range_min].
        among: look at this many of the most similar captions, without its own ones [range_max].
        margin: leave out captions that are not less similar than the image's own by that much; of several own ones the
            least similar counts. 0 is a good start [absolute_margin].
        most_similar: leave out captions with a higher cosine similarity [max_score].
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    num_negatives: int = 3
    skip: int = 0
    among: int = 100
    margin: float | None = None
    most_similar: float | None = None

    def __post_init__(self) -> None:
        require(self.num_negatives >= 1, f"--num_negatives {self.num_negatives}: must be at least 1")
        require(self.skip >= 0, f"--skip {self.skip}: must be at least 0")
        fits = self.among >= self.skip + self.num_negatives
        require(fits, f"--among {self.among}: must be at least --skip and --num_negatives together")
        require(self.margin is None or self.margin >= 0, f"--margin {self.margin}: must be at least 0")


def hard_negatives(
    images: np.ndarray, texts: np.ndarray, own: Sequence[set[int]], other: Sequence[set[int]], window: MiningWindow
) -> Iterator[list[tuple[int, float]]]:
    """Yield each image's hard negatives, most similar first: numbers of texts, and cosine similarities.

    Args:
        images: unit features ``[N, D]``.
        texts: unit features ``[M, D]``, of distinct captions.
        own: numbers of each image's captions.
        other: numbers of the captions that may be true of each image besides.
        window: which of the others are negatives.
    """
    device = best_device()
    every = torch.from_numpy(texts).to(device)
    for start in range(0, len(images), IMAGES):
        block = torch.from_numpy(images[start : start + IMAGES]).to(device)
        most = window.among + max(len(own[image] | other[image]) for image in range(start, start + len(block)))
        scores, numbers = (found.cpu().numpy() for found in nearest_in(every.split(CHUNK), block, most))
        for place, image in enumerate(range(start, start + len(block))):
            negative = ~np.isin(numbers[place], list(own[image] | other[image]))
            cosines, candidates = scores[place][negative][: window.among], numbers[place][negative][: window.among]
            highest = np.inf if window.most_similar is None else window.most_similar
            if window.margin is not None:
                highest = min(highest, float((texts[list(own[image])] @ images[image]).min()) - window.margin)
            left = np.flatnonzero(cosines <= highest)[window.skip :][: window.num_negatives]
            yield list(zip(candidates[left].tolist(), cosines[left].tolist(), strict=True))


def mine(
    given: DataOptions,
    *,
    model: str,
    output: str,
    window: MiningWindow = MiningWindow(),  # noqa: B008  # immutable
    keep: str | list[str] | None = None,
    settings: EncodingSettings = EncodingSettings(),  # noqa: B008  # immutable
) -> None:
    """Find hard negatives to train on: captions that a model finds similar to an image but that belong to others.

    The table has the rows of the data with the column negative, a list of captions, the hardest first. Captions of the
    image, of its group, and those that differ from them only in letter case and white space are none. The same command
    resumes an interrupted run.

    Args:
        given: the data.
        data: a table, a folder of images with captions beside them, or anything else whose images are files.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        output: negatives.jsonl.
        window: which of the nearest captions are hard negatives.
        keep: a table of lit-clip inspect, overlap or score, or several; only the pairs that all keep are read and
            written.
        settings: how images and captions are read and encoded.
    """
    path = Path(output)
    check_output(path, [".jsonl"])
    opened = open_data(given, settings.on_error, keep=keep, default_split="train")
    source = opened.every
    if not isinstance(source, ColumnPairs) or not isinstance(source.cells(0).image, str):
        data = ", ".join(given.data)
        raise InputError(f"{data}: its images are not files, which a table could name; unpack them first")
    root = without_secrets(source.root.url if isinstance(source.root, StoreFolder) else str(source.root))
    rows = dict(readable_rows(opened.pairs, settings.on_error))
    require(bool(rows), "none of the pairs can be read")
    with work_on(path, model, opened.stamp(path), settings) as work:
        found = _mined(opened.pairs, rows, work, settings, window)
        if found is not None:
            _write(path, list(rows.values()), found, root)


def _mined(
    source: PairSource, rows: Mapping[int, Row], work: Work, settings: EncodingSettings, window: MiningWindow
) -> dict[str, list[str]] | None:
    """Return the hard negatives of each readable image, by its key; None on ranks other than the first."""
    clip, parts = work.model, work.parts
    texts = {caption_hash(caption): caption for row in rows.values() for caption in row.captions}
    first: dict[str, int] = {}  # row of each image
    for number, row in rows.items():
        first.setdefault(row.key, number)
    images: list[Identity] = [(key, 0, 0) for key in first]
    captions: list[Identity] = [(text, 0, 1) for text in texts.values()]  # no image has that time
    of_images = image_task(clip, SourcePairs(source, list(first.values())), images, title="encoding images")
    of_captions = text_task(clip, list(texts.values()), captions, title="encoding captions")
    tables = features_of(clip, [of_images, of_captions], parts, settings)
    if not tables:
        return None
    image_table, text_table = tables
    keys = [key for key, _, _ in image_table.identities]
    own, other = _true_captions(rows.values(), {hashed: number for number, hashed in enumerate(texts)})
    own_of, other_of = [own[key] for key in keys], [other[key] for key in keys]
    mined = hard_negatives(image_table.features, text_table.features, own_of, other_of, window)
    every = list(texts.values())
    found = {key: [every[number] for number, _ in each] for key, each in zip(keys, mined, strict=True)}
    parts.remove()
    return found


def _true_captions(rows: Iterable[Row], numbers: dict[int, int]) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Return, by image key, the numbers of the image's captions and of its groups' captions."""
    own, of_group, groups = defaultdict(set), defaultdict(set), defaultdict(set)
    for row in rows:
        captions = {numbers[caption_hash(caption)] for caption in row.captions}
        own[row.key] |= captions
        if row.group:
            of_group[row.group] |= captions
            groups[row.key].add(row.group)
    return own, {key: set().union(*(of_group[group] for group in groups[key])) for key in own}


def _write(path: Path, rows: Sequence[Row], found: dict[str, list[str]], root: str) -> None:
    """Write the table, and print how to train on it."""
    grouped = any(row.group for row in rows)
    with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        for row in rows:
            if row.key in found:
                group = {"group": row.group} if grouped else {}
                line = {"image": row.key, "caption": row.captions, **group, "negative": found[row.key]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = [len(each) for each in found.values()]
    none = f"; {counts.count(0):,} have none" if 0 in counts else ""
    stderr().print(f"{path}: {sum(counts):,} hard negatives of {len(found):,} images{none}")
    words = ["lit-clip", "fit", "--data.train", str(path), "--data.columns.negative", "negative"]
    words += ["--data.columns.group", "group"] if grouped else []
    words += ["--data.columns.root", root] if root != str(path.parent) else []
    stderr().print(f"train on them: {shlex.join(words)}")
