"""Models of transformers' other classes open as their owners' code reads them: features, token ids, pixels."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from benchmarks.families.families import save_tokenizer
from datamodules import Captions
from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    Preprocessing,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.weights.checkpoints import saved_tokenizer
from lit_clip.weights.hugging_face import to_hugging_face
from lit_clip.weights.hugging_face_processor import byte_pairs
from lit_clip.weights.open_clip import open_clip_model
from tests.helpers.exports import photos
from tests.helpers.towers import TEXTS
from tests.weights.test_hugging_face import randomised

pytestmark = pytest.mark.usefixtures("offline")

VISION = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"max_position_embeddings": 90}
NOISE = photos((70, 90), (90, 70))
SQUASH = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
CROP: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
# name of the classes, tokenizer, settings of the texts, of the images, the owner's preprocessing, length of a text
FORMS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "metaclip_2": ("MetaClip2", "xlm", {"max_position_embeddings": 16, "eos_token_id": 2}, {}, SQUASH, 16),
    "metaclip_2 of mT5": (
        *("MetaClip2", "mt5", {"max_position_embeddings": 16, "eos_token_id": 1}),
        *({"hidden_act": "gelu", "layer_norm_eps": 1e-6}, SQUASH, 16),
    ),
    "chinese_clip": ("ChineseCLIP", "bert", {**BERT, "pad_token_id": 0}, {}, SQUASH, 52),
    "altclip": ("AltCLIP", "xlm", {**BERT, "pad_token_id": 1, "project_dim": 24}, {}, CROP, 77),
}


def saved(folder: Path, form: str) -> tuple[Any, Any]:
    """Save a small random model with its processor as published; return the owner's model and tokenizer."""
    name, kind, text, vision, pixels, _ = FORMS[form]
    vocabulary = save_tokenizer(kind, folder)
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "vocab_size": vocabulary, **text}, vision_config={**VISION, **vision}, projection_dim=24
    )
    model = randomised(getattr(transformers, f"{name}Model")(config))
    config.save_pretrained(folder)
    # The names of the published file, which save_pretrained of this release changes for AltCLIP.
    state = model.state_dict()
    published = {name.replace("roberta.encoder.layers.", "roberta.encoder.layer."): state[name] for name in state}
    save_file(published, folder / "model.safetensors")
    transformers.CLIPImageProcessor(**pixels).save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def assert_owners(
    ours: CLIP,
    theirs: Any,
    tokens: Tensor,
    pixels: Tensor,
    noise: list[Image.Image] = NOISE,
    texts: list[str] = TEXTS,
    tolerance: float = 1e-4,
    **masks: Tensor,
) -> None:
    """Compare pixels, features and, within a tolerance, logits with the owner's model."""
    found = torch.stack([ours.preprocess(image) for image in noise])
    torch.testing.assert_close(found, pixels, rtol=0, atol=1e-5)
    out = theirs(input_ids=tokens, pixel_values=pixels, **masks)
    images, words = ours.encode_image(pixels, normalize=True), ours.encode_text(ours.tokenize(texts), normalize=True)
    torch.testing.assert_close(images, out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(words, out.text_embeds, rtol=0, atol=1e-5)
    logits = ours.logit_scale.exp() * images @ words.T + (0 if ours.logit_bias is None else ours.logit_bias)
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_features_token_ids_and_pixels_are_the_owners(tmp_path: Path, form: str) -> None:
    theirs, tokenizer = saved(tmp_path, form)
    ours = load_model(tmp_path)
    length = FORMS[form][-1]
    assert ours.context_length == length
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert torch.equal(ours.tokenize(TEXTS), inputs.input_ids)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(NOISE, return_tensors="pt").pixel_values
    assert_owners(ours, theirs, inputs.input_ids, pixels, attention_mask=inputs.attention_mask)


def saved_tipsv2(folder: Path, **vision: Any) -> tuple[Any, Any]:
    """Save a small random TIPSv2 as published; return the owner's model and tokenizer."""
    encoding = Tokenizer(models.BPE(byte_fallback=True))
    encoding.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    encoding.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    learned = json.loads(encoding.to_str())["model"]
    tokenizer = transformers.Tipsv2Tokenizer(learned["vocab"], [tuple(each) for each in learned["merges"]])
    tokenizer.save_pretrained(folder)
    vision = {**VISION, "hidden_size": 32, "num_register_tokens": 1, **vision}
    text = {**TEXT, "vocab_size": len(learned["vocab"])}
    theirs = randomised(transformers.Tipsv2Model(transformers.Tipsv2Config(text_config=text, vision_config=vision)))
    theirs.save_pretrained(folder)
    transformers.Tipsv2ImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return theirs, tokenizer


@pytest.mark.parametrize("vision", [{}, {"use_swiglu_ffn": True}], ids=["base", "giant"])
@torch.no_grad()
def test_tipsv2_reads_the_first_of_its_class_tokens_and_locates_texts(tmp_path: Path, vision: dict[str, Any]) -> None:
    theirs, tokenizer = saved_tipsv2(tmp_path, **vision)
    if not vision:  # the owner's file has DINOv2's names of the MLPs, and no temperature
        state = load_file(tmp_path / "model.safetensors")
        state.pop("temperature")
        named = {name.replace("c_fc", "fc1").replace("c_proj", "fc2"): name for name in state if "vision" in name}
        state |= {new: state.pop(old) for new, old in named.items()}
        save_file(state, tmp_path / "model.safetensors")
        theirs.temperature.fill_(theirs.config.temperature_init_value)
    ours = load_model(tmp_path)
    texts = TEXTS[:-1]  # of an empty text its class has no feature
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(ours.tokenize(texts), inputs.input_ids)
    # Its own class resizes by torchvision alone, without Pillow.
    plain: dict[str, Any] = {"size": {"height": 32, "width": 32}, "resample": 2, "do_normalize": False}
    pixels = transformers.SiglipImageProcessorPil(**plain)(NOISE, return_tensors="pt").pixel_values
    assert_owners(
        ours, theirs, inputs.input_ids, pixels, texts=texts, tolerance=1e-3, attention_mask=inputs.attention_mask
    )
    assert ours.encode_patches(pixels).shape == (2, 32, 4, 4)


IN_CLIP_TOKENS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "aimv2": ("Aimv2", {}, {}, {}),
    "groupvit": (
        *("GroupViT", {"eos_token_id": 49407}),
        {"num_hidden_layers": 3, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]},
        {"projection_intermediate_dim": 16 * 24},
    ),
    # as published before transformers knew the id of the end of text
    "groupvit of 2022": ("GroupViT", {"eos_token_id": 2}, {}, {"projection_intermediate_dim": 16 * 24}),
}


