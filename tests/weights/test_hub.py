"""Models loaded by name: from the hub's local cache, and with the weights and settings of open_clip's registry."""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file
from torch import Tensor

from lit_clip import create_model, load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.registry import resolve_architecture
from lit_clip.weights.hub import tagged

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
CONFIG = CLIPConfig(
    32, VisionTransformerConfig(64, 16, 64, 1, 1), TextTransformerConfig(width=64, layers=1, heads=1), "gelu"
)


def put(cache: Path, name: str, files: Path) -> None:
    """Put a repository into the hub's cache in huggingface_hub's layout: blobs, linked from a snapshot."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    for file in files.iterdir():
        content = file.read_bytes()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, folder / "snapshots" / commit))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def open_clip_repository(folder: Path, weights: str = "open_clip_model.safetensors") -> dict[str, Tensor]:
    folder.mkdir()
    torch.manual_seed(0)
    state = CLIP(CONFIG).state_dict()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    values = {"model_cfg": MODEL_CFG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values), encoding="utf-8")
    (save_file if weights.endswith("s") else torch.save)(state, folder / weights)
    return state


def clip_model() -> transformers.CLIPModel:
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**vision, "max_position_embeddings": 77}
    vision |= {"image_size": 64, "patch_size": 16}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_an_open_clip_repository_is_loaded_by_name(tmp_path: Path, cache: Path, weights: str, prefix: str) -> None:
    state = open_clip_repository(tmp_path / "files", weights)
    put(cache, "somebody/tiny-clip", tmp_path / "files")
    model = load_model(f"{prefix}somebody/tiny-clip")
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert model.config.activation == "gelu"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shard", ["10GB", "5MB"], ids=["one file", "several files"])
def test_a_hugging_face_repository_is_loaded_by_name(tmp_path: Path, cache: Path, shard: str) -> None:
    theirs = clip_model()
    theirs.save_pretrained(tmp_path / "files", max_shard_size=shard)
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path / "files")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) == (1 if shard == "10GB" else 2)
    put(cache, "somebody/tiny-clip-hf", tmp_path / "files")
    model = load_model("somebody/tiny-clip-hf")
    assert model.config.activation == "quick_gelu"
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenize(["a dog", "two cats"])
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(model.encode_image(images, normalize=True), out.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), out.text_embeds, rtol=0, atol=1e-5)


def refusal(source: str) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)
    assert source.removeprefix("hf-hub:") in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nobody/nothing", "hf-hub:nobody/nothing", "nobody/noth ing", "a/b/c"])
def test_offline_a_name_outside_the_cache_is_refused_in_one_line(name: str) -> None:
    assert "no such file or folder, and not available from the hub" in refusal(name)


def test_a_repository_without_weights_lists_the_expected_files(tmp_path: Path, cache: Path) -> None:
    open_clip_repository(tmp_path / "files")
    (tmp_path / "files" / "open_clip_model.safetensors").unlink()
    put(cache, "somebody/tiny-clip", tmp_path / "files")
    assert "has none of open_clip_model.safetensors, " in refusal("somebody/tiny-clip")


# open_clip's registry -------------------------------------------------------------------------------------------------

TAGS = {  # open_clip's settings: activation (of the text encoder), mean of red, interpolation, resize mode
    "ViT-B-16-SigLIP:webli": ("gelu", 0.5, "bicubic", "squash"),
    "ViT-B-32-SigLIP2-256:webli": ("gelu_tanh", 0.5, "bicubic", "squash"),
    "ViT-B-32:openai": ("quick_gelu", 0.48145466, "bicubic", "shortest"),
    "ViT-B-32:laion2b_s34b_b79k": ("gelu", 0.48145466, "bicubic", "shortest"),
    "ViT-B-32-quickgelu:laion400m_e32": ("quick_gelu", 0.48145466, "bicubic", "shortest"),
    "ViT-L-14:laion2b_s32b_b82k": ("gelu", 0.5, "bicubic", "shortest"),
    "ViT-L-14-quickgelu:dfn2b": ("quick_gelu", 0.48145466, "bicubic", "shortest"),
    "ViT-H-14-quickgelu:dfn5b": ("quick_gelu", 0.48145466, "bicubic", "squash"),
    "ViT-H-14-378:dfn5b": ("quick_gelu", 0.48145466, "bicubic", "squash"),
    "MobileCLIP-B:datacompdr": ("gelu", 0.0, "bilinear", "shortest"),
    "RN50:cc12m": ("quick_gelu", 0.48145466, "bicubic", "shortest"),
}


def open_clips_preprocessing(model: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return open_clip's preprocessing for the weights, without downloading or reading them."""
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "nowhere")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it warns about names without -quickgelu
        model_: Any = open_clip.create_model(model, tag, load_weights=False, device="meta", pretrained_text=False)
    return model_.visual.preprocess_cfg


