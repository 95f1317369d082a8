"""One-colour images that encode a number, small sets made of them, and checks for tests of the evaluation sets."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import LabelledImages


def message_of(call: Callable[[], Any], kind: type[InputError] = InputError) -> str:
    """Return the message of the error that a call raises, which must be a single line."""
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def colour(number: int) -> tuple[int, int, int]:
    return number * 10 % 256, 255 - number % 256, number // 256


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour(number)).save(file, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def paint(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


def write_files(root: Path, files: dict[str, Any]) -> Path:
    """Write texts, bytes, values as JSON, lists of values as JSON lines, and numbers as images of their colour."""
    for name, content in files.items():
        path = root / name
        if isinstance(content, int):
            paint(path, content)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
            continue
        lines = path.suffix in (".jsonl", ".ndjson") and isinstance(content, list)
        text = "".join(f"{json.dumps(row)}\n" for row in content) if lines else json.dumps(content)
        path.write_text(content if isinstance(content, str) else text, encoding="utf-8")
    return root


def colour_of(images: Any, index: int) -> Any:
    return images.images(index)[0].convert("RGB").getpixel((1, 1))


def paint_shade(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (number, 50, 7)).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))
    return path


def shade(image: Image.Image) -> int:
    """Return the number that :func:`paint_shade` encoded, a multiple of 10; JPEG changes it a little."""
    pixel: Any = image.convert("RGB").getpixel((1, 1))
    return round(pixel[0] / 10) * 10


def assert_same_after_pickling(images: Any) -> None:
    """Check that a data worker gets the same images, labels, names, keys and stamp."""
    other = pickle.loads(pickle.dumps(images))
    assert len(other) == len(images)
    assert (other.labels(), other.class_names, other.stamp()) == (images.labels(), images.class_names, images.stamp())
    assert [other.key(i) for i in range(len(images))] == [images.key(i) for i in range(len(images))]
    for index in range(0, len(images), 1 + len(images) // 5):
        assert other[index][0].tobytes() == images[index][0].tobytes()
        assert other[index][1] == images[index][1] == images.labels()[index]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


WDS_LABELS = [2, 0, 1, 1, 2, 0, 2]
IMAGE_FORMATS = ["webp", "png", "jpg", "png", "webp", "png", "png"]


def wds_sample(number: int, **targets: bytes) -> dict[str, bytes]:
    """Return the files of a sample: its image, and its targets by suffix."""
    key, kind = f"s{number:07}", IMAGE_FORMATS[number % len(IMAGE_FORMATS)]
    image = encoded(number, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return {f"{key}.{kind}": image, **{f"{key}.{suffix}": content for suffix, content in targets.items()}}


def merged(samples: list[dict[str, bytes]]) -> dict[str, bytes]:
    return {name: content for files in samples for name, content in files.items()}


def write_wds(root: Path, samples: list[dict[str, bytes]], names: str = "", templates: str = "", kind: str = "") -> str:
    """Write a ``wds`` set: the last three samples in ``1.tar``, the others in ``0.tar``."""
    for number, part in enumerate((samples[:-3], samples[-3:])):
        write_tar(root / "test" / f"{number}.tar", merged(part))
    (root / "test/nshards.txt").write_text("2\n")
    texts = {"classnames.txt": names, "zeroshot_classification_templates.txt": templates, "dataset_type.txt": kind}
    for name, text in texts.items():
        if text:
            (root / name).write_text(text)
    return str(root)


WDS_NAMES, WDS_TEMPLATES = "apple\nriver boat\ncafé\n", "a photo of a {c}.\n{c}, a {c} thing\n"


def write_objectnet(root: Path) -> Path:
    """Write two classes that ImageNet has and one that it has not, with a red line of one pixel around the images."""
    labels = {"tshirt": "T-shirt", "alarm_clock": "Alarm clock", "air_freshener": "Air freshener"}
    (root / "mappings").mkdir(parents=True)
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    overlap = {"T-shirt": "jersey, T-shirt, tee shirt", "Alarm clock": "analog clock; digital clock"}
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    for number, name in enumerate(labels):
        image = Image.new("RGB", (12, 10), (255, 0, 0))
        image.paste(colour(number), (1, 1, 11, 9))
        (root / "images" / name).mkdir(parents=True)
        image.save(root / "images" / name / f"{number}.png")
    return root


def colours_and_labels(images: LabelledImages) -> list[tuple[tuple[int, int, int], int]]:
    """Return the colour and the label of every image."""
    pairs: list[Any] = [images[index] for index in range(len(images))]
    assert all(image.mode == "RGB" and image.size == (4, 3) for image, _ in pairs)
    return [(image.getpixel((1, 1)), label) for image, label in pairs]