def saved_in_clip_tokens(folder: Path, form: str) -> tuple[Any, Any]:
    """Save a small random model with its processor as published; return the owner's model and tokenizer."""
    name, text, vision, settings = IN_CLIP_TOKENS[form]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text}, vision_config={**VISION, **vision}, projection_dim=24, **settings
    )
    theirs = randomised(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(folder)
    transformers.CLIPImageProcessor(**CROP).save_pretrained(folder)
    vocabulary, merges = byte_pairs()
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return theirs, tokenizer


@pytest.mark.parametrize("form", IN_CLIP_TOKENS)
@torch.no_grad()
def test_aimv2_and_groupvit_have_the_features_ids_and_pixels_of_their_classes(tmp_path: Path, form: str) -> None:
    theirs, tokenizer = saved_in_clip_tokens(tmp_path, form)
    ours = load_model(tmp_path)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask, tokens = inputs.attention_mask.bool(), ours.tokenize(TEXTS)
    assert torch.equal(tokens[:, : mask.shape[1]][mask], inputs.input_ids[mask])
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)(NOISE, return_tensors="pt").pixel_values
    assert_owners(ours, theirs, inputs.input_ids, pixels, attention_mask=inputs.attention_mask)
    # A text alone has no padding, with which AIMv2's class forgets that texts are causal.
    alone = ours.encode_text(ours.tokenizer.trim(tokens[1:2]))
    torch.testing.assert_close(alone, ours.encode_text(tokens)[1:2], rtol=1e-5, atol=1e-5)