def assert_open_clips(config: CLIPConfig, theirs: dict[str, Any]) -> None:
    ours = config.preprocessing
    assert ours is not None
    size = ours.image_size if isinstance(ours.image_size, tuple) else (ours.image_size,) * 2
    assert size == (tuple(theirs["size"]) if isinstance(theirs["size"], list | tuple) else (theirs["size"],) * 2)
    assert ours.mean == tuple(theirs["mean"])
    assert ours.std == tuple(theirs["std"])
    assert (ours.interpolation, ours.resize_mode) == (theirs["interpolation"], theirs["resize_mode"])
    assert ours.crop_pct == 1


@pytest.mark.parametrize("name", TAGS)
def test_a_tag_sets_the_activation_and_preprocessing_it_was_trained_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, tag = name.partition(":")
    entry = get_pretrained_cfg(model, tag)
    config = tagged(resolve_architecture(model), entry)
    assert_open_clips(config, open_clips_preprocessing(model, tag, monkeypatch))
    assert config.preprocessing is not None
    ours = config.preprocessing
    assert (config.activation, ours.mean[0], ours.interpolation, ours.resize_mode) == TAGS[name]
    assert config.logit_bias == ("SigLIP" in name)


@pytest.mark.slow
def test_every_supported_tag_has_open_clips_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opened = 0
    for model, tag in open_clip.list_pretrained():
        try:
            config = tagged(resolve_architecture(model), get_pretrained_cfg(model, tag))
        except InputError:
            continue
        opened += 1
        assert_open_clips(config, open_clips_preprocessing(model, tag, monkeypatch))
    assert opened > 180  # the others have text encoders of Hugging Face's, whose configuration is on the hub


def test_open_clip_downloads_a_tag_and_its_entry_overrides_the_names_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name implies GELU, but by its entry laion400m_e32 was trained with QuickGELU."""
    requested: list[dict[str, Any]] = []
    state = open_clip_repository(tmp_path / "files")

    def download(cfg: dict[str, Any]) -> str:
        requested.append(cfg)
        return str(tmp_path / "files" / "open_clip_model.safetensors")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    monkeypatch.setattr("lit_clip.weights.hub.resolve_architecture", lambda name: {"ViT-B-32": CONFIG}[name])
    model = load_model("ViT-B-32:laion400m_e32")
    assert requested == [get_pretrained_cfg("ViT-B-32", "laion400m_e32")]
    assert model.config.activation == "quick_gelu"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    monkeypatch.setattr("lit_clip.weights.load.resolve_architecture", lambda name: {"ViT-B-32": CONFIG}[name])
    with pytest.raises(InputError, match="^ViT-B-32:laion400m_e32 .*activation quick_gelu there and gelu here"):
        create_model("ViT-B-32", "laion400m_e32")
    assert create_model("ViT-B-32", "laion2b_s34b_b79k").config == CONFIG


@pytest.mark.parametrize(
    ("error", "shown"), [(OSError("no route to host\nand more"), "no route to host"), (TimeoutError(), "TimeoutError")]
)
def test_a_failed_download_is_reported_in_one_line(error: OSError, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: dict[str, Any]) -> str:
        raise error

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", fail)
    message = refusal("ViT-B-32:openai")
    hint = "without a network, get the file elsewhere and give ViT-B-32:FILE"
    assert message == f"ViT-B-32:openai: cannot be downloaded ({shown}); {hint}"
