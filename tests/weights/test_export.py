"""An export either gives the model's features, pixels and ids in the other tool, or leaves no folder."""

import ast
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import tokenizers
import torch
import transformers
import yaml
from jsonargparse import ArgumentError
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from lit_clip.cli.subcommands import command_parser
from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
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
from lit_clip.models.tokenizer import tokenize
from lit_clip.weights import export as export_formats
from lit_clip.weights.hugging_face import read_hugging_face_folder
from lit_clip.weights.load import load_model

TEXTS = ["a dog on a hill", "A Photo of a CAT!", " ".join(["a very long caption about a cat"] * 9), ""]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)


def checkpoint(config: CLIPConfig, path: Path) -> CLIP:
    """Save a model with no weight at its initial value."""
    torch.manual_seed(0)
    model = CLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    torch.save({"hyper_parameters": {"architecture": config.to_dict()}, "state_dict": model.state_dict()}, path)
    return model


def photos(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def variants(tiny: CLIPConfig) -> dict[str, CLIPConfig]:
    replace = dataclasses.replace
    odd = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")
    resnet = replace(tiny, image=ResNetConfig((1, 2, 1, 1), 4, 64), preprocessing=None)
    return {
        "vit": tiny,
        "quick_gelu": replace(tiny, activation="quick_gelu", preprocessing=odd),
        "gelu_tanh": replace(
            tiny, activation="gelu_tanh", image=VisionTransformerConfig(32, 16, 64, 1, 2, 2.5), preprocessing=None
        ),
        "resnet": resnet,
        "timm": replace(tiny, image=TimmConfig("resnet10t", image_size=64, projection="mlp"), preprocessing=None),
        "classifier": replace(
            tiny,
            image=TimmConfig("test_vit", image_size=160, pool="token", projection="classifier"),
            text=replace(tiny.text, projection=False, width=16, heads=1),
            preprocessing=Preprocessing(160),
        ),
    }


@pytest.mark.parametrize("kind", ["vit", "quick_gelu", "gelu_tanh", "resnet", "timm", "classifier"])
def test_open_clip_opens_the_folder_with_our_features_pixels_and_ids(
    tmp_path: Path, tiny_config: CLIPConfig, kind: str
) -> None:
    config = variants(tiny_config)[kind]
    if kind == "timm":
        config.preprocessing = Preprocessing(64)  # timm's crops the resized image, which open_clip cannot
    ours = checkpoint(config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))

    name = f"local-dir:{tmp_path / 'out'}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    theirs = theirs.eval()
    images = torch.stack([ours.preprocess(image) for image in photos((70, 90), (90, 70))])
    expected = torch.stack([preprocess(image) for image in photos((70, 90), (90, 70))])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    assert torch.equal(tokens, ours.tokenize(TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-4, atol=1e-4)
    kept = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    assert_identical(ours.state_dict(), kept)
    again = load_model(tmp_path / "out")
    assert again.config == config.without_pretrained()
    assert_identical(ours.state_dict(), again.state_dict())


@pytest.mark.parametrize("kind", ["vit", "quick_gelu", "gelu_tanh"])
def test_transformers_opens_the_folder_with_our_features_pixels_and_ids(
    tmp_path: Path, tiny_config: CLIPConfig, kind: str
) -> None:
    ours = checkpoint(variants(tiny_config)[kind], tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "out"))

    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    sizes = ((70, 90), (90, 70), (33, 36))  # with margins that both sides halve the same way
    for backend, levels in (("pil", 0.001), (None, 2.001)):
        processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out", backend=backend)
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=TEXTS, images=photos(*sizes), **options)
        images = torch.stack([ours.preprocess(image) for image in photos(*sizes)])
        std = torch.tensor(ours.preprocessing.std)[:, None, None]
        assert ((inputs["pixel_values"] - images) * std).abs().max() * 255 <= levels
    assert torch.equal(inputs["input_ids"] * inputs["attention_mask"], ours.tokenize(TEXTS))
    inputs["pixel_values"] = images
    with torch.no_grad():
        out = theirs(**inputs)
        tokens = ours.tokenize(TEXTS)
        torch.testing.assert_close(out.image_embeds, ours.encode_image(images, normalize=True), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.text_embeds, ours.encode_text(tokens, normalize=True), rtol=0, atol=1e-5)


def test_the_crop_of_transformers_is_one_pixel_off_for_the_sizes_in_the_card(
    tmp_path: Path, tiny_config: CLIPConfig
) -> None:
    ours = checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "out"))
    assert "3, 7, 11, ... pixels longer" in (tmp_path / "out/README.md").read_text()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out", backend="pil")
    (image,) = photos((32, 35))
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs[:, :, 1:], ours.preprocess(image)[:, :, :-1], rtol=0, atol=1e-5)


