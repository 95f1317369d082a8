"""OpenMoji's drawings and names: complete, drawn the same on every system, and divided as documented."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from datamodules import OpenMoji, OpenMojiClasses
from datamodules.openmoji import Emoji, draw, held_out, read_table
from lit_clip.models.config import Preprocessing
from lit_clip.models.tokenizer import decode
from lit_clip.tools.own_files import default_cache_dir

EMOJI = read_table()
ROW = {emoji.name: row for row, emoji in enumerate(EMOJI)}
RED, WHITE, BLUE, GREEN = (210, 47, 39), (255, 255, 255), (30, 80, 160), (92, 158, 49)  # OpenMoji's palette


@pytest.fixture(scope="session")
def color(drawings_cache: Path) -> np.ndarray:
    """All drawings, ``[1914, 72, 72, 3]``."""
    return _read(draw(drawings_cache))


@pytest.fixture(scope="session")
def line(drawings_cache: Path) -> np.ndarray:
    """All drawings in the line style, ``[1914, 72, 72, 3]``."""
    return _read(draw(drawings_cache, "line"))


def _read(paths: list[Path]) -> np.ndarray:
    images = [Image.open(path) for path in paths]
    assert {(image.mode, image.size) for image in images} == {("RGB", (72, 72))}
    return np.stack([np.asarray(image) for image in images])


def ink(images: np.ndarray) -> np.ndarray:
    """Return where a drawing is not white: bool ``[N, 72, 72]``."""
    return (images < 250).any(axis=-1)


def saturation(images: np.ndarray) -> np.ndarray:
    """Return the difference between the strongest and weakest channel, 0 for grey: ``[N, 72, 72]``."""
    return images.max(axis=-1) - images.min(axis=-1)


def test_table_has_1914_emoji_with_distinct_names() -> None:
    assert len(EMOJI) == len(ROW) == len({emoji.hexcode for emoji in EMOJI}) == 1914
    assert all(emoji.name and emoji.group and emoji.subgroup and all(emoji.tags) for emoji in EMOJI)
    assert [emoji.name for emoji in EMOJI[:2]] == ["grinning face", "grinning face with big eyes"]
    # The five skin tones of a drawing are left out.
    tones = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}
    assert not any(tones & set(emoji.hexcode.split("-")) for emoji in EMOJI)
    assert not any("-" in emoji.group for emoji in EMOJI)  # words, not slugs


def test_164_names_are_held_out_and_none_is_a_flag() -> None:
    out = [emoji for emoji, is_held_out in zip(EMOJI, held_out(EMOJI), strict=True) if is_held_out]
    assert len(out) == 164
    assert "flags" not in {emoji.group for emoji in out}
    assert {emoji.group for emoji in out} == {emoji.group for emoji in EMOJI} - {"flags"}


def test_drawings_are_neither_blank_nor_cut_off(color: np.ndarray) -> None:
    """OpenMoji's grid of 72 pixels has a margin: only a few drawings touch the edge, and no flag does."""
    assert color.shape == (1914, 72, 72, 3)
    marks = ink(color)
    assert [EMOJI[row].name for row in np.flatnonzero(marks.sum(axis=(1, 2)) < 100)] == []
    cut = marks[:, [0, -1]].any(axis=(1, 2)) | marks[:, :, [0, -1]].any(axis=(1, 2))  # touches the edge
    assert [EMOJI[row].name for row in np.flatnonzero(cut) if EMOJI[row].group == "flags"] == []
    assert cut.sum() < 1914 / 50


@pytest.mark.parametrize(
    ("flag", "stripes"),
    [("France", (BLUE, WHITE, RED)), ("Italy", (GREEN, WHITE, RED)), ("Japan", (WHITE, RED, WHITE))],
)
def test_flag_sequences_are_drawn_as_flags(
    color: np.ndarray, flag: str, stripes: tuple[tuple[int, int, int], ...]
) -> None:
    """Checks the colour at the centre of each third of the flag."""
    image = color[ROW[f"flag: {flag}"]]
    rows, columns = (np.flatnonzero(ink(image[None])[0].any(axis=axis)) for axis in (1, 0))
    middle, left, width = (rows[0] + rows[-1]) // 2, columns[0], columns[-1] - columns[0] + 1
    assert width > 1.4 * len(rows)  # a flag, not two letters side by side
    found = [tuple(image[middle, left + int(width * share)].tolist()) for share in (1 / 6, 1 / 2, 5 / 6)]
    assert found == list(stripes)


def test_family_sequences_are_one_glyph_each(color: np.ndarray) -> None:
    """Drawn as a row of people they would not fit, and all would start with the same man."""
    names = [f"family: man, woman, {children}" for children in ("boy", "girl", "girl, boy", "boy, boy", "girl, girl")]
    rows = [ROW[name] for name in names]
    assert all("200D" in EMOJI[row].hexcode for row in rows)
    columns = ink(color[rows]).any(axis=1)
    assert (columns.sum(axis=1) > 36).all()
    assert not columns[:, [0, -1]].any()  # white at both ends
    assert len({color[row].tobytes() for row in rows}) == 5
    assert not any(np.array_equal(color[row], color[ROW["man"]]) for row in rows)


