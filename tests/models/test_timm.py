"""timm's models as image encoders give the features of timm itself and of open_clip's adapter."""

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, Size, TextTransformerConfig, TimmConfig, height_width
from lit_clip.models.external_settings import timm_hub_weights, timm_preprocessing, with_external_settings
from lit_clip.models.open_clip_configs import from_open_clip
from lit_clip.models.preprocess import image_transform
from lit_clip.module import LitCLIP
from lit_clip.weights.checkpoints import checked
from tests.helpers.towers import (
    D,
    assert_all_trainable_weights_are_used,
    image_tower,
    image_tower_from,
    photos,
    saved,
    shaken,
)
from tests.weights.test_hub import cache, put


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("test_vit", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
        ("test_vit", {"pool": "token", "projection": "mlp"}, {"pool": "token", "proj": "mlp"}),
        ("test_vit", {"pool": "avg", "projection": "classifier"}, {"pool": "avg", "proj": None}),
        ("test_vit3", {"pool": "map", "projection": "none"}, {"pool": "map", "proj": "none"}),
        ("test_vit3", {"pool": "map", "projection": "classifier"}, {"pool": "map", "proj": None}),
        ("test_convnext", {"projection_bias": True}, {"pool": "", "proj": "linear", "proj_bias": True}),
        ("test_convnext", {"pool": "avg", "projection": "none"}, {"pool": "avg", "proj": "none"}),
        ("test_resnet", {"pool": "avg", "projection": "mlp"}, {"pool": "avg", "proj": "mlp"}),
        ("test_efficientnet", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
        ("test_efficientnet", {"pool": "avg", "projection": "classifier"}, {"pool": "avg", "proj": None}),
        ("resnet10t", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
        ("convnext_atto", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
        pytest.param(
            *("swin_tiny_patch4_window7_224", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_timms_models_have_open_clips_names_and_features(
    name: str, settings: dict[str, Any], theirs: dict[str, Any]
) -> None:
    width = {"test_vit3": 96, "test_convnext": 64}[name] if settings.get("projection") == "none" else D
    ours = image_tower(name, width, **settings)
    size = ours.image_size
    peer: Any = TimmModel(name, width, image_size=size, **theirs).eval()
    assert list(ours.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(ours.state_dict())
    images = photos(size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-5, rtol=0)
    assert ours(images).shape == (2, width)
    assert_all_trainable_weights_are_used(ours, images)


@pytest.mark.parametrize("size", [64, (96, 64)])
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet"])
def test_a_convolutional_model_accepts_any_size(name: str, size: Size) -> None:
    ours = image_tower(name, image_size=size, pool="avg")
    peer: Any = TimmModel(name, D, image_size=size, pool="avg", proj="linear").eval()
    peer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(photos(size)), peer(photos(size)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, (96, 64)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}),
    ],
)
def test_a_fixed_size_model_is_created_for_another_size_as_in_timm(
    name: str, options: dict[str, Any], size: Size
) -> None:
    ours = image_tower(name, image_size=size, options=options)
    peer: Any = timm.create_model(name, num_classes=0, img_size=height_width(size), **options).eval()
    peer.load_state_dict(ours.trunk.state_dict())
    with torch.no_grad():
        expected = peer(photos(size)) @ ours.head.proj.weight.T  # type: ignore[operator]  # a Linear
        torch.testing.assert_close(ours(photos(size)), expected, atol=1e-5, rtol=0)
    assert_all_trainable_weights_are_used(ours, photos(size))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[B, 3, 64, 64\]"):
        image_tower("test_convnext", image_size=64)(photos(96))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet10t", None),  # bicubic, crop 0.875, ImageNet's mean and std
        ("tf_efficientnet_lite0", None),
        ("test_vit", None),
        ("vit_base_patch16_clip_224.openai", None),
        ("vit_base_patch16_siglip_384.webli", None),  # squashed
        ("convnext_atto", 96),
        ("convnext_atto", (96, 64)),
        ("mobilenetv3_small_050", (64, 160)),  # another interpolation
    ],
)
@pytest.mark.parametrize("image_size", [(230, 170), (75, 310), (20, 20)])
def test_preprocessing_gives_timms_pixels(name: str, size: Size | None, image_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rough = torch.randint(0, 256, (image_size[1] // 5, image_size[0] // 5, 3), generator=generator)
    image = Image.fromarray(rough.to(torch.uint8).numpy()).resize(image_size)
    peer: Any = timm.data
    cfg: Any = timm.get_pretrained_cfg(name)
    data = peer.resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    if size:
        data["input_size"] = (3, *height_width(size))
    theirs = peer.create_transform(**data)
    ours = image_transform(timm_preprocessing(TimmConfig(name, image_size=size)))
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=0)


def test_explicit_preprocessing_overrides_timms() -> None:
    mine = Preprocessing(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    config = CLIPConfig(D, TimmConfig("test_vit", image_size=64), preprocessing=mine)
    assert with_external_settings(config).preprocessing == mine
    config = with_external_settings(CLIPConfig(D, TimmConfig("test_vit")))
    assert config.preprocessing == timm_preprocessing(TimmConfig("test_vit"))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The weights of a test_efficientnet, including its classifier."""
    return shaken(timm.create_model("test_efficientnet")).state_dict()


def other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights as another library would, in the same order."""
    return OrderedDict((f"_part{i}.{key.rpartition('.')[2]}", value) for i, (key, value) in enumerate(state.items()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_loaded_from_a_local_file(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    tower = image_tower_from(path)
    peer: Any = timm.create_model("test_efficientnet")
    peer.load_state_dict(weights)
    peer.reset_classifier(0)
    images = photos(160)
    with torch.no_grad():
        torch.testing.assert_close(tower.eval().trunk(images), peer.eval()(images), atol=1e-6, rtol=0)  # type: ignore[operator]  # a module


@pytest.mark.parametrize("classifier", [True, False])
def test_weights_under_other_names_are_matched_by_order(
    classifier: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = {key: value for key, value in weights.items() if classifier or not key.startswith("classifier")}
    torch.save(other_names(kept), tmp_path / "w.pth")
    tower = image_tower_from(tmp_path / "w.pth")
    for key, value in tower.trunk.state_dict().items():
        assert torch.equal(value, weights[key]), key


def _spoilt(kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    other = other_names(weights)
    first = next(iter(other))
    return {
        "another shape": {**weights, "conv_stem.weight": torch.zeros(8, 3, 3, 3)},
        "another shape under other names": {**other, first: torch.zeros(8, 3, 3, 3)},
        "another ending": {f"{key}_" if key == first else key: value for key, value in other.items()},
        "more under other names": {**other, "x.weight": torch.zeros(1)},
        "fewer": dict(list(weights.items())[:5]),
        "deeper": {**weights, "blocks.7.0.conv.weight": torch.zeros(1)},
        "no tensors": {"a": 1},  # type: ignore[dict-item]  # refusing it is tested
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another shape", r"conv_stem.weight is \(8, 3, 3, 3\) there and \(24, 3, 3, 3\) here"),
        ("another shape under other names", r"conv_stem.weight is \(8, 3, 3, 3\) there and \(24, 3, 3, 3\) here"),
        ("another ending", "not weights of timm's test_efficientnet: .* is absent there"),
        ("more under other names", "not weights of timm's test_efficientnet: .* is absent there"),
        ("fewer", "not weights of timm's test_efficientnet: .* is absent there"),
        ("deeper", "not weights of timm's test_efficientnet: blocks.7.0.conv.weight is absent here"),
        ("no tensors", "does not hold tensors by name"),
    ],
)
def test_weights_of_another_model_are_refused(
    kind: str, message: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(_spoilt(kind, weights), tmp_path / "w.pth")
    with pytest.raises(InputError, match=message) as refusal:
        image_tower_from(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_classifier_projection_is_not_loaded_from_a_file(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "w.pth")
    trunk: Any = image_tower_from(tmp_path / "w.pth", projection="classifier").trunk
    assert trunk.classifier.weight.shape == (D, 256)
    assert torch.equal(trunk.conv_stem.weight, weights["conv_stem.weight"])


def test_a_files_position_embedding_is_resized_as_in_timm(tmp_path: Path) -> None:
    small: Any = shaken(timm.create_model("test_vit"))
    torch.save(small.state_dict(), tmp_path / "w.pth")
    trunk: Any = image_tower_from(tmp_path / "w.pth", "test_vit", image_size=(192, 128)).trunk
    peer: Any = timm.layers
    expected = peer.resample_abs_pos_embed(small.pos_embed, [12, 8], num_prefix_tokens=1)
    torch.testing.assert_close(trunk.pos_embed, expected, atol=1e-6, rtol=0)
    assert not torch.equal(trunk.pos_embed[:, :1], torch.zeros_like(trunk.pos_embed[:, :1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timm": "resnt50"}, r"timm has no model 'resnt50'; did you mean .*resnet50"),
        ({"timm": "efficientnet_lit"}, r"timm has no model 'efficientnet_lit'; did you mean .*efficientnet_lite0"),
        ({"timm": "xqzw"}, r"timm has no model 'xqzw'; it has \d+, see timm.list_models"),
        ({"timm": "resnet50.nothing"}, r"timm's resnet50 has no weights 'nothing'; known: .*resnet50.a1_in1k"),
        ({"timm": "test_resnet", "pool": "map"}, "timm cannot create test_resnet with .*global_pool map"),
        ({"timm": "test_vit", "options": {"dropp": 1}}, "timm cannot create test_vit with .*dropp 1"),
        ({"timm": "test_vit", "options": {"img_size": 64}}, "options.img_size is not allowed; set image_size"),
        ({"timm": "test_vit", "image_size": 72}, "timm cannot create test_vit with image_size 72"),
        ({"timm": "efficientformer_l1", "image_size": 192}, "cannot create efficientformer_l1 with image_size 192"),
        ({"timm": "test_vit", "image_size": 0}, "image_size: 0 must be at least 1"),
        ({"timm": "test_vit", "projection": "none"}, "test_vit has 64 features but embed_dim is 24; set a projection"),
        ({"timm": "test_vit", "pretrained": "gone.pth"}, "gone.pth: no such"),
    ],
)
def test_settings_that_timm_does_not_support_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        CLIP(CLIPConfig(D, TimmConfig(**settings)))
    assert "\n" not in str(refusal.value)


def test_a_dinov3_is_read_as_by_dino_txt() -> None:
    """The class token and the mean of the patches behind the last norm, by a plain forward pass."""
    options: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    settings = {"timm": "vit_small_patch16_dinov3", "image_size": 64, "pool": "token+mean", "options": options}
    text = TextTransformerConfig(width=32, layers=1, heads=1)
    model = CLIP(CLIPConfig(96, TimmConfig(**settings, projection="none"), text)).eval()
    visual: Any = shaken(model.visual)
    theirs: Any = timm.create_model("vit_small_patch16_dinov3", num_classes=0, img_size=64, **options).eval()
    theirs.load_state_dict(visual.trunk.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        assert theirs.num_prefix_tokens == 5  # the class token and four registers
        joined = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)
        torch.testing.assert_close(model.encode_image(images), joined)
        torch.testing.assert_close(model.forward_intermediates(images, normalize=False)["image_features"], joined)
    with pytest.raises(InputError, match="two poolings"):
        model.encode_patches(images)

    projected: Any = CLIP(CLIPConfig(D, TimmConfig(**settings), text)).visual
    assert projected.head.proj.weight.shape == (D, 96)
    wrong = [{**settings, "projection": "classifier"}, {"timm": "vit_base_patch16_siglip_224", "pool": "token+mean"}]
    for each in wrong:
        with pytest.raises(InputError, match="(?i)needs .*class token"):
            CLIP(CLIPConfig(D, TimmConfig(**each), text))


# timm image encoders named by their place on the Hugging Face hub: timm's own features, read as data, offline.


__all__ = ["cache"]  # a fixture
NAME, TEXT = "hf-hub:org/tiny", TextTransformerConfig(16, 100, 64, 1, 1)
ARGUMENTS = {"depth": 3, "img_size": 64, "global_pool": "avg"}  # not the model's own


@pytest.fixture
def repository(cache: Path, tmp_path: Path) -> Any:
    """Put a tiny timm model with settings of its own into the hub's cache, as timm pushes one."""
    model: Any = shaken(timm.create_model("test_vit", num_classes=7, **ARGUMENTS))
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}
    (tmp_path / "files").mkdir()
    save_for_hf(model, str(tmp_path / "files"), model_args=ARGUMENTS, safe_serialization=True)
    put(cache, "org/tiny", tmp_path / "files")
    return model.eval()


def test_a_hub_name_gives_timms_model_with_its_weights_and_preprocessing(repository: Any) -> None:
    ours: Any = CLIP(CLIPConfig(16, TimmConfig(NAME, pretrained=True), TEXT)).eval()
    assert (ours.preprocessing.image_size, ours.preprocessing.mean) == (64, (0.1, 0.2, 0.3))
    assert (ours.preprocessing.std, ours.preprocessing.crop_pct) == ((0.4, 0.5, 0.6), 0.9)
    theirs: Any = timm.create_model(NAME, pretrained=True, num_classes=0).eval()
    images = photos(64)
    with torch.no_grad():
        torch.testing.assert_close(ours.visual.trunk(images), theirs(images), rtol=0, atol=0)
        pushed = repository.forward_head(repository.forward_features(images), pre_logits=True)
        torch.testing.assert_close(ours.visual.trunk(images), pushed)


def test_a_checkpoint_opens_without_the_hub(repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LitCLIP(CLIPConfig(16, TimmConfig(NAME, pretrained=True), TEXT))
    file, model = saved(module, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    again = load_model(file)
    assert again.config.image == dataclasses.replace(model.config.image, pretrained=False)
    images = photos(64)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(images), model.encode_image(images), rtol=0, atol=0)


def test_settings_and_size_may_differ_from_the_hubs(repository: Any) -> None:
    image = TimmConfig(NAME, True, image_size=96, options={"drop_path_rate": 0.1})
    ours: Any = CLIP(CLIPConfig(16, image, TEXT)).eval()
    theirs: Any = timm.create_model(NAME, img_size=96, num_classes=0)
    theirs.load_state_dict(ours.visual.trunk.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours.visual.trunk(photos(96)), theirs.eval()(photos(96)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path is not allowed"),
        ({"model_args": {"pretrained_cfg": {"file": "x"}}}, "pretrained_cfg is not allowed"),
        ({"model_args": {"depth": 10**6}}, "must be at most 1000"),
        ({"model_args": {"act_layer": "{class_path: os.system}"}}, "may not name a class"),
        ({"architecture": "no_such_model"}, "timm has no model 'no_such_model'"),
        ({"architecture": 3}, "names no architecture"),
        ({"model_args": {"no_such_argument": 1}}, "timm cannot create hf-hub:org/tiny"),
    ],
)
def test_a_hostile_or_wrong_configuration_is_refused(
    cache: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160]}, **changes}
    (tmp_path / "files").mkdir()
    (tmp_path / "files/config.json").write_text(json.dumps(values), encoding="utf-8")
    put(cache, "org/tiny", tmp_path / "files")
    with pytest.raises(InputError, match=message):
        CLIP(CLIPConfig(16, TimmConfig(NAME), TEXT))


def test_a_repository_without_weights_is_refused_only_if_they_are_wanted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/config.json").write_text(json.dumps({"architecture": "test_vit"}), encoding="utf-8")
    put(cache, "org/tiny", tmp_path / "files")
    CLIP(CLIPConfig(16, TimmConfig(NAME), TEXT))
    with pytest.raises(InputError, match=r"has none of model\.safetensors, .* in its cache"):
        CLIP(CLIPConfig(16, TimmConfig(NAME, pretrained=True), TEXT))
    with pytest.raises(InputError, match=r"no config\.json of hf-hub:org/other on the hub or in its cache"):
        CLIP(CLIPConfig(16, TimmConfig("hf-hub:org/other"), TEXT))

    def not_found(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", not_found)
    with pytest.raises(InputError, match=r"org/tiny has none of model\.safetensors, "):
        timm_hub_weights(NAME)


def test_a_checkpoint_that_names_a_place_on_the_hub_alone_is_refused(repository: Any, tmp_path: Path) -> None:
    model = CLIP(CLIPConfig(16, TimmConfig(NAME), TEXT))
    values = model.config.to_dict()
    values["image"]["model"] = None
    checkpoint = {"hyper_parameters": {"architecture": values}, "state_dict": model.state_dict()}
    with pytest.raises(InputError, match="holds no configuration of its image encoder"):
        checked(checkpoint, "last.ckpt")


def test_weights_of_the_cache_are_found_by_their_later_name_without_the_network(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/pytorch_model.bin").write_bytes(b"weights")
    put(cache, "org/tiny", tmp_path / "files")
    assert timm_hub_weights(NAME).read_bytes() == b"weights"


def test_a_naflex_model_of_the_hub_reads_patches(cache: Path, tmp_path: Path) -> None:
    """Its patch size is an argument of the repository, unless an option gives another."""
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "pos_embed_grid_size": [4, 4]}
    values = {"architecture": "naflexvit_base_patch16_siglip", "model_args": arguments}
    (tmp_path / "files").mkdir()
    (tmp_path / "files/config.json").write_text(json.dumps(values), encoding="utf-8")
    put(cache, "org/tiny", tmp_path / "files")
    image = TimmConfig(NAME, image_size=64, projection="none")
    model = CLIP(CLIPConfig(32, image, TEXT)).eval()
    assert (model.preprocessing.max_patches, model.preprocessing.patch_size) == (64, 8)
    patches = model.preprocess(Image.new("RGB", (90, 40)))[None]
    assert model.encode_image(patches).shape == (1, 32)
    found = with_external_settings(CLIPConfig(32, dataclasses.replace(image, options={"patch_size": 16}), TEXT))
    assert found.preprocessing is not None
    assert found.preprocessing.patch_size == 16
    vision = {"image_size": 64, "image_seq_len": 50, "timm_model_name": NAME, "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "layers": 1, "heads": 1}
    theirs = from_open_clip({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, None, "theirs").preprocessing
    assert theirs is not None
    assert (theirs.max_patches, theirs.patch_size) == (50, 8)
