"""The formats of ``lit-clip export``: Immich's own layout, and ONNX files of float16 or int8 weights."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer, normalizers

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
    file, saved = folder / "textual" / "tokenizer.json", folder / "textual" / "tokenizer_config.json"
    written: Any = Tokenizer.from_file(str(file))
    if clean == "lower":  # which Immich does not
        own = [] if written.normalizer is None else [written.normalizer]
        written.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        written.save(str(file))
    save_json(read_json(saved) | {"pad_token": written.id_to_token(tokenizer.pad_id)}, saved)


def read_immich(folder: Path, sample: ExportSample) -> Reading:
    """Run the graphs on one image or text at a time, with the tokenizer's settings from the folder, as in Immich."""
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


# ONNX files of smaller weights

OnnxDType = Literal["float32", "float16", "int8"]
# Largest accepted difference between unit features: rounding to 11 bits, and to 8 bits of weights and activations.
TOLERANCES: dict[OnnxDType, float] = {"float16": 5e-3, "int8": 5e-2}
# Convolutions stay float32: onnxruntime's CPU kernels have none for int8 weights.
QUANTIZED = ["MatMul", "Gemm", "Gather"]
# CoCa's attention pool stays float32: with its transpositions in float16 onnxruntime's graph optimiser crashes.
_FLOAT32_PART = "'model.visual.attn_pool'"


def check_onnx_dtype(dtype: OnnxDType, format: str) -> None:
    """Raise :class:`InputError` if a format cannot hold weights of that type."""
    problem = f"{format} holds float32 weights, which its library casts on opening; only onnx has others"
    require(dtype == "float32" or format == "onnx", f"--dtype {dtype}: {problem}")


def tolerance_of(format: str, dtype: OnnxDType) -> float:
    """Return the largest accepted difference between unit features of a model and of its export."""
    return TOLERANCES.get(dtype, FORMATS[format].tolerance)


def shrink_onnx(path: Path, dtype: OnnxDType) -> None:
    """Convert an ONNX file in place; inputs and outputs keep their types.

    - ``float16``: all weights and operations but those of CoCa's attention pool, by
      ``onnxruntime.transformers.float16``.
    - ``int8``: the weights of :data:`QUANTIZED`, each channel with its own scale, by ``onnxruntime.quantization``'s
      ``quantize_dynamic``: activations are quantised as they come.
    """
    if dtype == "float32":
        return
    import onnxruntime

    before = sys.path.copy()  # its tools import their own files as top-level modules
    sys.path.append(str(Path(onnxruntime.__file__).parent / "transformers"))
    try:
        _shrink(path, dtype)
    finally:
        sys.path[:] = before


def _shrink(path: Path, dtype: OnnxDType) -> None:
    import onnx

    outside = path.with_name(f"{path.name}.data")  # weights of a file above 2 GiB
    large, smaller = outside.exists(), path.with_name(f"smaller_{path.name}")
    if dtype == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        whole = onnx.load(path)
        kept = [node.name for node in whole.graph.node if any(_FLOAT32_PART in p.value for p in node.metadata_props)]
        model = convert_float_to_float16(whole, keep_io_types=True, disable_shape_infer=large, node_block_list=kept)
        where = {"save_as_external_data": True, "location": outside.name} if large else {}
        outside.unlink(missing_ok=True)
        onnx.save(model, path, **where)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False)
    del graph.graph.value_info[:]  # torch 2.11 notes wrong shapes of a ResNet; quantize_dynamic infers them
    onnx.save(graph, path)
    quantize_dynamic(
        path, smaller, QUANTIZED, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large
    )
    if large:  # its second file has the draft's name inside
        model = onnx.load(smaller)
        smaller.with_name(f"{smaller.name}.data").unlink()
        outside.unlink()
        onnx.save(model, path, save_as_external_data=True, location=outside.name)
        smaller.unlink()
    else:
        smaller.replace(path)
