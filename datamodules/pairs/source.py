"""Source of (image, caption) pairs: its interface, its options, and sources with some of its rows."""

import io
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute
from PIL import Image

from lit_clip.errors import BadSample, InputError, listed, require
from lit_clip.tools.console import plural
from lit_clip.tools.hashing import hash64
from lit_clip.tools.images import FIX_HINT, OnError, image_for_model
from lit_clip.tools.levels import eight_bits, keep_levels
from ..loading.sampling import permutation
from ..loading.store import StoreFolder, is_remote

compute: Any = pyarrow.compute  # its functions are defined at run time

NO_CAPTION = "no caption"  # the reason, the same for samples that turn out bad when loaded
LISTED = 1000  # left-out rows that are listed one by one
COLUMNS = ("image", "caption", "group", "negative", "weight", "title")  # of :class:`Columns`
IMAGES_OF = "images of "  # with a row's first image, the group of the images that it lists
DELIMITED = (".csv", ".tsv", ".txt")
JSON_LINES = (".jsonl", ".ndjson")
MAKE_AGAIN = "write the table again"  # what to do about a table of decisions that does not fit
LongCaptions = Literal["truncate", "sentences"]
PerImage = Literal["all", "one", "together"]
PerThing = Literal["one", "two", "all", "together"] | None


class Row(NamedTuple):
    """A row as stored."""

    image: Any  # a PIL image, a path, the content of a file, or a function that returns one of these
    captions: list[str]  # at least one, none of them blank
    key: str  # identifies the image
    group: str = ""  # of duplicates
    where: str = ""  # its name in messages, such as "captions.csv row 7"
    negatives: Sequence[str] = ()  # captions that do not fit the image although they are similar
    extra: Mapping[str, Any] = {}  # tensors of one shape, for losses

    def opened(self) -> Image.Image | Path | bytes:
        """Return the image as a decoded image, a path or the content of a file."""
        image = self.image() if callable(self.image) else self.image
        if isinstance(image, Image.Image):
            image.load()  # Pillow opens files lazily
        elif not isinstance(image, str | Path | bytes):
            kind = type(image).__name__
            raise InputError(f"{self.where}: image() returned a {kind}, not a PIL image, path or bytes")
        return Path(image) if isinstance(image, str) else image

    def decoded(self) -> Image.Image:
        """Decode the image for a model."""
        with opening_files(self.where):
            image = self.opened()
            if isinstance(image, Image.Image):
                return keep_levels(image, self.where)
            return image_for_model(io.BytesIO(image) if isinstance(image, bytes) else image, self.where)

    def content(self) -> bytes:
        """Return the content of the image's file; a PIL image becomes a PNG."""
        with opening_files(self.where):
            image = self.opened()
            if isinstance(image, Image.Image):
                file = io.BytesIO()
                plain = image.mode == "I;16" and not hasattr(image, "tag_v2")  # a PNG holds it as it is
                (image if plain else eight_bits(image, self.where)).save(file, "PNG")
                return file.getvalue()
            return image if isinstance(image, bytes) else image.read_bytes()


@contextmanager
def opening_files(where: str, kind: str = "image file") -> Iterator[None]:
    """Turn an ``OSError`` into a bad sample."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadSample(where, "missing image", f"no such {kind}: {error.filename or error}") from error
    except OSError as error:
        raise BadSample(where, "broken image", f"cannot read its image ({error}){FIX_HINT}") from error


class Pair(NamedTuple):
    """An image and one of the captions of its row."""

    image: Any  # a PIL image; a tensor once it is a sample; None if only the texts were drawn
    caption: str
    key: str
    group: str = ""
    negative: str = ""
    extra: Mapping[str, Any] = {}  # as of a row; an image is augmented as the pair's
    more: "Sequence[Pair] | None" = None  # the image's other captions; None if a batch has images of one caption
    more_images: Sequence[Any] = ()  # other images of the same thing, whose features are averaged in training


Found = TypeVar("Found", Row, Pair)


class SkippedRows:
    """Rows left out when a source was opened: counts by reason, and (where, reason) of the first rows."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.listed: list[tuple[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.listed) < LISTED:
            self.listed.append((where, reason))

    def update(self, other: "SkippedRows") -> None:
        self.counts.update(other.counts)
        self.listed = [*self.listed, *other.listed][:LISTED]

    def __str__(self) -> str:
        """Return a text such as ``3 rows without a caption``; empty if no row was left out."""
        texts = {NO_CAPTION: "without a caption"}
        return ", ".join(
            f"{plural(count, 'row')} {texts.get(reason, f'({reason})')}" for reason, count in self.counts.items()
        )


