"""Images, tables, JSON files, parquet files and folders of classes, read as training and validation read them."""

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from datamodules.loading.augmentation import Augmentation, TrainingTransform
from datamodules.loading.bad_samples import SkippingDataset
from datamodules.loading.sampling import TrainingSample
from datamodules.open_source import open_source
from datamodules.pairs.batches import TrainingPairs, ValidationPairs
from datamodules.pairs.source import Classes, PairSource, Row
from lit_clip.errors import BadSample
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.tools.images import open_image
from tests.fuzz.inputs import Input, Inputs, Target, damaged, edited_json, lines_of_json
from tests.fuzz.samples import CAPTIONS, table_images, table_records, whole_images, whole_tables

SMALL = Preprocessing(image_size=32)
ROWS = 20  # of a source are loaded


class ImageSet(PairSource):
    """A source of one pair, whose image is given as a file's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def row(self, index: int) -> Row:
        return Row(self.data, ["an image"], "0", "", "the image")


def read_pairs(source: PairSource) -> Iterator[str]:
    """Load pairs as training and as validation do; rows that were left out when the source was opened are skipped."""
    yield from ["skipped"] * sum(source.left_out.counts.values())
    transform = TrainingTransform(Augmentation(crop_scale=(0.5, 1.0), color_jitter=0.1), SMALL)
    train = SkippingDataset(TrainingPairs(source, transform, 0))
    val = SkippingDataset(ValidationPairs(source, pixels(SMALL)))
    for row in range(min(len(source), ROWS)):
        for item in (train[TrainingSample(0, row)], val[row]):
            if isinstance(item, BadSample):
                assert item.reason, "skipped without a reason"
                yield "skipped"
            else:
                assert item.image.shape == (3, 32, 32), item.image.shape
                assert item.caption.strip(), "an empty caption"
                yield "used"


def on_error(given: Input) -> str:
    """Return an option that depends on the input alone."""
    return "skip" if sum(given.data[:1000]) % 2 else "error"


def write_table_images(folder: Path) -> None:
    """Write the images that the tables name."""
    for name, data in table_images().items():
        (folder / name).write_bytes(data)


def read_file_of_pairs(folder: Path, given: Input) -> Iterator[str]:
    """Read a table, a JSON file or a parquet file, whose images lie beside it."""
    write_table_images(folder)
    path = folder / given.name
    path.write_bytes(given.data)
    split = "train" if given.name == "karpathy.json" and on_error(given) == "skip" else None
    yield from read_pairs(open_source(path, on_error=on_error(given), split=split))


def read_image(folder: Path, given: Input) -> Iterator[str]:
    """Read an image's bytes as a pair, and a file as the commands do."""
    yield from read_pairs(ImageSet(given.data))
    path = folder / given.name
    path.write_bytes(given.data)
    image = open_image(path)
    assert image.size[0] > 0
    assert image.convert("RGB").size == image.size


@cache
def captions_trees() -> dict[str, Any]:
    """Return COCO's captions and Karpathy's splits."""
    coco = {
        "images": [
            {"id": 10 + i, "file_name": name, "height": 50, "width": 70} for i, name in enumerate(table_images())
        ],
        "annotations": [
            {"id": i, "image_id": 10 + i % 7, "caption": text[:200]} for i, text in enumerate(CAPTIONS * 2)
        ],
        "info": {},
    }
    karpathy = {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "split": ("train", "restval", "val")[i % 3],
                "imgid": i,
                "sentids": [i],
                "sentences": [{"raw": text[:200], "tokens": text[:9].split(), "imgid": i, "sentid": i}],
            }
            for i, (name, text) in enumerate(zip(table_images(), CAPTIONS, strict=True))
        ],
    }
    return {"coco.json": coco, "karpathy.json": karpathy}


def table_inputs() -> Inputs:
    trees = edited_json(lambda: {"t.json": table_records()})
    lines = lines_of_json(table_records, "t.jsonl")
    return st.one_of(damaged(whole_tables), damaged(whole_tables), trees, lines, st.builds(_odd_csv, _cells()))


def _cells() -> Any:
    pieces = (
        "0.png",
        "1.png",
        "image",
        "caption",
        '"',
        '""',
        ",",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\0",
        "=1",
        "sep=;",
        ";",
        "é",
    )
    cell = st.one_of(st.sampled_from(pieces), st.text(max_size=5))
    rows = st.lists(st.lists(cell, max_size=6).map("".join), max_size=8).map("\n".join)
    return st.tuples(
        st.sampled_from(("image,caption\n", "filepath\ttitle\n", "", "image;caption\n", "image,caption,image\n")),
        rows,
        st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "cp037")),
        st.sampled_from(("t.csv", "t.tsv", "t.txt")),
    )


def _odd_csv(cells: tuple[str, str, str, str]) -> Input:
    head, rows, encoding, name = cells
    return Input(name, (head + rows).encode(encoding, "replace"))


