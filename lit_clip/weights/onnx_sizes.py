"""Shrink ONNX files: float16 weights, or int8 weights in matrix products and look-ups."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lit_clip.errors import require
from lit_clip.weights.formats import FORMATS

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
    if dtype != "float32":
        with _own_modules_of_onnxruntime():
            _shrink(path, dtype)


@contextmanager
def _own_modules_of_onnxruntime() -> Iterator[None]:
    """Let onnxruntime's tools import their files as top-level modules; restore the path afterwards."""
    import onnxruntime

    before = sys.path.copy()
    sys.path.append(str(Path(onnxruntime.__file__).parent / "transformers"))
    try:
        yield
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
