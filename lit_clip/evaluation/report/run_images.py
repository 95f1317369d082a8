"""Images in the folder of a run."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from lit_clip.errors import InputError
from lit_clip.tools.images import open_image


def run_image(folder: Path, name: Any) -> Image.Image | None:
    """Open an image that the results name, as RGB; None if it is outside the run's folder, missing or broken."""
    try:
        path, within = (Path(os.path.realpath(each)) for each in (folder / str(name), folder))
        return open_image(path).convert("RGB") if path.is_relative_to(within) else None
    except (InputError, OSError, ValueError):
        return None
