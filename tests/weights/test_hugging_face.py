"""Hugging Face's CLIPModel and SiglipModel convert to ours and back: same features and bits, or a clear error."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig, VisionTransformerConfig
from lit_clip.weights.hugging_face import from_hugging_face, read_hugging_face_folder, to_hugging_face
from lit_clip.weights.hugging_face_processor import image_processor, preprocessing_of
from lit_clip.weights.open_clip import open_clip_model
from tests.helpers.exports import assert_identical

END = 98  # of text, in the small models
VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}


def randomised(model: Any) -> Any:
    """Gains of 1 and biases of 0 would hide swapped weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def clip_model(**text: Any) -> transformers.CLIPModel:
    vision = {**VISION, "intermediate_size": 192, "hidden_act": text.get("hidden_act", "quick_gelu")}
    text = {**TEXT, "intermediate_size": 128, "max_position_embeddings": 16, "eos_token_id": END, **text}
    ids = {"bos_token_id": END - 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**ids, **text}, projection_dim=24)
    return randomised(transformers.CLIPModel(config))


def siglip_model(hidden_act: str = "gelu_pytorch_tanh") -> transformers.SiglipModel:
    # Not four times as wide, as in SigLIP So400m.
    vision = {**VISION, "hidden_act": hidden_act, "intermediate_size": 100}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = {**TEXT, **ids, "intermediate_size": 70, "max_position_embeddings": 9, "projection_size": 48}
    return randomised(transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)))


def tokens(length: int) -> Tensor:
    ids = torch.randint(1, END, (3, length))
    ids[range(3), [3, length - 1, 5]] = END
    return ids


def opened(config: CLIPConfig, state: dict[str, Tensor]) -> CLIP:
    model = CLIP(config).eval()
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def assert_same_features(ours: CLIP, theirs: Any) -> None:
    images, texts = torch.randn(3, 3, 32, 32), tokens(ours.context_length)
    out = theirs(input_ids=texts, pixel_values=images)
    torch.testing.assert_close(ours.encode_image(images, normalize=True), out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(texts, normalize=True), out.text_embeds, rtol=0, atol=1e-5)
    logits = ours.logit_scale.exp() * out.image_embeds @ out.text_embeds.T
    logits = logits if ours.logit_bias is None else logits + ours.logit_bias
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        *(("CLIP", name) for name in ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")),
        *(("Siglip", name) for name in ("gelu_pytorch_tanh", "gelu", "quick_gelu")),
    ],
)
def test_a_model_converts_with_the_same_features_and_back_bit_by_bit(kind: str, activation: str) -> None:
    theirs = clip_model(hidden_act=activation) if kind == "CLIP" else siglip_model(activation)
    ours = opened(*from_hugging_face(theirs.config.to_dict(), theirs.state_dict()))
    assert_same_features(ours, theirs)
    config, state = to_hugging_face(ours)
    assert_identical(state, theirs.state_dict())
    again = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config").from_dict(config)).eval()
    again.load_state_dict(state, strict=True)
    assert_same_features(ours, again)


@torch.no_grad()
def test_a_siglip2_model_converts_with_the_same_features_and_back_bit_by_bit() -> None:
    """Images of several aspect ratios in one batch; the position embedding is resized for each."""
    vision = {**VISION, "intermediate_size": 100, "num_patches": 16}
    del vision["image_size"]
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = {**TEXT, **ids, "intermediate_size": 70, "max_position_embeddings": 9, "projection_size": 48}
    theirs = randomised(transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text)))
    processor = {"patch_size": 8, "max_num_patches": 40}
    ours = opened(*from_hugging_face(theirs.config.to_dict(), theirs.state_dict(), processor))
    noise = np.random.default_rng(0).integers(0, 256, (80, 300, 3), dtype=np.uint8)
    images = [Image.fromarray(noise[:height, :width]) for height, width in ((50, 70), (80, 30), (64, 64), (9, 300))]
    inputs = Siglip2ImageProcessorPil(**processor)(images, return_tensors="pt")
    texts = tokens(9)
    out = theirs(input_ids=texts, **inputs)
    image = ours.encode_image(torch.stack([ours.preprocess(image) for image in images]), normalize=True)
    text_features = ours.encode_text(texts, normalize=True)
    torch.testing.assert_close(image, out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_features, out.text_embeds, rtol=0, atol=1e-5)
    logits = ours.logit_scale.exp() * image @ text_features.T + ours.logit_bias
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=1e-4)
    config, state = to_hugging_face(ours)
    assert_identical(state, theirs.state_dict())
    transformers.Siglip2Model(transformers.Siglip2Config.from_dict(config)).load_state_dict(state, strict=True)
    with pytest.raises(InputError, match="preprocessor patch_size is 16 there and 8 here"):
        from_hugging_face(theirs.config.to_dict(), theirs.state_dict())


