"""Images in the folder of a run."""

import warnings
from pathlib import Path
from typing import Any

from PIL import Image


def run_image(folder: Path, name: Any) -> Image.Image | None:
    """Open an image that the results name, as RGB; None if it is outside the run's folder, missing or broken."""
    if not name or not isinstance(name, str):
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
