"""Images with the places where they were taken: IM2GPS."""

from pathlib import Path

import torch
from torch import Tensor

from datamodules.evaluation.annotation_files import number, read_table
from datamodules.evaluation.image_files import UnlabelledFiles
from lit_clip.errors import require
from lit_clip.evaluation.data import Located


class LocatedImages(UnlabelledFiles, Located):
    """A table of images and where they were taken: IM2GPS, or the reference images it is compared with.

    Args:
        path: a CSV file with columns ``image`` (or ``img_id``), ``latitude`` (``lat``) and ``longitude`` (``lon``,
            ``lng``), as github.com/TIBHannover/GeoEstimation has them.
        root: folder that image paths are relative to; None: the table's.

    Raises:
        MissingData: no such table.
    """

    def __init__(self, path: str, root: str | None = None) -> None:
        self.root = Path(path).parent if root is None else Path(root)
        self.annotation_paths = [Path(path)]
        columns = {
            "image": ("image", "img_id", "filename", "file", "path"),
            "latitude": ("latitude", "lat"),
            "longitude": ("longitude", "lon", "lng"),
        }
        self.names = []
        places: list[tuple[float, float]] = []
        for row in read_table(Path(path), columns):
            where = f"{path}: {row['image']}"
            latitude, longitude = number(row, "latitude", where), number(row, "longitude", where)
            on_earth = abs(latitude) <= 90 and abs(longitude) <= 180
            require(on_earth, f"{where}: {latitude}, {longitude} is not a latitude and a longitude in degrees")
            self.names.append(row["image"])
            places.append((latitude, longitude))
        self._coordinates = torch.tensor(places, dtype=torch.float64)

    def coordinates(self) -> Tensor:
        return self._coordinates