def json_inputs() -> Inputs:
    whole = {name: json.dumps(tree).encode() for name, tree in captions_trees().items()}
    return st.one_of(edited_json(captions_trees), edited_json(captions_trees), damaged(lambda: whole))


@cache
def whole_parquet() -> dict[str, bytes]:
    """Return parquet files: paths of images, and images in the file as the hub's."""
    import pyarrow as pa

    images = list(table_images().items())
    inside = pa.array([{"bytes": data, "path": name} for name, data in images])
    short = [text[:100] for text in CAPTIONS]
    return {
        "paths.parquet": to_parquet(pa.table({"image": list(table_images()), "caption": CAPTIONS})),
        "inside.parquet": to_parquet(pa.table({"image": inside, "caption": short}), row_group_size=3),
        "lists.parquet": to_parquet(pa.table({"image": inside, "captions": [[text, "b"] for text in short]})),
    }


def to_parquet(table: Any, **options: Any) -> bytes:
    """Return the bytes of a parquet file."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def odd_tables() -> Any:
    """Return Arrow tables whose columns have odd names and types."""
    import pyarrow as pa

    data = next(iter(table_images().values()))
    columns = (
        pa.array(["0.png", "1.png", None]),
        pa.array(["a cat", "", "nan"]),
        pa.array([["a", None], [], None]),
        pa.array([1, 2, None]),
        pa.array([1.5, float("nan"), None]),
        pa.array([b"\xff\xfe", data, None]),
        pa.array([data, data, data]),
        pa.array([data, None, data], pa.large_binary()),
        pa.array([{"bytes": data, "path": None}, {"bytes": None, "path": "0.png"}, None]),
        pa.array([{"bytes": "text"}, None, {"bytes": ""}]),
        pa.array([{"path": "1.png"}, None, {"path": ""}]),
        pa.array([{"bytes": [1, 2]}, None, None]),
        pa.array([None, None, None]),
        pa.array([True, False, None]),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["0.png", "x", None], pa.large_string()),
        pa.array(["0.png", "x", None], pa.string_view()),
        pa.array([0, 10**9, None], pa.timestamp("s")),
        pa.array([[b"a"], [data], None]),
        pa.array([[["a"]], [], None]),
        pa.array([[1, 2], [], None]),
    )
    names = st.one_of(
        st.sampled_from(
            ("image", "caption", "captions", "text", "jpg", "url", "bytes", "filepath", "title", "", "Image")
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    )
    pairs = st.lists(st.tuples(names, st.sampled_from(columns)), min_size=1, max_size=4)
    first = st.sampled_from(columns).map(lambda column: ("image", column))
    second = st.sampled_from(columns).map(lambda column: ("caption", column))
    named = st.tuples(first, second, pairs).map(lambda three: [three[0], three[1], *three[2][1:]])

    def make(columns: list[tuple[str, Any]], rows: int) -> Any:
        names, arrays = zip(*columns, strict=True)
        return pa.table([array.slice(0, rows) for array in arrays], names=list(names))

    return st.builds(make, st.one_of(named, named, pairs), st.sampled_from((3, 3, 3, 1, 0)))


def parquet_inputs() -> Inputs:
    odd = odd_tables().map(lambda table: Input("odd.parquet", to_parquet(table)))
    return st.one_of(odd, damaged(whole_parquet), damaged(whole_parquet))


def read_classes(folder: Path, given: Input) -> Iterator[str]:
    """Read a folder of classes with a file of class names or of templates."""
    for number, name in enumerate(("a_dog", "cat")):
        (folder / "photos" / name).mkdir(parents=True)
        (folder / "photos" / name / "0.png").write_bytes(table_images()[f"{number}.png"])
    (folder / given.name).write_bytes(given.data)
    option = "templates" if given.name.startswith("templates") else "names"
    yield from read_pairs(open_source(folder / "photos", classes=Classes(**{option: str(folder / given.name)})))


@cache
def class_trees() -> dict[str, Any]:
    """Return files of class names and of templates."""
    return {
        "names.yaml": ["a dog", "cat"],
        "several.yaml": [["a dog", "dog"], "cat"],
        "prompts.yaml": {"a dog": ["a photo of a dog", "dog"], "cat": ["a photo of a cat"]},
        "both.yaml": {"classes": ["a dog", "cat"], "templates": ["a {}", "{}"]},
        "names.json": ["a dog", "cat"],
        "templates.yaml": ["a {}.", "{}"],
        "templates.json": {"templates": ["a {}."]},
    }


def class_inputs() -> Inputs:
    whole = {name: json.dumps(tree).encode() for name, tree in class_trees().items()}
    return st.one_of(edited_json(class_trees), edited_json(class_trees), damaged(lambda: whole))


images = Target(lambda: damaged(whole_images), read_image, named=False, bytewise=True)
tables = Target(table_inputs, read_file_of_pairs)
coco = Target(json_inputs, read_file_of_pairs)
parquet = Target(parquet_inputs, read_file_of_pairs)
classes = Target(class_inputs, read_classes)
