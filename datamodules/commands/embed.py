"""``lit-clip embed``: features of images, captions or things, or of the texts in a file."""

import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from lit_clip.embedding.encode import (
    EncodingSettings,
    EncodingTask,
    features_of,
    image_task,
    report_skipped,
    text_task,
    work_on,
)
from lit_clip.embedding.feature_files import (
    FeatureTable,
    Identity,
    StoredFeatures,
    check_keys,
    check_output,
    write_features,
)
from lit_clip.embedding.image_files import FileRows, find_images, identities_of
from lit_clip.embedding.index import combined
from lit_clip.errors import BadSample, InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import Share
from lit_clip.tools.console import plural, stderr
from lit_clip.tools.hashing import stable_hash
from lit_clip.tools.images import OnError
from lit_clip.tools.reading import read_text
from ..open_source import Opened, holds_pairs, open_data, readable_rows
from ..pairs.batches import SourcePairs
from ..pairs.columns import ColumnPairs
from ..pairs.findings import DataOptions
from ..pairs.source import IMAGES_OF, Classes, PairSource

Fields = Literal["image", "caption", "image,caption"]


class _Items(NamedTuple):
    """Items to encode, in tasks that a model makes, and the rows of the file from the features of these tasks."""

    content: str  # text, image, caption or image,caption
    keys: Sequence[str]  # sorted
    tasks: Callable[[CLIP], list[EncodingTask]]  # that of the keys is the last
    rows: Callable[[CLIP, list[FeatureTable]], StoredFeatures]
    root: Path | None = None  # folder that the keys are paths from; None if they are not paths
    stamp: str = ""  # changes with the data as far as identities do not
    things: Sequence[str] = ()  # their names


def embed(
    given: DataOptions,
    *,
    model: str,
    output: str,
    texts: str | None = None,
    fields: Fields = "image",
    text_weight: float | None = None,
    classes: Classes = Classes(),  # noqa: B008  # immutable
    keep: str | list[str] | None = None,
    settings: EncodingSettings = EncodingSettings(),  # noqa: B008  # immutable
    share: str | None = None,
) -> None:
    """Write the features of images or texts to a file.

    Features are of unit length, float32; rows are sorted by key. Each image has one row, each caption its
    own, or all images and captions of a thing have one. The same command resumes an interrupted run.

    Args:
        given: the data.
        data: image files, and folders with everything below, whose keys are their paths as typed; or anything
            else that training takes, such as a table or shards, whose keys are those of its pairs.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        output: features.parquet (columns key and feature) or features.npy (keys in features.keys.json).
        texts: instead of data, a file with one text per line; a text is its own key.
        fields: of the data; image,caption is one feature of all images and captions of a thing, which are those of an
            image, or with --columns.group of a group.
        text_weight: of the captions with image,caption, above 0 and below 1 (0.5); the images have the rest.
        classes: of a folder of classes.
        keep: a table of lit-clip inspect, overlap or score, or several; only the pairs that all keep are encoded.
        settings: how images and texts are read and encoded.
        share: i/n, such as 3/16: encode the third sixteenth, beside other jobs; when all have ended, the same command
            without it joins their work.
    """
    path = Path(output)
    check_output(path)
    one = bool(given.data) != bool(texts)
    require(one, "give either images or --texts; instead of images also a table or other data")
    require(not (texts and fields != "image"), f"--fields {fields}: is for data, not for --texts")
    weighted = fields == "image,caption" or text_weight is None
    require(weighted, f"--text_weight {text_weight}: is for --fields image,caption")
    require(text_weight is None or 0 < text_weight < 1, f"--text_weight {text_weight}: must be above 0 and below 1")
    weight = 0.5 if text_weight is None else text_weight
    items = _texts(Path(texts)) if texts else _items_of(given, fields, classes, keep, settings.on_error, weight)
    check_keys(path, [*items.things, *items.keys])
    encoders = {"image": ["image"], "image,caption": ["image", "text"]}.get(items.content, ["text"])
    with work_on(path, model, f"{items.content} {items.stamp}", settings, Share.typed(share), encoders) as work:
        tables = features_of(work.model, items.tasks(work.model), work.parts, settings)
        if not tables:
            return
        found = items.rows(work.model, tables)
        metadata = work.metadata | found.metadata | ({} if items.root is None else {"root": str(items.root)})
        write_features(path, found.keys, found.features, metadata, found.captions or None, found.images or None)
        report_skipped(items.keys, tables[-1].unreadable, path.with_name(f"{path.name}.skipped.txt"))
        work.parts.remove()
    stderr().print(f"{path}: {found.features.shape[0]} rows of {found.features.shape[1]} numbers")
    if "image" in encoders:
        stderr().print(f"search them: {shlex.join(['lit-clip', 'search', str(path), 'TEXT', '--model', model])}")


def _of_one_kind(
    content: str,
    identities: Sequence[Identity],
    task: Callable[[CLIP], EncodingTask],
    captions: Mapping[Identity, str] | None = None,
    root: Path | None = None,
    stamp: str = "",
) -> _Items:
    """Return images or texts, each with a row of its own."""

    def rows(model: CLIP, tables: list[FeatureTable]) -> StoredFeatures:
        (table,) = tables
        scale = str(float(model.logit_scale.detach().exp()))  # for who learns from the features
        texts = [captions[identity] for identity in table.identities] if captions else []
        keys = [key for key, _, _ in table.identities]
        return StoredFeatures(keys, table.features, texts, [], {"logit_scale": scale, "content": content})

    return _Items(content, [key for key, _, _ in identities], lambda model: [task(model)], rows, root, stamp)


