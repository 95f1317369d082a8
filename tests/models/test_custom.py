"""Encoders by class path: what they must offer, and that everything works as with our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_clip import LitCLIP, load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig
from lit_clip.models.external_config import CustomImageConfig, CustomTextConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.fingerprint import fingerprint
from lit_clip.models.flops import training_flops
from lit_clip.models.layers import layer_groups, tower_blocks
from lit_clip.models.lora import LoRA
from lit_clip.models.rates import LayerDecay, Rates, rated_layers
from lit_clip.training.activation_checkpointing import checkpoint_encoders
from tests.helpers import own_encoders as own
from tests.helpers.ranks import PAIRS, make_batch, make_module

TEXTS = ["a dog", "two green birds in the rain", "x"]


def write_checkpoint(module: LitCLIP, path: Path) -> Path:
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, path)
    return path


@pytest.mark.parametrize("text", [own.Text, own.TextOfLengths])
def test_features_are_those_of_the_class_and_do_not_depend_on_common_padding(text: type[nn.Module]) -> None:
    model = CLIP(own.architecture(text)).eval()
    encoder: Any = model.text.encoder
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(images), model.visual.encoder(images))
    tokens = model.tokenize(TEXTS)
    lengths = model.tokenizer.lengths(tokens).tolist()
    by_hand = encoder(tokens, lengths) if text is own.TextOfLengths else encoder(tokens)
    for columns in (tokens, model.tokenizer.trim(tokens)):
        torch.testing.assert_close(model.encode_text(columns), by_hand)
        torch.testing.assert_close(model.encode_text(columns, lengths=lengths), by_hand)
    torch.testing.assert_close(model.encode_text(model.tokenizer.trim(tokens[:1])), by_hand[:1])


def test_sizes_and_preprocessing_come_from_the_encoders() -> None:
    model = CLIP(own.architecture(image_size=48))
    assert model.preprocessing == Preprocessing(48)
    assert model.context_length == 24
    assert model.tokenize("a" * 50).shape == (1, 24)
    with pytest.raises(InputError, match=r"images are \[1, 3, 32, 32\], the model reads \[B, 3, 48, 48\]"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    image = CustomImageConfig(own.Image)
    grey = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    text = TextTransformerConfig(8, 50, 64, 1, 1)
    assert CLIP(CLIPConfig(4, image, text, preprocessing=grey)).preprocessing == grey
    with pytest.raises(InputError, match=r"preprocessing\.image_size 224 is not image\.image_size 32"):
        CLIP(CLIPConfig(4, image, preprocessing=Preprocessing()))


def test_own_tokenizers_count_pad_and_decode() -> None:
    tokenizer = CLIP(own.architecture()).tokenizer
    assert tokenizer.pad_id == 200
    assert tokenizer.count("a dog") == 5
    assert tokenizer.decode(tokenizer("a dog")[0].tolist()) == "a dog"
    with pytest.raises(InputError, match="text 1 is a int, not a string: 3"):
        tokenizer(["a", 3])  # type: ignore[list-item]


PATH = "tests.helpers.own_encoders"


@pytest.mark.parametrize(
    ("kind", "name", "init_args", "message"),
    [
        ("image", "Nothing", {}, f"{PATH} has no class Nothing"),
        ("image", "TRUNK_WIDTH", {}, r"TRUNK_WIDTH is no torch\.nn\.Module; an image encoder is a torch\.nn\.Module"),
        ("image", "NotAModule", {}, r"is no torch\.nn\.Module; an image encoder is a torch\.nn\.Module"),
        ("image", "NoForward", {}, r"has no forward; an image encoder .* forward\(images \[B, 3, H, W\]\)"),
        ("image", "NoEmbedDim", {}, "unexpected keyword argument 'embed_dim'.*; an image encoder"),
        ("image", "NoSize", {}, "has the image_size None, at least 1; an image encoder"),
        ("image", "Wider", {}, r"forward returns float32 \[2, 5\] for a batch of 2 and embed_dim 4; an image encoder"),
        ("image", "Float64", {}, r"forward returns float64 \[2, 4\] for a batch of 2 and embed_dim 4"),
        ("image", "Pair", {}, "forward returns a tuple; an image encoder"),
        ("image", "NeedsDepth", {}, "missing a required argument: 'depth'"),
        ("image", "Image", {"widht": 3}, "got an unexpected keyword argument 'widht'"),
        ("image", "Image", {"embed_dim": 5}, r"init_args\.embed_dim 5 is not architecture\.embed_dim 4; leave it out"),
        ("text", "Text", {"embed_dim": 5}, r"init_args\.embed_dim 5 is not architecture\.embed_dim 4; leave it out"),
        ("text", "Image", {}, "has the context_length None, at least 3; a text encoder"),
        ("text", "ShortTokens", {}, r"its tokenizer returns int64 \[2, 9\] for 2 texts; .* here 16"),
        ("text", "NameOfTokenizer", {}, "its tokenizer is a str, which cannot be called with texts"),
        ("text", "MethodTokenizer", {}, "its tokenizer is a method of the encoder"),
        ("text", "TextOfLengths", {"masked": False}, "padding changes the features"),
    ],
)
def test_a_class_that_is_no_encoder_is_refused_in_one_line(
    kind: str, name: str, init_args: dict[str, Any], message: str
) -> None:
    config: Any = CustomImageConfig if kind == "image" else CustomTextConfig
    with pytest.raises(InputError, match=rf"^architecture\.{kind}: .*{message}") as refused:
        CLIP(CLIPConfig(4, **{kind: config(f"{PATH}.{name}", init_args)}))
    assert "\n" not in str(refused.value)


def test_blocks_that_are_no_modules_of_the_encoder_are_refused() -> None:
    model = CLIP(own.architecture())
    vars(model.visual.encoder)["blocks"] = [nn.Linear(2, 2)]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="`blocks` of Image holds more than modules of it"):
        layer_groups(model, "image")


def test_arguments_must_fit_into_a_checkpoint() -> None:
    with pytest.raises(InputError, match=r"init_args\.act of .*Image is a type; a checkpoint can only hold numbers"):
        CustomImageConfig(own.Image, {"act": nn.ReLU})
    with pytest.raises(InputError, match=r"class_path 'MyEncoder' must be a module and a class of it"):
        CustomImageConfig("MyEncoder")

    class Local(own.Image):
        pass

    with pytest.raises(InputError, match=r"class_path '.*<locals>.Local' must be"):
        CustomImageConfig(Local)


def test_a_class_of_a_module_that_is_not_imported_is_not_looked_for() -> None:
    with pytest.raises(InputError, match=r"antigravity\.X is not imported; import antigravity first"):
        CLIP(CLIPConfig(4, CustomImageConfig("antigravity.X")))
    # A package may import a submodule when it is asked for a name.
    with pytest.raises(InputError, match="transformers has no class FunnelModel"):
        CLIP(CLIPConfig(4, CustomImageConfig("transformers.FunnelModel")))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch_size: int) -> None:
    whole, parts = (make_module(architecture=own.architecture(), micro_batch_size=n) for n in (None, micro_batch_size))
    checkpoint_encoders(parts.model)
    for module in (whole, parts):
        module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, atol=1e-12, rtol=1e-9)


def test_freezing_and_layer_decay_use_the_blocks() -> None:
    module = LitCLIP(own.architecture(depth=3), freeze=Freeze(image=UnlockLast(2), text="all"))
    trained = {
        name.split(".")[2] + name.split(".")[3]
        for name, p in module.model.named_parameters()
        if p.requires_grad and "." in name
    }
    assert trained == {"blocks1", "blocks2", "headweight", "headbias"}
    model = CLIP(own.architecture(depth=2))
    groups = {group.name: set(group.parameters) for group in layer_groups(model, "image")}
    assert list(groups) == ["embeddings", "blocks.0", "blocks.1", "head"]
    assert groups["embeddings"] == {"visual.encoder.trunk.weight", "visual.encoder.trunk.bias"}
    rates = {layer.name: layer.rate.lr for layer in rated_layers(model, Rates(layer_decay=LayerDecay(image=0.5)))}
    assert {name: rates[f"image.{name}"] for name in groups} == dict(zip(groups, (0.125, 0.25, 0.5, 1), strict=True))


def test_without_blocks_an_encoder_can_be_frozen_whole_and_is_one_block() -> None:
    config = own.architecture(own.Text)
    model = CLIP(config)
    assert tower_blocks(model, "text") == [model.text.encoder]
    assert not any(p.requires_grad for p in LitCLIP(config, freeze=Freeze(text="all")).model.text.parameters())
    assert len(rated_layers(model, Rates(layer_decay=LayerDecay(image=0.5)))) == 6  # text is one layer
    for wrong in (
        lambda: LitCLIP(config, freeze=Freeze(text=UnlockLast(1))),
        lambda: rated_layers(model, Rates(layer_decay=LayerDecay(text=0.5))),
    ):
        with pytest.raises(InputError, match=r"architecture\.text: Text has no `blocks`"):
            wrong()


def test_a_lora_adds_to_the_blocks_and_loads_merged(tmp_path: Path) -> None:
    base = write_checkpoint(LitCLIP(own.architecture(own.Text)), tmp_path / "base.ckpt")
    with pytest.raises(InputError, match=r"architecture\.text: Text has no `blocks`"):
        LitCLIP(pretrained=base, lora=LoRA(2))
    module = LitCLIP(pretrained=base, lora=LoRA(2), freeze=Freeze(text="all"))
    added = [name for name, p in module.model.named_parameters() if p.requires_grad and "lora" in name]
    assert len(added) == 4
    assert all(name.startswith("visual.encoder.blocks.") for name in added)
    torch.nn.init.normal_(module.model.get_parameter(added[1]))
    images = torch.randn(2, 3, 32, 32)
    loaded = load_model(write_checkpoint(module, tmp_path / "lora.ckpt"))
    torch.testing.assert_close(loaded.encode_image(images), module.model.encode_image(images))


def test_a_checkpoint_loads_with_the_same_features_and_fingerprint(tmp_path: Path) -> None:
    module = LitCLIP(own.architecture(width=5))
    path = write_checkpoint(module, tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    for loaded in (load_model(path), LitCLIP.load_from_checkpoint(path).model.eval()):
        assert loaded.config == module.model.config
        assert fingerprint(loaded) == fingerprint(module.model)
        torch.testing.assert_close(loaded.encode_image(images), module.model.encode_image(images))
        torch.testing.assert_close(
            loaded.encode_text(loaded.tokenize(TEXTS)), module.model.encode_text(module.tokenize(TEXTS))
        )
    for size in ({"image_size": 48}, {"context_length": 9}):
        with pytest.raises(InputError, match="chooses its own; set it with architecture's init_args"):
            load_model(path, **size)


def test_flops_count_an_encoder_of_lengths_on_real_tensors() -> None:
    flops = training_flops(CLIP(own.architecture()))
    assert flops is not None
    D, patches, width = 6, 16, own.TRUNK_WIDTH
    forward = 2 * patches * width * 3 * 64 + 2 * 2 * width * width + 2 * width * D
    backward = 2 * forward - 2 * patches * width * 3 * 64  # the images need no gradient
    assert flops.image == forward + backward
    assert flops.total(1, 24, 24**2) - flops.image == pytest.approx(3 * 2 * D * D)


def test_load_from_checkpoint_refuses_unknown_arguments(tmp_path: Path) -> None:
    path = write_checkpoint(LitCLIP(own.architecture()), tmp_path / "last.ckpt")
    assert LitCLIP.load_from_checkpoint(path, micro_batch_size=2, map_location="cpu").hparams["micro_batch_size"] == 2
    with pytest.raises(InputError, match="LitCLIP has no argument 'leraning_rate'; there are architecture, pretrained"):
        LitCLIP.load_from_checkpoint(path, leraning_rate=1)