def test_converting_to_hugging_face_and_back_and_to_open_clip_is_bit_exact(
    tmp_path: Path, tiny_config: CLIPConfig
) -> None:
    ours = checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "hf"))
    config, state = read_hugging_face_folder(tmp_path / "hf")
    assert config == tiny_config
    assert_identical(state, ours.state_dict())
    export(str(tmp_path / "hf"), format="open_clip", output=str(tmp_path / "oc"))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert_identical(ours.state_dict(), load_model(tmp_path / "oc").state_dict())


# Texts whose cleaning transformers does not do: HTML escapes, broken Unicode, ligatures, typographic quotes.
UNCLEANED = ["&amp;lt;b&amp;gt; bold", "schÃ¶n", "ﬁne ﬂour", "“curly” ‘quotes’"]
CLEAN = [
    "a diagram",
    "a photo of a cat.",
    "A Photo of a CAT!",
    "  multiple   spaces\tand\nnewlines ",
    "it's the dog's bone, they'll've",
    "café naïve",
    "cafe\u0301",
    "12345 3.14",
    "emoji 😀🚀",
    "中文 日本語",
    "<|startoftext|> x <|endoftext|>",
    "",
    'a photo of the number: "7".',
    "hello-world_foo",
]


def test_the_exported_tokenizer_gives_our_ids_for_texts_that_need_no_fixing(
    tmp_path: Path, tiny_config: CLIPConfig
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "out"))
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 16

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenize(text)[0] if i]

    assert [text for text in CLEAN if tokenizer(text)["input_ids"] != ids(text)] == []
    assert [text for text in UNCLEANED if tokenizer(text)["input_ids"] == ids(text)] == []
    from_parts = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).get_vocab()
    assert json.loads((tmp_path / "out/vocab.json").read_text()) == from_parts
    merges = (tmp_path / "out/merges.txt").read_text().splitlines()
    assert (len(merges), merges[1]) == (48894 + 1, "i n")


@pytest.mark.parametrize("kind", ["vit", "resnet", pytest.param("timm", marks=pytest.mark.slow)])
def test_onnxruntime_gives_our_features_at_any_batch_size(tmp_path: Path, tiny_config: CLIPConfig, kind: str) -> None:
    ours = checkpoint(variants(tiny_config)[kind], tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"))
    facts = json.loads((tmp_path / "out/model.json").read_text())
    assert facts["preprocessing"]["image_size"] == ours.preprocessing.image_size
    assert facts["scale"] == pytest.approx(float(ours.logit_scale.exp()))
    size = ours.preprocessing.image_size
    tokens = ours.tokenize([*TEXTS, "one more"])
    for kind_, name, values, encode in (
        ("image", "pixels", torch.randn(5, 3, size, size), ours.encode_image),
        ("text", "tokens", tokens, ours.encode_text),
    ):
        session = onnxruntime.InferenceSession(tmp_path / f"out/{kind_}_encoder.onnx")
        for batch in (1, 3, 5):
            actual = torch.from_numpy(session.run(["features"], {name: values[:batch].numpy()})[0])
            with torch.no_grad():
                torch.testing.assert_close(actual, encode(values[:batch]), rtol=1e-4, atol=1e-4)


def word_tokenizer(folder: Path, special: list[str], template: str) -> int:
    """Save a tokenizer for the words that exports are checked with; return its vocabulary size."""
    words = [*special, *{word: None for text in export_formats.TEXTS for word in text.split()}]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    used = [(word, ids[word]) for word in special if word in template.split()]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=used)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0])
    fast.save_pretrained(folder)
    return len(words)


@pytest.fixture
def siglip(tmp_path: Path) -> CLIP:
    """A tiny SigLIP, with the folder of its tokenizer beside its checkpoint."""
    vocab_size = word_tokenizer(tmp_path / "tok", ["</s>", "<unk>"], "$A </s>")
    image = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 16}
    config = CLIPConfig(
        embed_dim=48,
        image=TimmConfig("vit_base_patch16_siglip_224", image_size=32, projection="none", options=image),
        text=TextTransformerConfig(
            context_length=16,
            vocab_size=vocab_size,
            width=48,
            layers=2,
            heads=2,
            causal=False,
            projection_bias=True,
            layer_norm_eps=1e-6,
            tokenizer=HuggingFaceTokenizerConfig(str(tmp_path / "tok"), "canonicalize"),
        ),
        activation="gelu_tanh",
        preprocessing=Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode="squash"),
        logit_bias=True,
    )
    return checkpoint(config, tmp_path / "last.ckpt")