class PairSource(ABC):
    """Numbered rows of images and captions; a row that cannot be read raises :class:`BadSample` in every method.

    Opening one reads no image. Data workers are sent a copy, so it holds no Python object per row.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Return a row, without reading the image where the source can."""

    def key(self, index: int) -> str:
        return self.row(index).key

    def captions(self, index: int) -> list[str]:
        return self.row(index).captions

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        """Draw one of a row's captions and negatives with ``rng``; None takes the first caption, and no negative."""
        row = self.row(index)
        image = row.decoded() if decoded else None
        caption = row.captions[0] if rng is None else one_of(row.captions, rng)
        negative = one_of(row.negatives, rng) if rng and row.negatives else ""
        return Pair(image, caption, row.key, row.group, negative, row.extra)

    def load(self, index: int, rng: random.Random | None) -> Pair:
        """Draw a pair, see :meth:`draw`, with its image."""
        return self.draw(index, rng, decoded=True)

    def text(self, index: int, rng: random.Random | None) -> Pair:
        """Draw what :meth:`load` would, without the image."""
        return self.draw(index, rng, decoded=False)

    def read(self, index: int) -> Row:
        """Return a row with the content of its image's file."""
        row = self.row(index)
        return row._replace(image=row.content())

    def image_identity(self, index: int) -> object:
        """Return a hashable identity of an image's content, with the same ``repr`` in every run."""
        return hash64(self.row(index).content())

    @property
    def pairs_per_epoch(self) -> int:
        """Number of pairs in an epoch."""
        return len(self)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Return the rows of an epoch in their order, a pure function: int ``[pairs_per_epoch]``."""
        return permutation(len(self), epoch, seed)

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Write the files that random access needs, unless they exist; called by one process per machine."""

    def check(self) -> None:  # noqa: B027  # nothing to check where images are in the source
        """Read the headers of some evenly spread images, to fail before training starts."""

    @cached_property
    def left_out(self) -> SkippedRows:
        """Rows left out when the source was opened."""
        return SkippedRows()

    @cached_property
    def versions(self) -> dict[str, str]:
        """The version of each opened address (without secrets); opening that version gives the same rows."""
        return {}

    def image_names(self) -> pa.ChunkedArray | Sequence[str] | None:
        """Return the names of all images, in order, equal for equal images; None: every row has another image."""
        return None

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        """Return names of the things shown, in order: a group's rows, or the images of a table's row, are one thing.

        With ``rows`` the latter alone. None: each pair shows another thing, or the source does not tell.
        """
        return None

    def divide(self, share: float, seed: int, groups: bool = False) -> "tuple[PairSource, PairSource]":
        """Divide the pairs in two: the second part has about ``share`` of the images, and no image is in both.

        Nor are images that one row lists, and with ``groups`` rows of one group.
        """
        names = _shown_together(self, groups)
        images = None if names is None else compute.unique(names)
        count, where = len(self if images is None else images), getattr(self, "path", type(self).__name__)
        require(count > 1, f"{where}: one image cannot be divided; set data.val")
        chosen = random.Random(seed).sample(range(count), max(1, int(share * count)))
        held_out = np.zeros(count, dtype=bool)
        held_out[chosen] = True
        if images is not None:
            images = images.take(compute.sort_indices(images)).filter(pa.array(held_out))
            held_out = compute.is_in(names, value_set=images).to_numpy().astype(bool)
        return Rows(self, np.flatnonzero(~held_out)), Rows(self, np.flatnonzero(held_out))


def one_of(texts: Sequence[str], rng: random.Random) -> str:
    """Draw a text; one alone is not drawn."""
    return texts[0] if len(texts) == 1 else rng.choice(texts)


def arrow_image_names(source: PairSource) -> pa.ChunkedArray | None:
    """Return the names of all images as Arrow values; None: every row has another image."""
    names = source.image_names()
    if names is None or isinstance(names, pa.ChunkedArray):
        return names
    return pa.chunked_array([pa.array([str(each).encode("utf-8", "surrogateescape") for each in names], pa.binary())])


def numbered(names: pa.ChunkedArray) -> np.ndarray:
    """Number names in order of appearance, int32 ``[N]``."""
    return compute.index_in(names, value_set=compute.unique(names)).to_numpy().astype(np.int32)


def row_names(numbers: np.ndarray) -> pa.Array:
    """Return names for rows that no group has."""
    return compute.binary_join_element_wise("\0row", pa.array(numbers).cast(pa.string()), "")


