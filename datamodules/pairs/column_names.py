"""Choose the columns of a table to read, and check their names, types and blank texts."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lit_clip.errors import InputError, listed, require
from lit_clip.tools.images import SUFFIXES
from ..loading.bad_samples import BLANK_PATTERN
from .source import SourceOptions, compute

IMAGE_COLUMNS = (
    *("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "file", "img"),
    *("jpg", "jpeg", "png", "webp"),  # encoded images in a parquet file
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence", "sentences")


LONGEST_NAME = 60  # of a column in a message


class ColumnNames(NamedTuple):
    """Names of the columns to read."""

    images: Sequence[str]  # usually one; several columns have an image each of one thing
    captions: Sequence[str]  # usually one
    group: str | None = None
    negative: str | None = None
    weight: str | None = None
    title: str | None = None

    def names(self) -> list[str]:
        names = (*self.images, *self.captions, self.group, self.negative, self.weight, self.title)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_column(
    path: object, found: list[str], wanted: str | None, usual: tuple[str, ...], option: str, image: str | None = None
) -> str:
    """Choose a column: ``wanted``, which the user sets with ``option``, or else the first of ``usual``.

    ``image`` is the column of images, which is not suggested for anything else.
    """
    columns = listed([name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in found], 30)
    if wanted is not None:
        if wanted in found:
            return wanted
        raise InputError(f"{path}: no column {wanted!r}; its columns are {columns}; set {option}")
    lowered = {column.lower(): column for column in reversed(found)}
    for name in usual:
        if name in lowered:
            return lowered[name]
    is_image = usual is IMAGE_COLUMNS
    others = [name for name in found if name != image]
    likely = shlex.quote(others[0 if is_image else -1][:LONGEST_NAME]) if others else "NAME"
    hint = f"for example, set {option} {likely}" if option.startswith("--") else f"set {option}"
    if any(Path(name).suffix.lower() in SUFFIXES for name in found):
        hint = "its first line looks like an image's: put a line with the columns' names above it"
    elif image is not None and not others:
        hint = f"beside the images in {image!r} it has no column"
    if is_image and "url" in lowered:
        hint = "download the images first, for example with img2dataset"
    raise InputError(f"{path}: none of its columns ({columns}) is called {' or '.join(usual[:3])}; {hint}")


def find_columns(path: object, found: list[str], options: SourceOptions) -> ColumnNames:
    """Choose which of the columns ``found`` to read."""
    wanted, option = options.columns, f"{options.option_prefix}columns."
    images = [wanted.image] if isinstance(wanted.image, str) else wanted.image or _numbered(found, IMAGE_COLUMNS)
    names = [find_column(path, found, name, IMAGE_COLUMNS, f"{option}image") for name in images or [None]]
    images = list(dict.fromkeys(names))
    captions = [] if wanted.caption is not None else _numbered(found, CAPTION_COLUMNS)
    caption = find_column(path, found, [*captions, wanted.caption][0], CAPTION_COLUMNS, f"{option}caption", images[0])
    require(caption not in images, f"{path}: column {caption!r} cannot be both the image and the caption")
    optional = {name: getattr(wanted, name) for name in ("group", "negative", "weight", "title")}
    for name, column in optional.items():
        if column is not None:
            find_column(path, found, column, (), f"{option}{name}")
    columns = ColumnNames(images, captions or [caption], **optional)
    refuse_equal(path, found, columns.names())
    return columns


def refuse_equal(path: object, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise :class:`InputError` if two columns have the same wanted name."""
    for name in wanted:
        require(found.count(name) < 2, f"{path}: two columns are called {name!r}; rename one")


