"""``lit-clip shard``: images are copied byte for byte or resized, and complete shards are kept."""

import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, v2

from datamodules.commands.shard import shard
from datamodules.loading.augmentation import RandomSquareCrop
from datamodules.open_source import open_source
from datamodules.pairs.source import Columns
from datamodules.shards.index import INDEX_SUFFIX
from datamodules.shards.pairs import TarPairs
from datamodules.shards.writing import reduced
from lit_clip.errors import InputError

Run = Callable[..., subprocess.CompletedProcess[str]]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_table_becomes_shards_of_the_same_bytes_and_captions(cli: Run, tmp_path: Path, caption_table: Path) -> None:
    result = cli("shard", str(caption_table), "out", "--shard_size", "20", "--num_workers", "2")
    assert result.returncode == 0, result.stderr
    assert "out: 64 pairs in 4 shards" in result.stderr
    assert result.stdout == ""
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number in range(4):
        with tarfile.open(tmp_path / f"out/{number:05d}.tar") as tar:
            names = tar.getnames()
            assert names[:3] == [f"{number:05d}0000.{extension}" for extension in ("png", "txt", "json")]
            files = {name: extracted.read() for name in names if (extracted := tar.extractfile(name))}
        for index, row in enumerate(rows[20 * number : 20 * number + 20]):
            key = f"{number:05d}{index:04d}"
            assert files[f"{key}.png"] == (caption_table.parent / row["image"]).read_bytes()
            assert files[f"{key}.txt"].decode() == row["caption"]
            assert json.loads(files[f"{key}.json"]) == {"key": key, "caption": row["caption"], "source": row["image"]}
    shards, table = TarPairs(str(tmp_path / "out")), open_source(str(caption_table))
    assert [shards.captions(index) for index in range(64)] == [table.captions(index) for index in range(64)]
    assert len(list((tmp_path / "out").glob(f"*.tar{INDEX_SUFFIX}"))) == 4


