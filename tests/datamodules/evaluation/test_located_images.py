"""Images with the places where they were taken."""

import pickle
from pathlib import Path

import torch

from datamodules.evaluation import LocatedImages
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import message_of, paint_shade, shade


def test_located_images_have_coordinates_and_bad_rows_are_errors(tmp_path: Path) -> None:
    for i in (1, 2):
        paint_shade(tmp_path / f"photos/{i}.jpg", 10 * i)
    (tmp_path / "a.csv").write_text(
        "IMG_ID,AUTHOR,LAT,LON\nphotos/1.jpg,me,48.858,2.294\nphotos/2.jpg,you,-33.9,151.2\n"
    )
    images = LocatedImages(str(tmp_path / "a.csv"))
    assert torch.equal(images.coordinates(), torch.tensor([[48.858, 2.294], [-33.9, 151.2]], dtype=torch.float64))
    assert [(images.key(i), shade(images.images(i)[0])) for i in range(len(images))] == [
        ("photos/1.jpg", 10),
        ("photos/2.jpg", 20),
    ]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.stamp(), copy.coordinates().tolist()) == (images.stamp(), images.coordinates().tolist())
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,1,2\n")
    assert len(LocatedImages(str(tmp_path / "b.csv"), str(tmp_path / "photos")).images(0)) == 1
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,91,2\n")
    assert "2.jpg" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,north,2\n")
    assert "north" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude\n2.jpg,1\n")
    assert "longitude" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    assert "c.csv" in message_of(lambda: LocatedImages(str(tmp_path / "c.csv")), MissingData)
