"""``lit-clip inspect`` on data with every kind of problem: figures against plain counting, page, exit codes."""

import csv
import hashlib
import io
import re
import sys
from base64 import b64decode
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
from PIL import Image

from datamodules.commands.inspect import inspect
from datamodules.open_source import open_source
from datamodules.pairs.findings import DataOptions
from datamodules.pairs.kept import kept_pairs
from lit_clip.cli.main import main
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
BROKEN = {
    "cut.jpg": "broken image",
    "page.jpg": "not an image",
    "gone.jpg": "missing image",
    "empty.png": "not an image",
    "floats.tif": "levels without a range",
}


class Report(NamedTuple):
    """Output of an inspection."""

    figures: dict[str, str]
    notes: str
    page: str
    table: list[dict[str, str]]


def figures_of(table: str) -> dict[str, str]:
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines() if "│" in line]
    return {name: value for name, value in cells if value}


def photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 240), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 40 images, some of them duplicates, odd or broken."""
    folder = tmp_path_factory.mktemp("messy")
    rows: list[tuple[str, str]] = []
    for seed in range(24):
        photo(seed).save(folder / f"{seed}.jpg", quality=92)
        rows.append((f"{seed}.jpg", " ".join(WORDS[: 1 + seed % 10] * (1 + seed // 2))))
    (folder / "copy.jpg").write_bytes((folder / "3.jpg").read_bytes())
    photo(5).resize((150, 120)).save(folder / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(30).save(folder / "turned.jpg", exif=exif)
    photo(31).convert("CMYK").save(folder / "print.jpg")
    photo(32).convert("P").save(folder / "film.gif", save_all=True, append_images=[photo(33).convert("P")])
    Image.new("RGB", (260, 260), "red").save(folder / "red.webp")
    deep = np.asarray(photo(34).convert("L")).astype(np.uint16) * 16  # 12 bits in a file of 16
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep.astype(np.float32)).save(folder / "floats.tif")
    Image.new("RGBA", (20, 10), (0, 0, 0, 0)).save(folder / "clear.png")
    (folder / "cut.jpg").write_bytes((folder / "7.jpg").read_bytes()[:2000])
    (folder / "page.jpg").write_text("<html>404 & <script>alert(1)</script></html>")
    (folder / "empty.png").touch()
    rows += [(name, f"Caption <b>{name}</b>") for name in ("copy.jpg", "small.png", "turned.jpg", "print.jpg")]
    rows += [
        ("film.gif", "twice"),
        ("red.webp", "Twice "),
        ("clear.png", "clear"),
        ("deep.png", "deep"),
        ("3.jpg", "another"),
        ("3.jpg", "another"),
    ]
    rows += [(name, "not seen") for name in BROKEN]
    rows += [("1.jpg", ""), ("2.jpg", "NaN")]
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


def usable_rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "pairs.csv").open(encoding="utf-8") as file:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    return [(image, text) for image, text in rows if image not in BROKEN and text not in ("", "NaN")]


def run_inspect(folder: Path, *words: str) -> Report:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        run_command(["inspect", *words, "--output", str(folder / "report.html")])
    return Report(
        figures_of(out.getvalue()), err.getvalue(), (folder / "report.html").read_text(encoding="utf-8"), lines(folder)
    )


def lines(folder: Path) -> list[dict[str, str]]:
    """Return the table of findings."""
    table = folder / "report.findings.csv"
    return list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig")))) if table.exists() else []


@pytest.fixture(scope="module")
def report(messy: Path) -> Report:
    """Report on the messy table, read by two data workers."""
    return run_wide(messy, 2)


def run_wide(messy: Path, workers: int) -> Report:
    """Inspect the messy table; the page names the folder, which is the same each time."""
    folder = messy.with_name("report")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as wide:
        wide.setenv("COLUMNS", "200")
        return run_inspect(folder, str(messy / "pairs.csv"), "--num_workers", str(workers))


def number(report: Report, name: str) -> int:
    return int(report.figures[name].split(" ")[0].replace(",", ""))


def test_every_row_is_counted_and_every_problem_is_named(report: Report, messy: Path) -> None:
    usable = usable_rows(messy)
    assert number(report, "rows or samples found") == len(usable) + len(BROKEN) + 2
    assert number(report, "usable") == len(usable)
    assert number(report, "left out: no caption") == 2
    for reason, count in Counter(BROKEN.values()).items():
        assert number(report, f"unusable: {reason}") == count
    with (messy / "pairs.csv").open(encoding="utf-8") as file:
        images = {f"row {line}": row["image"] for line, row in enumerate(csv.DictReader(file), start=2)}
    unusable = {**BROKEN, "1.jpg": "no caption", "2.jpg": "no caption"}
    bad = [line for line in report.table if line["finding"] in unusable.values()]
    named = {images[re.findall(r"pairs.csv (row \d+)", line["detail"])[0]]: line["finding"] for line in bad}
    assert named == unusable
    assert len(bad) == len(unusable)
    assert {line["decision"] for line in bad if line["finding"] != "levels without a range"} == {"drop"}
    (floats,) = [line for line in bad if line["finding"] == "levels without a range"]
    assert floats["decision"] == "keep"  # they train with a window
    assert "set data.window" in floats["detail"]
    kept = kept_pairs(open_source(messy / "pairs.csv"), messy.with_name("report") / "report.findings.csv")
    assert {kept.key(row) for row in range(len(kept))} & set(BROKEN) == {"floats.tif"}
    broken = [line["detail"].split(": ")[0] for line in bad if line["finding"] in BROKEN.values()]
    assert all(f"{where}: " in report.notes for where in broken)
    assert "report.findings.csv" in report.notes


def test_image_figures_match_plain_counting(report: Report, messy: Path) -> None:
    names = dict.fromkeys(image for image, _ in usable_rows(messy))
    opened = [Image.open(messy / name) for name in names]
    for line, counts in (
        ("formats", Counter(image.format for image in opened)),
        ("colour modes", Counter(image.mode for image in opened)),
    ):
        found = {name: int(count) for name, count in re.findall(r"([\w;]+) (\d+)", report.figures[line])}
        assert found == counts
    sizes = sorted((image.size for image in opened), key=lambda size: size[0] * size[1])
    for line, size in (("smallest", sizes[0]), ("median", sizes[len(sizes) // 2]), ("largest", sizes[-1])):
        assert report.figures[f"{line}, width x height"] == f"{size[0]} x {size[1]}"
    assert number(report, "shorter side under 224 pixels") == sum(min(image.size) < 224 for image in opened)
    assert number(report, "with an EXIF rotation (models see them unrotated)") == 1
    assert number(report, "animated (models see the first frame)") == 1
    assert number(report, "a single colour") == 2
    assert number(report, "more than 8 bits a level (models see the highest 8)") == 1
    assert number(report, "four or more bands, as CMYK (models see them converted to RGB)") == 1
    plain = {line["key"]: line["decision"] for line in report.table if "a single colour" in line["finding"]}
    assert plain == {"red.webp": "keep", "clear.png": "keep"}
    clear = [image for image in opened if "A" in image.getbands() and image.getchannel("A").getextrema()[0] < 128]
    name = "transparent (models see what lies underneath, often black; draw them on white)"
    assert number(report, name) == len(clear) > 0
    digests = {hashlib.md5((messy / name).read_bytes()).hexdigest() for name in names}
    assert number(report, "same file as another image") == len(names) - len(digests) == 1
    assert report.figures["other file that looks the same (64-bit difference hash)"].endswith("in 1 group")


def test_caption_figures_match_another_tokenizer(report: Report, messy: Path) -> None:
    captions = [text for _, text in usable_rows(messy)]
    lengths = [int((open_clip.tokenize([text], context_length=1000) != 0).sum()) for text in captions]
    cut = [length for length in lengths if length > 77]
    assert number(report, "captions") == len(captions)
    assert number(report, "truncated at 77 tokens") == len(cut) > 0
    lost = np.mean([length - 77 for length in cut])
    assert report.figures["tokens lost per truncated caption"] == f"{lost:.1f} on average"
    mean, most = np.mean(lengths), max(lengths)
    assert re.fullmatch(f"mean {mean:.1f}, .*longest {most}", report.figures["tokens, start and end included"])
    distinct = {" ".join(text.lower().split()) for text in captions}
    assert number(report, "same as another caption") == len(captions) - len(distinct)
    assert number(report, "same image and caption as another pair") == 1
    assert "duplicates positives" in report.figures["to count them as right in training"]


class Page(HTMLParser):
    """A page as a browser parses it."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_the_page_holds_its_images_and_shows_all_findings(report: Report, messy: Path) -> None:
    page = Page(report.page)
    text = " ".join(page.text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "b"}
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert sources
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(b64decode(data))).size) <= 160
    assert all(value in text for value in report.figures.values())
    for expected in ("the same file", "other files of the same look", "most frequent captions", "unusable pairs"):
        assert expected in page.text
    assert "Caption <b>copy.jpg</b>" in text  # as text, not as markup
    for name in ("copy.jpg", "small.png"):
        assert sum(part == name for part in page.text) >= 1
    shown = [line for line in report.table if line["finding"] in (*BROKEN.values(), "no caption")]
    assert all(re.findall(r"pairs.csv row \d+", line["detail"])[0] in text for line in shown)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["report.findings.csv"]
    assert report.notes.splitlines()[-1].removeprefix("train on the rest: ") in text


