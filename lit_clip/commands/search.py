"""``lit-clip search``: the pictures of a folder that fit a text or a picture best."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_clip import load_model
from lit_clip.cli.subcommands import progress, stderr
from lit_clip.embedding.encode import check_complete, encode, report_skipped
from lit_clip.embedding.feature_files import FeatureTable, Parts, collect, fingerprint, replacing
from lit_clip.embedding.image_files import Item, OnError, images_in, read_image
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.html import page

INDEX = ".lit-clip-index.npz"
MOST_ROWS = 1_000_000  # that matrix products search; more are left to faiss
CHUNK = 65_536  # rows scored at once
THUMBNAIL = 256  # pixels of the longer side


class Hit(NamedTuple):
    """A picture found, and its cosine similarity to the query."""

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
    """Find the pictures of a folder that fit a query best.

    The first search encodes the folder and keeps the features in an index; later ones encode only pictures that are
    new or changed since, and forget those that are gone.

    Args:
        images: a folder, searched with all below.
        queries: texts, each a search of its own.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        image: pictures to find similar ones of.
        top_k: number of pictures found for each query.
        sheet: an HTML page to show them on; it holds the thumbnails itself.
        index: the index, a .npz file; by default .lit-clip-index.npz in the folder.
        batch_size: pictures encoded at once.
        num_workers: processes that decode pictures.
        on_error: what a picture that cannot be read does; skip lists it in a file beside the index.
    """
    require(bool(queries or image), "nothing to search for: type a text behind the folder, or give --image")
    require(top_k >= 1, f"--top_k {top_k} must be at least 1")
    require(index is None or index.endswith(".npz"), f"--index {index}: an index is a .npz file")
    require(Path(sheet).absolute().parent.is_dir(), f"--sheet {sheet}: there is no such folder")
    folder = Path(images)
    items = images_in(folder)
    pictures = [(path, read_image(Path(path))) for path in image or []]
    clip = load_model(model)
    table = update_index(
        clip, items, Path(index) if index else folder / INDEX, batch_size=batch_size, num_workers=num_workers,
        on_error=on_error,
    )  # fmt: skip
    vectors = _encode_queries(clip, queries, [picture for _, picture in pictures])
    keys = [key for key, _, _ in table.identities]
    titles = [*queries, *(f"like {path}" for path, _ in pictures)]
    found = [
        [Hit(keys[row], score) for row, score in zip(rows, scores, strict=True)]
        for scores, rows in zip(*(part.tolist() for part in nearest(table.features, vectors, top_k)), strict=True)
    ]
    for title, hits in zip(titles, found, strict=True):
        _print_hits(title, hits)
    write_sheet(Path(sheet), folder, dict(zip(titles, found, strict=True)))
    stderr().print(f"the same with pictures: {sheet}", markup=False)


def update_index(
    model: CLIP, items: Sequence[Item], path: Path, *, batch_size: int, num_workers: int, on_error: OnError
) -> FeatureTable:
    """The features of all items, from the index as far as it has them; the index is brought up to date.

    Raises:
        InputError: the index cannot be written, or a picture cannot be read.
    """
    require(path.absolute().parent.is_dir(), f"{path}: there is no folder for this --index")
    name = fingerprint(model)
    old = FeatureTable.load(path, name)
    if old is None and path.exists():
        stderr().print(f"{path} is of another model, or damaged: everything is encoded anew", markup=False)
    known = dict(zip(old.identities, old.features, strict=True)) if old else {}
    keys = {key for key, _, _ in known}
    missing = [item for item in items if item.identity not in known]
    changed = sum(item.key in keys for item in missing)
    gone = len(keys - {item.key for item in items})
    if old is not None and not missing and not gone:
        return old
    note = f"index: {len(items) - len(missing)} pictures as they were, {len(missing) - changed} new"
    stderr().print(f"{note}, {changed} changed, {gone} gone", markup=False)
    parts = Parts(path, name)
    bad = encode(model, items, parts, known, batch_size=batch_size, num_workers=num_workers, on_error=on_error)
    assert bad is not None  # one process
    table = collect(items, {**known, **parts.read()}, model.config.embed_dim)
    check_complete(items, table, bad)
    table.save(path, name)
    report_skipped(bad, path.with_name(f"{path.name}.skipped.txt"))
    parts.remove()
    return table


@torch.inference_mode()
def _encode_queries(model: CLIP, texts: Sequence[str], pictures: Sequence[Image.Image]) -> np.ndarray:
    """float32 ``[Q, D]``, of unit length: the texts, then the pictures."""
    features = []
    if texts:
        tokens = model.tokenizer.trim(model.tokenize(list(texts)))
        features.append(model.encode_text(tokens.to(model.device), normalize=True))
    if pictures:
        inputs = torch.stack([model.preprocess(picture) for picture in pictures])
        features.append(model.encode_image(inputs.to(model.device), normalize=True))
    return torch.cat(features).float().cpu().numpy()


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the highest inner products, exactly.

    Args:
        features: float32 ``[N, D]``.
        queries: float32 ``[Q, D]``.
        k: number of rows; N if there are fewer.

    Returns:
        Products float32 and rows int64, each ``[Q, min(k, N)]``, the highest first.

    Raises:
        InputError: more than ``MOST_ROWS`` rows, and no faiss.
    """
    k = min(k, len(features))
    if len(features) > MOST_ROWS:
        return _faiss_nearest(features, queries, k)
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(features), CHUNK):
        block = torch.from_numpy(queries) @ torch.from_numpy(features[start : start + CHUNK]).T  # [Q, chunk]
        scores = torch.cat([scores, block], dim=1)
        here = torch.arange(start, start + block.shape[1]).expand(len(queries), -1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = torch.cat([rows, here], dim=1).gather(1, best)
    return scores.numpy(), rows.numpy()


def _faiss_nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"{len(features):,} pictures: more than {MOST_ROWS:,} need faiss: pip install -e '.[search]'"
        ) from error
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)  # pyright: ignore[reportCallIssue]  # faiss replaces its C++ signatures when it is imported
    return index.search(queries, k)  # pyright: ignore[reportCallIssue]  # likewise


def _print_hits(title: str, hits: Sequence[Hit]) -> None:
    table = Table(title=Text(title))
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("image", overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), f"{hit.score:.4f}", Text(hit.key))
    Console().print(table)


_STYLE = """\
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1rem }
figure { margin: 0 }
img { width: 100%; height: 180px; object-fit: contain; background: #f2f2f2 }
figcaption { overflow-wrap: anywhere }"""


def write_sheet(path: Path, folder: Path, found: dict[str, list[Hit]]) -> None:
    """Write one HTML file with a section a query; thumbnails are inside it, nothing is fetched from anywhere."""
    sections = []
    with progress("contact sheet", sum(map(len, found.values()))) as advance:
        for query, hits in found.items():
            figures = []
            for rank, hit in enumerate(hits, start=1):
                caption = html.escape(f"{rank}. {hit.key} ({hit.score:.4f})")
                source = f"data:image/jpeg;base64,{_thumbnail(folder / hit.key)}"
                figures.append(
                    f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
                )
                advance(1)
            sections.append(f"<h2>{html.escape(query)}</h2>\n<section>\n" + "\n".join(figures) + "\n</section>")
    content = page(" | ".join(found), _STYLE, "\n".join(sections))
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")


def _thumbnail(path: Path) -> str:
    """A JPEG of the picture, base64."""
    picture = ImageOps.exif_transpose(read_image(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()
