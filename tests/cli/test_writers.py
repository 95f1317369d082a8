"""Two processes that write one file at once: one works, and the other says so, for each command that writes."""

import csv
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from lit_clip.approximate import open_index
from lit_clip.cli.subcommands import COMMANDS, run_command
from lit_clip.embedding.feature_files import write_features
from lit_clip.errors import InputError
from lit_clip.tools import atomic
from tests.helpers import forks
from tests.helpers.demo import skip_without_starlette

WRITES_NOTHING = {"models", "configs"}
MODEL = ["--model", "tiny.ckpt"]
ENCODE = [*MODEL, "--num_workers", "0", "--accelerator", "cpu"]
CLASSIFY = ["classify", "photos", *MODEL, "--num_workers", "0"]
FEW = [*CLASSIFY, "--examples", "photos"]
SET = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "photos"}}
# A command line, and a file or folder that it writes.
WRITERS: list[tuple[list[str], str]] = [
    (["embed", "photos", *ENCODE, "--output", "new.parquet"], "new.parquet"),
    (["score", "captions.csv", *ENCODE, "--output", "scores.parquet"], "scores.parquet"),
    (["mine", "captions.csv", *ENCODE, "--output", "negatives.jsonl"], "negatives.jsonl"),
    (["inspect", "captions.csv", "--num_workers", "0"], "inspect.html"),
    (["inspect", "captions.csv", "--num_workers", "0"], "inspect.findings.csv"),
    (["overlap", "photos", "--train", "captions.csv", *MODEL, "--num_workers", "0"], "overlap.html"),
    (["overlap", "photos", "--train", "captions.csv", *MODEL, "--num_workers", "0"], "overlap.findings.csv"),
    (["shard", "captions.csv", "shards", "--num_workers", "0"], "shards"),
    (["index", "b.npy", "--output", "all.usearch"], "all.usearch"),
    (["search", "photos", "a cat", *MODEL, "--num_workers", "0"], "search.html"),
    (["search", "photos", "a cat", *MODEL, "--num_workers", "0"], "photos/.lit-clip-index.npz"),
    (["demo", *MODEL, "--images", "photos", "--port", "0"], "photos/.lit-clip-index.npz"),
    ([*CLASSIFY, "--output_file", "classes.csv"], "classes.csv"),
    (CLASSIFY, "classify.html"),
    ([*FEW, "--save_head", "head.safetensors"], "head.safetensors"),
    ([*FEW, "--label_next", "1"], "label_next.csv"),
    (FEW, "photos/.lit-clip-examples.npz"),
    (["locate", "photos", "a cat", *MODEL], "locations"),
    (["export", "tiny.ckpt", "--format", "open_clip", "--output", "exported/deep"], "exported/deep"),
    (["evaluate", *ENCODE, "--suite", "suite.yaml", "--tasks", "zero_shot", "--output", "out"], "out"),
    (["wise-ft", "tiny.ckpt", "tiny.ckpt", "--sets", "sets.yaml", "--output", "mixed.ckpt"], "mixed.ckpt"),
]


def write_some_features(path: Path, seed: int, rows: int = 30) -> None:
    features = np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    write_features(path, [f"{path.stem}{row}.png" for row in range(rows)], features, {"model_sha256": "one"})


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, images in two class folders, their table, sets of them, and features."""
    noise, rows = np.random.default_rng(0), [("image", "caption")]
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            rows.append((f"photos/{name}/{number}.png", f"a {name}, number {number}"))
            pixels = noise.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / rows[-1][0])
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    sets = {"pets": {"images": SET, "templates": ["a {}."]}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets), encoding="utf-8")
    suite = {"data": {"class_path": SET["class_path"]}, "splits": {"test": {"root": "photos"}}, "templates": ["a {}."]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": {"pets": suite}}), encoding="utf-8")
    (tmp_path / "tiny.ckpt").symlink_to(tiny_checkpoint)
    for seed, name in enumerate(("a.npy", "b.npy")):
        write_some_features(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_clip.heads.examples.DRAWS", 1)
    return tmp_path


def hold(paths: Connection) -> None:
    """Hold each path that is sent until the next one."""
    while path := paths.recv():
        atomic.release()
        paths.send(atomic.claim(Path(path)))


@pytest.fixture(scope="module")
def held() -> Iterator[Callable[[Path], int]]:
    """Have another process hold a path, and nothing else; return the process's number."""
    forks.start_server()
    ours, theirs = forks.CONTEXT.Pipe()
    process: Any = forks.CONTEXT.Process(target=hold, args=(theirs,))
    process.start()

    def by_another(path: Path) -> int:
        ours.send(str(path))
        assert ours.recv() == ""
        return process.pid

    yield by_another
    process.kill()
    process.join()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def locks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.suffix == ".lock"]


@pytest.mark.parametrize(("words", "output"), WRITERS, ids=lambda value: value[0] if isinstance(value, list) else value)
def test_what_another_process_writes_is_refused_in_one_line_and_left_as_it_is(
    words: list[str], output: str, folder: Path, held: Callable[[Path], int]
) -> None:
    if words[0] == "demo":
        skip_without_starlette()
    if output == "all.usearch":
        run_command(["index", "a.npy", "--output", output])
    elif Path(output).suffix and not output.endswith(".npz"):
        Path(output).write_text("an earlier one")
    before = content(folder)
    holder = held(folder / output)
    with pytest.raises(InputError, match=rf"{output}: another process writes there \(process {holder} on .*\); wait"):
        run_command(words)
    assert content(folder) == before
    assert len(locks(folder)) == 1
    held(folder / "elsewhere")
    if words[0] != "demo":  # which would wait for visitors
        run_command(words)
        assert content(folder) != before
    assert locks(folder) == [folder / ".elsewhere.lock"]


def test_every_command_that_writes_is_tried() -> None:
    tried = {words[0] for words, _ in WRITERS} | WRITES_NOTHING
    assert tried == COMMANDS.keys(), "add the command to WRITERS, or to WRITES_NOTHING"


# Both have started before one begins, and building takes a second.
AT_ONCE = """
import sys, time
from pathlib import Path
from lit_clip.approximate import approximate_index
from lit_clip.cli.main import main

new = approximate_index._new_graph
approximate_index._new_graph = lambda width: time.sleep(1) or new(width)
Path(f"{sys.argv[2]}.ready").touch()
while len(list(Path().glob("*.ready"))) < 2:
    time.sleep(0.01)
main()
"""


def test_two_that_add_to_an_index_at_once_lose_no_row(folder: Path) -> None:
    pytest.importorskip("usearch", reason="the extra index is not installed")
    (folder / "at_once.py").write_text(AT_ONCE, encoding="utf-8")
    programs = [
        forks.Program(forks.script, ["at_once.py", "index", name, "--output", "all.usearch"], folder, {**os.environ})
        for name in ("a.npy", "b.npy")
    ]
    done = {each.args[2]: each for each in forks.run(programs, 60)}
    assert sorted(each.returncode for each in done.values()) == [0, 2]
    (refused,) = (name for name, each in done.items() if each.returncode)
    (line,) = done[refused].stderr.splitlines()
    assert line.startswith("lit-clip: error: all.usearch: another process writes there (process ")
    assert len(open_index(folder / "all.usearch")) == 30
    run_command(["index", refused, "--output", "all.usearch"])
    assert len(open_index(folder / "all.usearch")) == 60
    assert locks(folder) == []
