"""``lit-clip inspect`` on a planted set: every problem is found, and exactly what the table keeps is trained on."""

import csv
import io
import json
import os
import resource
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.captions import Captions
from datamodules.inspection.scan import says_nothing
from datamodules.open_source import open_source
from datamodules.pairs.kept import kept_pairs
from datamodules.shards.pairs import TarPairs
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from tests.conftest import ROOT, TINY_YAML, lit_clip_command
from tests.helpers.small_sets import trained_on

Planted = tuple[str, list[str], list[tuple[str, str] | None]]
LONG = " ".join(["one of many words"] * 30)
# image, captions, and the finding and decision on each caption; None: no line
PLANTED: list[Planted] = [
    ("0.jpg", ["a red kite"], [None]),
    ("0.jpg", ["a kite in the sky"], [None]),  # several captions of a photograph, a row each
    ("0.jpg", ["a red kite"], [("copy", "drop")]),
    ("0 again.jpg", ["A red  kite"], [("copy", "drop")]),
    ("0 again.jpg", ["toys on a beach"], [("copy with another caption", "keep")]),
    ("1.jpg", ["a boat", "a boat on a lake", "photo"], [None, None, ("caption says nothing", "drop")]),
    ("1 at quality 40.jpg", ["a boat"], [("near copy", "drop")]),
    ("1 at half size.png", ["a boat", "water"], [("near copy", "drop"), ("near copy with another caption", "keep")]),
    ("2 at half size.jpg", ["a hill"], [("near copy", "drop")]),  # the larger one comes later
    ("2.jpg", ["a hill"], [None]),
    ("3.jpg", ["image", "IMG_0012.jpg"], [("caption says nothing", "drop")] * 2),
    ("4.jpg", [LONG, "short"], [("caption too long", "keep"), None]),
    ("5.jpg", ["7"], [None]),
    ("cut.jpg", ["a broken file"], [("broken image", "drop")]),
    ("gone.jpg", ["a missing file"], [("missing image", "drop")]),
    ("up.png", ["a shirt"], [None]),
    ("down.png", ["a shirt"], [("looks like another image", "keep")]),
    ("6.jpg", ["="], [None]),
    ("7.jpg", ["-- ??"], [("caption says nothing", "drop")]),
]
OTHERS = 13  # further images without a finding, numbered from 20
Pair = tuple[str, str]


def photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 240), Image.Resampling.BICUBIC)


