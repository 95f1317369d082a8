"""Data sets of the Hugging Face hub by name, from a server that speaks its protocol."""

import io
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from datamodules import Captions
from datamodules.open_source import open_source
from datamodules.pairs.remote import parse_hub_name
from datamodules.pairs.source import Columns
from lit_clip import LitCLIP
from lit_clip.batch import CaptionBatch
from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from tests.helpers.hub import Hub, Repository, running_hub

CAPTIONS = 5


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def parquet(numbers: range, **columns: Any) -> bytes:
    """Return a file as the hub has them: encoded images in a struct, and five columns of captions."""
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    captions = {f"caption_{k}": [f"image {number}, text {k}" for number in numbers] for k in range(CAPTIONS)}
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images, **captions, **columns}), file)
    return file.getvalue()


FILES = {
    "README.md": b"---\nconfigs: !!python/object/apply:os.system ['false']\n---\n",
    "flickr8k.py": b"raise SystemExit('must not be run')\n",
    "data/train-00000-of-00002.parquet": parquet(range(12)),
    "data/train-00001-of-00002.parquet": parquet(range(12, 20)),
    "data/validation-00000-of-00001.parquet": parquet(range(20, 26)),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the data set jxie/flickr8k, empty caches, and a working directory without files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories["jxie/flickr8k"] = Repository()
        server.repositories["jxie/flickr8k"].push(FILES)
        yield server


def message(name: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_files_of_the_wanted_split_and_no_others_are_downloaded(hub: Hub) -> None:
    source = open_source("jxie/flickr8k", default_split="train")
    assert len(source) == 20
    for row in (0, 11, 12, 19):
        assert source.captions(row) == [f"image {row}, text {k}" for k in range(CAPTIONS)]
        assert source.read(row).image == png(row)
    assert source.read(14)[2:5] == (
        "train-00001-of-00002.parquet:2",
        "",
        "jxie/flickr8k/data/train-00001-of-00002.parquet row 2",
    )
    drawn = {source.load(3, random.Random(seed)).caption for seed in range(40)}
    assert drawn == set(source.captions(3))
    fetched = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /datasets/")}
    assert fetched == {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}
    validation = open_source("jxie/flickr8k", default_split="train", split="validation")
    assert [validation.captions(row)[0] for row in range(len(validation))] == [
        f"image {row}, text 0" for row in range(20, 26)
    ]


def test_what_is_cached_is_read_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source("jxie/flickr8k", default_split="train")
    requests = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = open_source("jxie/flickr8k", default_split="train")
    assert len(hub.requests) == requests
    assert again.versions == first.versions == {"jxie/flickr8k": hub.repositories["jxie/flickr8k"].branches["main"]}
    assert [again.read(row) for row in range(20)] == [first.read(row) for row in range(20)]
    refused = message("jxie/flickr8k", split="validation")
    assert refused == "jxie/flickr8k: the hub cannot be reached, and some of its files are not cached"
    assert "neither reachable nor cached" in message("jxie/another")


def test_a_revision_and_a_configuration_can_be_named(hub: Hub) -> None:
    repository = hub.repositories["jxie/flickr8k"]
    old = repository.branches["main"]
    new = repository.push({"en/train.parquet": parquet(range(3)), "de/train/0000.parquet": parquet(range(4))})
    assert len(open_source(f"jxie/flickr8k@{old}", default_split="train")) == 20
    assert len(open_source("jxie/flickr8k:en")) == 3
    assert len(open_source(f"jxie/flickr8k@{new}:de")) == 4
    assert message("jxie/flickr8k") == (
        "jxie/flickr8k: it has several configurations; it has de, en; give one, such as jxie/flickr8k:de"
    )
    assert "no configuration 'fr'; it has de, en; give one, such as jxie/flickr8k:de" in message("jxie/flickr8k:fr")
    assert message("jxie/flickr8k@v9") == "jxie/flickr8k@v9: has no revision v9 on the hub"


def test_mistakes_are_one_line(hub: Hub) -> None:
    assert message("nobody/nothing") == (
        "nobody/nothing: no such file or folder, and no such data set on the hub (if it is private, set HF_TOKEN)"
    )
    hub.repositories["a/b"] = Repository()
    hub.repositories["a/b"].push({"images.zip": b"", "b.py": b"exit(1)"})
    assert "a/b: has no parquet files on the hub" in message("a/b")
    hub.repositories["a/b"].push({"data/train-00000-of-00002.parquet": parquet(range(3))})  # an unfinished upload
    assert "a/b: the hub has only 1 of the files of split train" in message("a/b")
    hub.repositories["some/texts"] = Repository()
    file = io.BytesIO()
    pq.write_table(pa.table({"question": ["?"], "text": ["a"]}), file)
    hub.repositories["some/texts"].push({"train.parquet": file.getvalue()})
    refused = message("some/texts")
    assert refused.startswith("some/texts/train.parquet: none of its columns (question, text) is called image")
    hub.repositories["jxie/flickr8k"].gated = True
    assert "is gated; accept its terms on its page on the hub and set HF_TOKEN" in message(
        "jxie/flickr8k", default_split="train"
    )


@pytest.mark.parametrize("root", [None, "images", "memory://images"])
@pytest.mark.parametrize("column", ["texts", "structs"])
def test_images_are_inside_of_the_data_set(hub: Hub, root: str | None, column: str, tmp_path: Path) -> None:
    """Parquet of the hub may name images in place of holding them, of the folder that its user gives."""
    Path("images").mkdir()
    Path("images/a.png").write_bytes(png(1))
    Path("outside.png").write_bytes(png(2))
    fsspec.filesystem("memory").pipe("/images/a.png", png(1))
    names = [
        "./a.png",
        "a.png",
        "../outside.png",
        str(tmp_path / "work/outside.png"),
        "b/../../outside.png",
        "/dev/zero",
    ]
    images = names if column == "texts" else [{"bytes": None, "path": name} for name in names]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images, "caption": ["text"] * len(names)}), file)
    hub.repositories["a/b"] = Repository()
    hub.repositories["a/b"].push({"train.parquet": file.getvalue()})
    source = open_source("a/b", columns=Columns(root=root))
    for row in range(2):
        if root is not None:
            assert source.read(row).image == png(1)
    for row in range(2, len(names)):
        for read in (source.read, lambda row: source.load(row, None), source.image_identity):
            with pytest.raises(BadSample, match=rf"a/b/train.parquet row {row}: .* is outside of the data set"):
                read(row)


