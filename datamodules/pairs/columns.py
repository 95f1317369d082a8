"""Pairs in columns of Arrow: no Python object a row, and none of a memory-mapped file in a process's own memory."""

import io
import random
import re
import shlex
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from datamodules.loading.bad_samples import BLANK, check_caption
from datamodules.pairs.source import (
    NO_CAPTION,
    EncodedPair,
    LeftOut,
    Pair,
    PairSource,
    Rows,
    SourceOptions,
    divide_rows,
)
from lit_clip.errors import BadSample, InputError
from lit_clip.tools.images import CHECKED, check_images, open_image

compute: Any = pyarrow.compute  # its functions are made at run time

IMAGE_COLUMNS = (
    *("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "file", "img"),
    *("jpg", "jpeg", "png", "webp"),  # images themselves in a parquet file
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence", "sentences")

_SPACE = r"[\t-\r\x1c-\x1f\x{85}\p{Z}]*"  # what str.strip takes off
_BLANK = f"^{_SPACE}(?:{'|'.join(map(re.escape, sorted(BLANK)))}){_SPACE}$"
_MAY_BE_BLANK = np.zeros(256, dtype=bool)  # by a text's first byte: white space (also of several bytes), or a letter
_MAY_BE_BLANK[[*range(9, 14), *range(0x1C, 0x21), 0xC2, 0xE1, 0xE2, 0xE3, *b"nN<"]] = True


def is_blank(caption: Any) -> bool:
    """Whether a cell says that there is no caption."""
    return caption is None or (isinstance(caption, str | float) and str(caption).strip().lower() in BLANK)


def blank_mask(captions: pa.Array) -> np.ndarray:
    """:func:`is_blank` of every text of a column, or of every row whose list holds no other: bool ``[N]``."""
    if pa.types.is_dictionary(captions.type):
        captions = captions.dictionary_decode()
    if _is_list(captions.type):
        usable = np.zeros(len(captions), dtype=bool)
        usable[compute.list_parent_indices(captions).to_numpy()[~blank_mask(captions.flatten())]] = True
        return ~usable
    blank = captions.is_null().to_numpy(zero_copy_only=False)
    candidates = np.flatnonzero(~blank & _may_be_blank(captions))
    if len(candidates):
        texts = captions.take(pa.array(candidates))
        if _is_bytes(texts.type):
            texts = texts.view(pa.large_string() if pa.types.is_large_binary(texts.type) else pa.string())
        matched = compute.match_substring_regex(texts, _BLANK, ignore_case=True)
        blank[candidates] = matched.to_numpy(zero_copy_only=False)
    return blank


def _may_be_blank(texts: pa.Array) -> np.ndarray:
    """A cheap look at lengths and first bytes that leaves the regular expression few texts: bool ``[N]``."""
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    _, offsets, data = texts.buffers()
    if data is None or offsets is None or not data.size:
        return np.ones(len(texts), dtype=bool)
    bounds = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(data, dtype=np.uint8)
    first = content[np.minimum(bounds[:-1], len(content) - 1)]
    return _MAY_BE_BLANK[first] | (bounds[1:] == bounds[:-1])


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        is_kind(value)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column holds images themselves: bytes, or Hugging Face's struct of bytes and path."""
    return _is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


class Columns(NamedTuple):
    """The columns of a table that are read."""

    image: str
    caption: str
    group: str | None = None

    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(name for name in self if name is not None))


def find_column(path: object, found: list[str], wanted: str | None, usual: tuple[str, ...], argument: str) -> str:
    """One column of a table that has the columns ``found``.

    Args:
        path: named in errors.
        found: names.
        wanted: what the user said; None: the first of ``usual`` that is there, in whatever case.
        usual: names to look for.
        argument: by which the user says so, as an option if it is typed.

    Raises:
        InputError: it is not there.
    """
    if wanted is not None:
        if wanted in found:
            return wanted
        raise InputError(f"{path}: no column {wanted!r}; its columns are {', '.join(found)}; set {argument}")
    lowered = {column.lower(): column for column in reversed(found)}
    for name in usual:
        if name in lowered:
            return lowered[name]
    is_image = argument.endswith("image_column")
    likely = shlex.quote(found[0 if is_image else -1]) if found else "NAME"
    hint = f"give {argument} {likely}, say" if argument.startswith("--") else f"set {argument}"
    if is_image and "url" in lowered:
        hint = "img2dataset, say, downloads the images of such a table"
    raise InputError(f"{path}: none of its columns ({', '.join(found)}) is called {' or '.join(usual[:3])}; {hint}")


def find_columns(path: object, found: list[str], options: SourceOptions) -> Columns:
    """Those of the image, the caption and the group of a table that has the columns ``found``.

    Raises:
        InputError: one that is named is not there, or none has a usual name.
    """
    image = find_column(path, found, options.image_column, IMAGE_COLUMNS, f"{options.typed}image_column")
    caption = find_column(path, found, options.caption_column, CAPTION_COLUMNS, f"{options.typed}caption_column")
    if image == caption:
        raise InputError(f"{path}: column {image!r} cannot be both the image and the caption")
    if options.group_column is not None:
        find_column(path, found, options.group_column, (), f"{options.typed}group_column")
    return Columns(image, caption, options.group_column)


def check_types(path: object, schema: pa.Schema, columns: Columns) -> None:
    """Raise :class:`InputError` unless images are paths or images, and captions are texts or lists of texts."""
    image, caption = schema.field(columns.image).type, schema.field(columns.caption).type
    if not (_is_text(image) or is_encoded(image)):
        raise InputError(f"{path}: column {columns.image!r} holds {image}, neither paths nor images; set image_column")
    if not _is_text(caption.value_type if _is_list(caption) else caption):
        raise InputError(
            f"{path}: column {columns.caption!r} holds {caption}, neither texts nor lists of texts; set caption_column"
        )


def group_name(value: Any) -> str:
    """What a cell calls a row's group; numbers are names too."""
    name = "" if value is None else str(value).strip()
    return "" if name.lower() in BLANK else name


class Cells(NamedTuple):
    """What a row says: the image as a path or as bytes (or Hugging Face's struct of both), captions, and its names.

    Attributes:
        image: of the image column.
        caption: of the caption column: a text or a list of texts.
        group: as :func:`group_name` makes it.
        where: how the user knows the row.
        key: of an image that is no file of its own.
    """

    image: Any
    caption: Any
    group: str
    where: str
    key: str


class ColumnPairs(PairSource):
    """Pairs of which columns hold the paths of images, or the images, and the captions.

    Args:
        path: named in errors.
        root: where relative image paths start.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self._left_out = LeftOut()

    @abstractmethod
    def cells(self, index: int) -> Cells:
        """What row ``index`` of the usable ones says.

        Raises:
            BadSample: it is no text.
        """

    @property
    def left_out(self) -> LeftOut:
        return self._left_out

    def image_paths(self) -> pa.ChunkedArray | None:
        """The paths of all images as written, in order; None: the images are in the table."""
        return None

    def load(self, index: int, rng: random.Random | None) -> Pair:
        cells = self.cells(index)
        captions = _captions(cells)
        source, key = self._image(cells)
        caption = captions[0] if rng is None or len(captions) == 1 else rng.choice(captions)
        return Pair(open_image(source, cells.where), caption, key, cells.group)

    def read(self, index: int) -> EncodedPair:
        cells = self.cells(index)
        source, key = self._image(cells)
        try:
            data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
        except FileNotFoundError as error:
            raise BadSample(cells.where, "missing image", f"no such image file: {source}") from error
        except OSError as error:
            raise BadSample(cells.where, "broken image", f"cannot read image {source} ({error.strerror})") from error
        return EncodedPair(data, _captions(cells), key, cells.group, cells.where)

    def captions(self, index: int) -> list[str]:
        return _captions(self.cells(index))

    def _image(self, cells: Cells) -> tuple[Path | io.BytesIO, str]:
        """Where the image of a row is, and its key."""
        value = cells.image
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if isinstance(value, bytes):
            return io.BytesIO(value), cells.key
        if not isinstance(value, str) or not value.strip():
            raise BadSample(cells.where, "missing image", "no image; name one or remove the row")
        return self.root / value.strip(), value.strip()

    def check(self) -> None:
        some = (self.cells(index) for index in range(0, len(self), max(1, len(self) // CHECKED)))
        files = [(self._image(cells)[0], cells.where) for cells in some if not isinstance(cells.image, bytes | dict)]
        check_images([(source, where) for source, where in files if isinstance(source, Path)])

    def divide(self, share: float, seed: int) -> tuple[PairSource, PairSource]:
        paths = self.image_paths()
        if paths is None:
            return divide_rows(self, share, seed)
        images = compute.unique(paths)
        if len(images) < 2:
            raise InputError(f"{self.path}: one image cannot be divided; give data.init_args.val")
        images = images.take(compute.sort_indices(images))
        chosen = random.Random(seed).sample(range(len(images)), max(1, int(share * len(images))))
        kept = compute.is_in(paths, value_set=images.take(pa.array(chosen)))
        held_out = kept.to_numpy(zero_copy_only=False).astype(bool)
        return Rows(self, np.flatnonzero(~held_out)), Rows(self, np.flatnonzero(held_out))


def _captions(cells: Cells) -> list[str]:
    """All captions of a row that are not blank."""
    values = cells.caption if isinstance(cells.caption, list) else [cells.caption]
    texts = [_decoded(value, cells.where) for value in values]
    captions = [check_caption(text, cells.where) for text in texts if not is_blank(text)]
    if not captions:
        raise BadSample(cells.where, NO_CAPTION, "no caption; write one or remove it")
    return captions


def _decoded(value: Any, where: str) -> Any:
    """A value of a column of bytes as text, any other as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"the caption is not UTF-8 text ({error.reason} at its byte {error.start})"
        raise BadSample(where, "caption is no text", what) from error


class TablePairs(ColumnPairs):
    """The pairs of an Arrow table with columns ``image``, ``caption``, ``number`` and perhaps ``group``.

    Args:
        table: one row a pair, all of them usable.
        path: the file that it was made of, named in errors.
        root: where relative image paths start.
        label: what ``number`` counts in that file.
        mapped: the Arrow file that ``table`` maps, if it does.
        left_out: rows of the file that are not in the table.
    """

    def __init__(
        self,
        table: pa.Table,
        path: Path,
        root: Path,
        label: str = "row",
        mapped: Path | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        super().__init__(path, root)
        self._table, self.label, self._mapped = table, label, mapped
        self._left_out = left_out or LeftOut()

    def __getstate__(self) -> dict[str, Any]:
        """A mapped table is opened again where the source is sent, not sent with it."""
        state = dict(self.__dict__)
        return {**state, "_table": None} if self._mapped else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._mapped:
            self._table = map_table(self._mapped)

    def __len__(self) -> int:
        return self._table.num_rows

    def image_paths(self) -> pa.ChunkedArray | None:
        return self._table["image"]

    def cells(self, index: int) -> Cells:
        row = {name: self._table[name][index].as_py() for name in self._table.column_names}
        where = f"{self.path} {self.label} {row['number']}"
        return Cells(row["image"], row["caption"], row.get("group") or "", where, "")


def map_table(path: Path) -> pa.Table:
    """An Arrow file as a table whose memory is the file's."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()
