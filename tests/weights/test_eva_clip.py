"""EVA-CLIP 8B and 18B open in their owner's form, with the features of a plain forward pass by the owner's code.

Form and defaults are those of modeling_evaclip.py and configuration_evaclip.py of BAAI/EVA-CLIP-8B-448; sizes are small
and weights random.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.weights import hub
from lit_clip.weights.hugging_face_processor import byte_pairs
from tests.helpers.exports import photos
from tests.helpers.towers import TEXTS

pytestmark = pytest.mark.usefixtures("offline")

# A width of 48 has fewer features than the embedding in one form and more in the other.
VISION = {"hidden_size": 48, "intermediate_size": 240, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_BIASES = dict.fromkeys(("q_bias", "k_bias", "v_bias"), False)
# settings of the images, model_type, width of the embedding, biases of the projection, the temperature is in the file
FORMS: dict[str, tuple[dict[str, Any], str, int, bool, bool]] = {
    "RMSNorm": ({**NO_BIASES, "use_rms_norm": True, "layer_norm_eps": 1e-6}, "clip", 24, False, False),
    "RMSNorm and biases": ({"layer_norm_eps": 1e-6}, "evaclip", 64, True, True),
    "LayerNorm": ({"k_bias": False, "use_rms_norm": False, "layer_norm_eps": 1e-6}, "clip", 24, True, True),
    "LayerNorm, other epsilon": ({**NO_BIASES, "use_rms_norm": False}, "evaclip", 64, False, True),
}
EPSILON = 1e-5  # unless the file says another


def random_state(config: dict[str, Any], projection_bias: bool, temperature: bool) -> dict[str, Tensor]:
    """Return random weights by the owner's names, a CLIPModel's except for some norms and biases of the images."""
    image, dim = config["vision_config"], config["projection_dim"]
    sizes = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=dim)
    shapes = {name: tuple(value.shape) for name, value in transformers.CLIPModel(sizes).state_dict().items()}
    absent = [f"{name}_proj.bias" for name in ("q", "k", "v") if not image.get(f"{name}_bias", True)]
    absent += ["norm1.bias", "norm2.bias", "layernorm.bias"] if image.get("use_rms_norm", True) else []
    shapes["vision_model.embeddings.patch_embedding.bias"] = (image["hidden_size"],)
    if projection_bias:
        shapes["visual_projection.bias"] = (dim,)
    for name in [*shapes]:
        of_images = name.startswith("vision_model.")
        gone = name == "logit_scale" and not temperature
        if "pre_layrnorm" in name or gone or (of_images and name.endswith(tuple(absent))):
            del shapes[name]
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Save a small model as published, in pickled shards and without a processor; return its settings and weights."""
    vision, kind, dim, projection_bias, temperature = FORMS[form]
    config = {"model_type": kind, "architectures": ["EvaCLIPModel"], "projection_dim": dim, "text_config": TEXT}
    config |= {"vision_config": {**VISION, **vision}, "logit_scale_init_value": 2.6592}
    config |= {"auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPModel"}}
    state = random_state(config, projection_bias, temperature)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    vocabulary, merges = byte_pairs()
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    return config, state