ALIGN_VISION = {
    **{"image_size": 40, "hidden_dim": 16, "width_coefficient": 1.0, "depth_coefficient": 1.0},
    **{"kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2]},
    **{"num_block_repeats": [1, 2], "expand_ratios": [1, 6]},
}
ALIGN_PIXELS: dict[str, Any] = {
    **{"do_center_crop": True, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
    **{"include_top": False, "resample": 2, "size": {"height": 37, "width": 37}},
    "crop_size": {"height": 32, "width": 32},
}


def saved_align(folder: Path) -> tuple[Any, Any]:
    """Save a small random ALIGN with its processor as published; return the owner's model and tokenizer."""
    text = {**TEXT, **BERT, "vocab_size": save_tokenizer("bert", folder)}
    config = transformers.AlignConfig(text_config=text, vision_config=ALIGN_VISION, projection_dim=24)
    theirs = randomised(transformers.AlignModel(config))
    theirs.temperature.data.fill_(0.02)
    theirs.save_pretrained(folder)
    transformers.EfficientNetImageProcessor(**ALIGN_PIXELS).save_pretrained(folder)
    return theirs, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_align_has_the_features_ids_and_pixels_of_its_class(tmp_path: Path) -> None:
    theirs, tokenizer = saved_align(tmp_path)
    ours = load_model(tmp_path)
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(ours.tokenize(TEXTS), inputs.input_ids)
    processor = transformers.EfficientNetImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(NOISE, return_tensors="pt").pixel_values
    masks = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert_owners(ours, theirs, inputs.input_ids, pixels, **masks)


SAVED = {"aimv2": saved_in_clip_tokens, "groupvit": saved_in_clip_tokens, "align": lambda to, _: saved_align(to)}


@pytest.mark.parametrize("form", SAVED)
def test_a_model_of_transformers_own_encoders_trains_resumes_and_embeds(
    tmp_path: Path, form: str, caption_table: Path
) -> None:
    SAVED[form](tmp_path / "published", form)
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_train_batches": 2}
    freeze = Freeze(image=UnlockLast(1))
    for epochs, start in ((1, None), (2, tmp_path / "1.ckpt")):
        module = LitCLIP(pretrained=tmp_path / "published", freeze=freeze)
        data = Captions(train=str(caption_table), batch_size=8, num_workers=0)
        trainer = Trainer(max_epochs=epochs, **settings)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    assert trainer.global_step == 4
    (tmp_path / "published").rename(tmp_path / "elsewhere")  # the checkpoint alone must do
    theirs, ours, trained = load_model(tmp_path / "elsewhere"), load_model(tmp_path / "2.ckpt"), module.model.eval()
    items = [*photos((70, 90)), "a dog"]
    torch.testing.assert_close(ours.encode(items), trained.encode(items), rtol=0, atol=1e-6)
    changed = {key for key, value in ours.state_dict().items() if not torch.equal(value, theirs.state_dict()[key])}
    assert any(key.startswith("text.") for key in changed)
    assert {key for key in changed if "embeddings" in key and "visual" in key} == set()


@pytest.mark.parametrize("form", SAVED)
def test_what_transformers_own_encoders_cannot_do_is_refused_in_a_line(tmp_path: Path, form: str) -> None:
    SAVED[form](tmp_path, form)
    model, kind = load_model(tmp_path), form.capitalize().replace("Groupvit", "GroupViT")
    with pytest.raises(InputError, match=f"encode_patches: transformers' {kind}VisionModel"):
        model.encode_patches(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=f"forward_intermediates: .*{kind}VisionModel"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=f"image_size: transformers' {form}_vision_model .* 32"):
        load_model(tmp_path, image_size=64)
    with pytest.raises(InputError, match="open_clip has no image encoder of transformers; use onnx"):
        open_clip_model(model)
    with pytest.raises(InputError, match="a CLIPModel has image encoder"):
        to_hugging_face(model)
    with pytest.raises(InputError, match="bands"):
        CLIP(dataclasses.replace(model.config, preprocessing=Preprocessing(32, (0.5,) * 4, (0.5,) * 4)))


@pytest.mark.parametrize(
    ("form", "settings", "problem"),
    [
        ("aimv2", {"model_type": "timm_wrapper", "architecture": "hf-hub:org/secret"}, "must be one of aimv2"),
        ("aimv2", {"is_native": True, "image_size": 10**9}, "is_native"),
        ("aimv2", {"class_path": "subprocess.Popen"}, "may not name a class"),
        ("aimv2", {"hidden_size": 65536, "intermediate_size": 10**9}, "do not fit"),
        ("groupvit", {"depths": [1000] * 1000}, "1000000 blocks must be at most 1000"),
        ("align", {"num_block_repeats": [10**9, 1]}, "blocks must be at most 1000"),
        ("align", {"hidden_act": "no such"}, "cannot create align_vision_model"),
    ],
)
def test_a_checkpoints_settings_of_transformers_encoders_name_nothing_and_take_no_memory(
    tmp_path: Path, form: str, settings: dict[str, Any], problem: str
) -> None:
    SAVED[form](tmp_path, form)
    model = load_model(tmp_path)
    architecture = model.config.to_dict()
    architecture["image"]["model"] |= settings
    values = {"hyper_parameters": {"architecture": architecture}, "state_dict": model.state_dict()}
    torch.save({**values, **saved_tokenizer(model)}, tmp_path / "hostile.ckpt")
    with pytest.raises(InputError, match=problem):
        load_model(tmp_path / "hostile.ckpt")


@pytest.mark.parametrize(
    ("form", "change", "problem"),
    [
        ("aimv2", {"text_config": {**TEXT, "eos_token_id": 7}}, "text_config.eos_token_id is 7 there and 49407"),
        ("aimv2", {"vision_config": {**VISION, "use_head": False}}, "vision_config.use_head is False"),
        ("groupvit", {"projection_intermediate_dim": 64}, "projection_intermediate_dim is 64 there and 384"),
        ("align", {"vision_config": {**ALIGN_VISION, "num_channels": 4}}, "vision_config.num_channels is 4"),
    ],
)
def test_settings_that_would_change_the_features_of_those_encoders_are_named(
    tmp_path: Path, form: str, change: dict[str, Any], problem: str
) -> None:
    SAVED[form](tmp_path, form)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=problem):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pooling": "end"}, "pooling end starts from no weights; set pretrained to false"),
        ({"pooling": "end", "pretrained": False}, "model_type 'bert' must be one of aimv2_text_model"),
    ],
)
def test_only_causal_encoders_of_clips_tokens_are_read_at_their_end(settings: dict[str, Any], problem: str) -> None:
    text = HuggingFaceTextConfig("org/name", model={"model_type": "bert"}, **settings)
    with pytest.raises(InputError, match=problem):
        CLIP(CLIPConfig(24, VisionTransformerConfig(32, 16, 64, 1, 1), text))


