"""``lit-clip locate``: what it writes equals an independent computation, and it writes nothing elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_clip.cli.subcommands import run_command
from lit_clip.commands.locate import file_stem
from lit_clip.errors import InputError
from tests.helpers.colours import BLACK, BLUE, GREEN, RED, beside, colour_model

WORDS = ["--model", "colours", "--background", "others.txt"]
IMAGES = {
    "photos/a.png": (beside(RED, BLACK, size=(64, 64)), "r"),
    "photos/deep/b c.png": (beside(GREEN, BLACK, RED, size=(120, 64)), "gr"),
    "photos/deep/d.png": (beside(BLUE, size=(50, 9)), ""),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (image, _) in IMAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / "others.txt").write_text("".join(f"{letter} other\n" for letter in "acdefhijklmnopqstuvwxyz"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model = colour_model()
    monkeypatch.setattr("lit_clip.commands.locate.load_model", lambda name: model)
    return tmp_path


def run(*words: str) -> list[dict[str, Any]]:
    run_command(["locate", *words, *WORDS])
    output = words[words.index("--output") + 1] if "--output" in words else "locations"
    return json.loads(Path(output, "locations.json").read_text(encoding="utf-8"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_locations_equal_those_of_the_maps_of_each_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    rows = run("photos", "red", "green", "--output", "found/here")
    assert [(row["image"], row["text"]) for row in rows] == [
        (name, text) for name in IMAGES for text in ("red", "green")
    ]
    model = colour_model()
    others = (folder / "others.txt").read_text().split("\n")[:-1]
    for row in rows:
        image, shown = IMAGES[row["image"]]
        maps = model.locate(image, ["red", "green", *others])
        number = ["red", "green"].index(row["text"])
        level = float(maps[2:].amax())  # of 23 texts, the highest is the level of 5 %
        assert row["seen"] == (row["text"][0] in shown)
        assert row["size"] == list(image.size)
        assert row["cosine"] == pytest.approx(float(maps[number].max()), abs=1e-4)
        assert row["margin"] == pytest.approx(row["cosine"] - level, abs=2e-3)
        own = (maps[number] > level) & (maps[number] >= maps[1 - number])
        if row["seen"]:
            ys, xs = np.nonzero(own.numpy())
            box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.abs(np.subtract(row["box"], box)).max() <= 3
            left, top, right, bottom = row["box"]
            assert left <= row["peak"][0] < right
            assert top <= row["peak"][1] < bottom
            mask = np.asarray(Image.open(folder / "found/here" / row["mask"]))
            assert mask.shape == image.size[::-1]
            assert (mask != own.numpy()).mean() < 0.02
        else:
            assert (row["box"], row["mask"]) == (None, None)
    assert files(folder) - before == {"found/here/locations.json", "found/here/locate.html"} | {
        f"found/here/{row[name]}" for row in rows for name in ("overlay", "mask") if row[name]
    }
    printed = capsys.readouterr().out
    assert printed.count("not seen") == 3
    page = (folder / "found/here/locate.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 6
    assert page.count("not seen") == 3
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)


def test_a_later_run_reads_no_heat_maps_and_leaves_no_file_of_an_earlier_one(folder: Path) -> None:
    first = run(".", "red", "green")
    (folder / "locations/own.png").write_bytes((folder / "photos/a.png").read_bytes())
    (folder / "locations/locations.json.partial").write_text(json.dumps([{"overlay": "../others.txt", "mask": 5}]))
    second = run(".", "blue")
    assert [row["image"] for row in second] == [row["image"] for row in first[::2]]
    assert files(folder / "locations") == {"locations.json", "locate.html", "own.png"} | {
        row[kind] for row in second for kind in ("overlay", "mask") if row[kind]
    }
    assert (folder / "others.txt").exists()
    assert len(run("locations/own.png", "red")) == 1  # a file that is named is read
    (folder / "locations/locations.json").write_text("5")
    assert run(".", "blue") == second


def test_heat_maps_of_earlier_runs_in_other_folders_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("photos", "red", "green", "--output", "photos/first")
    with monkeypatch.context() as killed:  # after its first image, so that it writes no list
        killed.setattr("lit_clip.commands.locate.Answers._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("photos", "blue", "--output", "photos/deep/killed")
    drawn = [f"photos/first/{row[kind]}" for row in first for kind in ("overlay", "mask") if row[kind]]
    Path(drawn[0]).rename("photos/moved.png")
    (folder / "photos/first/own.png").write_bytes((folder / "photos/a.png").read_bytes())
    assert len(list((folder / "photos").rglob("*.png"))) > len(drawn) + 4
    later = run("photos", "red", "green", "--output", "elsewhere")
    assert {row["image"] for row in later} == {*IMAGES, "photos/first/own.png"}
    assert [row for row in later if row["image"] in IMAGES] == first
    assert run(drawn[1], "red")[0]["image"] == drawn[1]  # a file that is named is read
    for name in (*IMAGES, "photos/first/own.png"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="photos: no images outside of --output other but heat maps"):
        run("photos", "red", "--output", "other")


def test_a_later_run_removes_what_a_killed_one_has_left_and_nothing_of_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("lit_clip.commands.locate.Answers._write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("photos", "red")
    left = next((folder / "locations").glob("*.mask.png"))
    own = "like-a-run-0123456789ab.png", f"copy of {left.name}"
    for name, content in zip(own, (folder / "photos/a.png", left), strict=True):
        (folder / "locations" / name).write_bytes(content.read_bytes())
    second = run("photos", "blue")
    assert files(folder / "locations") == {"locations.json", "locate.html", *own} | {
        row[kind] for row in second for kind in ("overlay", "mask") if row[kind]
    }


def test_an_output_folder_that_holds_the_images_is_refused(folder: Path) -> None:
    before = files(folder)
    for output in ("photos", "."):
        with pytest.raises(InputError, match=f"^--output {output}: the images are in it"):
            run("photos", "red", "--output", output)
    (folder / "photos/a.png").unlink()
    with pytest.raises(InputError, match="photos: no images outside of --output"):
        run("photos", "red", "--output", "photos/deep")
    assert files(folder) == before - {"photos/a.png"}


@pytest.mark.parametrize("size", [(300, 97), (1000, 511), (257, 257), (64, 40)])
def test_the_box_is_the_masks_and_the_peak_lies_in_it(folder: Path, size: tuple[int, int]) -> None:
    beside(BLACK, RED, BLACK, size=(size[0] // 3, size[1])).resize(size).save(folder / "photos/a.png")
    (row,) = run("photos/a.png", "red")
    mask = np.asarray(Image.open(folder / "locations" / row["mask"]))
    ys, xs = np.nonzero(mask)
    assert mask.shape == size[::-1]
    assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert mask[row["peak"][1], row["peak"][0]]


def test_background_texts_that_are_equal_or_searched_do_not_count(folder: Path) -> None:
    expected = run("photos", "red")
    lines = (folder / "others.txt").read_text()
    (folder / "others.txt").write_text(f"{lines}a  Other\nRed\nred\n")
    assert run("photos", "red") == expected
    (folder / "others.txt").write_text("sky\n" * 19)
    with pytest.raises(InputError, match="background: 1 texts that differ"):
        run("photos", "red")


def test_names_of_files_are_safe_and_distinct() -> None:
    keys = [
        "a/b.png",
        "a_b.png",
        "a b.png",
        "../../etc/passwd",
        "-rf.png",
        "犬.jpg",
        "x" * 300,
        "\udcff.png",
        "A/B.png",
    ]
    texts = ["a dog", "a-dog", "../up", "犬", "a dog?", ".", "CON"]
    stems = {file_stem(key, text) for key in keys for text in texts}
    assert len({stem.lower() for stem in stems}) == len(keys) * len(texts)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,90}", stem) for stem in stems)
    assert file_stem("photos/Red Kite.jpg", "a kite").startswith("red-kite-a-kite-")


def test_an_encoder_without_places_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = colour_model()
    monkeypatch.setattr(type(model.visual.encoder), "patches", None)
    monkeypatch.setattr("lit_clip.commands.locate.load_model", lambda name: model)
    with pytest.raises(InputError, match=r"^encode_patches: ColourImage has no method patches"):
        run("photos", "red")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "nothing to find; type a text after the file or folder"),
        (["photos", " "], "a text to find is empty"),
        (["photos", "red", "red"], "'red': typed more than once"),
        (["photos", "photos/a.png"], "photos/a.png: is a file, and would be found as a text"),
        (["absent", "red"], "absent: no such file or folder"),
        (["photos", "red", "--output", "others.txt"], "--output others.txt: is a file; name a folder"),
        (["photos", "red", "--false_alarms", "0.01"], "background: 23 texts, .* need at least 99"),
        (["photos", "red", "--scale", "7"], "scale: 7.0 must be between 1 and 4"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], message: str) -> None:
    before = files(folder)
    with pytest.raises(InputError, match=message):
        run(*words)
    assert files(folder) == before


def test_ctrl_c_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_clip.locating import Locator

    once, calls = Locator.__call__, []

    def interrupted(self: Locator, image: Image.Image) -> Any:
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(self, image)

    monkeypatch.setattr(Locator, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="what is done is in locations/locations.json.partial"):
        run("photos", "red")
    assert [row["image"] for row in json.loads((folder / "locations/locations.json.partial").read_text())] == [
        "photos/a.png"
    ]