def test_transformers_opens_an_exported_siglip_as_a_siglip_model(tmp_path: Path, siglip: CLIP) -> None:
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "out"))
    theirs = transformers.SiglipModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.SiglipProcessor.from_pretrained(tmp_path / "out", backend="pil")
    texts = ["a photo of two cats", "snow"]
    inputs = processor(text=texts, images=photos((50, 40)), padding="max_length", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], siglip.tokenize(texts))
    with torch.no_grad():
        logits = theirs(**inputs).logits_per_image
        image = siglip.encode_image(siglip.preprocess(photos((50, 40))[0])[None], normalize=True)
        text = siglip.encode_text(siglip.tokenize(texts), normalize=True)
        assert siglip.logit_bias is not None
        expected = siglip.logit_scale.exp() * image @ text.T + siglip.logit_bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_identical(load_model(tmp_path / "out").state_dict(), siglip.state_dict())


def test_a_siglip_in_onnx_keeps_its_bias_and_its_tokenizer(tmp_path: Path, siglip: CLIP) -> None:
    export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"))
    facts = json.loads((tmp_path / "out/model.json").read_text())
    assert siglip.logit_bias is not None
    assert facts["bias"] == pytest.approx(float(siglip.logit_bias))
    tokens = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("two cats").ids
    assert tokens == siglip.tokenize("two cats")[0, : len(tokens)].tolist()


@pytest.mark.parametrize("pooling", ["mean", pytest.param("pooler", marks=pytest.mark.slow)])
def test_a_hugging_face_text_encoder_is_exported_to_open_clip_and_onnx(
    tmp_path: Path, tiny_config: CLIPConfig, pooling: Any
) -> None:
    bert = tmp_path / "bert"
    vocab_size = word_tokenizer(bert, ["[PAD]", "<unk>", "[CLS]", "[SEP]"], "[CLS] $A [SEP]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertConfig(vocab_size=vocab_size, **sizes).save_pretrained(bert)
    text = HuggingFaceTextConfig(str(bert), False, context_length=20, pooling=pooling)
    ours = checkpoint(dataclasses.replace(tiny_config, text=text), tmp_path / "last.ckpt")
    texts = ["two cats", "snow on a mountain in the evening"]
    with torch.no_grad():
        expected = ours.encode_text(ours.tokenize(texts))

    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "oc"))
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'oc'}")(texts)
        torch.testing.assert_close(theirs.eval().encode_text(tokens), expected, rtol=1e-4, atol=1e-4)
    assert str(bert) in (tmp_path / "oc/README.md").read_text()

    export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "onnx/text_encoder.onnx")
    actual = torch.from_numpy(session.run(None, {"tokens": ours.tokenize(texts).numpy()})[0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "kind", "message"),
    [
        ("hugging_face", "resnet", "this model has ResNet and TextTransformer; use open_clip or onnx"),
        ("hugging_face", "timm", "this model has Timm and TextTransformer; use open_clip or onnx"),
        ("open_clip", "timm", "open_clip has no crop_pct, this model's is 0.875; use onnx"),
    ],
)
def test_a_model_that_a_format_cannot_represent_is_refused_in_one_line(
    tmp_path: Path, tiny_config: CLIPConfig, format: Any, kind: str, message: str
) -> None:
    checkpoint(variants(tiny_config)[kind], tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=re.escape(message)):
        export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_options_that_open_clip_would_ignore_are_refused(tmp_path: Path, siglip: CLIP) -> None:
    with pytest.raises(InputError, match="open_clip cannot pass {.*} to timm's vit_base_patch16_siglip_224; use onnx"):
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r._replace(text=r.text + 2e-4),
            "text features differ by 2.0e-04 from the original's, more than 1e-04",
        ),
        (lambda r: r._replace(image=r.image * float("nan")), "image features differ by nan"),
        (lambda r: r._replace(tokens=r.tokens + 1), "its tokenizer gives other ids than the model's"),
        (lambda r: r._replace(pixels=r.pixels + 0.1), "its preprocessing differs from the model's by"),
    ],
)
def test_an_export_with_other_outputs_leaves_no_folder(
    tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    right = export_formats.FORMATS["open_clip"]
    wrong = right._replace(read=lambda folder, sample: change(right.read(folder, sample)))
    monkeypatch.setitem(export_formats.FORMATS, "open_clip", wrong)
    with pytest.raises(InputError, match=re.escape(message)):
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_error_of_the_other_library_is_reported_in_one_line(
    tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")

    def fail(folder: Path, sample: export_formats.ExportSample) -> export_formats.Reading:
        raise RuntimeError("size mismatch\nfor a weight")

    right = export_formats.FORMATS["open_clip"]
    monkeypatch.setitem(export_formats.FORMATS, "open_clip", right._replace(read=fail))
    with pytest.raises(
        InputError, match=r"open_clip cannot open this model \(RuntimeError: size mismatch for a weight\)"
    ):
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))


