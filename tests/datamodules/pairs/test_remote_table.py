"""Tables at any address that fsspec knows are read like those on disk; an address in a local table is no path."""

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.loading.store import StoreFolder
from datamodules.open_source import open_source
from datamodules.pairs.batches import ValidationPairs
from datamodules.pairs.source import Columns, PairSource
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels

ROWS = [(f"photos/{number} of 50%#?.png", f"caption {number}") for number in range(6)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``site`` with images under odd names, and a table of them in each format; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    site = tmp_path / "site"
    (site / "photos").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, _ in ROWS:
        Image.fromarray(noise.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(site / name)
    objects = [{"image": image, "caption": caption} for image, caption in ROWS]
    (site / "t.csv").write_text("image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in ROWS))
    (site / "t.tsv").write_text("image\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in ROWS))
    (site / "t.jsonl").write_text("\n".join(map(json.dumps, objects)))
    pq.write_table(pa.Table.from_pylist(objects), site / "t.parquet")
    encoded = [{"image": (site / image).read_bytes(), "caption": caption} for image, caption in ROWS]
    pq.write_table(pa.Table.from_pylist(encoded), site / "bytes.parquet")
    return site


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of the folder, and the requests that it received."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {self.path}")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def memory(folder: Path) -> str:
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in folder.rglob("*.*"):
        files.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    return "memory://bucket"


def assert_same(ours: PairSource, theirs: PairSource) -> None:
    assert len(ours) == len(theirs) == len(ROWS)
    for row in range(len(ROWS)):
        assert ours.read(row)[:4] == theirs.read(row)[:4]
        assert ours.key(row) == ours.read(row).key
        assert ours.load(row, None).image.tobytes() == theirs.load(row, None).image.tobytes()


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "bytes.parquet"])
def test_pairs_are_those_of_the_table_on_disk(
    folder: Path, server: tuple[str, list[str]], memory: str, name: str
) -> None:
    expected = open_source(folder / name)
    for address in (server[0], memory):
        source = open_source(f"{address}/{name}")
        source.check()
        assert_same(source, expected)
    assert sum(request == f"GET /{name}" for request in server[1]) == 1


@pytest.mark.parametrize(
    ("name", "text", "row"),
    [
        ("c.csv", "image,caption\na.png,\nb.png,b\n", "row 2"),
        ("l.jsonl", '{"image": "a.png", "caption": ""}\n{"image": "b.png", "caption": "b"}', "row 1"),
    ],
)
def test_rows_that_are_left_out_are_named_by_the_address(
    name: str, text: str, row: str, folder: Path, server: tuple[str, list[str]]
) -> None:
    (folder / name).write_text(text)
    url = f"{server[0]}/{name}"
    assert [where for where, _ in open_source(url, on_error="skip").left_out.listed] == [f"{url} {row}"]


def test_a_local_table_may_have_its_images_in_a_store(folder: Path, server: tuple[str, list[str]], memory: str) -> None:
    for address in (server[0], memory):
        assert_same(open_source(folder / "t.csv", columns=Columns(root=f"{address}/")), open_source(folder / "t.csv"))


def test_data_workers_read_the_images(folder: Path, server: tuple[str, list[str]]) -> None:
    transform = pixels(Preprocessing(image_size=7))
    pairs = ValidationPairs(open_source(f"{server[0]}/t.csv"), transform)
    found = list(DataLoader(pairs, batch_size=None, num_workers=2))
    expected = ValidationPairs(open_source(folder / "t.csv"), transform)
    assert [pair.caption for pair in found] == [caption for _, caption in ROWS]
    assert all(bool((pair.image == expected[row].image).all()) for row, pair in enumerate(found))


def test_a_table_is_downloaded_again_only_when_it_has_changed(folder: Path, server: tuple[str, list[str]]) -> None:
    url, requests = f"{server[0]}/t.csv", server[1]
    first = open_source(url)
    assert open_source(url).versions == first.versions
    assert requests.count("GET /t.csv") == 1
    (folder / "t.csv").write_text("image,caption\nphotos/0 of 50%#?.png,new\n")
    changed = open_source(url)
    assert (len(changed), len(first)) == (1, 6)
    assert changed.versions != first.versions
    again = open_source(url, versions=first.versions)  # as a resumed run does
    assert_same(again, first)
    assert again.versions == first.versions


def test_a_resumed_run_refuses_a_changed_table_that_is_no_longer_cached(
    folder: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server[0]}/t.csv"
    versions = open_source(url).versions
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "another machine"))
    assert len(open_source(url, versions=versions)) == 6
    os.utime(folder / "t.csv", (0, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a third"))
    with pytest.raises(InputError, match=r"t.csv: has changed since the checkpoint was saved; put the former table"):
        open_source(url, versions=versions)


def test_rows_may_name_urls_of_the_same_store_and_local_files_but_no_other_store(folder: Path, memory: str) -> None:
    rows = [
        f"{memory}/photos/0 of 50%#?.png",
        str(folder / ROWS[1][0]),
        "https://elsewhere/a.png",
        "file:///etc/passwd",
    ]
    table = "image,caption\n" + "".join(f"{image},text\n" for image in rows)
    fsspec.filesystem("memory").pipe("/bucket/mixed.csv", table.encode())
    source, expected = open_source(f"{memory}/mixed.csv"), open_source(folder / "t.csv")
    for row in range(2):
        assert source.load(row, None).image.tobytes() == expected.load(row, None).image.tobytes()
    for row in (2, 3):
        with pytest.raises(BadSample, match=r"mixed.csv row \d: .* is not in memory://bucket; copy it there"):
            source.load(row, None)


@pytest.mark.parametrize(
    ("root", "name", "address"),
    [
        ("s3://bucket/a/b", "../c/d.jpg", "s3://bucket/a/c/d.jpg"),
        ("s3://bucket/a", "../../../other/d.jpg", "s3://bucket/other/d.jpg"),
        ("https://host:8/a?x=1", "b c#.jpg", "https://host:8/a/b%20c%23.jpg"),
        ("hf://datasets/me/data/", "a.jpg", "hf://datasets/me/data/a.jpg"),
    ],
)
def test_relative_paths_stay_in_the_store(root: str, name: str, address: str) -> None:
    assert StoreFolder(root).locate(name, "here") == address


def test_bad_images_are_bad_samples_and_a_dead_store_is_not(
    folder: Path, server: tuple[str, list[str]], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ROWS[0][0]).unlink()
    (folder / ROWS[1][0]).write_text("<html>not an image</html>")
    (folder / ROWS[2][0]).write_bytes(b"")
    source = open_source(f"{server[0]}/t.csv")
    for row, problem in enumerate(["no such image file", "not an image", "not an image"]):
        with pytest.raises(BadSample, match=rf"/t.csv row {row + 2}: .*{problem}"):
            source.load(row, None)
        assert source.text(row, None).caption == source.captions(row)[0]  # without the image
    with pytest.raises(BadSample, match="row 2"):
        source.check()

    def dead(*arguments: object, **options: object) -> bytes:
        raise ConnectionError("the line is down")

    source = open_source(f"{memory}/t.csv")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", dead)
    with pytest.raises(InputError, match=r"cannot be fetched \(the line is down\); tried 3 times") as caught:
        source.load(3, None)
    assert not isinstance(caught.value, BadSample)


def test_mistakes_name_the_address(folder: Path, server: tuple[str, list[str]], memory: str) -> None:
    (folder / "u.csv").write_text("a,b\n1,2\n")
    (folder / "u.parquet").write_text("no parquet")
    for name, problem in {
        "none.csv": ": no such file",
        "u.csv": r": none of its columns \(a, b\)",
        "u.parquet": ": not a readable parquet file",
        "captions.json": r": only tables \(.csv, .*\) and tar shards are read from a URL; download it",
    }.items():
        with pytest.raises(InputError, match=f"^{server[0]}/{name}{problem}"):
            open_source(f"{server[0]}/{name}")
    with pytest.raises(InputError, match="nonesuch"):
        open_source("nonesuch://bucket/t.csv")


Cli = Callable[..., subprocess.CompletedProcess[str]]
ADDRESS = "http://user:s3cretword@127.0.0.1:1/x.png"  # nobody listens there
TABLE, ON_CPU = ["t.csv"], ["--num_workers", "0", "--accelerator", "cpu"]
FIT = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size", "2"]
COMMANDS = {
    "embed": ["embed", *TABLE, "--output", "f.parquet", *ON_CPU],
    "embed, skipping": ["embed", *TABLE, "--output", "f.parquet", "--on_error", "skip", *ON_CPU],
    "score": ["score", *TABLE, "--output", "s.parquet", *ON_CPU],
    "score, skipping": ["score", *TABLE, "--output", "s.parquet", "--on_error", "skip", *ON_CPU],
    "mine": ["mine", *TABLE, "--output", "m.jsonl", *ON_CPU],
    "inspect": ["inspect", *TABLE, "--num_workers", "0"],
    "shard": ["shard", *TABLE, "out", "--num_workers", "0"],
    "overlap": ["overlap", "classes", "--train", *TABLE, "--num_workers", "0"],
    "classify": ["classify", "0.png", "--examples", "examples.csv", "--num_workers", "0"],
    "evaluate": ["evaluate", "--suite", "suite.yaml", "--output", "results.json", *ON_CPU],
    "evaluate, skipping": ["evaluate", "--suite", "suite.yaml", "--output", "out", "--on_error", "skip", *ON_CPU],
    "a model": ["embed", "0.png", "--output", "f.parquet", "--model", ADDRESS, *ON_CPU],
    "a model, one slash": ["embed", "0.png", "--output", "f.parquet", "--model", ADDRESS.replace("//", "/"), *ON_CPU],
    "inspect, one slash": ["inspect", "one.csv", "--num_workers", "0"],
    "fit": ["fit", "--data.train", *TABLE, *FIT],
    "fit, skipping": ["fit", "--data.train", *TABLE, "--data.val", *TABLE, "--data.bad_samples.on_error", "skip", *FIT],
    "other images": ["fit", "--data.train", "others.csv", "--data.columns.image", "[image, back]", *FIT],
}
LISTS = (
    *("embed, skipping", "score, skipping", "fit, skipping", "evaluate, skipping", "overlap"),
    *("a model", "a model, one slash", "inspect, one slash"),
)  # in a file; the terminal has no word of it


@pytest.fixture
def noisy_folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for row in range(7):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
    images = [*(f"{row}.png" for row in range(7)), ADDRESS]
    rows = [f"{image},a photo of number {row}" for row, image in enumerate(images)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    (tmp_path / "one.csv").write_text((tmp_path / "t.csv").read_text().replace("http://", "http:/"))
    others = [f"{row}.png,a photo of number {row},{ADDRESS}" for row in range(7)]
    (tmp_path / "others.csv").write_text("\n".join(["image,caption,back", *others]) + "\n")
    rows = [f"{image},class {row % 2}" for row, image in enumerate(images)]
    (tmp_path / "examples.csv").write_text("\n".join(["image,classes", *rows]) + "\n")
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    for name in ("class 0", "class 1"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "classes" / name / "a.png")
    data = "{class_path: datamodules.evaluation.LabelledTable, init_args: {path: labels.csv}}"
    (tmp_path / "suite.yaml").write_text(f"sets: {{mine: {{data: {data}, metric: top1, templates: ['{{}}']}}}}\n")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_or_writes_the_password(
    name: str, noisy_folder: Path, cli: Cli, tiny_checkpoint: Path
) -> None:
    words = COMMANDS[name]
    model = [] if words[0] in ("fit", "inspect", "shard") or "--model" in words else ["--model", str(tiny_checkpoint)]
    given = set(noisy_folder.iterdir())
    done = cli(*words, *model)
    assert "s3cretword" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert name in LISTS or "user:***@127.0.0.1" in done.stdout + done.stderr
    for file in noisy_folder.rglob("*"):
        if file.is_file() and file not in given:
            assert b"s3cretword" not in file.read_bytes(), file


def test_an_address_in_a_local_table_is_a_bad_sample_and_no_path(noisy_folder: Path) -> None:
    source = open_source([str(noisy_folder / "t.csv")])
    for read in (source.read, source.key, source.image_identity, lambda row: source.load(row, None)):
        with pytest.raises(BadSample, match=r"t.csv row 9: http://user:\*\*\*@127.0.0.1:1/x.png is an address"):
            read(7)
