"""Read and encode images batch by batch, for all commands and callbacks that need features.

Shapes: N rows, F images (a row may have several, such as the frames of a video), D embedding dimension.
"""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from lit_clip.errors import BadSample, InputError, require, unreadable_image
from lit_clip.models.clip import CLIP
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import pixels
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress
from lit_clip.tools.hardware import Precision, autocast
from lit_clip.tools.workers import loader

Encode = Callable[[Tensor], Tensor]  # inputs on the model's device, [B, ...] -> features [B, ...]
Batches = Sequence[Sequence[int]]  # the rows of each batch
Note = Callable[[int, str, Image.Image], Any]  # an image's row, the user's name for the row, the image -> anything


class ImageRows(Protocol):
    """Images by row number, each row with the user's name for it; data workers receive a pickled copy."""

    def __len__(self) -> int: ...

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]: ...


class UnreadableRow(NamedTuple):
    """A row that could not be read."""

    row: int
    reason: str  # in a few words that other rows share
    message: str  # the line for the user


class EncoderBatch(NamedTuple):
    """Inputs of an encoder."""

    inputs: Tensor | None  # [F, ...]; None if no row could be read
    rows: list[int]  # that could be read, in order
    counts: list[int]  # images of each of them
    notes: list[Any]  # on each image, see ImageBatches
    unreadable: list[UnreadableRow]  # the other rows
    texts: Any = None  # made of the notes, see ImageBatches


def in_batches(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut rows into batches, in their order."""
    require(1 <= batch_size < 2**31, f"--batch_size {batch_size} must be at least 1 and less than 2**31")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


class ImageBatches(Dataset[EncoderBatch]):
    """Batches of images, decoded and cropped: one item is one batch of uint8 ``[F, 3, H, W]``.

    A row that cannot be read is reported, never replaced. ``note`` is called for each image, and ``texts`` for all
    notes of a batch; once the file ``stop`` exists, nothing more is read.
    """

    def __init__(
        self,
        data: ImageRows,
        batches: Batches,
        preprocessing: Preprocessing,
        note: Note | None = None,
        stop: Path | None = None,
        texts: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.data, self.batches, self.note, self.stop, self.texts = data, batches, note, stop, texts
        self.transform = pixels(preprocessing)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> EncoderBatch:
        inputs: list[Tensor] = []
        batch = EncoderBatch(None, [], [], [], [])
        stopped = self.stop is not None and self.stop.exists()
        for row in self.batches[index] if not stopped else ():
            try:
                read, notes = self._read(row)
            except InputError as error:
                reason = error.reason if isinstance(error, BadSample) else "cannot be read"
                batch.unreadable.append(UnreadableRow(row, reason, str(error)))
                continue
            inputs += read
            batch.rows.append(row)
            batch.counts.append(len(read))
            batch.notes.extend(notes)
        if not inputs:
            return batch
        return batch._replace(inputs=torch.stack(inputs), texts=self.texts and self.texts(batch.notes))

    def _read(self, row: int) -> tuple[list[Tensor], list[Any]]:
        name, images = self.data.key_and_images(row)
        require(bool(images), f"{name}: has no image")
        try:
            notes = [self.note(row, name, image) for image in images] if self.note else []
            return [self.transform(image) for image in images], notes
        except MemoryError:
            raise
        except Exception as error:
            raise unreadable_image(error, name) from error


def text_batch(texts: Sequence[str], tokenizer: TextTokenizer, rows: Sequence[int]) -> EncoderBatch:
    """Return a batch of texts: tokens ``[N, L]``."""
    tokens = tokenizer.trim(tokenizer([texts[row] for row in rows]))
    return EncoderBatch(tokens, list(rows), [1] * len(rows), [], [])


def image_features(model: CLIP, precision: Precision = "32-true") -> Encode:
    """Return a function from uint8 ``[F, 3, H, W]`` to unit features, float32 ``[F, D]``."""

    def encode(images: Tensor) -> Tensor:
        with autocast(model.device, precision):
            return model.encode_image(model.normalize(images), normalize=True).float()

    return encode


def features_of_both_kinds(model: CLIP, precision: Precision = "32-true") -> Encode:
    """Return a function from uint8 ``[F, 3, H, W]`` to features before projection and unit features, joined."""

    def encode(images: Tensor) -> Tensor:
        with autocast(model.device, precision):
            before, after = model.image_features(model.normalize(images))
        return torch.cat([before.float(), normalize(after.float(), dim=1)], dim=1)

    return encode


def encode_batch(batch: EncoderBatch, encode: Encode, device: torch.device, batch_size: int) -> Tensor:
    """Encode a batch's inputs, at most ``batch_size`` at once; return an empty tensor if there are none."""
    if batch.inputs is None:
        return torch.empty(0, device=device)
    return torch.cat([encode(part.to(device)) for part in batch.inputs.split(batch_size)])


def check_finite(features: Tensor, name: str) -> None:
    """Raise :class:`InputError` if features contain NaN or infinity: damaged weights, or half-precision overflow."""
    if not features.isfinite().all():
        raise InputError(f"{name}: features that are not finite; check the model's weights, or compute in float32")


def row_means(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Average the features ``[F, ...]`` of each row's images -> ``[N, ...]``."""
    if len(features) == len(counts):
        return features
    return torch.stack([part.mean(dim=0) for part in features.split(list(counts))])


@torch.no_grad()
def encoded_batches(
    model: CLIP,
    data: ImageRows,
    batch_size: int,
    num_workers: int,
    *,
    encode: Encode | None = None,
    batches: Batches | None = None,
    note: Note | None = None,
    title: str | None = None,
) -> Generator[tuple[EncoderBatch, Tensor], None, None]:
    """Read and encode images; yield each batch with its images' features ``[F, ...]`` on the model's device.

    By default ``encode`` is :func:`image_features`, batches are all rows, at most ``batch_size`` at once, and no
    progress bar is shown; ``note``: see :class:`ImageBatches`.
    """
    batches = in_batches(range(len(data)), batch_size) if batches is None else batches
    dataset = ImageBatches(data, batches, model.preprocessing, note)
    encode = encode or image_features(model)
    with progress(title or "", sum(map(len, batches)), enabled=title is not None) as advance:
        for batch in loader(dataset, num_workers, pin_memory=model.device.type == "cuda"):
            yield batch, encode_batch(batch, encode, model.device, batch_size)
            advance(len(batch.rows) + len(batch.unreadable))
