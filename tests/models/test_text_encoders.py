"""transformers' models as text encoders give the features of the bare models and of open_clip's adapter; offline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from torch import Tensor

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    TimmConfig,
)
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import token_hashes
from tests.helpers.towers import (
    FAMILIES,
    TEXTS,
    D,
    assert_all_trainable_weights_are_used,
    save_family,
    save_words,
    saved,
    text_config,
    text_model,
)


def by_hand(folder: Path, text: str, pooling: str) -> Tensor:
    """Encode one unpadded text with the bare model: ``[W]``."""
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
def test_padding_changes_nothing_and_pooling_matches_the_bare_model(
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
        one_by_one = torch.cat([model.encode_text(model.tokenizer.trim(row[None])) for row in tokens])
        torch.testing.assert_close(one_by_one, features, atol=1e-5, rtol=0)
        texts = TEXTS[:-1] if family == "gpt2" else TEXTS  # the bare model refuses a text without tokens
        expected = torch.stack([by_hand(folders[family], text, pooling) for text in texts])
        expected = expected @ model.text.proj.weight.T  # type: ignore[operator]  # a Linear
        torch.testing.assert_close(features[: len(texts)], expected, atol=1e-5, rtol=0)
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
        if (family, rest[0]) != ("mt5", "pooler")  # mT5 has no pooler
    ],
)
def test_open_clip_gives_the_same_features_with_the_same_weights(
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
    with pytest.raises(InputError, match="has 32 features but embed_dim is 24; set a projection"):
        text_model(folders["bert"], projection="none")


def test_without_pretrained_the_weights_are_random_and_need_no_file(folders: dict[str, Path], tmp_path: Path) -> None:
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


def test_half_precision_weights_are_loaded_as_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(folders["bert"]).half().save_pretrained(tmp_path)
    save_words(tmp_path, *FAMILIES["bert"][1:])
    for pretrained in (True, False):
        model = text_model(tmp_path, pretrained=pretrained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["roberta", "modernbert", "t5"])
def test_a_checkpoint_does_not_need_the_encoders_folder(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(folders[family], folder)
    text = HuggingFaceTextConfig(str(folder), context_length=32)
    path, model = saved(LitCLIP(CLIPConfig(D, TimmConfig("test_convnext", image_size=32), text)), tmp_path)
    image = Image.new("RGB", (50, 40), "red")
    with torch.no_grad():
        expected = model.encode_text(model.tokenize(TEXTS)), model.encode_image(model.preprocess(image)[None])
    shutil.rmtree(folder)
    again = load_model(path)
    assert torch.equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    assert again.tokenizer.decode(again.tokenize("a red car")[0].tolist()) == "a red car"
    with torch.no_grad():
        assert torch.equal(again.encode_text(again.tokenize(TEXTS)), expected[0])
        assert torch.equal(again.encode_image(again.preprocess(image)[None]), expected[1])
        shorter = load_model(path, context_length=8)
        short = shorter.encode_text(shorter.tokenize("a dog"))
        torch.testing.assert_close(short, expected[0][:1], atol=1e-5, rtol=0)
    assert shorter.tokenize("a dog").shape == (1, 8)
    assert LitCLIP.load_from_checkpoint(path, map_location="cpu").model.tokenize("a dog").shape == (1, 32)


def _broken(kind: str, folders: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Damage a copy of BERT's folder; return encoder settings that expose the damage."""
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
        return {"model": {**text_config(folders["bert"]).text.model, "hidden_size": 64}}  # type: ignore[union-attr]  # a HuggingFaceTextConfig
    return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("images too", "has an image encoder too; open the whole model with load_model"),
        ("no padding", "has no padding token"),
        ("not JSON", "no Hugging Face model at"),
        ("unknown kind", "no Hugging Face model at"),
        ("own code", "no Hugging Face model at"),
        ("truncated", "no weights of that model there"),
        ("fewer layers", r"its weights lack encoder.layer.1\..*, which would be random"),
        ("wider", "no weights of that model there"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(
    kind: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = _broken(kind, folders, tmp_path / "spoilt")
    with pytest.raises(InputError, match=message) as refusal:
        text_model(tmp_path / "spoilt", **settings)
    assert str(tmp_path / "spoilt") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "spoilt" / "ran").exists()


def test_settings_that_the_encoder_does_not_support_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Hugging Face model at '.*nowhere'"):
        text_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match="context_length 41 exceeds the 40 positions"):
        text_model(folders["bert"], context_length=41)
    with pytest.raises(InputError, match="context_length 39 exceeds the 38 positions"):  # RoBERTa's begin at 2
        text_model(folders["roberta"], context_length=39)
    assert text_model(folders["roberta"], context_length=38).encode_text(torch.full((1, 38), 5)).shape == (1, D)
    assert text_model(folders["t5"], context_length=400).context_length == 400  # T5's positions are relative
    with pytest.raises(InputError, match="has no pooler; choose another pooling"):
        text_model(folders["distilbert"], pooling="pooler")


def test_captions_hash_the_same_in_batches_of_different_width(folders: dict[str, Path]) -> None:
    tokenizer = text_model(folders["roberta"]).tokenizer
    assert tokenizer.pad_id == 1
    narrow, wide = (
        token_hashes(tokenizer.trim(tokenizer(texts)), tokenizer.context_length, tokenizer.pad_id)
        for texts in (["a dog"], ["a dog", TEXTS[1]])
    )
    assert narrow[0] == wide[0] != wide[1]