def _numbered(found: list[str], usual: tuple[str, ...]) -> list[str]:
    """Return the columns ``caption``, ``caption_1``, ``caption_2``, ... by number; empty if no column has a number."""
    pattern = re.compile(rf"({'|'.join(usual)})(?:[_ -]?(\d+))?", re.IGNORECASE)
    matches = [(match[1].lower(), int(match[2] or -1), name) for name in found if (match := pattern.fullmatch(name))]
    plain = [stem for stem, number, _ in matches if number < 0]
    stem = min(plain, key=usual.index) if plain else next((stem for stem, _, _ in matches), None)
    named = sorted((number, name) for each, number, name in matches if each == stem)
    return [name for _, name in named] if named and named[-1][0] >= 0 else []


def check_types(path: object, schema: pa.Schema, columns: ColumnNames) -> None:
    """Raise :class:`InputError` unless images are paths or encoded images, and captions are texts or lists of texts."""
    for name in columns.images:
        kind = schema.field(name).type if len(columns.images) > 1 else image_type(schema, columns)[0]
        readable = _is_text(kind) or is_encoded(kind)
        require(readable, f"{path}: column {name!r} holds {kind}, neither paths nor images; set columns.image")
    kinds = {str(schema.field(name).type) for name in columns.images}
    unequal = f"{path}: columns {listed(columns.images)} hold {' and '.join(sorted(kinds))}; write them with one type"
    require(len(kinds) == 1, unequal)
    texts = [*(("caption", name) for name in columns.captions), ("negative", columns.negative)]
    for option, name in texts:
        kind = None if name is None else schema.field(name).type
        lists = kind is not None and _is_list(kind) and not (option == "caption" and len(columns.captions) > 1)
        if kind is not None and not _is_text(kind.value_type if lists else kind):
            raise InputError(
                f"{path}: column {name!r} holds {kind}, neither texts nor lists of texts; set columns.{option}"
            )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value) or _is_bytes(value)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_encoded(kind: pa.DataType) -> bool:
    """Return whether a column holds encoded images: bytes, or Hugging Face's struct of bytes and path."""
    return _is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def image_type(schema: pa.Schema, columns: ColumnNames) -> tuple[pa.DataType, bool]:
    """Return the type of an image, and whether a row may have several, in a list or in several columns."""
    kind = schema.field(columns.images[0]).type
    return (kind.value_type, True) if _is_list(kind) else (kind, len(columns.images) > 1)


def images_of(rows: pa.RecordBatch, names: Sequence[str]) -> tuple[np.ndarray, pa.Array]:
    """Return each row's number of images, int64 ``[N]``, and all images in row order, without blank cells.

    A row without an image has a null. The columns are one of lists, or several of single images of one type.
    """
    columns = [rows.column(name) for name in names]
    if _is_list(columns[0].type):
        row_of, images = compute.list_parent_indices(columns[0]).to_numpy(), columns[0].flatten()
    else:
        by_row = np.arange(len(rows) * len(columns)).reshape(len(columns), len(rows)).T.reshape(-1)
        row_of, images = np.repeat(np.arange(len(rows)), len(columns)), pa.concat_arrays(columns).take(pa.array(by_row))
    blank = images.is_null().to_numpy(zero_copy_only=False) if is_encoded(images.type) else blank_mask(images)
    counts = np.bincount(row_of[~blank], minlength=len(rows))
    places = np.insert(np.flatnonzero(~blank), np.cumsum(counts)[counts == 0], -1)
    return np.maximum(counts, 1), images.take(pa.array(places, mask=places < 0))


def blank_mask(captions: pa.Array) -> np.ndarray:
    """Return :func:`is_blank` of each text; a list is blank if all its texts are: bool ``[N]``."""
    if pa.types.is_dictionary(captions.type):
        captions = captions.dictionary_decode()
    if _is_list(captions.type):
        usable = np.zeros(len(captions), dtype=bool)
        usable[compute.list_parent_indices(captions).to_numpy()[~blank_mask(captions.flatten())]] = True
        return ~usable
    if _is_bytes(captions.type):
        captions = captions.view(pa.large_string() if pa.types.is_large_binary(captions.type) else pa.string())
    blank = compute.match_substring_regex(captions, BLANK_PATTERN, ignore_case=True)
    return blank.fill_null(True).to_numpy(zero_copy_only=False)