def test_webdataset_reads_the_written_shards(tmp_path: Path, caption_table: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shard(str(caption_table), str(tmp_path / "out"), shard_size=40, num_workers=0)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    table = open_source(str(caption_table))
    assert [caption for _, caption, _ in samples] == [table.captions(index)[0] for index in range(64)]
    assert samples[63][0].size == table.load(63, None).image.size


def test_complete_shards_are_kept_and_missing_ones_written(tmp_path: Path, caption_table: Path) -> None:
    out = tmp_path / "out"
    shard(str(caption_table), str(out), shard_size=10, num_workers=0)
    whole = digests(out)
    assert len(whole) == 7
    for number in (1, 4):
        (out / f"{number:05d}.tar").unlink()
    (out / f"00005.tar{INDEX_SUFFIX}").unlink()
    (out / ".00004.tar.part").write_bytes(b"of a killed run")
    before = (out / "00002.tar").stat().st_mtime_ns
    shard(str(caption_table), str(out), shard_size=10, num_workers=0)
    assert digests(out) == whole
    assert (out / "00002.tar").stat().st_mtime_ns == before
    assert (out / f"00005.tar{INDEX_SUFFIX}").exists()
    assert not list(out.glob(".*.part"))


def test_several_captions_and_groups_are_kept(tmp_path: Path, caption_table: Path) -> None:
    with caption_table.open(encoding="utf-8") as file:
        images = [str(caption_table.parent / row["image"]) for row in csv.DictReader(file)][:3]
    records = [
        {"image": images[0], "caption": ["a tiger", "a big cat"], "product": "x"},
        {"image": images[1], "caption": "a pizza\nin two lines", "product": None},
        {"image": images[2], "caption": ["a b\u00edcycle"], "product": 5},
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    shard(str(table), str(tmp_path / "out"), num_workers=0, columns=Columns(group="product"))
    source = TarPairs(str(tmp_path / "out"), columns=Columns(group="group"))
    assert [source.captions(index) for index in range(3)] == [
        ["a tiger", "a big cat"],
        ["a pizza\nin two lines"],
        ["a b\u00edcycle"],
    ]
    assert [source.read(index).group for index in range(3)] == ["x", "", "5"]


@pytest.mark.parametrize("resize", [None, 20])
def test_unreadable_pairs_end_the_run_or_are_listed(tmp_path: Path, caption_table: Path, resize: int | None) -> None:
    with caption_table.open(encoding="utf-8") as file:
        images = [str(caption_table.parent / row["image"]) for row in csv.DictReader(file)][:5]
    (tmp_path / "cut.png").write_bytes(Path(images[0]).read_bytes()[:-400])
    images[3] = "cut.png"
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{image},image {i}\n" for i, image in enumerate(images)))
    with pytest.raises(InputError, match=r"table\.csv row 5: cannot read"):
        shard(str(table), str(tmp_path / "out"), shard_size=2, num_workers=0, resize=resize)
    assert list(digests(tmp_path / "out")) == ["00000.tar"]
    shard(str(table), str(tmp_path / "out"), shard_size=2, num_workers=0, on_error="skip", resize=resize)
    source = TarPairs(str(tmp_path / "out"))
    assert [source.captions(index)[0] for index in range(4)] == ["image 0", "image 1", "image 2", "image 4"]
    listed = json.loads((tmp_path / "out/00001.skipped.jsonl").read_text())
    assert listed["where"].endswith("table.csv row 5")
    assert [path.name for path in (tmp_path / "out").glob("*.skipped.jsonl")] == ["00001.skipped.jsonl"]


def test_folder_with_other_content_is_refused(tmp_path: Path, caption_table: Path) -> None:
    out = tmp_path / "out"
    shard(str(caption_table), str(out), shard_size=40, num_workers=0)
    with pytest.raises(
        InputError, match=r"begun with other data \(shard_size 40 then and 50 now\); give an empty folder"
    ):
        shard(str(caption_table), str(out), shard_size=50, num_workers=0)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/00000.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000\.tar was not written by lit-clip shard"):
        shard(str(caption_table), str(tmp_path / "others"), num_workers=0)
    with pytest.raises(InputError, match="00000.tar: is a file; give a folder"):
        shard(str(caption_table), str(out / "00000.tar"), num_workers=0)
    with pytest.raises(InputError, match="--shard_size 0"):
        shard(str(caption_table), str(out), shard_size=0)


# --resize


def photograph(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG"}.get(name, name), **options)
    return file.getvalue()


def images_of_all_kinds() -> dict[str, bytes]:
    """Encode a photograph in sizes around 96 pixels and in every kind of file that has its own rule."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    see_through = photograph((200, 140)).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((200, 140)))
    return {
        "wide.jpg": encoded(photograph((307, 201)), "jpg"),
        "tall.jpg": encoded(photograph((201, 307)), "jpg"),
        "square.jpg": encoded(photograph((97, 97)), "jpg"),
        "enough.jpg": encoded(photograph((300, 96)), "jpg"),
        "small.jpg": encoded(photograph((60, 40)), "jpg"),
        "small.png": encoded(see_through.resize((60, 40)), "png"),
        "rotated.jpg": encoded(photograph((307, 201)), "jpg", exif=rotated),
        "grey.jpg": encoded(photograph((307, 201)).convert("L"), "jpg"),
        "print.jpg": encoded(photograph((307, 201)).convert("CMYK"), "jpg"),
        "drawing.png": encoded(photograph((307, 201)), "png"),
        "see_through.png": encoded(see_through, "png"),
        "palette.png": encoded(photograph((307, 201)).convert("P"), "png"),
        "deep.png": encoded(Image.fromarray(np.asarray(photograph((307, 201)).convert("L")).astype("u2") * 257), "png"),
        "first_of_two.gif": encoded(photograph((307, 201)), "gif", save_all=True, append_images=[see_through]),
        "any.webp": encoded(photograph((307, 201)), "webp"),
    }


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        (folder / name).write_bytes(content)
    table = folder / "images.csv"
    table.write_text("image,caption\n" + "".join(f"{name},a temple\n" for name in images))
    return table


def test_larger_images_become_jpegs_of_torchvisions_size_and_others_stay(tmp_path: Path) -> None:
    images = images_of_all_kinds()
    shard(str(write_images(tmp_path, images)), str(tmp_path / "out"), resize=96, num_workers=0)
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        files = {name: extracted.read() for name in tar.getnames() if (extracted := tar.extractfile(name))}
    for number, (name, before) in enumerate(images.items()):
        original, about = Image.open(io.BytesIO(before)), json.loads(files[f"00000{number:04d}.json"])
        kept = min(original.size) <= 96 or name == "deep.png"  # whose levels a JPEG cannot hold
        after = files[f"00000{number:04d}.{Path(name).suffix[1:] if kept else 'jpg'}"]
        assert kept == (name in ("enough.jpg", "small.jpg", "small.png", "deep.png"))
        if kept:
            assert after == before
            assert "width" not in about
            continue
        smooth = original.convert("RGB") if original.mode == "P" else original
        expected = v2.Resize(96, InterpolationMode.BICUBIC)(smooth)
        result = Image.open(io.BytesIO(after))
        assert (result.format, result.size) == ("JPEG", expected.size)
        assert result.mode == ("L" if name == "grey.jpg" else "RGB")
        assert not result.getexif()  # the rotation flag is ignored, and would turn the image in a viewer
        sizes = (about["width"], about["height"]), (about["original_width"], about["original_height"])
        assert sizes == (expected.size, original.size)
        difference = np.abs(np.asarray(result.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
        assert difference.mean() < 4, name  # of JPEG in 96 pixels; of an image turned or in false colours it is > 20


def test_size_keeps_the_aspect_ratio_and_is_never_larger() -> None:
    sizes = {(1000, 700): (548, 384), (700, 1000): (384, 548), (385, 385): (384, 384), (384, 9000): None, (1, 1): None}
    for size, expected in {**sizes, (500, 100_000): None}.items():  # 76,800 pixels are too many for a JPEG
        assert reduced(*size, 384) == expected
        assert reduced(*size, None) is None


def test_largest_training_crops_of_resized_images_hardly_differ(tmp_path: Path) -> None:
    """400 to 288 pixels for crops of 168: the proportions of 384 and 224, in photographs that a library installs."""
    crop = RandomSquareCrop((1.0, 1.0), exact=True, size=168, interpolation="bicubic")
    photos = [Image.fromarray(each).crop((20, 10, 620, 410)) for each in load_sample_images().images]
    images = {f"{number}.jpg": encoded(photo, "jpg", quality=90) for number, photo in enumerate(photos)}
    table = write_images(tmp_path, images)
    shard(str(table), str(tmp_path / "out"), resize=288, num_workers=0)
    before, after = open_source(str(table)), open_source(str(tmp_path / "out"))
    for number in range(2):
        for x in (0.0, 1.0):
            pair = [source.load(number, None).image for source in (before, after)]
            assert [min(image.size) for image in pair] == [400, 288]
            one, other = (np.asarray(crop.transform(i, {"side": 1.0, "x": x, "y": 0.0}), float) for i in pair)
            error = one - other
            assert np.abs(error).mean() < 2  # of 255, and decoding at a fraction costs 1.5
            assert 10 * np.log10(255**2 / (error**2).mean()) > 39


def test_resized_shards_are_resumed_and_other_sizes_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = images_of_all_kinds()
    table, out = str(write_images(tmp_path, images)), tmp_path / "out"
    shard(table, str(out), shard_size=5, resize=96, num_workers=0)
    sizes = [len(content) for name, content in images.items() if not name.startswith(("enough", "small", "deep"))]
    written = sum(path.stat().st_size for path in out.glob("*.tar"))
    resized = re.search(r"15 pairs in 3 shards, 11 images resized now, from ([\d.]+) to ([\d.]+) MB", message(capsys))
    assert resized is not None
    assert float(resized[1]) == round(sum(sizes) / 1e6, 1)
    assert 0 < float(resized[2]) <= written / 1e6
    whole = digests(out)
    shard(table, str(out), shard_size=5, resize=96, num_workers=0)
    assert "15 pairs in 3 shards\n" in message(capsys)  # nothing was resized
    (out / "00001.tar").unlink()
    shard(table, str(out), shard_size=5, resize=96, num_workers=2)
    assert "15 pairs in 3 shards, 4 images resized now" in message(capsys)
    assert digests(out) == whole
    for other in (64, None):
        with pytest.raises(InputError, match=rf"\(resize 96 then and {other} now\); give an empty folder"):
            shard(table, str(out), shard_size=5, resize=other, num_workers=0)
    shard(table, str(tmp_path / "copied"), shard_size=5, num_workers=0)
    with pytest.raises(InputError, match=r"\(resize None then and 96 now\); give an empty folder"):
        shard(table, str(tmp_path / "copied"), shard_size=5, resize=96, num_workers=0)
    with pytest.raises(InputError, match="--resize 0 must be at least 1"):
        shard(table, str(tmp_path / "none"), resize=0)


def message(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split(" "))


def test_hard_negatives_are_not_lost_in_silence(tmp_path: Path, caption_table: Path) -> None:
    with pytest.raises(InputError, match=r"--columns\.negative: shards hold captions and groups alone"):
        shard(str(caption_table), str(tmp_path / "out"), columns=Columns(negative="caption"))
    assert not (tmp_path / "out").exists()
