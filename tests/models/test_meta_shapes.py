"""What is said of results on the meta device is what torch says of them, and so are the FLOPs of whole towers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lit_clip import CLIP
from lit_clip.models import flops, meta_shapes
from lit_clip.models.config import CLIPConfig
from lit_clip.models.meta_shapes import MetaShapes

TEXT = {"context_length": 16, "layers": 1, "width": 64, "heads": 1}
IMAGES = (
    {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64, "heads": 1},
    {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    {"timm": "eva02_tiny_patch14_224", "image_size": 28, "options": {"depth": 1}},
)


class Compared(MetaShapes):
    """Computes each known result with torch, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.known: set[Any] = set()
        ours = meta_shapes._result

        def both(func: Any, first: Tensor, args: Any) -> Any:
            known = ours(func, first, args)
            if known is not None:
                self.known.add(func)
                torchs = func(*args)
                for one, other in zip(tree_leaves(known), tree_leaves(torchs), strict=True):
                    assert _described(one) == _described(other), func
            return known

        monkeypatch.setattr(meta_shapes, "_result", both)


def _described(tensor: Tensor | None) -> Any:
    return tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.stride(), tensor.device)


def test_results_and_flops_of_both_passes_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Compared(monkeypatch)
    monkeypatch.setattr(flops, "MetaShapes", lambda: compared)
    for image in IMAGES:
        model = CLIP(CLIPConfig.from_dict({"embed_dim": 32, "image": image, "text": TEXT}))
        images, texts = torch.zeros(1, *model.preprocessing.shape), torch.full((1, 16), 5)
        for tower, inputs in ((model.visual, images), (model.text_encoder, texts)):
            counted = flops._count_on(tower, inputs, torch.device("meta"))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                replica = flops._replica(tower, torch.device("meta")).eval()
                replica(inputs.to("meta")).sum().backward()
            assert counted[1] == counter.get_total_flops() > counted[0] > 0
    listed = meta_shapes._LIKE_FIRST | meta_shapes._LIKE_BOTH | meta_shapes._LIKE_CONTIGUOUS
    assert set(compared.known) == listed | {
        torch.ops.aten.addmm.default,
        torch.ops.aten.native_layer_norm.default,
        torch.ops.aten.native_layer_norm_backward.default,
        torch.ops.aten._native_batch_norm_legit_no_training.default,
    }


def test_what_changes_type_or_shape_is_torchs() -> None:
    turned = torch.zeros(4, 8, 2, device="meta", requires_grad=True).transpose(1, 2)
    strides = torch.nn.functional.layer_norm(turned, (8,)).stride()
    with MetaShapes():
        assert torch.nn.functional.layer_norm(turned, (8,)).stride() == strides
        whole = torch.arange(3, device="meta")
        assert (whole * 0.5).dtype == torch.float32
        halves = torch.ones(3, device="meta", dtype=torch.bfloat16)
        assert (halves + torch.ones(2, 3, device="meta")).shape == (2, 3)
        assert (halves + torch.ones(3, device="meta")).dtype == torch.float32
        assert torch.relu(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]  # not on the meta device