def ramp(upwards: bool) -> Image.Image:
    """Brighter to the right, so that the hashes are equal, and brighter above or below."""
    levels = np.linspace(60, 160, 90)[None] + np.where((np.arange(80) < 40) == upwards, 40, -40)[:, None]
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the planted set as ``planted.jsonl``; the first line and one within have no caption."""
    for seed in (*range(8), *range(20, 20 + OTHERS)):
        photo(seed).save(tmp_path / f"{seed}.jpg", quality=92)
    (tmp_path / "0 again.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    photo(1).save(tmp_path / "1 at quality 40.jpg", quality=40)
    photo(1).resize((150, 120)).save(tmp_path / "1 at half size.png")
    photo(2).resize((150, 120)).save(tmp_path / "2 at half size.jpg", quality=80)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "6.jpg").read_bytes()[:2000])
    ramp(True).save(tmp_path / "up.png")
    ramp(False).save(tmp_path / "down.png")
    rows = [{"image": name, "caption": captions} for name, captions, _ in PLANTED]
    rows += [{"image": f"{seed}.jpg", "caption": f"number {seed}"} for seed in range(20, 20 + OTHERS)]
    rows = [{"image": "5.jpg", "caption": "  "}, *rows[:3], {"image": "6.jpg", "caption": "nan"}, *rows[3:]]
    (tmp_path / "planted.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspect(*words: str) -> list[dict[str, str]]:
    run_command(["inspect", *words, "--num_workers", "0", "--output", "inspect.html"])
    return read()


def read(path: str = "inspect.findings.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"))))


def write(lines: list[dict[str, str]], path: str, delimiter: str = ",") -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)


def kept_of(planted: list[Planted]) -> set[tuple[int, str]]:
    """Return row and caption of the pairs that are kept."""
    kept = {
        (row, caption)
        for row, (_, captions, findings) in enumerate(planted)
        for caption, found in zip(captions, findings, strict=True)
        if found is None or found[1] == "keep"
    }
    return kept | {(len(planted) + number, f"number {20 + number}") for number in range(OTHERS)}


def trained(keep: str, world: int, data: str = "planted.jsonl") -> Counter[Pair]:
    """Return the pairs that some epochs draw on all ranks together, each as often as in one epoch."""
    every: Counter[Pair] = Counter()
    ranks = [Captions(data, "20.csv", batch_size=1, num_workers=0, keep=keep, seed=1) for _ in range(world)]
    for epoch in range(12):  # of several captions one is drawn
        drawn: Counter[Pair] = Counter()
        for rank, captions in enumerate(ranks):
            drawn.update(trained_on(captions, rank, world, epoch))
        every |= drawn
    return every


def names(rows: set[tuple[int, str]]) -> Counter[Pair]:
    """Return key and caption of pairs; a copy that is kept has the key of its original."""
    original = {"0 again.jpg": "0.jpg", "1 at half size.png": "1.jpg", "1 at quality 40.jpg": "1.jpg"}
    keys = [name for name, _, _ in PLANTED] + [f"{20 + number}.jpg" for number in range(OTHERS)]
    return Counter((original.get(keys[row], keys[row]), caption) for row, caption in rows)


def test_every_planted_problem_is_found_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect("planted.jsonl")
    left_out, lines = lines[:2], lines[2:]
    assert [(line["finding"], line["decision"], line["row"]) for line in left_out] == [("no caption", "drop", "")] * 2
    assert [line["detail"].rpartition(" row ")[2] for line in left_out] == ["1", "5"]
    wanted = [
        (str(row), name, *found)
        for row, (name, _, findings) in enumerate(PLANTED)
        for found in findings
        if found is not None
    ]
    assert [(line["row"], line["key"], line["finding"], line["decision"]) for line in lines] == wanted
    copies = {line["key"]: line["copy_of"] for line in lines if "copy" in line["finding"]}
    assert copies == {
        "0.jpg": "0.jpg",
        "0 again.jpg": "0.jpg",
        "1 at quality 40.jpg": "1.jpg",
        "1 at half size.png": "1.jpg",
        "2 at half size.jpg": "2.jpg",
    }
    smaller = next(line for line in lines if line["copy_of"] == "2.jpg")
    assert smaller["copy_of_row"] == "9"
    assert "150 x 120 pixels, the other 300 x 240" in smaller["detail"]
    output = capsys.readouterr()
    last = output.err.splitlines()[-1]
    assert last == "train on the rest: lit-clip fit --data.train planted.jsonl --data.keep inspect.findings.csv"
    assert shlex.split(last)[-1] in Path("inspect.html").read_text()
    counted = [[cell.strip() for cell in row.split("│")[1:3]] for row in output.out.splitlines() if "│" in row]
    counts = Counter(f"{line['finding']}: {line['decision']}" for line in (*left_out, *lines))
    assert {(name, str(count)) for name, count in counts.items()} <= {tuple(cells) for cells in counted}


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_exactly_the_rest_is_trained_on_and_an_edited_table_decides(folder: Path, world: int) -> None:
    Path("20.csv").write_text("image,caption\n20.jpg,one\n")
    lines = inspect("planted.jsonl")
    assert trained("inspect.findings.csv", world) == names(kept_of(PLANTED))
    changes = {"near copy": "Keep ", "caption too long": "DROP", "copy with another caption": "drop"}
    edited = [  # and sorted otherwise; a line that is removed is a pair that is kept
        line | {"decision": changes.get(line["finding"], line["decision"]), "caption": "changed"}
        for line in reversed(lines)
        if line["finding"] != "missing image"
    ]
    write(edited, "edited.csv", delimiter=";")
    Path("gone.jpg").write_bytes(Path("7.jpg").read_bytes())
    decided = {**{name: word.strip().lower() for name, word in changes.items()}, "missing image": "keep"}
    planted = [
        (name, captions, [found and (found[0], decided.get(*found)) for found in findings])
        for name, captions, findings in PLANTED
    ]
    expected = names(kept_of(planted))
    del expected["2.jpg", "a hill"]
    expected["2 at half size.jpg", "a hill"] = 2  # the first of the two gives the key
    assert trained("edited.csv", world) == expected


def test_shards_and_features_are_those_of_the_kept_pairs(folder: Path, tiny_checkpoint: Path) -> None:
    inspect("planted.jsonl")
    run_command(["shard", "planted.jsonl", "shards", "--keep", "inspect.findings.csv", "--num_workers", "0"])
    shards = TarPairs("shards")
    written = [(shards.read(row).image, caption) for row in range(len(shards)) for caption in shards.captions(row)]
    keys = [name for name, _, _ in PLANTED] + [f"{20 + number}.jpg" for number in range(OTHERS)]
    kept = [((folder / keys[row]).read_bytes(), caption.strip()) for row, caption in kept_of(PLANTED)]
    assert Counter(written) == Counter(kept)
    words = ["embed", "planted.jsonl", "--model", str(tiny_checkpoint), "--output", "features.npy"]
    run_command([*words, "--num_workers", "0", "--keep", "inspect.findings.csv"])
    wanted = {key for key, _ in names(kept_of(PLANTED))}
    assert json.loads(Path("features.keys.json").read_text())["keys"] == sorted(wanted)


def test_two_processes_train_on_exactly_the_rest(folder: Path) -> None:
    inspect("planted.jsonl")
    Path("recording.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        "class Recording(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        with Path(f'seen{trainer.global_rank}.txt').open('a') as file:\n"
        "            file.writelines(f'{key}\\n' for key in batch.keys)\n"
    )
    Path("val.csv").write_text("image,caption\n20.jpg,one\n21.jpg,two\n")
    found = lit_clip_command(
        folder,
        *("fit", "--config", str(ROOT / "tests/helpers/no_settings.yaml"), "--data", "datamodules.Captions"),
        *("--data.train", "planted.jsonl", "--data.keep", "inspect.findings.csv", "--data.val", "val.csv"),
        *("--model.architecture", TINY_YAML, "--data.batch_size", "4", "--data.num_workers", "0"),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
        *("--trainer.strategy", "ddp", "--trainer.callbacks+=recording.Recording", "--trainer.logger", "false"),
    )
    assert found.returncode == 0, found.stderr
    seen = [(folder / f"seen{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert min(map(len, seen)) > 5
    kept = names({(row, "") for row, _ in kept_of(PLANTED)})
    assert sum(kept.values()) == 24  # three batches
    assert Counter(seen[0] + seen[1]) == Counter(key for key, _ in kept.elements())


def test_copies_of_validation_images_are_dropped_whatever_their_captions(folder: Path) -> None:
    (folder / "val").mkdir()
    photo(1).resize((200, 160)).save(folder / "val/a.png")
    (folder / "val/b.jpg").write_bytes((folder / "4.jpg").read_bytes())
    photo(50).save(folder / "val/c.jpg")
    (folder / "val/d.jpg").write_text("no image")
    Path("val/val.csv").write_text("image,caption\na.png,x\nb.jpg,x\nc.jpg,x\nd.jpg,x\n")
    lines = inspect("planted.jsonl", "--val", "val/val.csv")
    leaks = {(line["key"], line["finding"], line["copy_of"]) for line in lines if "validation" in line["finding"]}
    near = [("1.jpg", "looks like a validation image", "a.png")]
    near += [(name, *near[0][1:]) for name in ("1 at quality 40.jpg", "1 at half size.png")]
    assert leaks == {*near, ("4.jpg", "copy of a validation image", "b.jpg")}
    assert {line["decision"] for line in lines if "validation" in line["finding"]} == {"drop"}
    kept = kept_pairs(open_source("planted.jsonl"), "inspect.findings.csv")
    assert not {kept.key(row) for row in range(len(kept))} & {"4.jpg", *(name for name, _, _ in near)}


def test_kept_copies_are_never_divided_from_their_originals(folder: Path) -> None:
    rows = [f"{seed}.jpg,number {seed}\ncopy{seed}.jpg,another {seed}\n" for seed in range(20, 60)]
    for seed in range(20, 60):
        photo(seed).save(f"{seed}.jpg", quality=90)
        photo(seed).save(f"copy{seed}.jpg", quality=50)
    Path("copies.csv").write_text("image,caption\n" + "".join(rows))
    assert {line["decision"] for line in inspect("copies.csv")} == {"keep"}
    for seed in range(8):
        data = Captions("copies.csv", num_workers=0, seed=seed, keep="inspect.findings.csv")
        data.setup("fit")
        assert data.train_source
        assert data.val_source
        train, val = ({each.key(row) for row in range(len(each))} for each in (data.train_source, data.val_source))
        assert not train & val
        assert (len(data.train_source), len(data.val_source)) == (2 * len(train), 2 * len(val))
        loaded = data.val_source.load(1, None)
        assert loaded.key == data.val_source.text(1, None).key == data.val_source.read(1).key in val


def test_shards_are_inspected_and_trained_on_like_the_table(folder: Path) -> None:
    run_command(["shard", "planted.jsonl", "shards", "--num_workers", "0", "--on_error", "skip", "--shard_size", "9"])
    of_table = Counter(line["finding"] for line in inspect("planted.jsonl") if line["row"])
    of_shards = Counter(line["finding"] for line in inspect("shards"))
    for finding in ("broken image", "missing image", "copy"):  # skipped; rows of one image are samples of their own
        of_table.pop(finding)
    of_shards.pop("copy")
    of_shards["copy with another caption"] -= 1
    assert of_shards == of_table
    assert len(kept_pairs(TarPairs("shards"), "inspect.findings.csv")) < len(TarPairs("shards"))


def test_files_of_one_look_keep_no_file_open(folder: Path) -> None:
    """An array of a data worker is shared memory, which is an open file as long as the array is kept."""
    for number in range(120):
        Path(f"like{number}.png").write_bytes(Path("up.png").read_bytes() + bytes([number]))
    Path("like.csv").write_text("image,caption\n" + "".join(f"like{number}.png,a shirt\n" for number in range(120)))
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 60, limits[1]))
    try:
        run_command(["inspect", "like.csv", "--num_workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [line["finding"] for line in read()] == ["near copy"] * 119


def test_captions_that_say_nothing() -> None:
    nothing = ["image", "A photo.", "IMG_0123.jpg", "DSC00012", "???", "_", "no image available", "Untitled (2)"]
    something = ["7", "a photo of a dog", "imagery", "犬", "🍎", "π"]
    assert [caption for caption in (*nothing, *something) if says_nothing(caption)] == nothing


def test_a_table_of_other_data_is_refused(folder: Path) -> None:
    inspect("planted.jsonl")
    text = Path("planted.jsonl").read_text()
    Path("planted.jsonl").write_text(f'{text}\n{{"image": "0.jpg", "caption": "more"}}')
    with pytest.raises(InputError, match=r"inspect.findings.csv: is of 32 rows, and the data have 33 rows; it is"):
        kept_pairs(open_source("planted.jsonl"), "inspect.findings.csv")
    rows = text.splitlines()
    for changed in ([*rows[:10], *rows[11:], rows[10]], [*rows[:9], rows[9].replace("boat", "ship"), *rows[10:]]):
        Path("planted.jsonl").write_text("\n".join(changed))
        with pytest.raises(InputError, match=r"decided on row \d+ with another key or caption than .* has now; write"):
            kept_pairs(open_source("planted.jsonl"), "inspect.findings.csv")


def test_a_table_with_edited_decisions_is_kept_when_the_data_are_inspected_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "few.jsonl").write_text((folder / "planted.jsonl").read_text().splitlines()[6] + "\n")
    command = ["few.jsonl", "--num_workers", "0"]
    run_command(["inspect", *command])
    table = folder / "inspect.findings.csv"
    proposed = table.read_bytes()
    run_command(["inspect", *command])
    assert len(list(folder.glob("*.csv"))) == 1  # nothing was edited
    edited = []
    for decision in (b"keep,mine", b"keep,mine again"):
        edited.append(proposed + decision)
        table.write_bytes(edited[-1])
        run_command(["inspect", *command])
        assert table.read_bytes() == proposed
    assert [(folder / f"inspect.findings.{n}.csv").read_bytes() for n in (1, 2)] == edited
    assert "differs; it is now inspect.findings.2.csv" in capsys.readouterr().err
