"""Features of things: one feature for all images and captions of a group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lit_clip.embedding.encode import EncodingSettings, Work, check_complete, encode, image_task, text_task
from lit_clip.embedding.feature_files import FeatureTable, Identity, collect
from lit_clip.embedding.image_files import identities_of
from lit_clip.embedding.index import combined
from lit_clip.embedding.reading import UnreadableRow
from lit_clip.tools.hashing import stable_hash
from lit_clip.tools.images import OnError
from ..pairs.batches import SourcePairs
from ..pairs.source import IMAGES_OF, PairSource
from .opened import readable_rows


@dataclass
class Thing:
    """The distinct image keys and captions of a thing, in row order."""

    images: dict[str, None] = field(default_factory=dict)
    captions: dict[str, None] = field(default_factory=dict)


@dataclass
class Things:
    """Things by name: the group, or else the key of the first image in their row."""

    by_name: dict[str, Thing]
    rows: dict[str, int]  # the first row of each image
    root: Path | None  # folder that keys of images are paths from; None if they are not paths
    grouped: bool = False  # whether a name is a group

    @classmethod
    def of(cls, source: PairSource, root: Path | None, on_error: OnError) -> "Things":
        """List the things of pairs; read no image if the source allows this."""
        things = cls({}, {}, root)
        for row, key, captions, group in readable_rows(source, on_error):
            thing = things.by_name.setdefault(group.removeprefix(IMAGES_OF) or key, Thing())
            thing.images[key] = None
            thing.captions |= dict.fromkeys(captions)
            things.rows.setdefault(key, row)
            things.grouped |= bool(group)
        return things


class ThingFeatures(NamedTuple):
    """Features of all readable things."""

    names: list[str]  # of N things, sorted
    features: np.ndarray  # float32 [N, D], of unit length
    images: list[str]  # the first readable image of each
    keys: Sequence[str]  # of all images
    unreadable: Sequence[UnreadableRow]  # numbers of keys that could not be read


def features_of_things(
    work: Work, source: PairSource, things: Things, settings: EncodingSettings, text_weight: float
) -> ThingFeatures | None:
    """Encode and mix images and captions; None on ranks other than the first, and for a share of the work.

    All ranks call this. A thing's feature is the direction of ``text_weight`` times the mean of its captions' unit
    features, plus the rest times that of its images: the more its mean cosine with a query, the nearer it is. One
    none of whose images can be read is left out.
    """
    model, parts, _ = work
    keys = sorted(things.rows)
    texts = sorted({caption for thing in things.by_name.values() for caption in thing.captions})
    rows = SourcePairs(source, [things.rows[key] for key in keys])
    images = image_task(model, rows, identities_of(keys, things.root))
    captions = text_task(model, texts, [_of_text(text) for text in texts])
    unreadable = encode(model, images, parts, settings, title="images")
    encode(model, captions, parts, replace(settings, num_workers=0), title="captions")
    if unreadable is None or parts.shared():
        return None
    table = collect(images.identities, parts.read(FeatureTable.of))
    check_complete(len(table.identities), len(keys), unreadable)
    of_text = collect(captions.identities, parts.read(FeatureTable.of))
    check_complete(len(of_text.identities), len(texts), [], "captions")
    image_rows = {key: row for row, (key, _, _) in enumerate(table.identities)}
    text_rows = {text: row for row, text in enumerate(texts)}
    names, of_images, of_texts = list[str](), list[np.ndarray](), list[np.ndarray]()
    for name, thing in sorted(things.by_name.items()):
        readable = [image_rows[key] for key in thing.images if key in image_rows]
        if readable:
            names.append(name)
            of_images.append(table.features[readable].mean(axis=0))
            of_texts.append(of_text.features[[text_rows[caption] for caption in thing.captions]].mean(axis=0))
    image_ND, text_ND = (torch.from_numpy(np.stack(means)) for means in (of_images, of_texts))
    mixed = combined(image_ND, text_ND, text_weight)
    shown = [_first(things.by_name[name], image_rows) for name in names]
    return ThingFeatures(names, mixed.numpy(), shown, keys, unreadable)


def _of_text(text: str) -> Identity:
    return text, 1, stable_hash(text)  # no image's, whose file has more than a byte


def _first(thing: Thing, readable: Mapping[str, int]) -> str:
    return next(key for key in thing.images if key in readable)
