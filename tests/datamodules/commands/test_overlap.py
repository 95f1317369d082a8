"""Data overlap: statistics against SciPy and plain sums, detection of altered copies, ``lit-clip overlap``."""

import csv
import io
import json
import math
import re
from base64 import b64decode
from functools import lru_cache
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from scipy.stats import beta, binom

import lit_clip.evaluation.overlap as maths
from datamodules.commands.overlap import EvaluationSet, open_sets
from datamodules.near_duplicates import LOOK, LookIndex, look_of
from datamodules.open_source import open_source
from datamodules.overlap.search import EncodedImages, Searched, SourceRows, encode_images, findings_of, leaked_rows
from datamodules.pairs.kept import kept_pairs
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.reading import ImageRows, UnreadableRow, in_batches
from lit_clip.errors import InputError
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import bonferroni, clopper_pearson, nearer, nowhere, overlap_of
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig


def booleans(text: str) -> torch.Tensor:
    return torch.tensor([character == "1" for character in text])


def test_statistics_match_a_count_by_hand() -> None:
    found = overlap_of(booleans("1110000000"), booleans("1101100000"))
    assert (found.images, found.overlap, found.clean, found.contamination) == (10, 3, 7, 0.3)
    assert (found.accuracy_all, found.accuracy_overlap, found.accuracy_clean) == (0.4, 2 / 3, 2 / 7)
    assert found.difference == pytest.approx(0.4 - 2 / 7)
    # At least two of three correct, each with probability 2/7.
    assert found.p_value == pytest.approx(3 * (2 / 7) ** 2 * (5 / 7) + (2 / 7) ** 3)
    assert found.interval == pytest.approx((beta.ppf(0.0025, 2, 2), beta.ppf(0.9975, 3, 1)))


def test_p_values_and_intervals_are_sums_of_binomial_probabilities() -> None:
    def at_most(count: int, trials: int, chance: float) -> float:
        return sum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(count + 1))

    for successes, trials, null in ((0, 5, 0.3), (5, 5, 0.3), (7, 20, 0.2), (130, 200, 0.6)):
        at_least = 1 - at_most(successes - 1, trials, null)
        assert maths.binomial_p_value(successes, trials, null) == pytest.approx(at_least, rel=1e-9)
    for successes, trials in ((0, 9), (9, 9), (3, 40), (500, 1000)):
        low, high = clopper_pearson(successes, trials)
        low_tail, high_tail = 1 - at_most(successes - 1, trials, low), at_most(successes, trials, high)
        assert low == 0 if successes == 0 else low_tail == pytest.approx(0.0025, rel=1e-6)
        assert high == 1 if successes == trials else high_tail == pytest.approx(0.0025, rel=1e-6)
    assert clopper_pearson(0, 0) == (0, 1)
    assert bonferroni([0.01, None, 0.5, 0.0]) == pytest.approx([0.03, None, 1.0, 0.0])
    assert bonferroni([]) == []


def test_an_empty_subset_has_no_accuracy_and_no_p_value() -> None:
    clean = overlap_of(booleans("0000"), booleans("1100"))
    assert (clean.contamination, clean.accuracy_all, clean.accuracy_clean, clean.difference) == (0, 0.5, 0.5, 0)
    assert (clean.accuracy_overlap, clean.p_value, clean.interval) == (None, None, None)
    seen = overlap_of(booleans("1111"), booleans("1100"))
    assert (seen.contamination, seen.accuracy_overlap, seen.accuracy_clean) == (1, 0.5, None)
    assert (seen.difference, seen.p_value) == (None, None)
    unknown = overlap_of(booleans("1000"))
    assert (unknown.overlap, unknown.accuracy_all, unknown.interval) == (1, None, None)
    assert overlap_of(booleans("")).contamination is None
    with pytest.raises(InputError, match="3 predictions for 4 images"):
        overlap_of(booleans("1000"), booleans("100"))


def brute_force(query: torch.Tensor, reference: torch.Tensor) -> list[tuple[int, float]]:
    best = []
    for vector in query.double():
        similarities = [float(vector @ other) for other in reference.double()]
        best.append((similarities.index(max(similarities)), max(similarities)))
    return best


