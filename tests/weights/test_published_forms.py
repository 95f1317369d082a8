"""Models of transformers' other classes open as their owners' code reads them: features, token ids, pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from benchmarks.families.families import save_tokenizer
from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from tests.helpers.exports import photos
from tests.helpers.towers import TEXTS
from tests.weights.test_hugging_face import randomised

pytestmark = pytest.mark.usefixtures("offline")

VISION = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"max_position_embeddings": 90}
SQUASH = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
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


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_features_token_ids_and_pixels_are_the_owners(tmp_path: Path, form: str) -> None:
    theirs, tokenizer = saved(tmp_path, form)
    ours = load_model(tmp_path)
    length = FORMS[form][-1]
    assert ours.context_length == length
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    assert torch.equal(ours.tokenize(TEXTS), inputs.input_ids)
    noise = photos((70, 90), (90, 70))
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(noise, return_tensors="pt").pixel_values
    torch.testing.assert_close(torch.stack([ours.preprocess(image) for image in noise]), pixels, rtol=0, atol=1e-5)
    out = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=pixels)
    torch.testing.assert_close(ours.encode_image(pixels, normalize=True), out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(inputs.input_ids, normalize=True), out.text_embeds, rtol=0, atol=1e-5)
    logits = ours.logit_scale.exp() * ours.encode_image(pixels, True) @ ours.encode_text(inputs.input_ids, True).T
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=1e-4)


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
