"""Models without weights of their own: after they are given another model's weights and buffers they are that model."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.weights.load import create_model, weights_come_later
from tests.helpers.own_encoders import architecture
from tests.helpers.towers import FAMILIES, text_config
from tests.weights.test_round_trip import IMAGES, TEXT

OF_IMAGES = ("resnet", "vit with an attention pool", "timm with avg", "timm's vit with map", "a bias of the logits")


def tensors(model: CLIP) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def assert_is_given(config: CLIPConfig, drawn: tuple[str, ...] = ()) -> None:
    """Give a model all that the first rank broadcasts, and compare features; ``drawn`` parts have weights before."""
    first = create_model(config).eval()
    with weights_come_later():
        later = create_model(config).eval()
    theirs, ours = tensors(first), tensors(later)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.requires_grad == theirs[name].requires_grad, name
        assert name.startswith(drawn) or not tensor.any(), name
        tensor.data = theirs[name].data.clone()
    images = torch.randn(2, *first.preprocessing.shape)
    tokens = first.tokenize(["a", "a b"])
    with torch.no_grad():
        assert torch.equal(later.encode_image(images), first.encode_image(images))
        assert torch.equal(later.encode_text(tokens), first.encode_text(tokens))


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_image_encoders(kind: str) -> None:
    assert_is_given(CLIPConfig(**{"embed_dim": 32, "text": TEXT, **IMAGES[kind]}))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_of_transformers(family: str, folders: dict[str, Path]) -> None:
    """Also those with the same weights in two places, and with buffers that no file holds."""
    assert_is_given(text_config(folders[family]))


def test_encoders_of_ones_own_draw_theirs() -> None:
    assert_is_given(architecture(), drawn=("visual.", "text."))