@pytest.mark.parametrize("name", ["photos/captions.csv", "photos/a.tar", "none", "/owner/name", "../a/b", "here/b"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(hub: Hub, name: str) -> None:
    Path("here").mkdir()
    message(name)
    assert hub.requests == []


def test_names_have_three_parts() -> None:
    assert parse_hub_name("a/b") == ("a/b", None, None)
    assert parse_hub_name("a/b@refs/pr/1:plain text") == ("a/b", "refs/pr/1", "plain text")
    assert parse_hub_name("a/b:c") == ("a/b", None, "c")
    assert parse_hub_name("a/b/c") is parse_hub_name("a") is parse_hub_name("a/b@") is None


class Watched(LitCLIP):
    """A model that keeps the captions it was given."""

    def on_train_batch_start(self, batch: CaptionBatch, batch_idx: int) -> None:
        vars(self).setdefault("read", []).extend(batch.captions)


def train(steps: int, folder: Path, checkpoint: str | None = None, data: str = "jxie/flickr8k") -> list[str]:
    """Train to a number of steps, leave ``last.ckpt``, and return the captions read."""
    image, text = VisionTransformerConfig(32, 16, 32, 1, 1), TextTransformerConfig(width=32, layers=1, heads=1)
    model = Watched(CLIPConfig(16, image, text))
    module = Captions(data, batch_size=3, num_workers=0)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=steps, enable_version_counter=False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, logger=False, callbacks=[saving], **options)
    trainer.fit(model, module, ckpt_path=checkpoint, weights_only=False)
    return vars(model)["read"]


@pytest.mark.parametrize("steps", [2, pytest.param(6, marks=pytest.mark.slow)])  # within an epoch, and at its end
def test_a_resumed_run_reads_the_commit_that_it_began_with(hub: Hub, tmp_path: Path, steps: int) -> None:
    whole = train(8, tmp_path)
    first = train(steps, tmp_path)
    repository = hub.repositories["jxie/flickr8k"]
    repository.push({name: other(content) for name, content in FILES.items()})
    shutil.rmtree(tmp_path / "hub")  # on another machine
    rest = train(8, tmp_path, str(tmp_path / "last.ckpt"))
    assert first + rest == whole
    assert all(caption.startswith("other") for caption in train(2, tmp_path))  # a new run reads what is there now


def other(content: bytes) -> bytes:
    """Return a parquet file with other captions."""
    if not content.startswith(b"PAR1"):
        return content
    table, file = pq.read_table(io.BytesIO(content)), io.BytesIO()
    for name in [f"caption_{k}" for k in range(CAPTIONS)]:
        texts = [text.replace("image", "other") for text in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, [texts])
    pq.write_table(table, file)
    return file.getvalue()


def test_thousands_of_configurations_are_a_short_line(hub: Hub) -> None:
    hub.repositories["jxie/flickr8k"].push({f"c{number}/train.parquet": parquet(range(1)) for number in range(400)})
    assert re.fullmatch(
        r"jxie/flickr8k: it has several configurations; it has (\w+, ){4}\w+ and 39\d more; give one, such as \S+",
        message("jxie/flickr8k"),
    )
