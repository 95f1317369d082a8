"""The formats of ``lit-clip export``: how each is written, read back, judged and named in a model card."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from lit_clip.models.clip import CLIP
from lit_clip.weights.export import (
    ExportSample,
    Reading,
    read_hugging_face,
    read_onnx,
    read_open_clip,
    write_hugging_face,
    write_onnx,
    write_open_clip,
)
from lit_clip.weights.export_programs import (
    read_diffusers,
    read_immich,
    read_timm,
    write_diffusers,
    write_immich,
    write_timm,
)

FormatName = Literal["open_clip", "hugging_face", "onnx", "timm", "diffusers", "immich"]
BOTH = "zero-shot-image-classification"


class Format(NamedTuple):
    """How to write and read a format, the largest accepted difference between unit features, and what hubs call it."""

    write: Callable[[CLIP, Path], None]
    read: Callable[[Path, ExportSample], Reading]
    tolerance: float
    library: str
    task: str = BOTH


FORMATS: dict[str, Format] = {
    "open_clip": Format(write_open_clip, read_open_clip, 1e-4, "open_clip"),
    "hugging_face": Format(write_hugging_face, read_hugging_face, 1e-4, "transformers"),
    "onnx": Format(write_onnx, read_onnx, 1e-3, "onnx"),
    "timm": Format(write_timm, read_timm, 1e-4, "timm", "image-feature-extraction"),
    "diffusers": Format(write_diffusers, read_diffusers, 1e-4, "diffusers", "feature-extraction"),
    "immich": Format(write_immich, read_immich, 1e-3, "immich"),
}