def _texts(path: Path) -> _Items:
    texts = sorted({line.strip() for line in read_text(path, "--texts").splitlines() if line.strip()})
    require(bool(texts), f"{path}: no text in this file; write one per line")
    identities = [(text, 0, 0) for text in texts]
    return _of_one_kind("text", identities, lambda model: text_task(model, texts, identities))


def _images(rows: FileRows | SourcePairs, identities: Sequence[Identity], root: Path | None, stamp: str = "") -> _Items:
    return _of_one_kind("image", identities, lambda model: image_task(model, rows, identities), None, root, stamp)


def _items_of(
    given: DataOptions,
    fields: Fields,
    classes: Classes,
    keep: str | list[str] | None,
    on_error: OnError,
    text_weight: float,
) -> _Items:
    """List image files, or open a source of pairs and list its images, captions or things."""
    pairs = [name for name in given.data if holds_pairs(name)]
    unset = given == DataOptions(given.data) and classes == Classes()
    if not pairs and fields == "image" and unset and keep is None:
        files = find_images(given.data, on_error)
        return _images(FileRows(files), [file.identity for file in files], Path())
    if 0 < len(pairs) < len(given.data) and fields != "image,caption":
        other = next(name for name in given.data if name not in pairs)
        raise InputError(f"{other}: holds images, and {pairs[0]} pairs; embed them into separate files")
    opened = open_data(given, on_error, classes, keep, "train")
    source, every = opened.pairs, opened.every
    root = every.root if isinstance(every, ColumnPairs) and isinstance(every.root, Path) else None
    if fields == "caption":
        texts = dict(sorted(_captions_of(source, on_error).items()))
        task = partial(text_task, texts=list(texts.values()), identities=list(texts))
        return _of_one_kind("caption", list(texts), task, texts, stamp=opened.stamp())
    if fields == "image,caption":
        return _things(opened, root, on_error, text_weight)
    rows = dict(sorted(_rows_of_images(source, on_error).items()))
    images = SourcePairs(source, list(rows.values()))
    return _images(images, identities_of(list(rows), root), root, opened.stamp())


def _rows_of_images(source: PairSource, on_error: OnError) -> dict[str, int]:
    """Return the first row of each image by its key; an unreadable row has its name as key, for the report."""
    rows: dict[str, int] = {}
    for row in range(len(source)):
        try:
            rows.setdefault(source.key(row), row)
        except BadSample as error:
            if on_error == "error":
                raise
            rows.setdefault(error.where, row)
    return rows


def _captions_of(source: PairSource, on_error: OnError) -> dict[Identity, str]:
    """Return the distinct captions of all keys; each identity has the key and the caption's number."""
    texts: dict[Identity, str] = {}
    seen = defaultdict[str, dict[str, None]](dict)
    for _, row in readable_rows(source, on_error):
        for caption in row.captions:
            if caption not in seen[row.key]:
                texts[row.key, len(seen[row.key]), stable_hash(caption)] = caption
                seen[row.key][caption] = None
    require(bool(texts), "no caption could be read")
    return texts


def _things(opened: Opened, root: Path | None, on_error: OnError, text_weight: float) -> _Items:
    """List things: groups, or else images with their captions.

    A thing's feature is the direction of ``text_weight`` times the mean of its captions' unit features, plus the rest
    times that of its images: the more its mean cosine with a query, the nearer it is. One none of whose images can be
    read is left out.
    """
    images_of, captions_of = defaultdict[str, dict[str, None]](dict), defaultdict[str, dict[str, None]](dict)
    rows: dict[str, int] = {}  # the first row of each image
    grouped = False
    for number, row in readable_rows(opened.pairs, on_error):
        name = row.group.removeprefix(IMAGES_OF) or row.key
        images_of[name][row.key] = None
        captions_of[name] |= dict.fromkeys(row.captions)
        rows.setdefault(row.key, number)
        grouped |= bool(row.group)
    keys = sorted(rows)
    texts = sorted({caption for captions in captions_of.values() for caption in captions})

    def tasks(model: CLIP) -> list[EncodingTask]:
        pairs = SourcePairs(opened.pairs, [rows[key] for key in keys])
        # no image has such an identity, as its file has more than a byte
        captions = text_task(model, texts, [(text, 1, stable_hash(text)) for text in texts], "captions")
        return [captions, image_task(model, pairs, identities_of(keys, root), title="images")]

    def features(_: CLIP, tables: list[FeatureTable]) -> StoredFeatures:
        of_text, table = tables
        image_rows = {key: row for row, (key, _, _) in enumerate(table.identities)}
        text_rows = {text: row for row, text in enumerate(texts)}
        found = {name: [key for key in images_of[name] if key in image_rows] for name in sorted(images_of)}
        names = [name for name, readable in found.items() if readable]
        image_ND = _means(table.features, [[image_rows[key] for key in found[name]] for name in names])
        text_ND = _means(of_text.features, [[text_rows[text] for text in captions_of[name]] for name in names])
        if len(names) < len(found):
            lost = plural(len(found) - len(names), "thing")
            stderr().print(f"{lost} left out: none of their images can be read")
        shown = [found[name][0] for name in names] if grouped else []
        metadata = {"content": "image,caption", "text_weight": f"{text_weight:g}"}
        return StoredFeatures(names, combined(image_ND, text_ND, text_weight).numpy(), [], shown, metadata)

    return _Items("image,caption", keys, tasks, features, root, opened.stamp(), list(images_of))


def _means(features: np.ndarray, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([features[each].mean(axis=0) for each in rows]))
