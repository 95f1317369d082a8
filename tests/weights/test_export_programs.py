"""Each program opens the folder that is written for it, with the model's features."""

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from torch import Tensor

from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTokenizerConfig,
    Preprocessing,
    VisionTransformerConfig,
)
from tests.helpers.exports import TEXTS, checkpoint, photos, traced_once, variants
from tests.helpers.towers import WORDS, save_words
from tests.weights.test_export import siglip_config

pytestmark = pytest.mark.usefixtures("offline", "_traced_once")
SIZES = ((70, 90), (90, 70), (33, 36))


@pytest.fixture
def _traced_once(traces: Path) -> Iterator[None]:
    with traced_once(traces):
        yield


def siglip(words: Path) -> CLIPConfig:
    save_words(words, ["<pad>", "</s>", "<unk>"], "$A </s>")
    return siglip_config(words, len(WORDS) + 3)


Exported = Callable[[str, Any], tuple[CLIP, Path]]


@pytest.fixture
def exported(tmp_path: Path, tiny_config: CLIPConfig) -> Exported:
    def make(kind: str, format: Any) -> tuple[CLIP, Path]:
        config = siglip(tmp_path / "words") if kind == "siglip" else variants(tiny_config)[kind]
        model = checkpoint(config, tmp_path / "last.ckpt")
        export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "out"))
        return model, tmp_path / "out"

    return make


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_sentence_transformers_encodes_texts_and_images_as_lit_clip(exported: Exported, kind: str) -> None:
    library = pytest.importorskip("sentence_transformers", minversion="5.4")
    ours, folder = exported(kind, "hugging_face")
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    texts = TEXTS[:3] if kind == "vit" else ["a dog", "red car and two cats " * 9]
    close(theirs.encode(texts), ours.encode(texts))
    close(theirs.encode(photos(*SIZES)), ours.encode(photos(*SIZES)))


def test_a_pipeline_of_diffusers_conditions_on_the_text_encoder(exported: Exported) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours, folder = exported("vit", "hugging_face")
    transformers.CLIPTextModel.from_pretrained(folder).save_pretrained(folder.parent / "sd/text_encoder")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder.parent / "sd/tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder.parent / "sd", subfolder="text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder.parent / "sd", subfolder="tokenizer")
    blocks = {"block_out_channels": (32,), "norm_num_groups": 8, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=8,
        **blocks,
    )
    vae = diffusers.AutoencoderKL(latent_channels=4, **blocks)
    pipeline = diffusers.StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    states: list[Tensor] = []  # of the last token of each text, which our encoder reads
    hook = ours.text_encoder.ln_final.register_forward_hook(lambda *call: states.append(call[2]))
    with torch.no_grad(), hook:
        ours.encode_text(ours.tokenize(TEXTS))
        found, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, do_classifier_free_guidance=False)
    last = ours.tokenize(TEXTS).argmax(dim=1)
    close(found[range(len(TEXTS)), last], states[0])


class Immich:
    """What Immich's machine learning does with a folder, written from its code as published.

    One image or text at a time; sizes are cut off, not rounded, and the middle is found in whole pixels.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.preprocess = json.loads((folder / "visual/preprocess_cfg.json").read_text())
        self.visual, self.textual = (
            onnxruntime.InferenceSession(folder / kind / "model.onnx") for kind in ("visual", "textual")
        )
        settings = json.loads((folder / "textual/tokenizer_config.json").read_text())
        self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
        length, pad = self.config["text_cfg"].get("context_length", 77), settings["pad_token"]
        self.tokenizer.enable_padding(length=length, pad_token=pad, pad_id=self.tokenizer.token_to_id(pad))
        self.tokenizer.enable_truncation(max_length=length)

    def image(self, image: Image.Image) -> Tensor:
        size, values = self.preprocess["size"][0], self.preprocess
        filter = {each.name.lower(): each for each in Image.Resampling}[values["interpolation"].lower()]
        if values["resize_mode"] == "squash":
            image = image.resize((size, size), filter)
        else:
            wide = image.width >= image.height
            ratio = image.width / image.height if wide else image.height / image.width
            image = image.resize((int(ratio * size), size) if wide else (size, int(ratio * size)), filter)
            left, top = (int(side / 2 - size / 2) for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255.0
        pixels = (pixels - np.float32(values["mean"])) / np.float32(values["std"])
        return torch.from_numpy(self.visual.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0])

    def text(self, text: str) -> Tensor:
        text = " ".join(text.split())
        if (self.config["text_cfg"].get("tokenizer_kwargs") or {}).get("clean") == "canonicalize":
            text = text.translate(str.maketrans("", "", string.punctuation)).lower()
        tokens = np.array([self.tokenizer.encode(text).ids], dtype=np.int32)
        return torch.from_numpy(self.textual.run(None, {"text": tokens})[0][0])


@pytest.mark.parametrize("kind", ["vit", pytest.param("siglip", marks=pytest.mark.slow)])
def test_immich_has_our_features_for_images_and_texts(exported: Exported, kind: str) -> None:
    ours, folder = exported(kind, "immich")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "visual/model.onnx", "visual/preprocess_cfg.json", "textual/model.onnx"} <= names
    assert {"textual/tokenizer.json", "textual/tokenizer_config.json"} <= names
    theirs = Immich(folder)
    texts = [*TEXTS, "  Two  DOGS, and a cat! "]
    close(torch.stack([theirs.text(text) for text in texts]), ours.encode(texts))
    images = photos(*SIZES[:2], (64, 64))
    close(torch.stack([theirs.image(image) for image in images]), ours.encode(images))


@pytest.mark.slow
def test_immich_lower_cases_where_the_model_does(tmp_path: Path) -> None:
    config = siglip(tmp_path / "words")
    config.text.tokenizer = HuggingFaceTokenizerConfig(str(tmp_path / "words"), "lower")
    ours = checkpoint(config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="immich", output=str(tmp_path / "out"))
    text = " ".join(WORDS[:6]).upper()
    assert not torch.equal(ours.tokenize(text), ours.tokenize("xx"))
    close(Immich(tmp_path / "out").text(text), ours.encode([text])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"crop_pct": 0.875}, "crop_pct 0.875"), ({"image_size": (32, 64)}, "32 x 64")],
)
def test_what_immich_would_leave_out_is_refused(
    tmp_path: Path, tiny_config: CLIPConfig, change: dict[str, Any], message: str
) -> None:
    size = change.get("image_size", 32)
    config = CLIPConfig(16, VisionTransformerConfig(size, 16, 64, 1, 1), tiny_config.text)
    config.preprocessing = Preprocessing(**{"image_size": size, **change})
    checkpoint(config, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=message):
        export(str(tmp_path / "last.ckpt"), format="immich", output=str(tmp_path / "out"))