@pytest.mark.parametrize("batch", [1, 7, 23, 100])
@pytest.mark.parametrize("tile", [1, 5, 4096])
def test_chunking_does_not_change_the_nearest_image(batch: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "QUERIES", tile)
    monkeypatch.setattr(maths, "REFERENCES", tile + 1)
    query, reference = F.normalize(torch.randn(13, 6), dim=1), F.normalize(torch.randn(23, 6), dim=1)
    found = nowhere(13)
    for rows in in_batches(range(23), batch):
        found = nearer(found, query, reference[rows], 100 + torch.tensor(rows))
    expected = brute_force(query, reference)
    assert found.row.tolist() == [100 + row for row, _ in expected]
    assert found.similarity.tolist() == pytest.approx([similarity for _, similarity in expected], abs=1e-6)


def test_the_first_of_equally_near_training_images_is_reported() -> None:
    query, reference = torch.eye(3)[:2], torch.eye(3)[[2, 0, 0]]
    found = nowhere(2)
    for row in range(3):
        found = nearer(found, query, reference[row : row + 1], torch.tensor([row]))
    at_once = nearer(nowhere(2), query, reference, torch.arange(3))
    assert found.row.tolist() == at_once.row.tolist() == [1, 0]
    assert nowhere(1).row.tolist() == [-1]


@lru_cache
def photographs(longest: int = 240) -> list[Image.Image]:
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "retina")
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    for photo in photos:
        photo.thumbnail((longest, longest))
    return photos