def test_a_used_folder_and_a_file_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, message in (
        ("used", "the folder is not empty"),
        ("file", "there is a file of that name"),
    ):
        with pytest.raises(InputError, match=message):
            export("no such model", format="onnx", output=str(tmp_path / name))
    assert (tmp_path / "used/mine.txt").read_text() == "keep"


def test_missing_packages_of_the_export_extra_are_named(
    tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    find = export_formats.importlib.util.find_spec
    monkeypatch.setattr(
        export_formats.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(InputError, match=r"onnx needs onnxscript: pip install -e '.\[export\]'"):
        export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"))


def test_the_card_states_facts_and_its_code_runs(tmp_path: Path, tiny_config: CLIPConfig) -> None:
    ours = checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "my_model"), license="mit")
    card = (tmp_path / "my_model/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    digest = hashlib.sha256((tmp_path / "last.ckpt").read_bytes()).hexdigest()
    for fact in (f"`last.ckpt`, SHA-256 `{digest}`", f"{sum(p.numel() for p in ours.parameters()):,}", "# my_model"):
        assert fact in body
    block = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)[0]
    assert CLIPConfig.from_dict(yaml.safe_load(block)) == tiny_config
    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0].replace("my_model", str(tmp_path / "my_model"))
    ast.parse(code)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(names["tokenizer"](TEXTS), ours.tokenize(TEXTS))


@pytest.mark.parametrize(
    ("format", "size"),
    [
        *(("onnx", size) for size in ((640, 427), (301, 500), (31, 32))),
        *(
            ("hugging_face", size) for size in ((600, 400), (301, 500), (31, 32))
        ),  # 640 x 427 is off by a pixel, see above
    ],
)
def test_the_code_in_the_card_gives_our_features_of_a_photograph(
    format: str, size: tuple[int, int], tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code runs in the parent folder, as the card says."""
    ours = checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "exported"))
    photograph = Image.fromarray(load_sample_images().images[0]).resize(size)
    photograph.save(tmp_path / "photo.jpg", quality=100)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "exported/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        image = ours.encode_image(ours.preprocess(Image.open("photo.jpg"))[None], normalize=True)
        text = ours.encode_text(ours.tokenize("a photo of a dog"), normalize=True)
        logits = ours.logit_scale.exp() * image @ text.T
    if format == "hugging_face":
        torch.testing.assert_close(names["logits"], logits, rtol=0, atol=1e-3)
    else:
        for kind, expected in (("image", image), ("text", text)):
            found = torch.nn.functional.normalize(torch.from_numpy(names[f"{kind}_features"]), dim=-1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_without_a_licence_the_card_says_unknown(tmp_path: Path, tiny_config: CLIPConfig) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="hugging_face", output=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "| licence of the weights | unknown |" in card
    assert "license:" not in card


def test_the_command_writes_a_folder_and_refuses_to_overwrite_it(
    tmp_path: Path, tiny_config: CLIPConfig, cli: Any
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    words = ("export", "last.ckpt", "--format", "open_clip", "--output", "out")
    first = cli(*words)
    assert first.returncode == 0, first.stderr
    assert "image features (unit length)" in first.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    again = cli(*words)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].endswith("out: the folder is not empty; name another one")


def test_an_unknown_format_lists_the_known_ones() -> None:
    parser = command_parser("export", export)
    with pytest.raises(ArgumentError, match=r"open_clip.*hugging_face.*onnx"):
        parser.parse_args(["last.ckpt", "--format", "tflite", "--output", "other"])


@pytest.mark.slow
def test_vit_b_32_from_transformers_and_back_is_bit_exact(tmp_path: Path) -> None:
    config = CLIPConfig(activation="quick_gelu", image=VisionTransformerConfig(patch_size=32))
    theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.CLIPImageProcessor().save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config == config
    export(str(tmp_path / "theirs"), format="hugging_face", output=str(tmp_path / "out"))
    again = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    assert_identical(again.state_dict(), theirs.state_dict())
    images, tokens = torch.randn(2, 3, 224, 224), ours.tokenize(TEXTS[:2])
    with torch.no_grad():
        out = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(ours.encode_image(images, normalize=True), out.image_embeds, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=True), out.text_embeds, rtol=0, atol=1e-4)