def thing_names(groups: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return the thing of each row from its group; a blank group is a thing by itself; None if all are blank."""
    blank = compute.equal(groups, "")
    if compute.all(blank).as_py():
        return None
    return compute.if_else(blank, row_names(np.arange(len(groups))), groups)


def _shown_together(source: PairSource, groups: bool) -> pa.ChunkedArray | None:
    """Return a name for each row, equal for rows linked by shared images or things, also through other rows."""
    names, things = arrow_image_names(source), source.things(rows=not groups)
    if names is None or things is None:
        return names if things is None else things
    numbers = numbered(names), numbered(things)
    label, before = numbers[1], None
    while before is None or not np.array_equal(label, before):
        before = label
        for number in numbers:
            lowest = np.full(int(number.max()) + 1, len(label), np.int32)
            np.minimum.at(lowest, number, label)
            label = lowest[number]
    return pa.chunked_array([pa.array(label)])


class Derived(PairSource):
    """Rows of other sources: a selection, another order, or changed ones; by default all rows of the first source."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = list(sources)
        self.source = self.sources[0]

    def __len__(self) -> int:
        return len(self.source)

    def locate(self, index: int) -> tuple[PairSource, int]:
        """Return the source of a row, and the row's number there."""
        return self.source, index

    def renamed(self, index: int, key: str) -> str:
        return key

    def changed(self, index: int, found: Found) -> Found:
        """Return what replaces the source's row or pair."""
        return found._replace(key=self.renamed(index, found.key))

    def row(self, index: int) -> Row:
        source, row = self.locate(index)
        return self.changed(index, source.row(row))

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        source, row = self.locate(index)
        pair = self.changed(index, source.draw(row, rng, decoded))
        return pair._replace(more=[self.changed(index, each) for each in pair.more]) if pair.more else pair

    def key(self, index: int) -> str:
        source, row = self.locate(index)
        return self.renamed(index, source.key(row))

    def image_identity(self, index: int) -> object:
        source, row = self.locate(index)
        return source.image_identity(row)

    def prepare(self) -> None:
        for source in self.sources:
            source.prepare()

    def check(self) -> None:
        for source in self.sources:
            source.check()

    @cached_property
    def left_out(self) -> SkippedRows:
        total = SkippedRows()
        for source in self.sources:
            total.update(source.left_out)
        return total

    @cached_property
    def versions(self) -> dict[str, str]:
        return {name: version for source in self.sources for name, version in source.versions.items()}


class Rows(Derived):
    """Some rows of a source, ascending, int ``[N]``."""

    def __init__(self, source: PairSource, rows: np.ndarray) -> None:
        super().__init__([source])
        self.rows = rows.astype(np.int32 if len(source) < 2**31 else np.int64, copy=False)

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, index: int) -> tuple[PairSource, int]:
        return self.source, int(self.rows[index])

    def image_names(self) -> pa.ChunkedArray | None:
        names = arrow_image_names(self.source)
        return None if names is None else names.take(pa.array(self.rows))

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        names = self.source.things(rows)
        return None if names is None else names.take(pa.array(self.rows))

    def order(self, epoch: int, seed: int) -> np.ndarray:
        position = np.full(len(self.source), -1, dtype=self.rows.dtype)  # row of ``source`` -> row of this
        position[self.rows] = np.arange(len(self.rows), dtype=self.rows.dtype)
        ours = position[self.source.order(epoch, seed)]
        ours = ours[ours >= 0]
        require(len(ours) == len(self), "a mixture repeats rows; filter or divide its parts, not the mixture")
        return ours


@dataclass(frozen=True)
class Columns:
    """Columns of a table, or fields of the ``.json`` files in tar shards.

    Attributes:
        image: paths or encoded images, or several columns with an image each of one thing, of which some may be blank;
            detected automatically by default.
        caption: texts or lists of texts; detected automatically by default.
        group: names the group of duplicates, such as a product.
        negative: hard negative captions, texts or lists of texts, of which training draws one; blank for none.
        weight: how much a pair counts in :class:`lit_clip.losses.WeightedContrastive`, a number of at least 0.
        title: a text that belongs to the image, for :class:`lit_clip.training.losses.WithTitle`.
        root: folder or address in a store that relative paths of images start from; by default the table's.
    """

    image: str | list[str] | None = None
    caption: str | None = None
    group: str | None = None
    negative: str | None = None
    weight: str | None = None
    title: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class CaptionOptions:
    """Which captions are read, and how much of each.

    Attributes:
        long: what becomes of captions with more tokens than the model reads: ``truncate`` them, or read ``sentences``
            of them that fit, others in each epoch (validation: the first ones).
        per_image: of an image with several rows, each epoch trains on ``all`` of them, or on ``one``, others in the
            next epochs, so that each is used once before any is used again. ``together``: a step has an image once,
            with all captions of its rows as positives; batches then count images. Validation has all rows.
    """

    long: LongCaptions = "truncate"
    per_image: PerImage = "all"

    def __post_init__(self) -> None:
        policies = get_args(LongCaptions)
        require(self.long in policies, f"data.captions.long: {self.long!r} must be one of {', '.join(policies)}")
        known = self.per_image in ("all", "one", "together")
        require(known, f"data.captions.per_image: {self.per_image!r} must be 'all', 'one' or 'together'")


