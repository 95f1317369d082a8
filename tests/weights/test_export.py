"""An export either gives the model's features, pixels and ids in the other tool, or leaves no folder."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import open_clip
import pytest
import tokenizers
import torch
import transformers

from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    Preprocessing,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.weights import export as export_formats
from lit_clip.weights.formats import FORMATS
from lit_clip.weights.load import load_model
from tests.helpers.exports import TEXTS, assert_identical, checkpoint, photos, traced_once, variants

pytestmark = pytest.mark.usefixtures("offline", "_traced_once")


@pytest.fixture
def _traced_once(traces: Path) -> Iterator[None]:
    with traced_once(traces):
        yield


@pytest.mark.parametrize(
    "kind", ["vit", pytest.param("quick_gelu", marks=pytest.mark.slow), "gelu_tanh", "resnet", "timm", "classifier"]
)
def test_open_clip_opens_the_folder_with_our_features_pixels_and_ids(
    tmp_path: Path, tiny_config: CLIPConfig, kind: str
) -> None:
    config = variants(tiny_config)[kind]
    if kind == "timm":
        config.preprocessing = Preprocessing(64)  # timm's crops the resized image, which open_clip leaves out
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


@pytest.mark.parametrize("kind", ["vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("resnet", "timm"))])
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


# Without VNNI instructions ONNX Runtime's sums of two int8 products saturate at 16 bits.
INT8 = 5e-2 if torch.cpu._is_vnni_supported() else 1e-1


@pytest.mark.parametrize(
    ("dtype", "kind", "share", "tolerance"),
    [("float16", "vit", 0.55, 5e-3), pytest.param("int8", "resnet", 0.3, INT8, marks=pytest.mark.slow)],
)
def test_smaller_onnx_files_give_our_features_within_their_tolerance(
    tmp_path: Path,
    tiny_config: CLIPConfig,
    dtype: Any,
    kind: str,
    share: float,
    tolerance: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sizes are those of the text encoders, whose files are nearly all weights."""
    ours = checkpoint(variants(tiny_config)[kind], tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"), dtype=dtype)
    assert f"onnx in {dtype}" in capsys.readouterr().out
    assert f"| weights | {dtype} |" in (tmp_path / "out/README.md").read_text()
    whole = 4 * sum(p.numel() for name, p in ours.named_parameters() if not name.startswith("visual."))
    assert (tmp_path / "out/text_encoder.onnx").stat().st_size < share * whole
    size = ours.preprocessing.image_size
    pixels, tokens = torch.randn(3, 3, size, size), ours.tokenize(TEXTS)
    with torch.no_grad():
        expected = {"image": ours.encode_image(pixels, True), "text": ours.encode_text(tokens, True)}
    for name, key, values in (("image", "pixels", pixels), ("text", "tokens", tokens)):
        session = onnxruntime.InferenceSession(tmp_path / f"out/{name}_encoder.onnx")
        found = torch.cat([torch.from_numpy(session.run(None, {key: row[None].numpy()})[0]) for row in values])
        assert found.dtype == torch.float32
        found = torch.nn.functional.normalize(found, dim=-1)
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance)
        assert not torch.allclose(found, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_attention_pool_in_float16_opens(tmp_path: Path, tiny_config: CLIPConfig) -> None:
    """With the whole pool in float16, onnxruntime's graph optimiser crashes behind two blocks and more."""
    image = VisionTransformerConfig(32, 16, 64, 2, 1, pool="attention", pool_queries=256, pool_heads=8)
    checkpoint(dataclasses.replace(tiny_config, image=image, preprocessing=None), tmp_path / "last.ckpt")
    export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"), dtype="float16")
    types = [tensor.data_type for tensor in onnx.load(tmp_path / "out/image_encoder.onnx").graph.initializer]
    assert types.count(onnx.TensorProto.FLOAT16) > types.count(onnx.TensorProto.FLOAT)


def test_a_crash_of_onnxruntime_is_an_error(
    tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_formats, "OPEN", "import os; os.abort()")
    with pytest.raises(InputError, match=r"onnxruntime crashes on opening this model \(exit status -6\)"):
        export_formats.read_onnx(tmp_path, export_formats.ExportSample.of(CLIP(tiny_config)))


def test_formats_of_float32_weights_refuse_another_type_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--dtype int8: open_clip holds float32 weights, .* only onnx has others"):
        export("no such model", format="open_clip", output=str(tmp_path / "out"), dtype="int8")


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


def siglip_config(words: Path, vocab_size: int) -> CLIPConfig:
    """A tiny SigLIP whose tokenizer is saved in ``words``."""
    image = {"embed_dim": 48, "depth": 1, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 16}
    return CLIPConfig(
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
            tokenizer=HuggingFaceTokenizerConfig(str(words), "canonicalize"),
        ),
        activation="gelu_tanh",
        preprocessing=Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode="squash"),
        logit_bias=True,
    )


@pytest.fixture
def siglip(tmp_path: Path) -> CLIP:
    """A tiny SigLIP, with the folder of its tokenizer beside its checkpoint."""
    vocab_size = word_tokenizer(tmp_path / "tok", ["</s>", "<unk>"], "$A </s>")
    return checkpoint(siglip_config(tmp_path / "tok", vocab_size), tmp_path / "last.ckpt")


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