def test_only_a_few_drawings_are_identical(color: np.ndarray) -> None:
    """OpenMoji draws 18 like another one on purpose, such as the flags of France and St. Martin."""
    distinct = {image.tobytes() for image in color}
    assert 1914 - len(distinct) <= 20
    assert np.array_equal(color[ROW["flag: France"]], color[ROW["flag: St. Martin"]])


def test_drawings_are_the_same_without_text_shaping(
    color: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFont.core, "HAVE_RAQM", False)
    monkeypatch.setattr(ImageFont.core, "HAVE_FRIBIDI", False)
    few = [*EMOJI[:: len(EMOJI) // 40], EMOJI[ROW["flag: Japan"]], EMOJI[ROW["family: man, woman, girl"]]]
    monkeypatch.setattr("datamodules.openmoji.read_table", lambda: few)
    assert np.array_equal(_read(draw(tmp_path)), color[[ROW[emoji.name] for emoji in few]])


def test_line_style_is_grey_and_colour_style_is_coloured(color: np.ndarray, line: np.ndarray) -> None:
    assert saturation(line).max() == 0
    assert line.min() == 0
    coloured = (saturation(color) > 100).any(axis=(1, 2))
    assert coloured.mean() > 0.7  # many symbols and clocks are black
    # What is black in a line drawing is dark in the coloured one.
    black = line[..., 0] < 30
    assert (color[black].max(axis=-1) < 60).mean() > 0.95


def _times(paths: list[Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def test_cached_drawings_are_not_drawn_again(drawings_cache: Path, color: np.ndarray) -> None:
    paths = draw(drawings_cache)
    before = _times(paths)
    assert draw(drawings_cache) == paths
    assert _times(paths) == before
    OpenMojiClasses(cache_dir=str(drawings_cache))
    OpenMoji(cache_dir=str(drawings_cache)).prepare_data()
    assert _times(paths) == before


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Emoji]:
    """The table cut down to 25 rows, for tests of the cache."""
    monkeypatch.setattr("datamodules.openmoji.read_table", lambda: EMOJI[:25])
    return EMOJI[:25]


def test_missing_drawing_in_the_cache_is_added(few: list[Emoji], color: np.ndarray, tmp_path: Path) -> None:
    paths = draw(tmp_path)
    assert not set(paths) & set(draw(tmp_path, "line"))
    paths[11].unlink()
    assert draw(tmp_path) == paths
    assert np.array_equal(_read(paths), color[: len(few)])


def test_interrupted_drawing_leaves_no_partial_image(
    few: list[Emoji], color: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    save: Callable[..., None] = Image.Image.save

    def killed(image: Image.Image, path: Path, **options: Any) -> None:
        save(image, path, **options)
        saved.append(path)
        if len(saved) == 7:
            path.write_bytes(path.read_bytes()[:40])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path)
    whole = sorted(tmp_path.rglob("*.png"))
    assert len(whole) == 6
    _read(whole)
    assert np.array_equal(_read(draw(tmp_path)), color[: len(few)])


@pytest.mark.parametrize("value", ["given", "", None])
def test_cache_folder_follows_the_xdg_specification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """Unset and empty mean the same."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / value) if value else "")
    assert default_cache_dir() == tmp_path / (value or "home/.cache") / "lit-clip"


def module_of(cache: Path, **options: Any) -> OpenMoji:
    module = OpenMoji(num_workers=0, cache_dir=str(cache), **options)
    module.preprocessing = Preprocessing(image_size=8)
    module.setup("fit")
    return module


def names_of(source: Any) -> list[str]:
    return [source.load(index, None).caption for index in range(len(source))]


@pytest.mark.parametrize(("hold_out", "trained"), [(True, 1750), (False, 1914)])
def test_training_has_nine_names_of_ten_and_validation_the_others(
    drawings_cache: Path, hold_out: bool, trained: int
) -> None:
    module = module_of(drawings_cache, hold_out=hold_out)
    train, val = names_of(module.train_source), names_of(module.val_source)
    assert (len(train), len(val)) == (trained, 164)
    assert set(train) | set(val) == set(ROW)
    assert bool(set(train) & set(val)) != hold_out
    assert module.steps_per_epoch == trained // 128


def test_validation_captions_are_names_and_keys_are_code_points(drawings_cache: Path, color: np.ndarray) -> None:
    module = module_of(drawings_cache)
    batches = list(module.val_dataloader())
    assert [len(batch.keys) for batch in batches] == [64, 64, 36]
    expected = [emoji for emoji, out in zip(EMOJI, held_out(EMOJI), strict=True) if out]
    assert [key for batch in batches for key in batch.keys] == [emoji.hexcode for emoji in expected]
    ascii_names = 0
    captions = [decode(row) for batch in batches for row in batch.tokens.tolist()]
    for text, emoji in zip(captions, expected, strict=True):
        if emoji.name.isascii() and emoji.name.replace(" ", "").isalpha():  # decoding puts spaces around punctuation
            ascii_names += 1
            assert text == emoji.name.lower()
    assert ascii_names > 100
    source: Any = module.val_source
    for index in (0, 63, 163):
        image = source.load(index, None).image
        assert np.array_equal(np.asarray(image), color[ROW[expected[index].name]])


def test_training_captions_are_names_names_with_tags_or_groups(drawings_cache: Path) -> None:
    source: Any = module_of(drawings_cache).train_source
    kinds = Counter[str]()
    by_key = {emoji.hexcode: emoji for emoji in EMOJI}
    for index in range(len(source)):
        _, text, key, *_ = source.load(index, random.Random(index))
        emoji = by_key[key]
        if text == emoji.name:
            kinds["name"] += 1
        elif text in (emoji.group, f"{emoji.group}, {emoji.subgroup}"):
            kinds["group"] += 1
        else:
            kinds["tags"] += 1
            tags = text.removeprefix(emoji.name + ", ")
            assert tags != text
            assert 1 <= len(tags.split(", ")) <= 3
            assert set(tags.split(", ")) <= set(emoji.tags) - {emoji.name}
    # 0.7, 0.15 and 0.15 of 1,750 draws, plus or minus five standard deviations.
    assert abs(kinds["name"] - 1225) < 96
    assert abs(kinds["tags"] - 262) < 75
    assert abs(kinds["group"] - 263) < 75


@pytest.mark.parametrize(
    ("drawings", "style", "count"),
    [
        ("all", "color", 1914),
        ("trained", "color", 1750),
        ("held_out", "color", 164),
        ("all", "line", 1643),  # without 270 flags and the NEW button, which has no black
        ("trained", "line", 1480),
        ("held_out", "line", 163),
    ],
)
def test_classes_are_all_1914_names_for_any_choice_of_drawings(
    drawings_cache: Path, drawings: Any, style: Any, count: int
) -> None:
    images = OpenMojiClasses(drawings, style, cache_dir=str(drawings_cache))
    assert len(images) == len(images.labels()) == len(set(images.labels())) == count
    assert images.class_names == [emoji.name for emoji in EMOJI]
    out = held_out(EMOJI)
    shown = {"all": {True, False}, "trained": {False}, "held_out": {True}}[drawings]
    color = style == "color"
    assert images.labels() == [
        row
        for row, emoji in enumerate(EMOJI)
        if out[row] in shown and (color or (emoji.group != "flags" and emoji.name != "NEW button"))
    ]


@pytest.mark.parametrize("style", ["color", "line"])
def test_labelled_drawing_matches_its_class_name(drawings_cache: Path, style: Any, request: Any) -> None:
    drawn = request.getfixturevalue(style)
    images = OpenMojiClasses("held_out", style, cache_dir=str(drawings_cache))
    for index in range(0, len(images), 9):
        image, label = images[index]
        assert label == images.labels()[index]
        assert np.array_equal(np.asarray(image), drawn[ROW[images.class_names[label]]])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that Pillow opens, from here on."""
    files: list[Path] = []
    really: Any = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *others: files.append(path) or really(path, *others))
    return files


def test_of_the_line_drawings_only_small_files_are_opened_to_find_the_blank_ones(
    drawings_cache: Path, line: np.ndarray, opened: list[Path]
) -> None:
    images = OpenMojiClasses(style="line", cache_dir=str(drawings_cache))
    assert 0 < len(opened) < 400
    white = line.min(axis=(1, 2, 3)) == line.max(axis=(1, 2, 3))
    expected = [e.name for e, blank in zip(EMOJI, white, strict=True) if not blank and e.group != "flags"]
    assert [images.class_names[label] for label in images.labels()] == expected


def test_a_drawing_is_read_with_its_pair_and_kept(drawings_cache: Path, opened: list[Path]) -> None:
    module: Any = module_of(drawings_cache)
    names = [module.train_source.captions(row)[0] for row in range(1750)]
    assert names == [e.name for e, out in zip(EMOJI, held_out(EMOJI), strict=True) if not out]
    assert opened == []
    assert module.train_source.load(7, None).image is module.train_source.load(7, random.Random(0)).image


def test_group_classes_are_nine(drawings_cache: Path) -> None:
    images = OpenMojiClasses(classes="group", cache_dir=str(drawings_cache))
    assert len(images.class_names) == len(set(images.class_names)) == 9
    assert [images.class_names[label] for label in images.labels()] == [emoji.group for emoji in EMOJI]
    assert set(images.labels()) == set(range(9))
    line = OpenMojiClasses(style="line", classes="group", cache_dir=str(drawings_cache))
    assert line.class_names == images.class_names  # "flags" stays a possible wrong prediction
    assert len(set(line.labels())) == 8
