"""``lit-clip search``: find the images of a folder, or rows of a feature file, that best match a query."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Column, Table
from torch import Tensor

from lit_clip import load_model
from lit_clip.embedding.encode import Encoding
from lit_clip.embedding.feature_files import WRITE_AGAIN, StoredFeatures, read_features
from lit_clip.embedding.image_files import FileRows, ImageFile, images_in
from lit_clip.embedding.index import INDEX, combined, nearest, update_index
from lit_clip.embedding.reading import check_finite, encoded_batches
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.tools.atomic import claimed
from lit_clip.tools.console import Console, Text, progress, stderr
from lit_clip.tools.hardware import Precision
from lit_clip.tools.html import page_path, thumbnail, write_page
from lit_clip.tools.images import open_image, upright

TEMPLATE = Path(__file__).parent / "templates" / "search.html"
# Rooms that need not be there: what opens an index, by its suffix, and what draws where an image fits a query.
INDICES = {".usearch": "lit_clip.approximate"}
HEAT_MAPS = ["lit_clip.locating.overlay"]
FEATURE_FILES = (".parquet", ".npy", *INDICES)
THUMBNAIL = 256  # pixels of the longer side
EXPLAINED = 10  # images of each query of which the page shows where they fit it: each is encoded once more

Hits = list[tuple[int, float]]  # rows found, with their cosine similarity to the query


class Searched(NamedTuple):
    """Images or rows of a feature file to search."""

    names: Sequence[str]  # of N rows, to be shown
    nearest: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # queries [Q, D], k -> cosines and rows [Q, k]
    files: Sequence[Path | None]  # each row's image, if it is a file


def search(
    images: str,
    queries: list[str],
    *,
    model: str,
    image: list[str] | None = None,
    text_weight: float | None = None,
    top_k: int = 10,
    sheet: str = "search.html",
    index: str | None = None,
    encoding: Encoding = Encoding(),  # noqa: B008  # immutable
) -> None:
    """Find the images of a folder that best match a query.

    The first search encodes the folder and keeps the features in an index; later searches encode only images that are
    new or have changed, and forget images that are gone. A file that lit-clip embed wrote is searched as it is, without
    encoding an image; name it in place of the folder.

    Args:
        images: a folder, with its subfolders; a .parquet or .npy file of features; or a .usearch file of
            lit-clip index.
        queries: texts, each a search of its own.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        image: images, each a search for similar ones.
        text_weight: make one search of all texts and images: the weight of the texts, above 0 and below 1; the images
            have the rest.
        top_k: number of images found for each query.
        sheet: an HTML page with thumbnails of the images found, in one file, which replaces an earlier search's.
        index: the index, a .npz file; by default .lit-clip-index.npz in the folder, or one in the cache folder if the
            folder cannot be written to.
        encoding: how images are read and encoded; queries are always encoded in float32.
    """
    _check_queries(queries, image or [], text_weight)  # before the model, which may have to be downloaded
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    page, path = page_path("sheet", sheet), Path(images)
    stored = holds_features(path, index, encoding.precision)
    files = [] if stored else images_in(path, encoding.on_error)
    with claimed(page, option="--sheet"):
        clip = load_model(model)
        # before the folder: an unreadable query ends the command
        titles, vectors = _titled_queries(clip, queries, image or [], text_weight)
        searched = read_searched(path, clip) if stored else search_in(clip, path, files, index, encoding)
        found = zip(*(part.tolist() for part in searched.nearest(vectors, top_k)), strict=True)
        hits = [list(zip(rows, scores, strict=True)) for scores, rows in found]
        for title, each in zip(titles, hits, strict=True):
            _print_hits(title, searched, each)
        write_sheet(page, searched, dict(zip(titles, hits, strict=True)), clip, vectors)
    stderr().print(f"page with images: {page}")


def holds_features(path: Path, index: str | None, precision: Precision) -> bool:
    """Return whether the path is a feature file or index, not a folder; options for encoding are then refused."""
    require(index is None or index.endswith(".npz"), f"--index {index}: must be a .npz file")
    stored = path.suffix in FEATURE_FILES and not path.is_dir()
    kinds = " or ".join(FEATURE_FILES)
    require(stored or not path.is_file(), f"{path}: cannot be searched; name a folder of images, or a {kinds} file")
    needless = f"{path} holds features already; leave it out"
    require(not (stored and index), f"--index {index}: {needless}")
    require(not stored or precision == "32-true", f"--precision {precision}: {needless}")
    return stored


def _titled_queries(
    model: CLIP, texts: Sequence[str], images: Sequence[str], text_weight: float | None
) -> tuple[list[str], np.ndarray]:
    titles, vectors = [*texts, *(f"like {path}" for path in images)], encode_queries(model, texts, images)
    if text_weight is None:
        return titles, vectors
    of_texts, of_images = (
        part.mean(dim=0, keepdim=True) for part in torch.from_numpy(vectors).split([len(texts), len(images)])
    )
    return [f"{', '.join(titles)} (texts {text_weight:g})"], combined(of_images, of_texts, text_weight).numpy()


def _check_queries(queries: Sequence[str], images: Sequence[str], text_weight: float | None) -> None:
    require(bool(queries or images), "nothing to search for; type a text after the folder, or give --image")
    if text_weight is not None:
        require(0 < text_weight < 1, f"--text_weight {text_weight}: must be above 0 and below 1")
        both = f"--text_weight {text_weight}: needs a text and an image; type a text after the folder, and give --image"
        require(bool(queries and images), both)
    for query in queries:
        require(bool(query.strip()), "a text to search for is empty; type one after the folder, or give --image")
        named = bool(Path(query).suffix) and os.path.isfile(query)
        require(not named, f"{query}: is a file, and would be searched for as a text; put it after --image")
    for each in images:
        require(not os.path.isdir(each), f"--image {each}: is a folder; name an image")
        require(os.path.exists(each), f"--image {each}: no such image file")


def search_in(model: CLIP, folder: Path, files: Sequence[ImageFile], index: str | None, settings: Encoding) -> Searched:
    """Return a folder's images to search; encode images that its index lacks."""
    table = update_index(model, files, Path(index) if index else folder / INDEX, settings)
    keys = [key for key, _, _ in table.identities]
    return Searched(keys, partial(nearest, table.features), [folder / key for key in keys])


