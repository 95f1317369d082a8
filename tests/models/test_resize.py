"""Weights at another image size give open_clip's features; at another context length short captions keep their bits."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lit_clip import LitCLIP, create_model, load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    ResNetConfig,
    Size,
    TextTransformerConfig,
    height_width,
)
from lit_clip.models.finetuning import Freeze
from lit_clip.models.open_clip_configs import from_open_clip
from lit_clip.models.resize import stretched
from tests.helpers.towers import shaken

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
SIGLIP_TEXT = {
    **{**TEXT, "vocab_size": 99, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    **{"norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "timm/nowhere"},
}
VIT = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16}
TIMM = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160}


def model_cfg(vision: dict[str, Any], text: dict[str, Any] | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": text or TEXT}
    return values if text is None else {**values, "custom_text": True, "init_logit_bias": -10}


def save_folder(folder: Path, values: dict[str, Any]) -> Path:
    """Save a model with random weights in open_clip's layout."""
    folder.mkdir(exist_ok=True)
    model = shaken(CLIP(from_open_clip(values, None, "tiny")))
    state = model.state_dict()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}), encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "vit", model_cfg(VIT))


def photos(size: Size, number: int = 2) -> Tensor:
    return F.interpolate(torch.randn(number, 3, 5, 5, generator=torch.Generator().manual_seed(1)), height_width(size))


@pytest.mark.parametrize(
    ("values", "size"),
    [
        *((model_cfg(VIT), size) for size in (32, 96, 128, (48, 80), (112, 64))),
        *((model_cfg(TIMM, SIGLIP_TEXT), size) for size in (240, (128, 192))),
        (model_cfg(CONVNEXT), (128, 192)),
        pytest.param(model_cfg(TIMM, SIGLIP_TEXT), 96, marks=pytest.mark.slow),
        pytest.param(model_cfg(CONVNEXT), 96, marks=pytest.mark.slow),
    ],
)
def test_another_image_size_gives_open_clips_features(tmp_path: Path, values: dict[str, Any], size: Size) -> None:
    folder = save_folder(tmp_path / "model", values)
    theirs: Any = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    ours, images = load_model(folder, image_size=size), photos(size)
    assert ours.config.image.image_size == ours.preprocessing.image_size == size
    with torch.no_grad():
        features, expected = ours.encode_image(images, normalize=True), F.normalize(theirs.encode_image(images), dim=-1)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    if "timm_model_name" not in values["vision_cfg"]:  # zeroing the position embedding must change the features
        with torch.no_grad():
            ours.get_parameter("visual.positional_embedding").zero_()
            assert float((ours.encode_image(images, normalize=True) - features).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [32, 96, (64, 128)])