@dataclass(frozen=True)
class ImageOptions:
    """Which images of a thing are read.

    Attributes:
        per_thing: of a thing with several images, each epoch trains on ``one``, others in the next epochs, so that each
            is used once before any is used again, or on ``all`` of them, each with the texts of its row. ``two``: on
            one, and a second one at random, for :class:`lit_clip.training.losses.OtherImageContrastive`; where
            there is none, on the image augmented a second time. ``together``: a step has a thing once, as the mean of
            its images' unit features, with one of its captions; batches then count things. A thing is a row that lists
            several images, and all rows of a group (``columns.group``). None: ``one`` of the images that a row lists; a
            group is no thing. Validation has all images of other things than training.
    """

    per_thing: PerThing = None

    def __post_init__(self) -> None:
        known = self.per_thing in ("one", "two", "all", "together", None)
        require(known, f"data.images.per_thing: {self.per_thing!r} must be 'one', 'two', 'all' or 'together'")


@dataclass(frozen=True)
class Classes:
    """Captions for a folder with a subfolder of images per class; a class is a group of duplicates.

    Attributes:
        templates: prompt templates with {} for the class name: imagenet, paper:NAME, clip_benchmark:NAME, a YAML file,
            a template or a list.
        names: of the classes, as for an evaluation; the subfolders' names by default.
    """

    templates: str | list[str] | None = None
    names: str | list[str] | None = None


@dataclass
class ShardOptions:
    """How tar shards are read.

    Attributes:
        shuffle_shards: the shards are shuffled, then the samples within windows of at most this many shards.
        cache_folder: for shards fetched from stores; None: ``~/.cache/lit-clip/shards``.
        cache_gb: size limit of that folder; the least recently used shards are deleted first.
        index_workers: processes that index shards; 0: this one, for a store that only this process sees.
    """

    shuffle_shards: int = 10
    cache_folder: str | None = None
    cache_gb: float = 50.0
    index_workers: int = 8

    def __post_init__(self) -> None:
        require(self.shuffle_shards >= 1, f"shards.shuffle_shards: {self.shuffle_shards} must be at least 1")
        require(self.cache_gb > 0, f"shards.cache_gb: {self.cache_gb} must be above 0")
        require(self.index_workers >= 0, f"shards.index_workers: {self.index_workers} must be at least 0")


class SourceOptions(NamedTuple):
    """Options for opening a source."""

    columns: Columns = Columns()
    classes: Classes = Classes()
    split: str | None = None
    default_split: str | None = None  # taken where a source has splits and split is None
    on_error: OnError = "error"  # at a row that cannot be read; skip leaves it out
    shards: ShardOptions | None = None
    versions: Mapping[str, str] = MappingProxyType({})  # as PairSource.versions, to open addresses as they were
    option_prefix: str = ""  # of these names on the command line, for messages

    def image_root(self, default: Path) -> Path | StoreFolder:
        root = self.columns.root
        return default if root is None else StoreFolder(root) if is_remote(root) else Path(root).expanduser()

    def refuse_split(self, path: object) -> None:
        require(self.split is None, f"{path}: has no splits, but split is {self.split!r}; leave it out")

    def refuse_classes(self, path: object) -> None:
        option = "classes.templates" if self.classes.templates is not None else "classes.names"
        message = f"{self.option_prefix}{option}: {path} is not a folder of classes; leave {option} out"
        require(self.classes == Classes(), message)

    def refuse_columns(self, path: object, names: Sequence[str] = COLUMNS, kind: str = "is not a table") -> None:
        """Raise :class:`InputError` if a column is set, for a source without columns."""
        for name in names:
            column = getattr(self.columns, name)
            require(column is None, f"{path}: {kind}, but columns.{name} is {column!r}; leave it out")


SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


def find_split(path: object, found: Sequence[str], options: SourceOptions) -> str:
    """Return the split to use; ``val``, ``valid``, ``dev`` and ``validation`` are the same name."""
    wanted = options.split or options.default_split
    if options.split is None and len(found) == 1:
        return found[0]
    for name in found:
        if wanted is not None and SPLIT_NAMES.get(name, name) == SPLIT_NAMES.get(wanted, wanted):
            return name
    problem = "it has several splits" if wanted is None else f"no split {wanted!r}"
    raise InputError(f"{path}: {problem}; its splits are {listed([name[:60] for name in found])}; set split")
