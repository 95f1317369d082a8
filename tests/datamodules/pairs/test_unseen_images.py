"""What of the images a model does not see is said before training, with counts, from every kind of source."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules import Captions, CustomPairs
from datamodules.loading.bad_samples import BadSamples
from datamodules.pairs import reports
from datamodules.pairs.source import Classes, Row
from datamodules.pairs.text_table import TablePairs
from lit_clip.models.config import Preprocessing
from tests.fuzz.samples import encoded, image, whole_images
from tests.helpers.tar_shards import write_tar

FILES = {
    **{f"{row}.png": encoded(image(row), "PNG") for row in range(16)},
    "deep 1.png": whole_images()["sixteen.png"],
    "deep 2.png": whole_images()["sixteen.png"],
    "clear 1.png": encoded(Image.new("RGBA", (70, 50), (200, 0, 0, 0)), "PNG"),
    "clear 2.png": encoded(Image.new("RGBA", (70, 50), (0, 200, 0, 0)), "PNG"),
    "clear 3.png": whole_images()["gray_alpha.png"],
    "print.jpg": whole_images()["cmyk.jpg"],
    "film.gif": whole_images()["animated.gif"],
    "turned.jpg": whole_images()["turned.jpg"],
}
SAID = (
    "images: of 24 looked at (of 24 pairs), 2 have more than 8 bits a level (the highest 8 are read), 1 have four "
    "or more bands, as CMYK (converted to RGB), 3 have an alpha channel or a transparent colour (dropped: black, or "
    "the colour underneath), 1 have "
    "several frames (the first is read), 1 have a rotation flag (ignored)"
)


class Own(CustomPairs):
    """The same images from Python: paths, contents and PIL images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(FILES)

    def image(self, row: int) -> Any:
        path = self.folder / [*FILES][row]
        if path.name.startswith(("deep", "clear")):
            return Image.open(path)
        return path if row % 2 else path.read_bytes()

    def captions(self, row: int) -> list[str]:
        return [f"number {row}"]


def table(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = "".join(f"{name},number {row}\n" for row, name in enumerate(files))
    (folder / "t.csv").write_text(f"image,caption\n{rows}")
    return folder / "t.csv"


def text_files(folder: Path) -> Path:
    table(folder)
    for name in FILES:
        (folder / name).with_suffix(".txt").write_text(name)
    return folder


def class_folder(folder: Path) -> Path:
    (folder / "classes/one").mkdir(parents=True)
    table(folder / "classes/one").unlink()
    return folder / "classes"


def parquet(folder: Path) -> Path:
    columns = {"image": list(FILES.values()), "caption": [f"number {row}" for row in range(len(FILES))]}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


def shard(folder: Path) -> Path:
    samples = [(str(row), {name[-3:]: data, "txt": b"a"}) for row, (name, data) in enumerate(FILES.items())]
    write_tar(folder / "a.tar", samples)
    return folder / "a.tar"


def own(folder: Path) -> Own:
    table(folder)
    return Own(folder)


def said(data: Any, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    module = Captions(data, num_workers=0, batch_size=4, **options)
    with caplog.at_level("INFO"):
        module.setup("fit")
    return [record.message for record in caplog.records if record.message.startswith("images: ")]


@pytest.mark.parametrize("write", [table, text_files, class_folder, parquet, shard, own])
def test_each_kind_is_counted_whatever_the_source(
    write: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In training and validation images together: a tenth validates."""
    written = write(tmp_path)
    classes = Classes(templates="a {}") if write is class_folder else None
    (line,) = said(written if write is own else str(written), caplog, classes=classes)
    assert line == SAID


def test_images_that_show_as_they_are_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = {name: data for name, data in FILES.items() if name[0].isdigit()}
    assert said(str(table(tmp_path, plain)), caplog) == []


def test_levels_of_12_bits_in_files_of_16_are_said_to_be_dark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    scans = {f"{row}.png": rng.integers(0, 4096, (40, 40)).astype(np.uint16) for row in range(8)}
    (line,) = said(
        str(table(tmp_path, {name: encoded(Image.fromarray(x), "PNG") for name, x in scans.items()})), caplog
    )
    assert "8 have more than 8 bits" in line
    assert "dark: no level of 4 is above 15 of 255" in line
    assert "scale" in line


def test_a_bad_sample_is_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {**FILES, "cut.png": FILES["0.png"][:10], "page.jpg": b"<html>"}
    path = table(tmp_path, files)
    with path.open("a") as file:
        file.write("gone.png,not there\n")
    (line,) = said(str(path), caplog, bad_samples=BadSamples("skip"))
    assert line == SAID.replace("of 24 pairs", "of 27 pairs")


def test_a_slow_source_is_left_after_a_short_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = TablePairs.row

    def slowly(self: TablePairs, index: int) -> Row:
        time.sleep(0.05)
        return read(self, index)

    monkeypatch.setattr(reports, "SECONDS", 0.2)
    monkeypatch.setattr(TablePairs, "row", slowly)
    deep = {f"{row}.png": FILES["deep 1.png"] for row in range(40)}
    (line,) = said(str(table(tmp_path, deep)), caplog)
    number = int(line.split()[2])
    assert 0 < number < 10
    assert line.startswith(f"images: of {number} looked at (of 40 pairs), {number} have more than 8 bits")


def test_only_the_first_rank_looks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(TablePairs, "row", None)
    assert said(str(table(tmp_path)), caplog) == []


@pytest.mark.parametrize("name", ["deep 1.png", "clear 1.png", "clear 3.png", "print.jpg", "film.gif", "turned.jpg"])
def test_training_and_validation_see_the_same_pixels(name: str, tmp_path: Path) -> None:
    """On average over the image, of which training takes a square at a random place; a transparent one is black."""
    path = table(tmp_path, {name: FILES[name]})
    module = Captions(str(path), str(path), num_workers=0, batch_size=1)
    module.preprocessing = Preprocessing(image_size=32)
    module.setup("fit")
    (trained,), (validated,) = module.train_dataloader(), module.val_dataloader()
    colours = [batch.images.float().mean((0, 2, 3)) for batch in (trained, validated)]
    assert (colours[0] - colours[1]).abs().max() < 12
    assert bool((colours[1] == 0).all()) == (name == "clear 1.png")
    if name == "deep 1.png":
        assert 80 < colours[1].mean() < 180  # neither white, as clipped levels are, nor black