def blocks(part: str, config: dict[str, Any], state: dict[str, Tensor], x: Tensor, causal: bool) -> Tensor:
    """The owner's pre-norm blocks, and its last norm: ``[B, L, W]`` -> ``[B, L, W]``."""
    sizes = config[f"{part}_config"]
    eps, heads = sizes.get("layer_norm_eps", EPSILON), sizes["num_attention_heads"]
    B, L, W = x.shape

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{part}_model.{name}.weight"], state.get(f"{part}_model.{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{part}_model.{name}.weight"], state.get(f"{part}_model.{name}.bias")
        if sizes.get("use_rms_norm", part == "vision"):
            return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return F.layer_norm(x, (W,), weight, bias, eps)

    for i in range(sizes["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        y = norm(f"{block}.layer_norm1", x)
        q, k, v = (
            linear(f"{block}.self_attn.{name}_proj", y).view(B, L, heads, -1).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        scores = q @ k.transpose(2, 3) * (W // heads) ** -0.5
        if causal:
            scores = scores + torch.full((L, L), -torch.inf).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, W)
        x = x + linear(f"{block}.self_attn.out_proj", y)
        y = norm(f"{block}.layer_norm2", x)
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", y)))
    return norm("post_layernorm" if part == "vision" else "final_layer_norm", x)


def owners_image(config: dict[str, Any], state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    there, patch = "vision_model.embeddings.", config["vision_config"]["patch_size"]
    weight, bias = state[f"{there}patch_embedding.weight"], state[f"{there}patch_embedding.bias"]
    x = F.conv2d(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{there}class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = blocks("vision", config, state, x + state[f"{there}position_embedding.weight"], causal=False)[:, 0]
    return F.linear(x, state["visual_projection.weight"], state.get("visual_projection.bias"))


def owners_text(config: dict[str, Any], state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    there = "text_model.embeddings."
    x = state[f"{there}token_embedding.weight"][tokens] + state[f"{there}position_embedding.weight"][: tokens.shape[1]]
    x = blocks("text", config, state, x, causal=True)[torch.arange(len(tokens)), tokens.argmax(dim=1)]
    return F.linear(x, state["text_projection.weight"])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_features_ids_and_pixels_are_those_of_the_owners_code(tmp_path: Path, form: str) -> None:
    config, state = save(tmp_path, form)
    ours = load_model(tmp_path)
    inputs = transformers.CLIPTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    mask, tokens = inputs.attention_mask.bool(), ours.tokenize(TEXTS)
    assert torch.equal(tokens[:, : mask.shape[1]][mask], inputs.input_ids[mask])
    noise = photos((70, 90), (90, 70))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)  # of the owner's examples
    pixels = processor(noise, return_tensors="pt").pixel_values
    torch.testing.assert_close(torch.stack([ours.preprocess(image) for image in noise]), pixels, rtol=0, atol=1e-5)
    images, texts = owners_image(config, state, pixels), owners_text(config, state, tokens)
    torch.testing.assert_close(ours.encode_image(pixels), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens), texts, rtol=1e-5, atol=1e-5)
    scale = state["logit_scale"].exp() if "logit_scale" in state else torch.tensor(100.0)
    torch.testing.assert_close(ours.logit_scale.exp(), scale)
    assert ours.encode_patches(pixels).shape == (2, config["projection_dim"], 4, 4)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("vision_config", {"post_layernorm": True}, "vision_config.post_layernorm is True there and False here"),
        ("vision_config", {"use_swiglu_mlp": True}, "vision_config.use_swiglu_mlp is True"),
        ("vision_config", {"use_rms_norm": False}, "vision_config.use_rms_norm is False there and True here"),
        ("vision_config", {"layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps is 1e-05; must be 1e-06"),
        ("vision_config", {"num_channels": 4}, "vision_config.num_channels is 4"),
        ("vision_config", {"num_hidden_layers": 10**9}, "the weight vision_model.encoder.layers.2"),
        ("text_config", {"num_hidden_layers": 10**9}, "the weight text_model.encoder.layers.2"),
        ("text_config", {"use_rms_norm": True}, "text_config.use_rms_norm is True there and False here"),
        ("text_config", {"hidden_act": "silu"}, "text_config.hidden_act is silu; must be one of"),
    ],
)
def test_settings_that_would_change_the_features_are_named(
    tmp_path: Path, part: str, change: dict[str, Any], problem: str
) -> None:
    config, _ = save(tmp_path, "RMSNorm")
    (tmp_path / "config.json").write_text(json.dumps({**config, part: {**config[part], **change}}))
    with pytest.raises(InputError, match=problem):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["post_layernorm.weight", "encoder.layers.1.self_attn.v_proj.bias"])
def test_an_absent_weight_is_named(tmp_path: Path, name: str) -> None:
    _, state = save(tmp_path, "LayerNorm")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    torch.save(
        {key: value for key, value in state.items() if key != f"vision_model.{name}"}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(InputError, match=f"the weight vision_model.{name} is missing"):
        load_model(tmp_path)


def test_of_its_repository_only_the_shards_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's .pt file and the weights of the image encoder alone lie beside them, 60 GB."""
    folder, patterns = tmp_path / ("a" * 40), []
    folder.mkdir()
    save(folder, "RMSNorm")

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.download("BAAI/EVA-CLIP-8B") == folder
    others = ["EVA_CLIP_8B_psz14_s9B.pt", "EVA_8B_psz14.bin"]
    found = {path.name for path in folder.iterdir()} | set(others)
    wanted = {name for name in found if any(Path(name).match(pattern) for pattern in patterns)}
    assert {name for name in wanted if name.endswith((".bin", ".pt"))} == {
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }
