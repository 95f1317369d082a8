"""FER+'s votes on FER2013's images become labels as its authors' code makes them."""

import random
from pathlib import Path

import pytest

from datamodules import evaluation as sets
from tests.helpers.coloured_sets import message_of
from tests.helpers.miniature_arrays import write_fer_plus
from tests.helpers.miniature_images import write_text

COLUMNS = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF"]
WORDS = {
    **{"neutral": "neutral", "happiness": "happy", "surprise": "surprised", "sadness": "sad", "anger": "angry"},
    **{"disgust": "disgusted", "fear": "fearful", "contempt": "contemptuous"},
}


def label_of(votes: list[int]) -> str | None:
    """Follow ``_process_data`` of ferplus.py in its mode majority, and ``load_folders``, step by step."""
    raw = [float(vote) for vote in votes]
    for i, value in enumerate(raw):
        if value < 1.0 + 2e-16:  # its outlier removal
            raw[i] = 0.0
    emotion = [0.0] * len(raw)
    if max(raw) > 0.5 * sum(raw):
        emotion[raw.index(max(raw))] = max(raw)
    else:
        emotion[-2] = 1.0  # unknown
    place = emotion.index(max(emotion))
    return WORDS[COLUMNS[place]] if place < len(COLUMNS) - 2 else None


def test_labels_are_the_majorities_of_fer_plus_own_code(tmp_path: Path) -> None:
    """Of 300 images with ten votes each, some of which have no name because they show no face."""
    generator = random.Random(0)
    faces, votes, expected = [], [], []
    usages = ("Training", "PublicTest", "PrivateTest")
    for row in range(300):
        cast = generator.choices(range(10), weights=[generator.random() ** 4 for _ in range(10)], k=10)
        counts = [cast.count(place) for place in range(10)]
        name = f"fer{row:07}.png" if generator.random() < 0.9 else ""
        faces.append(f"{row % 7},{' '.join(['7'] * 48 * 48)},{usages[row // 100]}")
        votes.append(",".join([usages[row // 100], name, *map(str, counts)]))
        expected.append(label_of(counts) if name else None)
    write_text(tmp_path / "fer2013.csv", "\n".join(["emotion,pixels,Usage", *faces]))
    write_text(tmp_path / "fer2013new.csv", "\n".join([",".join(["Usage", "Image name", *COLUMNS]), *votes]))
    found: list[str | None] = [None] * 300
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        images = sets.FERPlus(str(tmp_path), split)  # pyright: ignore[reportArgumentType]
        for number, label in enumerate(images.labels()):
            assert start <= int(images.key(number)) < start + 100
            found[int(images.key(number))] = images.class_names[label]
    assert found == expected
    assert {None, *WORDS.values()} == set(expected)


@pytest.mark.parametrize("line", ["PrivateTest,fer0000000.png,4,0,0,1,3,2,0,0,0,0", "more"])
def test_tables_of_other_images_are_an_error(line: str, tmp_path: Path) -> None:
    """The rows of the two tables belong together by their order alone."""
    write_fer_plus(tmp_path)
    path = tmp_path / "fer2013/fer2013new.csv"
    lines = path.read_text().splitlines()
    lines = [*lines, lines[-1]] if line == "more" else [lines[0], line, *lines[2:]]
    path.write_text("\n".join(lines))
    assert "fer2013new.csv: its" in message_of(lambda: sets.FERPlus(str(tmp_path)))


def test_vote_that_is_no_number_is_an_error_naming_the_row(tmp_path: Path) -> None:
    write_fer_plus(tmp_path)
    path = tmp_path / "fer2013/fer2013new.csv"
    path.write_text(path.read_text().replace("4,0,0,1,3", "4,x,0,1,3"))
    assert "fer2013new.csv row 0: a vote" in message_of(lambda: sets.FERPlus(str(tmp_path)))
