"""``lit-clip search``: exact results, an index that follows changes of its folder, and a self-contained page."""

import base64
import io
import os
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.feature_files import write_features
from lit_clip.embedding.index import INDEX
from lit_clip.embedding.reading import EncoderBatch
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.models.fingerprint import fingerprint
from tests.helpers.colours import BLACK, RED, beside, colour_model
from tests.helpers.encoding import watch_encoding

Search = Callable[..., tuple[list[tuple[str, float]], list[str]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory; its folder ``photos`` has five noise images."""
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png", "deep/c & <i>.png", "d[red].png", "e.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Search:
    """A function that runs a search and returns the images found with their scores, and the keys encoded for it."""

    def run(*words: str) -> tuple[list[tuple[str, float]], list[str]]:
        keys: list[str] = []

        def see(task: EncodingTask, batch: EncoderBatch) -> None:
            keys.extend(task.identities[row][0] for row in batch.rows)

        watch_encoding(monkeypatch, see)
        run_command(["search", *words, "--num_workers", "0"])
        rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [(key.strip(), float(score)) for _, score, key in rows], keys

    return run


class Page(HTMLParser):
    """The tags and texts of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_search_finds_the_drawings_the_model_was_trained_on(
    drawings: tuple[Path, Path, list[str]], tmp_path: Path, search: Search
) -> None:
    checkpoint, photos, names = drawings
    own = ["--sheet", str(tmp_path / "sheet.html"), "--index", str(tmp_path / "index.npz")]
    words = ["--model", str(checkpoint), *own]
    found, encoded = search(str(photos), *names, *words, "--top_k", "1")
    assert len(encoded) == 64
    assert sum(Path(key).stem == name.replace("/", "_") for (key, _), name in zip(found, names, strict=True)) >= 60
    found, encoded = search(str(photos), *words, "--image", str(photos / "bicycle.png"), "--top_k", "2")
    assert encoded == []
    assert found[0] == ("bicycle.png", 1.0)
    assert found[1][1] < 1


@torch.no_grad()
def test_scores_equal_the_cosines_of_a_plain_loop_best_first(
    folder: Path, tiny_checkpoint: Path, search: Search
) -> None:
    found, _ = search("photos", "a red kite", "--model", str(tiny_checkpoint))
    model = load_model(tiny_checkpoint)
    text = model.encode_text(model.tokenize("a red kite"), normalize=True)[0]
    expected = {}
    for path in (folder / "photos").rglob("*.png"):
        image = model.encode_image(model.preprocess(Image.open(path))[None], normalize=True)[0]
        expected[path.relative_to(folder / "photos").as_posix()] = float(image @ text)
    assert [key for key, _ in found] == sorted(expected, key=lambda key: -expected[key])
    for key, score in found:
        assert score == pytest.approx(expected[key], abs=1e-4)


def test_a_text_and_an_image_together_rank_by_the_weighted_cosines(
    folder: Path, tiny_checkpoint: Path, search: Search
) -> None:
    words = ("photos", "a red kite", "two dogs", "--image", "photos/a.png", "--model", str(tiny_checkpoint))
    found, _ = search(*words, "--text_weight", "0.7")
    model = load_model(tiny_checkpoint)
    kite, dogs, image = model.encode(["a red kite", "two dogs", Path("photos/a.png")])
    expected = {}
    for path in (folder / "photos").rglob("*.png"):
        (feature,) = model.encode([path])
        score = 0.35 * feature @ kite + 0.35 * feature @ dogs + 0.3 * feature @ image
        expected[path.relative_to(folder / "photos").as_posix()] = float(score)
    assert [key for key, _ in found] == sorted(expected, key=lambda key: -expected[key])
    length = float((0.35 * (kite + dogs) + 0.3 * image).norm())
    assert [score for _, score in found] == pytest.approx([expected[key] / length for key, _ in found], abs=1e-4)
    assert "a red kite, two dogs, like photos/a.png (texts 0.7)" in Page(folder / "search.html").text


def test_the_index_is_updated_when_the_folder_changes(folder: Path, tiny_checkpoint: Path, search: Search) -> None:
    words = ["photos", "kite", "--model", str(tiny_checkpoint)]
    first, encoded = search(*words)
    assert len(encoded) == len(first) == 5
    again, encoded = search(*words)
    assert encoded == []
    assert again == first
    Image.new("RGB", (9, 9), "blue").save(folder / "photos/new.png")
    Image.new("RGB", (50, 50), "red").save(folder / "photos/b.png")
    (folder / "photos/e.png").unlink()
    mixed, encoded = search(*words)
    assert encoded == ["b.png", "new.png"]
    (folder / "photos" / INDEX).unlink()
    anew, encoded = search(*words)
    assert len(encoded) == 5
    assert dict(mixed) == pytest.approx(dict(anew), abs=1e-4)
    assert "e.png" not in dict(mixed)


def test_an_index_of_another_precision_is_made_again(folder: Path, tiny_checkpoint: Path, search: Search) -> None:
    words = ["photos", "kite", "--model", str(tiny_checkpoint)]
    exact, _ = search(*words)
    half, encoded = search(*words, "--precision", "bf16-mixed")
    assert len(encoded) == 5
    assert dict(half) == pytest.approx(dict(exact), abs=1e-2)
    assert half != exact
    _, encoded = search(*words, "--precision", "bf16-mixed")
    assert encoded == []
    again, encoded = search(*words)
    assert len(encoded) == 5
    assert again == exact


def test_a_damaged_index_is_rebuilt(folder: Path, tiny_checkpoint: Path, search: Search) -> None:
    first, _ = search("photos", "kite", "--model", str(tiny_checkpoint))
    index = folder / "photos" / INDEX
    index.write_bytes(index.read_bytes()[:200])
    found, encoded = search("photos", "kite", "--model", str(tiny_checkpoint))
    assert (len(encoded), found) == (5, first)


def test_somebodys_arrays_are_not_replaced_by_an_index(folder: Path, tiny_checkpoint: Path, search: Search) -> None:
    np.savez(folder / "arrays.npz", values=np.zeros(3))
    before = (folder / "arrays.npz").read_bytes()
    with pytest.raises(InputError, match=r"--index arrays\.npz: holds other arrays than an index; name another file"):
        search("photos", "kite", "--model", str(tiny_checkpoint), "--index", "arrays.npz")
    assert (folder / "arrays.npz").read_bytes() == before


def test_embed_names_the_command_that_searches_its_file_without_encoding(
    folder: Path, tiny_checkpoint: Path, search: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_checkpoint)]
    run_command(["embed", "photos", *model, "--output", "some features.parquet", "--num_workers", "0"])
    (command,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search them: ")]
    program, name, *words = shlex.split(command.removeprefix("search them: "))
    assert (program, name) == ("lit-clip", "search")
    found, encoded = search(*("kite" if word == "TEXT" else word for word in words))
    assert encoded == []
    of_folder, encoded = search("photos", "kite", *model)
    assert len(encoded) == 5
    assert dict(found) == {f"photos/{key}": score for key, score in of_folder}


def test_an_approximate_index_of_two_files_finds_what_the_folder_does(
    folder: Path,
    tiny_checkpoint: Path,
    tiny_config: CLIPConfig,
    search: Search,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("usearch", reason="the extra index is not installed")
    model = ["--model", str(tiny_checkpoint), "--num_workers", "0"]
    run_command(["embed", "photos/deep", *model, "--output", "deep.npy"])
    run_command(
        ["embed", *(f"photos/{name}.png" for name in ("a", "b", "d[red]", "e")), *model, "--output", "flat.npy"]
    )
    run_command(["index", "deep.npy", "--output", "all.usearch"])
    run_command(["index", "flat.npy", "--output", "all.usearch"])
    words = shlex.split(capsys.readouterr().err.splitlines()[-1].removeprefix("search them: "))[2:]
    found, encoded = search(*("kite" if word == "TEXT" else word for word in words))
    assert encoded == []
    of_folder, _ = search("photos", "kite", *model[:2])
    assert found == [(f"photos/{key}", score) for key, score in of_folder]
    torch.manual_seed(1)
    monkeypatch.setattr("lit_clip.commands.search.load_model", lambda name: CLIP(tiny_config))
    with pytest.raises(InputError, match=r"all\.usearch: features of another model \(.*\); give that one as --model"):
        search("all.usearch", "kite", "--model", "other")


def test_features_of_another_width_are_refused(folder: Path, tiny_checkpoint: Path, search: Search) -> None:
    model = {"model": "last.ckpt", "model_sha256": fingerprint(load_model(tiny_checkpoint)).model}
    write_features(folder / "features.npy", ["a.png"], np.full((1, 5), 5**-0.5, np.float32), model)
    with pytest.raises(InputError, match=r"features\.npy: has features of 5 numbers, but the model's have 16"):
        search("features.npy", "kite", "--model", str(tiny_checkpoint))


def test_the_page_shows_every_hit_and_loads_nothing_from_outside(
    folder: Path, tiny_checkpoint: Path, search: Search
) -> None:
    query = '<script>alert("x")</script> & more'
    found, _ = search("photos", query, "kite", "--model", str(tiny_checkpoint), "--top_k", "5", "--sheet", "page.html")
    page = Page(folder / "page.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "i"})
    assert query in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    images, why = pictures[::2], pictures[1::2]
    assert [attributes["alt"] for attributes in why] == [
        f"where it fits: {each}" for each in (query, "kite") for _ in range(5)
    ]
    assert [attributes["alt"] for attributes in images] == [
        f"{rank}. {key} ({score:.4f})" for rank, (key, score) in zip([1, 2, 3, 4, 5] * 2, found, strict=True)
    ]
    for (key, _), attributes in zip(found, images, strict=True):
        head, _, data = (attributes["src"] or "").partition(",")
        assert head == "data:image/jpeg;base64"
        thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)
        image = np.asarray(Image.open(folder / "photos" / key).convert("RGB"), dtype=float)
        assert np.abs(thumbnail.mean((0, 1)) - image.mean((0, 1))).max() < 5
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all((address or "").startswith("data:") for address in addresses)
    assert "url(" not in (folder / "page.html").read_text(encoding="utf-8")


def test_the_page_shows_where_the_image_fits_the_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a photograph that a camera's flag turns by a quarter; and of ten images of a query at most."""
    (tmp_path / "photos").mkdir()
    image, black = beside(RED, BLACK, size=(128, 64)), beside(BLACK)
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "photos/turned.png", exif=image.getexif())
    for number in range(14):
        black.save(tmp_path / f"photos/{number}.png")
    monkeypatch.chdir(tmp_path)
    model = colour_model()
    monkeypatch.setattr("lit_clip.commands.search.load_model", lambda name: model)
    words = ["search", "photos", "red", "--model", "colours", "--num_workers", "0", "--top_k", "12"]
    run_command(words)
    page = Page(tmp_path / "search.html")
    why = [attributes["src"] or "" for _, attributes in page.tags if (attributes.get("alt") or "").startswith("where")]
    assert len(why) == 10
    first = Image.open(io.BytesIO(base64.b64decode(why[0].partition(",")[2])))
    colours = np.asarray(first.convert("RGB")).astype(int)
    height = colours.shape[0] - 38 * first.width // 256  # without the colour bar
    upper, lower = (
        float(np.ptp(part, axis=2).mean())
        for part in (colours[5 : height // 2 - 30], colours[height // 2 + 30 : height - 5])
    )
    assert upper > 3 * lower  # left in the file, above on the page
    monkeypatch.setattr(type(model.visual.encoder), "patches", None)
    run_command(words)
    assert "why was this found" not in (tmp_path / "search.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "nothing to search for"),
        (["photos", ""], "a text to search for is empty"),
        (["photos", "kite", "photos/a.png"], "photos/a.png: is a file, .* put it after --image"),
        (["absent", "kite"], "absent: no such folder"),
        (["photos/a.png", "kite"], "photos/a.png: cannot be searched; name a folder of images"),
        (["all.faiss", "kite"], "all.faiss: cannot be searched; name .* .usearch file"),
        (["empty", "kite"], "empty: no images"),
        (["photos", "--image", "absent.png"], "--image absent.png: no such image file"),
        (["photos", "--image", "photos"], "--image photos: is a folder; name an image"),
        (["photos", "kite", "--sheet", "absent/page.html"], "--sheet absent/page.html: there is no such folder"),
        (["photos", "kite", "--sheet", "photos/a.png"], "--sheet photos/a.png: must be a .html file"),
        (["photos", "kite", "--index", "photos/a.png"], "--index photos/a.png: must be a .npz file"),
        (["photos", "kite", "--top_k", "0"], "--top_k 0 must be at least 1"),
        (["photos", "kite", "--text_weight", "0.5"], "--text_weight 0.5: needs a text and an image"),
        (["photos", "kite", "--image", "photos/a.png", "--text_weight", "1"], "--text_weight 1.0: must be above 0"),
        (["a.npy", "kite", "--precision", "bf16-mixed"], "--precision bf16-mixed: a.npy holds features"),
    ],
)
def test_invalid_arguments_are_named_before_a_model_is_opened(folder: Path, words: list[str], message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "all.faiss").touch()
    image = (folder / "photos/a.png").read_bytes()
    with pytest.raises(InputError, match=message):
        run_command(["search", *words, "--model", "nobody/nothing", "--num_workers", "0"])
    assert (folder / "photos/a.png").read_bytes() == image
    assert not (folder / "search.html").exists()


def read_only(folder: Path) -> Callable[[Any, int], bool]:
    """Return ``os.access`` as it is where a folder is mounted read-only, also for the superuser."""
    access = os.access
    return lambda path, mode: Path(path).resolve() != folder.resolve() and access(path, mode)


def test_features_of_a_folder_that_cannot_be_written_to_are_kept_in_the_cache_folder(
    folder: Path,
    tiny_checkpoint: Path,
    search: Search,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["photos", "a red kite", "--model", str(tiny_checkpoint)]
    expected, _ = search(*words, "--index", "elsewhere.npz")
    before = {path: path.read_bytes() for path in (folder / "photos").rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "access", read_only(folder / "photos"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    found, encoded = search(*words)
    assert (found, len(encoded)) == (expected, 5)
    (kept,) = (folder / "cache/lit-clip/search").iterdir()
    assert kept.name.startswith("photos-")
    assert search(*words) == (expected, [])
    assert {path: path.read_bytes() for path in (folder / "photos").rglob("*") if path.is_file()} == before
    run_command(["search", *words, "--num_workers", "0"])
    assert f"photos cannot be written to: features of its images are kept in {kept}" in capsys.readouterr().err


def test_a_whole_index_in_a_folder_that_cannot_be_written_to_is_used_and_another_is_completed_in_the_cache(
    folder: Path, tiny_checkpoint: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["photos", "a red kite", "--model", str(tiny_checkpoint)]
    _, encoded = search(*words)
    assert len(encoded) == 5
    monkeypatch.setattr(os, "access", read_only(folder / "photos"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert search(*words)[1] == []
    assert not (folder / "cache").exists()
    Image.new("RGB", (40, 40), "red").save(folder / "photos/new.png")
    index = (folder / "photos" / INDEX).read_bytes()
    assert search(*words)[1] == ["new.png"]
    assert search(*words)[1] == []
    assert (folder / "photos" / INDEX).read_bytes() == index