def test_our_weights_convert_and_back_bit_by_bit() -> None:
    config = CLIPConfig(
        embed_dim=24,
        image=VisionTransformerConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2, mlp_ratio=2.3),
        text=TextTransformerConfig(context_length=16, vocab_size=99, width=48, layers=3, heads=4),
    )
    ours = randomised(CLIP(config))
    again, state = from_hugging_face(*to_hugging_face(ours))
    assert_identical(state, ours.state_dict())
    opened(again, state)  # mlp_ratio is no longer 2.3, but the widths are the same
    assert again.text == config.text


def test_a_file_with_position_ids_and_no_settings_is_vit_b_32() -> None:
    """The oldest published configurations are nearly empty. On the meta device: nothing is allocated."""
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig())
        state = {**theirs.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)}
    config, ours = from_hugging_face({"model_type": "clip", "text_config": {}, "vision_config": {}}, state)
    assert config == CLIPConfig(activation="quick_gelu")
    with torch.device("meta"):
        expected = CLIP(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


def test_siglip_b16_is_timms_model_with_the_gelu_of_its_training() -> None:
    with torch.device("meta"):
        state = transformers.SiglipModel(transformers.SiglipConfig()).state_dict()
    config, _ = from_hugging_face(transformers.SiglipConfig().to_dict(), state, None, "somewhere")
    assert isinstance(config.image, TimmConfig)
    assert (config.image.timm, config.image.options) == ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"})
    assert config.activation == "gelu_tanh"
    assert config.preprocessing is not None
    assert (config.preprocessing.mean, config.preprocessing.resize_mode) == ((0.5, 0.5, 0.5), "squash")


@pytest.mark.parametrize("how", ["safetensors", "shards", "bin"])
def test_a_folder_of_save_pretrained_is_read(tmp_path: Path, how: str) -> None:
    theirs = clip_model()
    if how == "bin":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="100KB" if how == "shards" else "5GB")
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (how == "shards")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=2, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    ours = opened(*read_hugging_face_folder(tmp_path))
    assert_same_features(ours, theirs)
    noise = np.random.default_rng(0).integers(0, 256, (70, 74, 3), dtype=np.uint8)
    expected = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)(Image.fromarray(noise), return_tensors="pt")
    actual = ours.preprocess(Image.fromarray(noise))
    torch.testing.assert_close(actual, expected["pixel_values"][0], rtol=0, atol=1e-5)


def exchange(one: Path, two: Path) -> None:
    other = one.with_name("other")
    one.rename(other)
    two.rename(one)
    other.rename(two)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (exchange, "lacks .*, which model.safetensors.index.json says is in it; copy the whole folder again"),
        (lambda one, two: one.unlink(), "no such checkpoint file"),
        (lambda one, two: os.truncate(one, one.stat().st_size - 4), "not a readable weight file"),
        (lambda one, two: shutil.copyfile(two, one), "lacks .*, which model.safetensors.index.json says is in it"),
    ],
    ids=["exchanged", "missing", "truncated", "another's"],
)
def test_a_shard_that_is_not_what_the_index_says_is_one_line_that_names_it(
    tmp_path: Path, damage: Callable[[Path, Path], object], message: str
) -> None:
    clip_model().save_pretrained(tmp_path, max_shard_size="100KB")
    one, two, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    damage(one, two)
    with pytest.raises(InputError, match=rf"^{one}: {message}"):
        read_hugging_face_folder(tmp_path)


