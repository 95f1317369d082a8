"""Images on disk: one way to open them, with one set of refusals."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip.errors import InputError, require
from lit_clip.tools.workers import quiet_worker

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


OnError = Literal["error", "skip"]


FIX_HINT = "; fix or remove it"  # how a line about a broken image may end


class Bad(NamedTuple):
    """An item that could not be read, and the line that says why."""

    key: str
    reason: str


class Batch(NamedTuple):
    """Inputs of an encoder, ``[b, ...]`` or None if none could be read, and the rows among the items they are of."""

    inputs: Tensor | None
    rows: list[int]
    bad: list[Bad]


def read_image(path: Path) -> Image.Image:
    """The decoded image.

    Raises:
        InputError: no such file, not an image, or a broken one.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a file")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    # Pillow's decoders answer a broken file with whatever they trip over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        what = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot read this image ({what or type(error).__name__})") from error


def loader(batches: Dataset[Batch], num_workers: int, pin_memory: bool = False) -> DataLoader[Any]:
    """A loader of a dataset whose items are batches, with at most one worker a core.

    A single batch is not worth starting processes for.
    """
    require(num_workers >= 0, f"--num_workers {num_workers} must be at least 0")
    count: int = len(batches)  # pyright: ignore[reportArgumentType]  # Dataset declares no length, ours have one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(num_workers, count, cores) if count > 1 else 0
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=quiet_worker)
