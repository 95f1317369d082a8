"""Every kind of model is exported to open_clip's format and opens again: in open_clip, and here with equal features."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers

from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    Preprocessing,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.fingerprint import tensors_sha256
from lit_clip.models.lora import LoRA, add_lora
from lit_clip.weights.load import load_model
from tests.helpers.exports import TEXTS, assert_identical, checkpoint, photos
from tests.helpers.own_encoders import architecture
from tests.models.test_timm import NAME, repository
from tests.weights.test_export import word_tokenizer
from tests.weights.test_hub import cache

__all__ = ["cache", "repository"]  # fixtures
pytestmark = pytest.mark.usefixtures("offline")

VIT = VisionTransformerConfig(32, 16, 32, 1, 2)
RECTANGLE = VisionTransformerConfig((32, 48), 16, 32, 1, 2)
TEXT = TextTransformerConfig(context_length=16, width=32, layers=1, heads=2)
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
HALF = (0.5, 0.5, 0.5)
IMAGES: dict[str, dict[str, Any]] = {
    "resnet": {"image": ResNetConfig((1, 2, 1, 1), 4, 64)},
    "resnet of quick_gelu": {"image": ResNetConfig((1, 1, 1, 2), 4, 64), "activation": "quick_gelu"},
    "resnet of gelu_tanh": {"image": ResNetConfig((1, 1, 1, 1), 4, 64), "activation": "gelu_tanh"},
    "vit of a rectangle": {"image": RECTANGLE},
    "vit of gelu_tanh": {"image": VIT, "activation": "gelu_tanh"},
    "vit without ln_pre": {"image": dataclasses.replace(VIT, ln_pre=False, mlp_ratio=2.5)},
    "vit with the mean": {"image": dataclasses.replace(VIT, pool="mean")},
    "vit with an attention pool": {
        "image": dataclasses.replace(VIT, pool="attention", pool_queries=4, pool_heads=4),
    },
    "timm with its own pool": {"image": TimmConfig("resnet10t", image_size=64)},
    "timm with avg": {"image": TimmConfig("resnet10t", image_size=64, pool="avg", projection="mlp")},
    "timm with max and a bias": {"image": TimmConfig("resnet10t", image_size=64, pool="max", projection_bias=True)},
    "timm with avgmax": {"image": TimmConfig("resnet10t", image_size=64, pool="avgmax", projection="classifier")},
    "timm's efficientnet": {"image": TimmConfig("test_efficientnet", image_size=64)},
    "timm's vit with the token": {"image": TimmConfig("test_vit", pool="token")},
    "timm's vit with map": {"image": TimmConfig("test_vit2", pool="map", projection="classifier")},
    "timm's vit with a classifier": {"image": TimmConfig("test_vit", projection="classifier")},
    "timm's vit without a projection": {"image": TimmConfig("test_vit", projection="none"), "embed_dim": 64},
    "timm of a rate of dropped paths": {"image": TimmConfig("test_vit", options={"drop_path_rate": 0.1})},
    "a bias of the logits": {"image": VIT, "logit_bias": True},
    "crop_pct": {"image": VIT, "preprocessing": Preprocessing(32, crop_pct=0.875)},
    "crop_pct of a rectangle": {
        "image": RECTANGLE,
        "preprocessing": Preprocessing((32, 48), crop_pct=0.9),
    },
    "crop_pct, squashed": {
        "image": VIT,
        "preprocessing": Preprocessing(32, HALF, HALF, "bilinear", "squash", crop_pct=0.8),
    },
    "other preprocessing": {
        "image": VIT,
        "preprocessing": Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash"),
    },
}
TEXTS_OF: dict[str, Callable[[str, int], Any]] = {
    "eos": lambda folder, size: dataclasses.replace(TEXT, pool="eos", eos_id=49407),
    "last, causal": lambda folder, size: dataclasses.replace(TEXT, pool="last"),
    "class": lambda folder, size: dataclasses.replace(TEXT, pool="class"),
    "all tokens": lambda folder, size: dataclasses.replace(TEXT, causal=False, layer_norm_eps=1e-6, mlp_ratio=2.0),
    "argmax of all tokens": lambda folder, size: dataclasses.replace(TEXT, causal=False, pool="argmax"),
    "no projection": lambda folder, size: dataclasses.replace(TEXT, projection=False),
    "a bias": lambda folder, size: dataclasses.replace(TEXT, projection_bias=True),
    "a bias, all tokens": lambda folder, size: dataclasses.replace(TEXT, projection_bias=True, causal=False),
    "SigLIP": lambda folder, size: dataclasses.replace(
        TEXT,
        vocab_size=size,
        causal=False,
        projection_bias=True,
        tokenizer=HuggingFaceTokenizerConfig(folder, "canonicalize"),
    ),
    "SigLIP 2": lambda folder, size: dataclasses.replace(
        TEXT, vocab_size=size, causal=False, tokenizer=HuggingFaceTokenizerConfig(folder, "lower")
    ),
    "CLIPA": lambda folder, size: dataclasses.replace(
        TEXT,
        vocab_size=size,
        causal=False,
        pool="last",
        tokenizer=HuggingFaceTokenizerConfig(folder, "whitespace", strip_sep_token=True),
    ),
    "bert, mean": lambda folder, size: HuggingFaceTextConfig(folder, False, 20, "mean", "mlp"),
    "bert, cls": lambda folder, size: HuggingFaceTextConfig(folder, False, 20, "cls", "linear"),
    "bert, pooler": lambda folder, size: HuggingFaceTextConfig(folder, False, 20, "pooler", "linear"),
}


def assert_opens_again(config: CLIPConfig, tmp_path: Path, format: Any = "open_clip") -> None:
    """Export, which compares with the other library, open the folder and compare features, pixels and token ids."""
    ours = checkpoint(config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "out"))
    for name in ("last.ckpt", "bert"):  # the folder alone must do
        if (tmp_path / name).exists():
            (tmp_path / name).rename(tmp_path / f"{name} elsewhere")
    again = load_model(tmp_path / "out")
    if format == "open_clip":  # transformers keeps the sides in pixels
        assert again.preprocessing == ours.preprocessing
    tokens, images = ours.tokenize(TEXTS), photos((70, 90), (90, 70))
    pixels = torch.stack([ours.preprocess(image) for image in images])
    assert torch.equal(again.tokenize(TEXTS), tokens)
    assert torch.equal(torch.stack([again.preprocess(image) for image in images]), pixels)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(pixels), ours.encode_image(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(again.encode_text(tokens), ours.encode_text(tokens), rtol=0, atol=1e-5)
    assert torch.equal(again.logit_scale, ours.logit_scale)
    assert (again.logit_bias is None) == (ours.logit_bias is None)


# What these say is read as in the kinds beside them: another activation, pool or projection.
ALIKE = (
    *("resnet of gelu_tanh", "timm with avg", "timm with max and a bias", "timm's vit with a classifier"),
    *("timm's vit with the token", "timm of a rate of dropped paths", "crop_pct of a rectangle"),
)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ALIKE)) for kind in IMAGES])
def test_every_kind_of_image_encoder_opens_again(tmp_path: Path, kind: str) -> None:
    assert_opens_again(CLIPConfig(**{"embed_dim": 32, "text": TEXT, **IMAGES[kind]}), tmp_path)


@pytest.mark.parametrize("activation", ["gelu", pytest.param("gelu_tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TEXTS_OF)
def test_every_kind_of_text_encoder_opens_again(tmp_path: Path, kind: str, activation: Any) -> None:
    folder = tmp_path / "bert"
    size = word_tokenizer(folder, ["[PAD]", "<unk>", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    if "CLIPA" in kind:
        special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "<unk>"}
        transformers.AutoTokenizer.from_pretrained(folder, **special).save_pretrained(folder)
    transformers.BertConfig(vocab_size=size, **WIDTHS).save_pretrained(folder)
    text = TEXTS_OF[kind](str(folder), size)
    assert_opens_again(CLIPConfig(embed_dim=32, image=VIT, text=text, activation=activation), tmp_path)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mt5", "m2m_100"])
def test_text_encoders_of_every_architecture_that_open_clip_knows_open_again(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "bert"
    size = word_tokenizer(folder, ["[PAD]", "<unk>", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    widths = WIDTHS
    if kind in ("mt5", "m2m_100"):
        widths = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "encoder_layers": 1}
        widths |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_layers": 1}
    transformers.AutoConfig.for_model(kind, vocab_size=size, pad_token_id=0, **widths).save_pretrained(folder)
    text = HuggingFaceTextConfig(str(folder), False, 20, "mean", "mlp")
    assert_opens_again(CLIPConfig(embed_dim=32, image=VIT, text=text), tmp_path)


def test_timms_model_of_the_hub_opens_again(repository: Any, tmp_path: Path) -> None:
    assert_opens_again(CLIPConfig(16, TimmConfig(NAME), TEXT), tmp_path)


def test_a_merged_lora_opens_again(tmp_path: Path) -> None:
    model = checkpoint(CLIPConfig(32, VIT, TEXT), tmp_path / "base.ckpt")
    add_lora(model, LoRA(r=2))
    additions = {name: torch.randn_like(value) for name, value in model.state_dict().items() if "lora_" in name}
    sha256 = tensors_sha256(load_model(tmp_path / "base.ckpt").state_dict())
    base = {"pretrained": str(tmp_path / "base.ckpt"), "sha256": sha256}
    settings = {"architecture": model.config.to_dict(), "pretrained": base["pretrained"], "lora": {"r": 2}}
    torch.save({"hyper_parameters": settings, "state_dict": additions, "base": base}, tmp_path / "lora.ckpt")
    export(str(tmp_path / "lora.ckpt"), format="open_clip", output=str(tmp_path / "out"))
    merged, plain = load_model(tmp_path / "lora.ckpt"), load_model(tmp_path / "base.ckpt")
    assert_identical(load_model(tmp_path / "out").state_dict(), merged.state_dict())
    assert not torch.equal(merged.encode_text(merged.tokenize(TEXTS)), plain.encode_text(plain.tokenize(TEXTS)))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_hugging_faces_format_opens_again(tmp_path: Path, crop_pct: float) -> None:
    wanted = Preprocessing(32, HALF, HALF, "bilinear", crop_pct=crop_pct)
    assert_opens_again(CLIPConfig(32, VIT, TEXT, preprocessing=wanted), tmp_path, "hugging_face")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CLIPConfig(32, ResNetConfig((1, 1, 1, 1), 4, (64, 96)), TEXT), "a ResNet of squares only, not (64, 96)"),
        (CLIPConfig(64, TimmConfig("test_vit", image_size=64), TEXT), "open_clip cannot open this model"),
        (
            CLIPConfig(32, RECTANGLE, TEXT, preprocessing=Preprocessing((32, 48), interpolation="bilinear")),
            "its preprocessing differs from the model's by",
        ),
        (CLIPConfig(32, TimmConfig("test_vit", options={"depth": 2}), TEXT), "cannot pass {'depth': 2} to timm's"),
        (architecture(), "open_clip has no encoder tests.helpers.own_encoders."),
    ],
)
def test_what_open_clip_cannot_read_is_refused_in_one_line(tmp_path: Path, config: CLIPConfig, message: str) -> None:
    checkpoint(config, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))
    assert "use onnx" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_card_gives_open_clip_the_crop_that_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CLIPConfig(32, VIT, TEXT, preprocessing=Preprocessing(32, crop_pct=0.875))
    ours = checkpoint(config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))
    assert "open_clip leaves out crop_pct, which is 0.875 here" in capsys.readouterr().out
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    (image,) = photos((70, 90))
    torch.testing.assert_close(names["preprocess"](image), ours.preprocess(image), rtol=0, atol=1e-5)
    plain: Any = open_clip.create_model_and_transforms("local-dir:out")[2]
    assert not torch.allclose(plain(image), ours.preprocess(image), rtol=0, atol=0.1)


def test_a_text_encoders_settings_are_read_as_data(tmp_path: Path) -> None:
    """A folder without them, or with a tokenizer elsewhere, names no path outside of it."""
    folder = tmp_path / "bert"
    size = word_tokenizer(folder, ["[PAD]", "<unk>", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    transformers.BertConfig(vocab_size=size, **WIDTHS).save_pretrained(folder)
    text = HuggingFaceTextConfig(str(folder), False, 20, "mean", "mlp")
    checkpoint(CLIPConfig(32, VIT, text), tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))
    file = tmp_path / "out/open_clip_config.json"
    values = json.loads(file.read_text())
    hostile = {**values["hf_model_config"], "class_path": "subprocess.Popen"}
    for change, message in (
        ({"hf_model_config": None}, "a file or folder outside"),
        ({"hf_model_config": [1]}, "model"),
        ({"hf_model_config": hostile}, "may not name a class"),
    ):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "out")