def read_searched(path: Path, model: CLIP) -> Searched:
    """Read a feature file, or an index with its feature files."""
    index = import_module(INDICES[path.suffix]).open_index(path) if path.suffix in INDICES else None
    tables = index.tables if index else [read_features(path)]
    names: list[str] = []
    files: list[Path | None] = []
    for stored in tables:
        _check_model(path, stored, model)
        root = stored.metadata.get("root")
        files += [None if root is None else Path(root, image) for image in stored.images or stored.keys]
        captions = zip(stored.keys, stored.captions, strict=True) if stored.captions else ()
        names += [f"{key}: {caption}" for key, caption in captions] or stored.keys
    return Searched(names, index.nearest if index else partial(nearest, tables[0].features), files)


def _check_model(path: Path, stored: StoredFeatures, model: CLIP) -> None:
    theirs = stored.metadata.get("model", "an unknown model")
    ours = fingerprint(model)._asdict()
    same = all(ours[name.removesuffix("_sha256")] == digest for name, digest in stored.made_by.items())
    require(same, f"{path}: features of another model ({theirs}); give that one as --model, or embed again with yours")
    require(bool(stored.keys), f"{path}: no features in it")
    width, ours = stored.features.shape[1], model.config.embed_dim
    require(width == ours, f"{path}: has features of {width} numbers, but the model's have {ours}; {WRITE_AGAIN}")


@torch.inference_mode()
def encode_queries(model: CLIP, texts: Sequence[str], images: Sequence[str]) -> np.ndarray:
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
    joined = torch.cat(features).float().cpu()
    check_finite(joined, "query")
    return joined.numpy()


def _print_hits(title: str, searched: Searched, hits: Hits) -> None:
    numbers = (Column(name, justify="right") for name in ("", "score"))
    table = Table(*numbers, Column("image", overflow="fold"), title=Text(title))
    for rank, (row, score) in enumerate(hits, start=1):
        table.add_row(str(rank), f"{score:.4f}", Text(searched.names[row]))
    Console().print(table)


def write_sheet(path: Path, searched: Searched, found: dict[str, Hits], model: CLIP, vectors: np.ndarray) -> None:
    """Write an HTML page with thumbnails of each query's results, and where the best ones match it."""
    shown: dict[str, list[tuple[str, str, str]]] = {query: [] for query in found}
    explain = next((import_module(room).HeatMaps(model, THUMBNAIL) for room in HEAT_MAPS), None)
    with progress("contact sheet", sum(map(len, found.values()))) as advance:
        for (query, hits), vector in zip(found.items(), torch.from_numpy(vectors), strict=True):
            files = [searched.files[row] for row, _ in hits]
            drawn = explain(vector, files[:EXPLAINED]) if explain else {}
            why = {file: thumbnail(image, THUMBNAIL) for file, image in drawn.items()}
            for rank, ((row, score), file) in enumerate(zip(hits, files, strict=True), start=1):
                caption = f"{rank}. {searched.names[row]} ({score:.4f})"
                shown[query].append((small_thumbnail(file, THUMBNAIL), caption, why.get(file, "")))
                advance(1)
    write_page(path, TEMPLATE, title=" | ".join(found), found=shown)


def small_image(path: Path, size: int) -> Image.Image | None:
    """Return an image of at most ``size`` pixels a side, upright, on white; None if it has become unreadable."""
    try:
        return upright(open_image(path), size)
    except ValueError:  # a key need not be a path
        return None


def small_thumbnail(path: Path | None, size: int) -> str:
    """Return :func:`small_image` as a data URI; empty if there is none."""
    image = path and small_image(path, size)
    return thumbnail(image, size) if image else ""