def test_the_single_file_of_newer_processors_is_read(tmp_path: Path) -> None:
    theirs = siglip_model()
    theirs.save_pretrained(tmp_path)
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, image_std=[0.2, 0.2, 0.2])
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor.to_dict()}))
    config, _ = read_hugging_face_folder(tmp_path)
    assert config.preprocessing is not None
    assert (config.preprocessing.std, config.preprocessing.resize_mode) == ((0.2, 0.2, 0.2), "squash")


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_preprocessing_converts_and_back(kind: str, crop_pct: float, resize_mode: Any) -> None:
    config = CLIPConfig().preprocessing
    assert config is not None
    config.crop_pct, config.resize_mode = crop_pct, resize_mode
    again = preprocessing_of(image_processor(config, kind), 224, kind)
    assert int(224 / again.crop_pct) == int(224 / crop_pct)
    again.crop_pct = crop_pct
    assert again == config


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model_type", value="blip"), "model_type is 'blip'; must be one of 'clip', 'siglip', 'siglip2'"),
        (_set("text_config", "hidden_act", value="relu"), "text_config.hidden_act is relu; must be one of gelu_new"),
        (_set("text_config", "eos_token_id", value=7), "eos_token_id is 7 there and 98 here"),
        (_set("vision_config", "num_channels", value=4), "num_channels is 4 there and 3 here"),
        (_set("vision_config", "num_attention_heads", value=7), "not a readable CLIPConfig"),
    ],
)
def test_a_setting_that_would_change_the_features_is_refused(change: Any, message: str) -> None:
    theirs = clip_model()
    values = theirs.config.to_dict()
    change(values)
    with pytest.raises(InputError, match=re.escape(message)):
        from_hugging_face(values, theirs.state_dict())


def test_each_encoder_may_have_its_own_activation_and_epsilon() -> None:
    """Also on the way back; the epsilons are large enough to show."""
    values = clip_model().config.to_dict()
    values["text_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-2}
    values["vision_config"] |= {"layer_norm_eps": 1e-3}
    theirs = randomised(transformers.CLIPModel(transformers.CLIPConfig.from_dict(values)))
    ours = opened(*from_hugging_face(theirs.config.to_dict(), theirs.state_dict()))
    assert_same_features(ours, theirs)
    config, state = to_hugging_face(ours)
    again = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).eval()
    again.load_state_dict(state, strict=True)
    assert_same_features(ours, again)
    assert CLIPConfig.from_dict(ours.config.to_dict()) == ours.config
    with pytest.raises(InputError, match="open_clip has QuickGELU in both encoders or in none"):
        open_clip_model(ours)


def test_with_openais_eos_token_id_the_end_of_text_is_the_highest_id() -> None:
    theirs = clip_model(eos_token_id=2)
    assert_same_features(opened(*from_hugging_face(theirs.config.to_dict(), theirs.state_dict())), theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop is False there and True here"),
        ({"crop_size": 48, "size": 48}, "size of a preprocessed image is 48 there and 32 here"),
        ({"resample": 1, "size": 32, "crop_size": 32}, "resample is 1; must be 2 (bilinear) or 3 (bicubic)"),
        ({"do_rescale": False}, "do_rescale is False there"),
        ({"size": 20, "crop_size": 32}, "black border"),
    ],
)
def test_unsupported_preprocessing_is_refused(values: dict[str, Any], message: str) -> None:
    theirs = clip_model()
    with pytest.raises(InputError, match=re.escape(message)):
        from_hugging_face(theirs.config.to_dict(), theirs.state_dict(), values)


def test_a_missing_or_unknown_weight_is_named() -> None:
    theirs = clip_model()
    name = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    state = {key: value for key, value in theirs.state_dict().items() if key != name}
    with pytest.raises(InputError, match=f"weight {name} is missing"):
        from_hugging_face(theirs.config.to_dict(), state)
    with pytest.raises(InputError, match="weight adapter has no counterpart"):
        from_hugging_face(theirs.config.to_dict(), {**theirs.state_dict(), "adapter": torch.ones(1)})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: not a readable JSON file"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("vocab.json", '{"a": 5}', "vocab.json is not CLIP's vocabulary"),
        ("model.safetensors", "nothing", "model.safetensors"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    clip_model().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        read_hugging_face_folder(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_lists_the_expected_files(tmp_path: Path) -> None:
    clip_model().config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no model.safetensors or pytorch_model.bin"):
        read_hugging_face_folder(tmp_path)