def test_align_pixels_of_another_scale_are_refused(tmp_path: Path) -> None:
    saved_align(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_offset": False}))
    with pytest.raises(InputError, match="rescale_offset is False there and True here"):
        load_model(tmp_path)


def positions(length: int) -> dict[str, tuple[int, ...]]:
    return {f"text_model.embeddings.position_embedding_{name}.weight": (length, 32) for name in ("res", "ori")}


LONG = {**positions(248), "text_filip_projection.weight": (24, 32), "logit_scale_finegraind": ()}
LONG |= {"logit_scale_hardneg": ()}
HEADS = {**positions(196), "longtext_head.weight": (32, 32), "longtext_head.bias": (32,)}
HEADS |= {"boxtext_head.weight": (32, 32), "boxtext_head.bias": (32,)}
HEADS |= {f"dense_feature_head.{name}": (32,) for name in ("probe", "layernorm.weight", "attention.in_proj_bias")}


def add_weights(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> None:
    """Add random weights to a folder's file, and settings to its configuration."""
    state = load_file(folder / "model.safetensors")
    save_file({**state, **{name: torch.randn(shape) for name, shape in shapes.items()}}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


@torch.no_grad()
def test_fg_clip_reads_whole_images_and_short_texts_as_its_owners_examples_do(tmp_path: Path) -> None:
    """As a CLIPModel of 77 positions with the projection for short texts; images are squashed to squares first."""
    text = {**TEXT, "eos_token_id": 49407, "max_position_embeddings": 77}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    theirs = randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(**CROP).save_pretrained(tmp_path)
    add_weights(tmp_path, LONG, architectures=["FGCLIPModel"], auto_map={"AutoModelForCausalLM": "fgclip.FGCLIPModel"})
    with pytest.warns(UserWarning, match="long texts.*text_filip_projection, logit_scale_finegraind") as warned:
        ours = load_model(tmp_path)
    assert len(warned) == 1
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor([image.resize((32, 32)) for image in NOISE], return_tensors="pt").pixel_values
    assert_owners(ours, theirs, ours.tokenize(TEXTS), pixels)


@torch.no_grad()
def test_fg_clip_2_is_a_siglip_2_of_patches_with_heads_that_are_left_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = save_tokenizer("siglip", tmp_path)
    text, vision = (
        {**sizes, "vocab_size": vocabulary, "projection_size": 32},
        {**sizes, "patch_size": 8, "num_patches": 16},
    )
    theirs = randomised(transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision)))
    theirs.save_pretrained(tmp_path)
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    processor.save_pretrained(tmp_path)
    add_weights(tmp_path, HEADS, model_type="fgclip2", architectures=["FG_CLIP2_Model"])
    with pytest.warns(UserWarning, match="longtext_head, boxtext_head, dense_feature_head") as warned:
        ours = load_model(tmp_path)
    assert len(warned) == 1
    noise = photos((70, 90), (90, 40))
    inputs, tokens = processor(noise, return_tensors="pt"), ours.tokenize(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lower = [text.lower() for text in TEXTS]  # as in its owner's examples
    assert torch.equal(tokens, tokenizer(lower, padding="max_length", max_length=64, return_tensors="pt").input_ids)
    out = theirs(input_ids=tokens, **inputs)
    images = ours.encode_image(torch.stack([ours.preprocess(image) for image in noise]), normalize=True)
    torch.testing.assert_close(images, out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens, normalize=True), out.text_embeds, rtol=0, atol=1e-5)


@torch.no_grad()
def test_long_clips_own_file_is_read_as_its_code_does(tmp_path: Path) -> None:
    """The paper's forward pass: positions of the first table where a mask is 1, up to 20, of the second behind."""
    torch.manual_seed(0)
    text = TextTransformerConfig(context_length=248, width=64, layers=2, heads=1)
    plain = CLIP(CLIPConfig(32, VisionTransformerConfig(32, 16, 64, 2, 1), text, "quick_gelu")).eval()
    randomised(plain)
    state = plain.state_dict()
    second = torch.randn_like(state["positional_embedding"])
    published = {key: value.half() for key, value in {**state, "positional_embedding_res": second}.items()}
    torch.save(published, tmp_path / "longclip-B.pt")
    ours = load_model(tmp_path / "longclip-B.pt")
    assert (ours.context_length, ours.config.activation) == (248, "quick_gelu")

    state = {key: value.float() for key, value in published.items()}
    first, second = state["positional_embedding"], state.pop("positional_embedding_res")
    mask = (torch.arange(248) < 20).float()[:, None]
    plain.load_state_dict(state)
    plain.positional_embedding.copy_(first * mask + second * (1 - mask))
    tokens = ours.tokenize(["a dog", "a red car beside a house " * 20])
    torch.testing.assert_close(ours.encode_text(tokens), plain.encode_text(tokens), rtol=0, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.encode_image(images), plain.encode_image(images), rtol=0, atol=1e-5)
    torch.save({**published, "positional_embedding_res": second[:5]}, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"damaged\.pt.*positional_embedding_res, of one shape"):
        load_model(tmp_path / "damaged.pt")
