"""The formats of ``lit-clip export``, including Immich's own layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer
from lit_clip.weights import export
from lit_clip.weights.export import OUTPUTS, ExportSample, Reading, TracedEncoder, run_graphs, save_json
from lit_clip.weights.hugging_face_processor import read_json, save_tokenizer, square


def write_immich(model: CLIP, folder: Path) -> None:
    """Write ``visual`` and ``textual`` as Immich's machine learning reads a model of open_clip.

    Its graphs read one image or text at a time and give features of unit length.
    """
    export.check_traceable(model, "immich")
    ours, tokenizer, settings = model.preprocessing, model.tokenizer, model.config.text.tokenizer
    require(ours.bands == 3, f"immich: reads images of 3 bands, the model {ours.bands}; use onnx")
    require(ours.crop_pct == 1, f"immich: resizes to the image size, and leaves out crop_pct {ours.crop_pct}; use onnx")
    separated = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.stripped_id is not None
    require(not separated, "immich: its tokenizer keeps the separators that this model's leaves out; use onnx")
    sample, size = ExportSample.of(model), square("preprocessing.image_size", ours.image_size)
    for name in ("visual", "textual"):
        (folder / name).mkdir()
    image, text = (TracedEncoder(model, kind, unit_length=True) for kind in ("image", "text"))
    image.write(sample.pixels[:1], folder / "visual" / "model.onnx", "image", OUTPUTS[:1])
    text.write(sample.tokens[:1].int(), folder / "textual" / "model.onnx", "text", OUTPUTS[:1])
    same = {name: getattr(ours, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    save_json({"size": [size, size], "mode": "RGB", **same}, folder / "visual" / "preprocess_cfg.json")
    clean = None if settings is None else settings.clean
    texts = {"context_length": model.context_length, "tokenizer_kwargs": {"clean": clean}}
    save_json({"embed_dim": model.config.embed_dim, "text_cfg": texts}, folder / "config.json")
    save_tokenizer(model, folder / "textual")
    _complete_tokenizer(folder / "textual", tokenizer.pad_id, clean == "lower")


def _complete_tokenizer(folder: Path, pad_id: int, lower: bool) -> None:
    """Set the padding token's name, and lower-case in the tokenizer where Immich does not."""
    from tokenizers import Tokenizer, normalizers

    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer: Any = Tokenizer.from_file(str(file))
    if lower:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        tokenizer.save(str(file))
    save_json(read_json(settings) | {"pad_token": tokenizer.id_to_token(pad_id)}, settings)


def read_immich(folder: Path, sample: ExportSample) -> Reading:
    """Run the graphs on one image or text at a time, with the tokenizer's settings from the folder, as in Immich."""
    from tokenizers import Tokenizer

    length = read_json(folder / "config.json")["text_cfg"]["context_length"]
    pad = read_json(folder / "textual" / "tokenizer_config.json")["pad_token"]
    tokenizer: Any = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    tokens = torch.tensor([tokenizer.encode(text).ids for text in sample.texts])
    inputs = {"visual/model.onnx": ("image", sample.pixels), "textual/model.onnx": ("text", tokens.int())}
    (image,), (text,) = run_graphs(folder, inputs, [1] * len(tokens))
    return Reading(image, text, tokens=tokens)


FormatName = Literal["open_clip", "hugging_face", "onnx", "immich"]


class Format(NamedTuple):
    """How to write and read a format, its largest accepted feature difference, and its name on hubs."""

    write: Callable[[CLIP, Path], None]
    read: Callable[[Path, ExportSample], Reading]
    tolerance: float
    library: str


FORMATS: dict[str, Format] = {
    "open_clip": Format(export.write_open_clip, export.read_open_clip, 1e-4, "open_clip"),
    "hugging_face": Format(export.write_hugging_face, export.read_hugging_face, 1e-4, "transformers"),
    "onnx": Format(export.write_onnx, export.read_onnx, 1e-3, "onnx"),
    "immich": Format(write_immich, read_immich, 1e-3, "immich"),
}