def as_jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def smaller(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((image.width * 2 // 3, image.height * 2 // 3))


def cropped(image: Image.Image) -> Image.Image:
    x, y = image.width // 50, image.height // 50
    return image.convert("RGB").crop((x, y, image.width - x, image.height - y))


def looks_of(images: list[Image.Image]) -> np.ndarray:
    return np.array([look_of(image) for image in images], LOOK)


def test_altered_copies_of_photographs_match_only_their_originals() -> None:
    originals = photographs(600)
    copies = [*map(smaller, originals), *map(as_jpeg, originals), Image.new("RGB", (40, 40), "red")]
    index = LookIndex(looks_of([*originals, Image.new("RGB", (9, 9), "red")]))
    left, right = index.like(looks_of(copies))
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == {
        (place % len(originals), place) for place in range(2 * len(originals))
    }


def test_the_look_index_finds_the_same_pairs_as_comparing_all() -> None:
    random = np.random.default_rng(3)
    seeds = random.integers(0, 2**64, 6, dtype=np.uint64)

    def random_looks(number: int) -> np.ndarray:
        looks = np.zeros(number, LOOK)
        looks["bits"] = seeds[random.integers(0, 6, number)]
        for _ in range(2):
            looks["bits"] ^= np.uint64(random.integers(0, 2)) << random.integers(0, 64, number).astype(np.uint64)
        looks["colour"], looks["plain"] = random.integers(0, 12, number), random.random(number) < 0.1
        return looks

    ours, others = random_looks(40), random_looks(60)
    left, right = LookIndex(ours).like(others)
    expected = {
        (i, j)
        for i, one in enumerate(ours.tolist())
        for j, other in enumerate(others.tolist())
        if not (one[2] or other[2]) and (one[0] ^ other[0]).bit_count() <= 2 and abs(one[1] - other[1]) <= 8
    }
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected
    assert 20 < len(expected) < 40 * 60
    assert [len(side) for side in LookIndex(looks_of([])).like(others)] == [0, 0]


class Videos(ImageSet):
    """Two videos of three frames each, and a broken file between them."""

    several = True

    def __init__(self, frames: list[Image.Image]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return 3

    def images(self, index: int) -> list[Image.Image]:
        if index == 1:
            raise RuntimeError("no such codec")
        return self.frames[3 * (index // 2) : 3 * (index // 2) + 3]

    def stamp(self) -> str:
        return "videos"


def write_table(folder: Path, images: list[Image.Image]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", "an image"])
    return folder / "train.csv"


def encoded(model: CLIP, images: ImageRows, path: Path, several: bool = False) -> tuple[Parts, list[UnreadableRow]]:
    parts = Parts(path, "any")
    return parts, encode_images(model, images, parts, EncodingSettings(2, 0, on_error="skip"), "images", several)


def searched(model: CLIP, frames: list[Image.Image], path: Path, threshold: float) -> Searched:
    parts, bad = encoded(model, Videos(frames), path, several=True)
    return Searched(EncodedImages.joined(parts), [row.message for row in bad], threshold, torch.device("cpu"))


def compare(parts: Parts, *sets: Searched) -> None:
    for part in parts.read(EncodedImages.of):
        for batch in part.batches(2):
            for each in sets:
                each.add(batch)


def test_a_video_is_in_the_overlap_if_one_of_its_frames_is(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    model, photos = CLIP(tiny_config).eval(), photographs()
    videos = searched(model, photos[:6], tmp_path / "videos", 2.0)
    assert videos.images.rows.tolist() == [0, 0, 0, 2, 2, 2]
    assert videos.bad == ["1: cannot be read (no such codec)"]
    source = open_source(write_table(tmp_path / "train", [photos[6], as_jpeg(photos[4], 90), photos[7]]))
    compare(encoded(model, SourceRows(source), tmp_path / "training")[0], videos)
    judged = findings_of(Videos(photos[:6]), videos, booleans("10"))
    assert judged.seen.tolist() == [False, True]
    pair = judged.alike[1]
    assert pair is not None
    assert (pair.item, pair.frame, pair.row) == (2, 1, 1)
    assert [each["train"] for each in judged.pairs(source)] == [f"{source.path} row 3"]
    nearest_of_second = judged.nearest[1]
    assert (nearest_of_second.frame, nearest_of_second.row) == (1, 1)
    assert (judged.overlap.images, judged.overlap.overlap, judged.overlap.accuracy_overlap) == (2, 1, 0)


def test_an_image_that_is_mended_is_encoded_then_and_takes_its_place(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    model, source = CLIP(tiny_config).eval(), open_source(write_table(tmp_path / "train", photographs()[:4]))
    whole = (tmp_path / "train/1.png").read_bytes()
    (tmp_path / "train/1.png").write_text("no image")
    parts, bad = encoded(model, SourceRows(source), tmp_path / "training")
    assert [row.row for row in bad] == [1]
    (tmp_path / "train/1.png").write_bytes(whole)
    assert encoded(model, SourceRows(source), tmp_path / "training")[1] == []
    found = EncodedImages.joined(parts)
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_features_that_are_not_finite_end_the_search_and_name_the_batch(
    tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_table(tmp_path / "train", photographs()[:4]))
    plain = CLIP.encode_image

    def overflowing(self: CLIP, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = plain(self, images, normalize)
        features[1] = torch.nan
        return features

    monkeypatch.setattr(CLIP, "encode_image", overflowing)
    with pytest.raises(InputError, match=r"train\.csv row 2: features that are not finite"):
        encoded(CLIP(tiny_config).eval(), SourceRows(source), tmp_path / "training")


def test_an_interrupted_search_resumes_and_finds_the_same(
    tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, photos = CLIP(tiny_config).eval(), photographs()
    source = open_source(write_table(tmp_path / "train", [*photos[4:], *map(as_jpeg, photos[:4])]))
    whole, _ = encoded(model, SourceRows(source), tmp_path / "whole")
    read: list[int] = []
    plain = SourceRows.key_and_images

    def counted(self: SourceRows, row: int) -> tuple[str, list[Image.Image]]:
        read.append(row)
        if read == [0, 1, 2, 3, 4, 5]:
            raise KeyboardInterrupt
        return plain(self, row)

    monkeypatch.setattr(SourceRows, "key_and_images", counted)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        encoded(model, SourceRows(source), tmp_path / "found")
    found, _ = encoded(model, SourceRows(source), tmp_path / "found")
    assert read[6:] == [4, 5, 6, 7]
    encoded(model, SourceRows(source), tmp_path / "found")
    assert len(read) == 10
    results = []
    for number, parts in enumerate((whole, found)):
        videos = searched(model, photos[:6], tmp_path / f"videos {number}", 0.95)
        compare(parts, videos)
        leaks = np.concatenate(videos.leaks).tolist()
        results.append((*map(torch.Tensor.tolist, videos.nearest), videos.look_rows.tolist(), repr(leaks)))
    assert results[0] == results[1]


def test_all_training_images_that_are_in_a_set_are_leaks_not_only_the_nearest(
    tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    """Against a plain loop over all pairs of two sets and a training set with several copies of each image."""
    model, photos = CLIP(tiny_config).eval(), photographs()
    frames = {"one": photos[:6], "two": [photos[number] for number in (3, 1, 6, 6, 3, 1)]}
    images = [photos[1], photos[7], as_jpeg(photos[1], 90), smaller(photos[0]), photos[6], photos[1]]
    source = open_source(write_table(tmp_path / "train", images))
    training, _ = encoded(model, SourceRows(source), tmp_path / "training")
    features = EncodedImages.joined(training).features
    for least in (0.97, 0.9999):
        sets = {name: searched(model, each, tmp_path / name, least) for name, each in frames.items()}
        compare(training, *sets.values())
        wanted: dict[int, list[str]] = {}
        for row, image in enumerate(images):
            for name, each in frames.items():
                near = float((sets[name].images.features @ features[row]).max()) >= least
                alike = len(LookIndex(looks_of(each)).like(looks_of([image]))[0]) > 0
                if near or alike:
                    wanted.setdefault(row, []).append(f"image of the evaluation set {name}")
        assert {0, 5} <= set(wanted)
        judged = {name: findings_of(Videos(frames[name]), each, None) for name, each in sets.items()}
        lines = list(leaked_rows(judged, source))
        assert {line.row: line.finding for line in lines} == {row: "; ".join(wanted[row]) for row in wanted}
        assert [line.row for line in lines] == sorted(wanted)


def test_a_link_to_itself_is_no_folder_of_classes(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: no such folder of classes"):
        open_sets([str(tmp_path / "loop")], [], None, tmp_path, [])


class Drawn(NamedTuple):
    """Drawings in class folders, and a training table with copies of some of them."""

    model: Path
    evaluation: Path
    table: Path
    copied: dict[str, str]  # key in the evaluation set -> row of the table
    misplaced: list[str]


@pytest.fixture(scope="module")
def drawn(drawings: tuple[Path, Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """30 drawings; the training set has 20 others and copies of 12, scaled down, compressed or cropped."""
    model, photos, _ = drawings
    root = tmp_path_factory.mktemp("drawn")
    files = sorted(photos.iterdir())
    for place, file in enumerate(files[:30]):
        wrong = place in (0, 1, 2, 20)  # in the folder of another class
        folder = root / "emoji" / files[place + 5 if wrong else place].stem
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    images = [Image.open(file).convert("RGB") for file in files]
    changes = (smaller, as_jpeg, cropped)
    copies = [changes[place % 3](images[place]) for place in range(12)]
    table = write_table(root / "train", [*images[30:50], *copies])
    (root / "train/broken.jpg").write_bytes((root / "train/3.png").read_bytes()[:200])
    with table.open("a", encoding="utf-8") as file:
        file.write("broken.jpg,an image\ngone.png,an image\n")
    keys = {path.name: path.relative_to(root / "emoji").as_posix() for path in (root / "emoji").rglob("*.png")}
    copied = {keys[files[place].name]: f"{table} row {2 + 20 + place}" for place in range(12)}
    return Drawn(model, root / "emoji", table, copied, [keys[files[place].name] for place in (0, 1, 2, 20)])


def run_overlap(drawn: Drawn, output: Path, *words: str) -> dict[str, Any]:
    run_command(["overlap", *words, "--model", str(drawn.model), "--output", str(output), "--num_workers", "0"])
    return json.loads(output.with_suffix(".json").read_text())


def recognised_keys(drawn: Drawn) -> set[str]:
    """Return the keys of the images that the model classifies correctly, encoded one by one."""
    model = load_model(str(drawn.model))
    names = sorted(folder.name for folder in drawn.evaluation.iterdir())
    classifier = zero_shot_classifier(model, [name.replace("_", " ") for name in names], ["{}."])
    right = set()
    for path in drawn.evaluation.rglob("*.png"):
        with torch.no_grad():
            feature = model.encode_image(model.preprocess(Image.open(path))[None])[0]
        if names[int((feature @ classifier).argmax())] == path.parent.name:
            right.add(path.relative_to(drawn.evaluation).as_posix())
    return right


def test_the_command_finds_the_copies_and_reports_their_effect_on_accuracy(
    drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(drawn.evaluation), "--train", str(drawn.table), "--templates", "{}."]
    report = run_overlap(drawn, tmp_path / "overlap.html", *words, "--threshold", "0.9")
    output = capsys.readouterr()
    found = report["sets"]["emoji"]
    assert {pair["image"]: pair["train"] for pair in found["pairs"]} == drawn.copied
    assert all(pair["similarity"] > 0.9 for pair in found["pairs"])
    right = recognised_keys(drawn)
    assert 15 < len(right) < 30
    overlap, clean = set(drawn.copied), {*right, *drawn.misplaced} - set(drawn.copied)
    assert (found["images"], found["overlap"], found["clean"]) == (30, 12, 18)
    assert found["contamination"] == 0.4
    assert found["accuracy_all"] == len(right) / 30
    assert found["accuracy_overlap"] == len(right & overlap) / 12
    assert found["accuracy_clean"] == pytest.approx(len(right & clean) / 18)
    assert found["p_value"] == found["p_value_bonferroni"]
    assert found["p_value"] == pytest.approx(binom.sf(len(right & overlap) - 1, 12, found["accuracy_clean"]))
    assert report["train"]["images"] == 32
    assert report["train"]["skipped"] == {"broken image": 1, "missing image": 1}
    assert any("row 34" in line for line in report["train"]["skipped_lines"])
    assert "1 training image could not be read: broken image" in output.err
    assert "12 (40.0 %)" in output.out
    check_page(tmp_path / "overlap.html", report)
    assert "--data.keep" in output.err.splitlines()[-1]
    check_leaks(tmp_path / "overlap.findings.csv", drawn)

    similar = sorted(pair["similarity"] for pair in found["pairs"])
    limit = (similar[5] + similar[6]) / 2
    words += ["--threshold", f"{limit}"]
    higher = run_overlap(drawn, tmp_path / "overlap.html", *words)["sets"]["emoji"]
    assert higher["threshold"] == limit
    looks = {pair["image"] for pair in higher["pairs"] if pair["similarity"] < limit}
    assert looks == {pair["image"] for pair in found["pairs"] if pair["similarity"] < limit and pair["same_look"]}
    assert higher["overlap"] == 6 + len(looks)
    tried = {row["threshold"]: row["overlap"] for row in higher["thresholds"]}
    assert (tried[0.9], tried[limit]) == (12, 6 + len(looks))


def test_features_are_kept_until_the_command_succeeds(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(drawn.evaluation), "--train", str(drawn.table)]

    def full_disk(*_: object) -> None:
        raise InputError("the disk is full")

    def no_forward(*_: object, **__: object) -> None:
        raise AssertionError("an image was encoded again")

    with monkeypatch.context() as failing:
        failing.setattr("datamodules.commands.overlap.write_findings", full_disk)
        with pytest.raises(InputError, match="the disk is full"):
            run_overlap(drawn, tmp_path / "overlap.json", *words)
    assert (tmp_path / ".overlap.found").is_dir()
    monkeypatch.setattr(CLIP, "encode_image", no_forward)
    assert run_overlap(drawn, tmp_path / "overlap.json", *words)["sets"]["emoji"]["images"] == 30
    assert {path.name for path in tmp_path.iterdir()} == {"overlap.json", "overlap.findings.csv"}


def test_bfloat16_finds_the_same_copies_and_shares_no_features_with_float32(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(drawn.evaluation), "--train", str(drawn.table), "--threshold", "0.9"]
    encoders: dict[str, set[torch.dtype]] = {"image": set(), "text": set()}
    for kind in encoders:
        plain = getattr(CLIP, f"encode_{kind}")

        def noting(*args: Any, plain: Any = plain, kind: str = kind, **options: Any) -> torch.Tensor:
            encoders[kind].add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return plain(*args, **options)

        monkeypatch.setattr(CLIP, f"encode_{kind}", noting)
    similar: dict[str, dict[str, float]] = {}
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        report = run_overlap(drawn, tmp_path / "overlap.json", *words, "--precision", precision)
        assert report["model"]["precision"] == precision
        assert encoders == {"image": {dtype}, "text": {dtype}}
        similar[precision] = {pair["image"]: pair["similarity"] for pair in report["sets"]["emoji"]["pairs"]}
        encoders["image"].clear()
        encoders["text"].clear()
    exact, half = similar.values()
    assert set(half) == set(drawn.copied)
    assert half == pytest.approx(exact, abs=1e-2)
    assert half != exact


def check_leaks(table: Path, drawn: Drawn) -> None:
    """Check that the table drops the copies from training, and nothing else."""
    with table.open(encoding="utf-8-sig") as file:
        leaks = list(csv.DictReader(file))
    assert [f"{drawn.table} row {int(line['row']) + 2}" for line in leaks] == sorted(drawn.copied.values())
    assert {line["finding"] for line in leaks} == {"image of the evaluation set emoji"}
    assert {line["copy_of"] for line in leaks} == {f"emoji: {key}" for key in drawn.copied}
    kept = kept_pairs(open_source(drawn.table), table)
    names = [f"{number}.png" for number in range(20)]
    assert [kept.key(index) for index in range(len(kept))] == [*names, "broken.jpg", "gone.png"]


def check_page(path: Path, report: dict[str, Any]) -> None:
    """Check that the page shows all pairs with readable images, and loads nothing from outside."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    images = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) >= 2 * 2 * 12  # both sides, above and below the threshold
    assert all(max(Image.open(io.BytesIO(b64decode(image))).size) <= 160 for image in images)
    text = unescape(page)
    for pair in report["sets"]["emoji"]["pairs"]:
        assert pair["image"] in text
        assert pair["train"] in text
    assert "could not be read" in page


def test_the_command_accepts_a_suite(drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets in one pass, one with a broken image; p-values are corrected for two tests."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/emoji").symlink_to(drawn.evaluation)
    half = tmp_path / "data/half"
    for key in [*list(drawn.copied)[::2], *drawn.misplaced[3:]]:
        (half / key).parent.mkdir(parents=True, exist_ok=True)
        (half / key).write_bytes((drawn.evaluation / key).read_bytes())
    broken = list(drawn.copied)[0]
    (half / broken).write_bytes((half / broken).read_bytes()[:-300])
    entries = {
        name: {"data": {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": name}}}
        for name in ("emoji", "half", "missing")
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": entries}))
    keys = [path.relative_to(drawn.evaluation).as_posix() for path in sorted(drawn.evaluation.rglob("*.png"))]

    def answers(_: CLIP, each: EvaluationSet, encoded: EncodedImages, *__: Any) -> torch.Tensor:
        size = len(encoded.rows)
        return torch.tensor([key in drawn.copied for key in keys]) if size == 30 else torch.ones(size, dtype=torch.bool)

    monkeypatch.setattr("datamodules.commands.overlap.recognised", answers)
    words = ["--suite", str(tmp_path / "suite.yaml"), "--data_root", str(tmp_path / "data"), "--threshold", "0.9"]
    words += ["--train", str(drawn.table)]
    report = run_overlap(drawn, tmp_path / "overlap.json", *words)
    assert list(report["sets"]) == ["emoji", "half"]
    emoji, half_found = report["sets"].values()
    assert (emoji["accuracy_overlap"], emoji["accuracy_clean"], emoji["difference"]) == (1, 0, 0.4)
    assert emoji["p_value"] == 0
    assert (half_found["images"], half_found["overlap"], half_found["accuracy_all"]) == (6, 5, 1)
    assert half_found["p_value_bonferroni"] == 1
    assert len(half_found["skipped"]) == 1
    assert Path(broken).name in half_found["skipped"][0]
    assert not (tmp_path / "overlap.html").exists()
    with pytest.raises(InputError, match="missing: not there"):
        run_overlap(drawn, tmp_path / "overlap.json", *words, "--sets", "missing")


def test_images_of_which_none_can_be_read_are_an_error(drawn: Drawn, tmp_path: Path) -> None:
    words = [str(drawn.evaluation), "--train", str(write_table(tmp_path / "train", photographs()[:2]))]
    for number in (0, 1):
        (tmp_path / f"train/{number}.png").write_text("no image")
    with pytest.raises(InputError, match=r"none of 2 training images could be read; .*train.csv row 2: .*not an image"):
        run_overlap(drawn, tmp_path / "overlap.json", *words)
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat/1.png").write_text("no image")
    with pytest.raises(InputError, match=r"none of 1 images of pets could be read; .*cat/1.png"):
        run_overlap(drawn, tmp_path / "overlap.json", str(tmp_path / "pets"), *words[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output overlap.csv", "must be a .html or a .json file"),
        ("--output nowhere/overlap.html", "no such folder"),
        ("--sets cifar10", "--suite"),
        ("pets --threshold 7", "must be between -1 and 1"),
        ("pets --precision 16-mixed", "--precision 16-mixed: needs a GPU"),
        ("", "no evaluation set"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_read(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run_command(["overlap", "--train", "none.csv", "--model", "none.ckpt", *words.split()])


def test_mismatched_class_names_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / "1.png")
    data = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "pets"}}
    suite = {"sets": {"pets": {"data": data, "class_names": ["cat"]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="pets: class_names: 1 class names, but the set has 2 classes"):
        run_command(["overlap", "--suite", "suite.yaml", "--train", "none.csv", "--model", "none.ckpt"])
