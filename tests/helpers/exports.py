"""Tiny models for tests of exports, and comparisons."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, ResNetConfig, TimmConfig, VisionTransformerConfig
from lit_clip.tools.atomic import replacing
from lit_clip.weights.checkpoints import saved_tokenizer
from tests.helpers import forks

_collecting_once = functools.cache(functools.cache)  # of a function, the same for each who asks

TEXTS = ["a dog on a hill", "A Photo of a CAT!", " ".join(["a very long caption about a cat"] * 9), ""]


def checkpoint(config: CLIPConfig, path: Path) -> CLIP:
    """Save a model with no weight at its initial value; those of an encoder do not depend on the other encoder."""
    torch.manual_seed(0)
    model = CLIP(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if not name.startswith("visual."):
                matrix = parameter.ndim > 1
                parameter.mul_(not matrix).add_(torch.randn_like(parameter), alpha=0.1 if matrix else 0.05)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    settings = {"hyper_parameters": {"architecture": model.config.to_dict()}}
    torch.save({**settings, "state_dict": model.state_dict(), **saved_tokenizer(model)}, path)
    return model


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Keep ONNX files in a folder, and write the same for an encoder with the same settings and weights.

    Tracing an encoder takes seconds, of which one is to collect the functions that ONNX is written with.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    plain = torch.onnx.export

    def trace(encoder: Any, example: tuple[Tensor], path: Path, **options: Any) -> object:
        config, image = encoder.model.config, encoder.kind == "image"
        state = {n: p for n, p in encoder.model.state_dict().items() if n.startswith("visual.") == image}
        weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in state.values())).hexdigest()
        tower = config.image if image else config.text
        key = repr(
            (tower, options["input_names"], config.embed_dim, config.activation, example[0].shape, [*state], weights)
        )
        kept = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
        if encoder.head is not None:
            return plain(encoder, example, path, **options)
        if not kept.exists():
            plain(encoder, example, path, **options)
            with replacing(kept) as draft:
                draft.write_bytes(path.read_bytes())
        return path.write_bytes(kept.read_bytes())

    collected = _collecting_once(ONNXRegistry.from_torchlib)
    with (
        patch.object(torch.onnx, "export", trace),
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(collected)),
    ):
        yield


def command_traced_once(folder: Path) -> None:
    """Run ``lit-clip`` with :func:`traced_once`."""
    with traced_once(folder):
        forks.command()


def photos(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def variants(tiny: CLIPConfig) -> dict[str, CLIPConfig]:
    replace = dataclasses.replace
    odd = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")
    resnet = replace(tiny, image=ResNetConfig((1, 2, 1, 1), 4, 64), preprocessing=None)
    return {
        "vit": tiny,
        "quick_gelu": replace(tiny, activation="quick_gelu", preprocessing=odd),
        "gelu_tanh": replace(
            tiny, activation="gelu_tanh", image=VisionTransformerConfig(32, 16, 64, 1, 2, 2.5), preprocessing=None
        ),
        "resnet": resnet,
        "timm": replace(tiny, image=TimmConfig("resnet10t", image_size=64, projection="mlp"), preprocessing=None),
        "classifier": replace(
            tiny,
            image=TimmConfig("test_vit", image_size=160, pool="token", projection="classifier"),
            text=replace(tiny.text, projection=False, width=16, heads=1),
            preprocessing=Preprocessing(160),
        ),
    }
