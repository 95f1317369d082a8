"""``lit-clip embed``: features of images, captions or things, or of the texts in a file."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from lit_clip.embedding.encode import EncodingSettings, features_of, image_task, report_skipped, text_task, work_on
from lit_clip.embedding.feature_files import Identity, check_keys, check_output, write_features
from lit_clip.embedding.image_files import FileRows, find_images, identities_of
from lit_clip.embedding.precision import check_precision
from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.console import plural, stderr
from lit_clip.tools.hashing import stable_hash
from lit_clip.tools.images import OnError
from lit_clip.tools.shares import Share
from lit_clip.tools.text_files import read_text
from ..open_source import holds_pairs
from ..pairs.batches import SourcePairs
from ..pairs.columns import ColumnPairs
from ..pairs.findings import DataOptions
from ..pairs.source import Classes, PairSource
from .opened import Opened, open_data, readable_rows
from .things import Things, features_of_things

Fields = Literal["image", "caption", "image,caption"]


class _Items(NamedTuple):
    """Items to encode, sorted by key."""

    identities: Sequence[Identity]  # distinct; they start with the key, and change with the item
    images: FileRows | SourcePairs | None = None  # None for texts
    texts: Sequence[str] = ()  # empty for images
    content: str = "image"  # or text, or caption
    root: Path | None = None  # folder that the keys are paths from; None if they are not paths
    stamp: str = ""  # changes with the data as far as the identities do not


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
    check_precision(settings.precision, settings.accelerator)
    together = fields == "image,caption"
    require(not (texts and fields != "image"), f"--fields {fields}: is for data, not for --texts")
    require(together or text_weight is None, f"--text_weight {text_weight}: is for --fields image,caption")
    require(text_weight is None or 0 < text_weight < 1, f"--text_weight {text_weight}: must be above 0 and below 1")
    if together:
        opened = open_data(given, settings.on_error, classes, keep, "train")
        weight = 0.5 if text_weight is None else text_weight
        _embed_things(opened, model, path, settings, Share.typed(share), weight)
        return
    captions = fields == "caption"
    items = _items_of_texts(Path(texts)) if texts else _items_of(given, captions, classes, keep, settings.on_error)
    check_keys(path, [key for key, _, _ in items.identities])
    if items.images is None:
        settings = replace(settings, num_workers=0)  # tokenizing is not worth a process
    _embed(items, model, path, settings, Share.typed(share))


def _embed(items: _Items, model: str, path: Path, settings: EncodingSettings, share: Share) -> None:
    """Encode items and write their features; ranks other than the first only encode."""
    encoders = ["image"] if items.images is not None else ["text"]
    stamp = f"{items.content} {items.stamp}"
    with work_on(path, model, stamp, settings, share, encoders) as (clip, parts, metadata):
        if items.images is None:
            task = text_task(clip, items.texts, items.identities)
        else:
            task = image_task(clip, items.images, items.identities)
        table = features_of(clip, task, parts, settings)
        if table is None:
            return
        metadata["logit_scale"] = str(float(clip.logit_scale.detach().exp()))  # for who learns from the features
        metadata |= {"content": items.content} | ({"root": str(items.root)} if items.root is not None else {})
        texts_of = dict(zip(items.identities, items.texts, strict=True)) if items.content == "caption" else {}
        captions = [texts_of[identity] for identity in table.identities] if texts_of else None
        write_features(path, [key for key, _, _ in table.identities], table.features, metadata, captions)
        keys = [key for key, _, _ in items.identities]
        report_skipped(keys, table.unreadable, path.with_name(f"{path.name}.skipped.txt"))
        parts.remove()
        _tell(path, table.features.shape, model, searched=items.content == "image")


def _embed_things(
    opened: Opened, model: str, path: Path, settings: EncodingSettings, share: Share, text_weight: float
) -> None:
    """Write a feature of each thing; ranks other than the first only encode."""
    root = _root(opened)
    things = Things.of(opened.pairs, root, settings.on_error)
    check_keys(path, [*things.by_name, *things.rows])
    with work_on(path, model, f"things {opened.stamp()}", settings, share) as work:
        found = features_of_things(work, opened.pairs, things, settings, text_weight)
        if found is None:
            return
        metadata = work.metadata | {"content": "image,caption", "text_weight": f"{text_weight:g}"}
        metadata |= {"root": str(root)} if root is not None else {}
        images = found.images if things.grouped else None
        write_features(path, found.names, found.features, metadata, images=images)
        report_skipped(found.keys, found.unreadable, path.with_name(f"{path.name}.skipped.txt"))
        work.parts.remove()
        lost = len(things.by_name) - len(found.names)
        if lost:
            stderr().print(f"{plural(lost, 'thing')} left out: none of their images can be read")
        _tell(path, found.features.shape, model, searched=True)


def _tell(path: Path, shape: tuple[int, ...], model: str, searched: bool) -> None:
    stderr().print(f"{path}: {shape[0]} rows of {shape[1]} numbers")
    if searched:
        stderr().print(f"search them: {shlex.join(['lit-clip', 'search', str(path), 'TEXT', '--model', model])}")


def _root(opened: Opened) -> Path | None:
    """Return the folder from which image keys are paths; None if keys are not paths."""
    every = opened.every
    return every.root if isinstance(every, ColumnPairs) and isinstance(every.root, Path) else None


def _items_of_texts(path: Path) -> _Items:
    texts = sorted({line.strip() for line in read_text(path, "--texts").splitlines() if line.strip()})
    require(bool(texts), f"{path}: no text in this file; write one per line")
    return _Items([(text, 0, 0) for text in texts], texts=texts, content="text")


def _items_of(
    given: DataOptions, captions: bool, classes: Classes, keep: str | list[str] | None, on_error: OnError
) -> _Items:
    """List image files, or open a source of pairs and list its images or captions."""
    pairs = [name for name in given.data if holds_pairs(name)]
    unset = given == DataOptions(given.data) and classes == Classes()
    if not pairs and not captions and unset and keep is None:
        files = find_images(given.data, on_error)
        return _Items([file.identity for file in files], FileRows(files), root=Path())
    if 0 < len(pairs) < len(given.data):
        other = next(name for name in given.data if name not in pairs)
        raise InputError(f"{other}: holds images, and {pairs[0]} pairs; embed them into separate files")
    opened = open_data(given, on_error, classes, keep, "train")
    source, root, stamp = opened.pairs, _root(opened), opened.stamp()
    if captions:
        texts = _captions_of(source, on_error)
        identities = sorted(texts)
        return _Items(identities, None, [texts[each] for each in identities], "caption", stamp=stamp)
    rows = _rows_of_images(source, on_error)
    identities = identities_of(sorted(rows), root)
    return _Items(identities, SourcePairs(source, [rows[key] for key in sorted(rows)]), root=root, stamp=stamp)


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
    seen: dict[str, dict[str, None]] = {}
    for _, key, captions, _ in readable_rows(source, on_error):
        known = seen.setdefault(key, {})
        for caption in captions:
            if caption not in known:
                texts[key, len(known), stable_hash(caption)] = caption
                known[caption] = None
    require(bool(texts), "no caption could be read")
    return texts