def test_a_resnets_attention_pool_is_interpolated_in_two_dimensions(tmp_path: Path, size: Size) -> None:
    """open_clip cannot resize these; the oracle is the interpolation, written out."""
    text = TextTransformerConfig(context_length=16, width=64, layers=1, heads=1)
    config = CLIPConfig(32, ResNetConfig((1, 1, 1, 1), width=16, image_size=64), text)
    state = shaken(CLIP(config)).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(tmp_path / "weights.pt", architecture=config, image_size=size)
    key, (height, width) = "visual.attnpool.positional_embedding", (side // 32 for side in height_width(size))
    grid = state[key][1:].T.reshape(1, -1, 2, 2)
    expected = F.interpolate(grid, (height, width), mode="bicubic", antialias=True)[0].flatten(1).T
    resized = model.state_dict()
    torch.testing.assert_close(resized[key], torch.cat([state[key][:1], expected]), rtol=0, atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in resized.items() if name != key)
    with torch.no_grad():
        assert model.encode_image(photos(size)).shape == (2, 32)


def test_passing_the_weights_own_sizes_changes_no_bit(vit: Path) -> None:
    expected = load_model(vit).state_dict()
    for size in (64, (64, 64)):
        again = load_model(vit, image_size=size, context_length=16)
        assert again.config.image.image_size == 64
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_a_non_square_position_embedding_is_interpolated_from_its_own_grid(vit: Path, tmp_path: Path) -> None:
    """open_clip assumes that every stored grid is square."""
    wide = load_model(vit, image_size=(64, 128))
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    back = load_model(tmp_path / "wide.pt", architecture=wide.config, image_size=64)
    grid = wide.state_dict()["visual.positional_embedding"][1:].T.reshape(1, 64, 4, 8)
    expected = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(back.state_dict()["visual.positional_embedding"][1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [5, 10, 15, 17, 30, 77])
def test_captions_that_fit_either_context_keep_their_bits(vit: Path, length: int) -> None:
    before, after = load_model(vit), load_model(vit, context_length=length)
    assert after.context_length == after.tokenizer.context_length == length
    texts = ["a dog", "cats", ""]
    short = before.tokenizer.trim(before.tokenize(texts))
    assert torch.equal(short, after.tokenizer.trim(after.tokenize(texts)))
    with torch.no_grad():
        assert torch.equal(before.encode_text(short), after.encode_text(short))
        full = after.encode_text(after.tokenize(texts), normalize=True)
        torch.testing.assert_close(full, before.encode_text(short, normalize=True), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with CLIP's context of 77."""
    return save_folder(tmp_path_factory.mktemp("long"), {**model_cfg(VIT), "text_cfg": {**TEXT, "context_length": 77}})


def test_positions_of_77_are_stretched_to_248_as_long_clip_does(long_text: Path) -> None:
    """The oracle is the paper's text, a position at a time: 20 are kept, and 57 become 4 x 57."""
    before = load_model(long_text).state_dict()["positional_embedding"].double()
    longer = load_model(long_text, context_length=248).state_dict()["positional_embedding"]
    assert torch.equal(longer[:20], before[:20].float())
    for i in range(20, 248):
        whole, quarter = divmod(i - 20, 4)
        first = 20 + whole
        step = before[first + 1] - before[first] if first < 76 else before[76] - before[75]
        torch.testing.assert_close(longer[i].double(), before[first] + step * quarter / 4, rtol=0, atol=1e-6)
    assert torch.equal(
        load_model(long_text, context_length=30).state_dict()["positional_embedding"], before[:30].float()
    )


@pytest.mark.parametrize("length", [78, 100, 248, 308])
def test_captions_of_20_tokens_keep_their_bits_in_a_longer_context_and_longer_ones_keep_their_order(
    long_text: Path, length: int
) -> None:
    before, after = load_model(long_text), load_model(long_text, context_length=length)
    texts = ["a dog", "", "cat " * 18]
    short = before.tokenizer.trim(before.tokenize(texts))
    assert short.shape == (3, 20)
    long = after.tokenizer.trim(after.tokenize(["cat " * 70 + "dog", "dog " + "cat " * 70]))
    with torch.no_grad():
        assert torch.equal(before.encode_text(short), after.encode_text(short))
        assert after.encode_text(long).isfinite().all()
    positions = after.state_dict()["positional_embedding"]
    assert (positions.diff(dim=0).abs().sum(dim=1) > 0).all()  # copies of a position would hide the order


@pytest.mark.parametrize(("size", "length"), [(16, 20), (22, 23), (21, 84), (3, 12), (2, 5)])
def test_stretched_positions_of_any_table_lie_on_the_lines_between_the_old_ones(size: int, length: int) -> None:
    """A table whose rows are its positions must stay a straight, even line beyond those that are kept."""
    line = torch.arange(size, dtype=torch.float64)[:, None].expand(-1, 3)
    new = stretched(line, length)
    assert new.shape == (length, 3)
    kept = min(20, size - 2)
    assert torch.equal(new[:kept], line[:kept])
    expected = torch.linspace(kept, size, length - kept + 1, dtype=torch.float64)[:-1]
    torch.testing.assert_close(new[kept:, 0], expected, rtol=0, atol=1e-9)


def test_siglip_refuses_a_shorter_context_with_the_reason(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "siglip", model_cfg(TIMM, SIGLIP_TEXT))
    with pytest.raises(InputError, match=r"^context_length: must be the weights' 16, not 8; .* attends to padding too"):
        load_model(folder, context_length=8)


def test_siglip_reads_longer_texts_by_stretched_positions_and_says_that_it_must_be_trained(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "siglip", model_cfg(TIMM, SIGLIP_TEXT))
    before = load_model(folder)
    with pytest.warns(UserWarning, match="reads padding, so the features of all texts change until it is trained"):
        after = load_model(folder, context_length=40)
    key = "text.positional_embedding"
    assert torch.equal(after.state_dict()[key], stretched(before.state_dict()[key], 40))
    tokens = torch.randint(2, 99, (2, 40))
    with torch.no_grad():
        features = after.encode_text(tokens)
        tokens[0, 39] += 1 if tokens[0, 39] < 98 else -1
        assert not torch.allclose(after.encode_text(tokens)[0], features[0])  # the last of 40 is read


def test_a_frozen_siglip_text_encoder_refuses_longer_texts(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "siglip", model_cfg(TIMM, SIGLIP_TEXT))
    with pytest.warns(UserWarning, match="longer than the weights' 16"):
        trained = LitCLIP(pretrained=str(folder), context_length=40, freeze=Freeze(image="all"))
    assert trained.model.get_parameter("text.positional_embedding").requires_grad
    with (
        pytest.warns(UserWarning, match="longer than the weights' 16"),
        pytest.raises(InputError, match=r"^model\.context_length: .* but model\.freeze\.text is all"),
    ):
        LitCLIP(pretrained=str(folder), context_length=40, freeze=Freeze(text="all"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 65}, "image_size 65 is not a multiple of patch_size 16"),
        ({"image_size": (64, 70)}, r"image_size \(64, 70\) is not a multiple of patch_size 16"),
        ({"image_size": 0}, "image_size: 0 must be at least 1"),
        ({"context_length": 2}, "context_length: 2 must be at least 3"),
    ],
)
def test_unsupported_sizes_are_refused(vit: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(vit, **options)


def test_a_random_model_by_name_has_the_requested_sizes() -> None:
    model = create_model("ViT-tiny-16-64", image_size=(32, 48), context_length=9)
    assert model.visual.grid == (2, 3)
    assert model.tokenize("a dog").shape == (1, 9)
    with torch.no_grad():
        assert model.encode_image(photos((32, 48))).shape == (2, 256)