def test_the_histogram_counts_every_caption_once_and_marks_truncated_ones(report: Report, messy: Path) -> None:
    chart = re.findall(r"<svg.*?</svg>", report.page, re.DOTALL)[0]
    bars = re.findall(r'fill="(var\(--[\w-]+\))"><title>(\d+)(?: to (\d+))?: ([\d,]+)<', chart)
    assert sum(int(count) for *_, count in bars) == len(usable_rows(messy))
    marked = sum(int(count) for colour, *_, count in bars if colour == "var(--marked-bar)")
    assert marked == number(report, "truncated at 77 tokens")
    assert all((int(first) > 77) == (colour == "var(--marked-bar)") for colour, first, *_ in bars)


def test_the_number_of_workers_does_not_change_the_findings(report: Report, messy: Path) -> None:
    same = run_wide(messy, 0)
    assert (same.figures, same.table, same.page) == (report.figures, report.table, report.page)


def test_a_folder_and_shards_of_the_same_pairs_have_the_same_figures(
    messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "folder"
    folder.mkdir()
    for image, text in dict(usable_rows(messy)).items():
        (folder / image).write_bytes((messy / image).read_bytes())
        (folder / image).with_suffix(".txt").write_text(text)
    (folder / "3.txt").write_text("first\nsecond\n")
    run_command(["shard", str(folder), str(tmp_path / "shards"), "--shard_size", "10", "--num_workers", "0"])
    of_folder, of_shards = (
        run_inspect(tmp_path, str(tmp_path / name), "--num_workers", "0").figures for name in ("folder", "shards")
    )
    assert of_folder == of_shards
    images = len(dict(usable_rows(messy)))
    assert of_folder["images"] == f"{images}, with {images + 1} captions"
    (tmp_path / "one.csv").write_text(f"image,caption\n{messy / '1.jpg'},one\n")
    assert run_inspect(tmp_path, str(tmp_path / "one.csv"), "--num_workers", "0").table == []
    assert len(kept_pairs(open_source(tmp_path / "one.csv"), tmp_path / "report.findings.csv")) == 1


def test_captions_are_measured_with_the_models_tokenizer_and_context_length(
    messy: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    lengths = [int((open_clip.tokenize([text], context_length=1000) != 0).sum()) for _, text in usable_rows(messy)]
    table = str(messy / "pairs.csv")
    for words, context in (
        (("--model", str(tiny_checkpoint)), 16),
        (("--model", "ViT-tiny-16-64"), 32),
        (("--model", "ViT-B-32", "--context_length", "20"), 20),
    ):
        report = run_inspect(tmp_path, table, "--num_workers", "0", *words)
        assert number(report, f"truncated at {context} tokens") == sum(length > context for length in lengths)


def test_the_command_exits_with_2_if_no_pair_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("image,caption\nnone.jpg,a\nbad.csv,b\n")
    monkeypatch.setattr(sys, "argv", ["lit-clip", "inspect", "bad.csv"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lit-clip: error: bad.csv: none of 2 pairs can be used; the first: bad.csv row 2")
    assert "unusable pairs" in (tmp_path / "inspect.html").read_text()


def test_an_unknown_column_is_asked_for_by_option(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Dateiname;Beschreibung\na.png;ein Hund\n")
    with pytest.raises(InputError, match=r"\(Dateiname, Beschreibung\) .*; for example, set --columns.image Dateiname"):
        run_inspect(tmp_path, str(tmp_path / "t.csv"))
    with pytest.raises(InputError, match="for example, set --columns.caption Beschreibung"):
        run_inspect(tmp_path, str(tmp_path / "t.csv"), "--columns.image", "Dateiname")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": DataOptions([])}, "no data"),
        ({"context_length": 1}, "context_length"),
        ({"output": "nowhere/inspect.html"}, "no such folder"),
        ({"output": "pairs.csv"}, "must be a .html file"),
        ({"model": "ViT-B-99"}, "ViT-B-99"),
        ({}, "nothing.csv"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_read(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        inspect(**{"given": DataOptions(["nothing.csv"]), **options})  # pyright: ignore[reportArgumentType]  # wrong on purpose
    assert list(tmp_path.iterdir()) == []
