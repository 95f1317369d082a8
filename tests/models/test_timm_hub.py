"""timm image encoders named by their place on the Hugging Face hub: timm's own features, read as data, offline."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from timm.models import save_for_hf

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.open_clip_configs import from_open_clip
from lit_clip.models.timm_hub import timm_hub_weights
from lit_clip.module import LitCLIP
from lit_clip.weights.checkpoints import checked
from tests.helpers.towers import photos, saved, shaken
from tests.weights.test_hub import cache, put

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
    with pytest.raises(InputError, match=r"none of model\.safetensors, .* is in the hub's cache, and the hub cannot"):
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
