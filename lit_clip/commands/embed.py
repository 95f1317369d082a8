"""`lit-clip embed`: embeddings of images or texts in a file."""

from pathlib import Path

from lit_clip import load_model
from lit_clip.embedding.batch_size import BatchSize
from lit_clip.embedding.encode import Precision, check_complete, encode, report_skipped
from lit_clip.embedding.feature_files import FeatureParts, check_keys, check_output, collect, write_features
from lit_clip.embedding.image_files import Item, find_images
from lit_clip.errors import InputError, require
from lit_clip.tools.console import stderr
from lit_clip.tools.images import OnError
from lit_clip.version import __version__
from lit_clip.weights.fingerprint import fingerprint


def embed(
    images: list[str],
    *,
    model: str,
    output: str,
    texts: str | None = None,
    batch_size: BatchSize = 64,
    num_workers: int = 4,
    devices: int = 1,
    accelerator: str = "auto",
    precision: Precision = "32-true",
    on_error: OnError = "error",
) -> None:
    """Write the features of images, or of texts, to a file.

    Features are float32 and of unit length; rows are sorted by key, each key once. An interrupted run goes on where it
    was when the same command is given again.

    Args:
        images: files, and folders with all below; an image's key is its path.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        output: features.parquet (columns key and feature) or features.npy (keys in features.keys.json).
        texts: instead of images a file with a text a line; a text is its own key.
        batch_size: of one process; auto: the one at which the encoder is fastest and that fits in memory, found by
            trying.
        num_workers: processes that decode images, of each process.
        devices: number of processes, one a device.
        accelerator: cpu, gpu, mps, ...
        precision: of the encoder; 32-true is exact.
        on_error: what an image that cannot be read does; skip lists it in a file beside the output.
    """
    path = Path(output)
    check_output(path)
    require(bool(images) != bool(texts), "give either images or --texts, not both and not neither")
    items = _read_texts(Path(texts)) if texts else find_images(images)
    check_keys(path, [item.key for item in items])
    clip = load_model(model)
    name = fingerprint(clip).model
    parts = FeatureParts(path, f"{name} {precision} {'text' if texts else 'image'}")
    settings = {"devices": devices, "accelerator": accelerator, "precision": precision}
    bad = encode(clip, items, parts, {}, batch_size=batch_size, num_workers=num_workers, on_error=on_error, **settings)
    if bad is None:
        return
    table = collect(items, parts.read(), clip.config.embed_dim)
    check_complete(items, table, bad)
    metadata = {"model": model, "model_sha256": name, "precision": precision, "lit_clip": __version__}
    write_features(path, [key for key, _, _ in table.identities], table.features, metadata)
    report_skipped(bad, path.with_name(f"{path.name}.skipped.txt"))
    parts.remove()
    stderr().print(f"{path}: {len(table.identities)} rows of {table.features.shape[1]} numbers", markup=False)


def _read_texts(path: Path) -> list[Item]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 text file ({' '.join(str(error).split())})") from error
    texts = sorted({line.strip() for line in lines if line.strip()})
    require(bool(texts), f"{path}: no texts in this file; it wants one a line")
    return [Item(text) for text in texts]
