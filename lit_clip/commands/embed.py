"""``lit-clip embed``: features of images or texts in a file."""

from pathlib import Path

from lit_clip import load_model
from lit_clip.embedding.encode import (
    EncodingSettings,
    Precision,
    check_complete,
    encode,
    image_task,
    report_skipped,
    text_task,
)
from lit_clip.embedding.feature_files import FeatureParts, check_keys, check_output, collect, write_features
from lit_clip.embedding.image_files import find_images
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
    batch_size: int = 64,
    num_workers: int = 4,
    devices: int = 1,
    accelerator: str = "auto",
    precision: Precision = "32-true",
    on_error: OnError = "error",
) -> None:
    """Write the features of images, or of texts, to a file.

    Features are float32 and of unit length; rows are sorted by key, each key once. The same command resumes an
    interrupted run.

    Args:
        images: files, and folders with everything below; an image's key is its path.
        model: a checkpoint, or a name that lit_clip.load_model understands.
        output: features.parquet (columns key and feature) or features.npy (keys in features.keys.json).
        texts: instead of images, a file with one text per line; a text is its own key.
        batch_size: images or texts that each process encodes at once.
        num_workers: processes that decode images, for each process.
        devices: number of processes, one per device.
        accelerator: cpu, gpu, mps, ...
        precision: of the encoder; 32-true is exact.
        on_error: error ends the run at an image that cannot be read; skip lists it in a file beside the output.
    """
    path = Path(output)
    check_output(path)
    require(bool(images) != bool(texts), "give either images or --texts")
    files = [] if texts else find_images(images)
    lines = _read_texts(Path(texts)) if texts else []
    check_keys(path, lines or [file.key for file in files])
    clip = load_model(model)
    name = fingerprint(clip).model
    workers = 0 if texts else num_workers  # tokenizing is not worth a process
    settings = EncodingSettings(batch_size, workers, devices, accelerator, precision, on_error)
    task = text_task(clip, lines) if texts else image_task(clip, files)
    parts = FeatureParts(path, f"{name} {precision} {'text' if texts else 'image'}")
    unreadable = encode(clip, task, parts, settings)
    if unreadable is None:
        return
    table = collect(task.identities, parts.read(), clip.config.embed_dim)
    check_complete(task.identities, table, unreadable)
    metadata = {"model": model, "model_sha256": name, "precision": precision, "lit_clip": __version__}
    write_features(path, [key for key, _, _ in table.identities], table.features, metadata)
    report_skipped(files, unreadable, path.with_name(f"{path.name}.skipped.txt"))
    parts.remove()
    stderr().print(f"{path}: {len(table.identities)} rows of {table.features.shape[1]} numbers", markup=False)


def _read_texts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 text file ({' '.join(str(error).split())})") from error
    texts = sorted({line.strip() for line in lines if line.strip()})
    require(bool(texts), f"{path}: no text in this file; write one per line")
    return texts