@pytest.mark.slow
def test_transformers_opens_an_exported_naflex_model_as_a_siglip2_model(tmp_path: Path, siglip: CLIP) -> None:
    """Images of several aspect ratios in one batch, through transformers' own processor."""
    image, text = siglip.config.image, siglip.config.text
    assert isinstance(image, TimmConfig)
    assert isinstance(text, TextTransformerConfig)
    naflex = dataclasses.replace(image, timm="naflexvit_base_patch16_siglip", image_size=None)
    naflex.options |= {"patch_size": 8, "pos_embed_grid_size": [4, 4]}
    ids = {
        token: i
        for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz▁"])
    }
    transformers.Siglip2Tokenizer(vocab=ids, merges=[]).save_pretrained(tmp_path / "gemma")
    source = HuggingFaceTokenizerConfig(str(tmp_path / "gemma"), "lower")
    text = dataclasses.replace(text, vocab_size=len(ids), tokenizer=source)
    half = (0.5, 0.5, 0.5)
    patches = Preprocessing(mean=half, std=half, interpolation="bilinear", max_patches=30, patch_size=8)
    config = dataclasses.replace(siglip.config, image=naflex, text=text, preprocessing=patches)
    ours = checkpoint(config, tmp_path / "naflex.ckpt")
    export(str(tmp_path / "naflex.ckpt"), format="hugging_face", output=str(tmp_path / "out"))
    theirs = transformers.Siglip2Model.from_pretrained(tmp_path / "out").eval()
    processor: Any = transformers.Siglip2Processor.from_pretrained(tmp_path / "out", backend="pil")
    texts, images = ["a photo of CATS", "snow"], photos((50, 40), (20, 90), (40, 40))
    sizes = {"patch_size": 8, "max_num_patches": 30, "max_length": 16}
    inputs = processor(text=texts, images=images, padding="max_length", return_tensors="pt", **sizes)
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        logits = theirs(**inputs).logits_per_image
        features = [again.encode_image(torch.stack([again.preprocess(image) for image in images]), normalize=True)]
        features.append(again.encode_text(again.tokenize(texts), normalize=True))
        assert again.logit_bias is not None
        expected = again.logit_scale.exp() * features[0] @ features[1].T + again.logit_bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_identical(again.state_dict(), ours.state_dict())
    assert again.preprocessing == ours.preprocessing
    for format in ("open_clip", "onnx"):
        with pytest.raises(InputError, match="only hugging_face has NaFlex's patches"):
            export(str(tmp_path / "naflex.ckpt"), format=format, output=str(tmp_path / format))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_a_hugging_face_text_encoder_is_exported_to_open_clip_and_onnx(
    tmp_path: Path, tiny_config: CLIPConfig, pooling: Any, capsys: pytest.CaptureFixture[str]
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
    assert f"open_clip opens it only where {bert} is" in capsys.readouterr().out
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
        ("hugging_face", "resnet", "a CLIPModel has image encoder VisionTransformer, this model ResNet; use open_clip"),
        ("hugging_face", "timm", "a CLIPModel has image encoder VisionTransformer, this model Timm; use open_clip"),
    ],
)
def test_a_model_that_a_format_cannot_represent_is_refused_in_one_line(
    tmp_path: Path, tiny_config: CLIPConfig, format: Any, kind: str, message: str
) -> None:
    checkpoint(variants(tiny_config)[kind], tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=re.escape(message)):
        export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_siglips_bias_is_beside_its_onnx_files(siglip: CLIP) -> None:
    assert siglip.logit_bias is not None
    assert export_formats.onnx_facts(siglip)["bias"] == float(siglip.logit_bias) != 0


def test_options_that_open_clip_would_ignore_are_refused(tmp_path: Path, siglip: CLIP) -> None:
    with pytest.raises(InputError, match="open_clip cannot pass {.*} to timm's vit_base_patch16_siglip_224; use onnx"):
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "out"))


def _fail(_: object) -> None:
    raise RuntimeError("size mismatch\nfor a weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r._replace(text=r.text + 2e-4),
            "text features differ by 2.0e-04 from the original's, more than 1e-04",
        ),
        (lambda r: r._replace(image=r.image * float("nan")), "image features differ by nan"),
        (lambda r: r._replace(tokens=r.tokens + 1), "its tokenizer gives other token ids than the model's"),
        (lambda r: r._replace(pixels=r.pixels + 0.1), "its preprocessing differs from the model's by"),
        (_fail, "open_clip cannot open this model (RuntimeError: size mismatch for a weight)"),
    ],
)
def test_an_export_with_other_outputs_leaves_no_folder(
    tmp_path: Path, tiny_config: CLIPConfig, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    checkpoint(tiny_config, tmp_path / "last.ckpt")
    right = FORMATS["open_clip"]
    wrong = right._replace(read=lambda folder, sample: change(right.read(folder, sample)))
    monkeypatch.setitem(FORMATS, "open_clip", wrong)
    with pytest.raises(InputError, match=re.escape(message)):
        export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "exported" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_used_folder_and_a_file_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, message in (
        ("used", "the folder is not empty"),
        ("file", "file: is a file; name a folder"),
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
    with pytest.raises(InputError, match="onnx needs onnxscript: pip install onnxscript"):
        export(str(tmp_path / "last.ckpt"), format="onnx", output=str(tmp_path / "out"))
