"""``lit-clip search``: find the images of a folder that best match a text or an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lit_clip import load_model
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.image_files import FileRows, ImageFile, images_in
from lit_clip.embedding.index import INDEX, nearest, update_index
from lit_clip.embedding.reading import encoded_batches
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.html import thumbnail, write_page
from lit_clip.tools.images import OnError, open_image

TEMPLATE = Path(__file__).parent / "templates" / "search.html"
THUMBNAIL = 256  # pixels of the longer side


class Hit(NamedTuple):
    """An image that was found, and its cosine similarity to the query."""

    key: str
    score: float


def search(
    images: str,
    queries: list[str],
    *,
    model: str,
    image: list[str] | None = None,
    top_k: int = 10,
    sheet: str = "search.html",
    index: str | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
    on_error: OnError = "error",
) -> None:
    """Find the images of a folder that best match a query.

    The first search encodes the folder and keeps the features in an index; later searches encode only images that are
    new or have changed, and forget those that are gone.

    Args:
        images: a folder, searched with everything below.
        queries: texts, each a search of its own.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        image: images, each a search for similar ones.
        top_k: number of images found for each query.
        sheet: an HTML page with thumbnails of the images found, in one file.
        index: the index, a .npz file; by default .lit-clip-index.npz in the folder.
        batch_size: images encoded at once.
        num_workers: processes that decode images.
        on_error: error ends the run at an image that cannot be read; skip lists it in a file beside the index.
    """
    require(bool(queries or image), "nothing to search for; type a text after the folder, or give --image")
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    require(index is None or index.endswith(".npz"), f"--index {index}: must be a .npz file")
    require(Path(sheet).absolute().parent.is_dir(), f"--sheet {sheet}: there is no such folder")
    folder = Path(images)
    files = images_in(folder)
    clip = load_model(model)
    vectors = _encode_queries(clip, queries, image or [])  # before the folder: an unreadable query ends the command
    settings = EncodingSettings(batch_size, num_workers, on_error=on_error)
    table = update_index(clip, files, Path(index) if index else folder / INDEX, settings)
    keys = [key for key, _, _ in table.identities]
    titles = [*queries, *(f"like {path}" for path in image or [])]
    found = [
        [Hit(keys[row], score) for row, score in zip(rows, scores, strict=True)]
        for scores, rows in zip(*(part.tolist() for part in nearest(table.features, vectors, top_k)), strict=True)
    ]
    for title, hits in zip(titles, found, strict=True):
        _print_hits(title, hits)
    write_sheet(Path(sheet), folder, dict(zip(titles, found, strict=True)))
    stderr().print(f"page with images: {sheet}", markup=False)


@torch.inference_mode()
def _encode_queries(model: CLIP, texts: Sequence[str], images: Sequence[str]) -> np.ndarray:
    """Return the unit features of the texts, then of the images: float32 ``[Q, D]``."""
    features: list[Tensor] = []
    if texts:
        tokens = model.tokenizer.trim(model.tokenize(list(texts)))
        features.append(model.encode_text(tokens.to(model.device), normalize=True))
    files = FileRows([ImageFile(path, Path(path)) for path in images])
    for batch, encoded in encoded_batches(model, files, batch_size=64, num_workers=0):
        for bad in batch.unreadable:
            raise InputError(bad.message)
        features.append(encoded)
    return torch.cat(features).float().cpu().numpy()


def _print_hits(title: str, hits: Sequence[Hit]) -> None:
    table = Table(title=Text(title))
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("image", overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), f"{hit.score:.4f}", Text(hit.key))
    Console().print(table)


def write_sheet(path: Path, folder: Path, found: dict[str, list[Hit]]) -> None:
    """Write an HTML page with the thumbnails of the images found for each query."""
    shown: dict[str, list[tuple[str, str]]] = {query: [] for query in found}
    with progress("contact sheet", sum(map(len, found.values()))) as advance:
        for query, hits in found.items():
            for rank, hit in enumerate(hits, start=1):
                shown[query].append((_thumbnail(folder / hit.key), f"{rank}. {hit.key} ({hit.score:.4f})"))
                advance(1)
    write_page(path, TEMPLATE, title=" | ".join(found), found=shown)


def _thumbnail(path: Path) -> str:
    """A thumbnail, upright and on white, as a data URI."""
    image = ImageOps.exif_transpose(open_image(path))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return thumbnail(image, THUMBNAIL)
