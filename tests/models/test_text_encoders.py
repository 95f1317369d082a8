"""transformers' models as text encoders give the features of the bare models and of open_clip's adapter; offline."""

import json
import pickle
import shutil
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from datamodules.openmoji import read_table
from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer, clean, from_source
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
from tests.models.test_tokenizer import FRAGMENTS, random_texts


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
    [(family, "mean") for family in FAMILIES]
    + [("bert", "cls"), ("bert", "last"), ("t5", "last"), ("bert", "pooler")]
    + [
        pytest.param(family, pooling, marks=pytest.mark.slow)
        for family in FAMILIES
        for pooling in ("cls", "last")
        if (family, pooling) not in (("bert", "cls"), ("bert", "last"), ("t5", "last"))
    ]
    + [pytest.param("roberta", "pooler", marks=pytest.mark.slow)],
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


def test_half_precision_weights_are_loaded_as_float32_without_a_progress_bar(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.AutoModel.from_pretrained(folders["bert"]).half().save_pretrained(tmp_path)
    save_words(tmp_path, *FAMILIES["bert"][1:])
    assert "Loading weights" in capsys.readouterr().err  # transformers' own
    for pretrained in (True, False):
        model = text_model(tmp_path, pretrained=pretrained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "Loading weights" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["roberta", pytest.param("modernbert", marks=pytest.mark.slow), "t5"])
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


# Other models' tokenizers give open_clip's and transformers' ids, and fit in a checkpoint.


Clean = Literal["whitespace", "lower", "canonicalize"]
PUNCTUATED = [
    "Hello, World_foo!",
    "it's a dog's life...",
    "{a} [b] <c>",
    "A_photo__of_a  CAT.",
    "“curly”",
    "",
    "   ",
    "!!!",
]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [emoji.name for emoji in read_table()] + [*FRAGMENTS, "café naïve 中文 日本語 hello world 123 3.14"] * 5


@pytest.fixture(scope="module")
def t5_folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Unigram tokenizer like T5's fast one, padded with the end token as in SigLIP."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer: Any = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(corpus, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    folder = tmp_path_factory.mktemp("t5")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a sentencepiece model trained like SigLIP's, in the layout of its tokenizer."""
    folder = tmp_path_factory.mktemp("siglip")
    (folder / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    train: Any = sentencepiece.SentencePieceTrainer.train
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    train(input=f"{folder}/corpus.txt", model_prefix=f"{folder}/trained", vocab_size=800, minloglevel=2, **ids)
    transformers.SiglipTokenizer(f"{folder}/trained.model").save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path, how: Clean, context_length: int = 64) -> HuggingFaceTokenizer:
    return from_source(HuggingFaceTokenizerConfig(str(folder), how), context_length, whole=True, vocab_size=1000)


@pytest.mark.parametrize("how", ["canonicalize", "lower", "whitespace"])
def test_ids_of_random_unicode_are_open_clips(how: Clean, t5_folder: Path) -> None:
    texts = [*random_texts(2000, seed=4, extra=["</s>", "<unk>", "hello_world", "A.B"]), *PUNCTUATED]
    ours = tokenizer_of(t5_folder, how)(texts)
    theirs = HFTokenizer(str(t5_folder), context_length=64, clean=how)(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert differ == []
    assert ours.shape == (len(texts), 64)
    assert ours.dtype == torch.int64
    assert (ours[:, -2] != ours[:, -1]).sum() > 50  # some texts are truncated


@pytest.mark.parametrize(
    ("how", "cleaned"),
    [
        ("whitespace", 'A "Photo_of" a\u2014CAT\'s <b>'),
        ("lower", 'a "photo_of" a\u2014cat\'s <b>'),
        ("canonicalize", "a photo of a\u2014cats b"),
    ],
)
def test_texts_are_cleaned_as_configured(how: str, cleaned: str) -> None:
    assert clean('  A "Photo_of"\n a\u2014CAT\'s &amp;lt;b&amp;gt; ', how) == cleaned


def test_a_bare_sentencepiece_model_gives_the_ids_of_siglips_own_tokenizer(siglip_folder: Path) -> None:
    assert not (siglip_folder / "tokenizer.json").exists()
    theirs = transformers.SiglipTokenizer.from_pretrained(siglip_folder)
    # transformers removes "_", where SigLIP's training and open_clip put a space. And where sentencepiece replaces a
    # character followed by a combining mark, the library `tokenizers` loses the mark, here and in open_clip: the texts
    # are normalised first.
    texts = [clean(text, "canonicalize") for text in [*random_texts(2000, seed=5, extra=[]), *PUNCTUATED]]
    texts = [clean(unicodedata.normalize("NFKC", text).replace("\ufffd", ""), "canonicalize") for text in texts]
    expected: Any = theirs(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    ours = tokenizer_of(siglip_folder, "canonicalize")(texts)
    differ = [text for text, a, b in zip(texts, ours, expected.input_ids, strict=True) if not torch.equal(a, b)]
    assert differ == []


def test_padding_is_trimmed_unless_the_encoder_attends_to_it(t5_folder: Path) -> None:
    whole = tokenizer_of(t5_folder, "canonicalize", 16)
    tokens = whole(["a dog", "grinning face with a hat", ""])
    assert torch.equal(whole.trim(tokens), tokens)
    assert whole.lengths(tokens).tolist() == [16, 16, 16]
    other = HuggingFaceTokenizer(whole.definition, 0, "canonicalize", 16, whole=False)
    tokens = other(["a dog", "grinning face with a hat", ""])
    used = [len(other._tokenizer.encode(text).ids) for text in ("a dog", "grinning face with a hat", "")]
    assert used[2] == 1  # only the end
    assert other.lengths(tokens).tolist() == used
    assert torch.equal(other.trim(tokens), tokens[:, : max(used)])
    assert other.trim(tokens[:0]).shape == (0, 16)


def test_overlong_empty_and_foreign_input(t5_folder: Path) -> None:
    tokenizer = tokenizer_of(t5_folder, "lower", 8)
    long, empty = tokenizer(["tiger " * 30, ""])
    end = tokenizer.pad_id  # the same id in SigLIP
    assert long[-1] == end
    assert (long[:-1] != end).all()
    assert empty.tolist() == [end] * 8
    assert tokenizer([]).shape == (0, 8)
    assert torch.equal(tokenizer("tiger"), tokenizer(["tiger"]))
    with pytest.raises(InputError, match="text 1 is a int, not a string"):
        tokenizer(["a dog", 3])  # type: ignore[list-item]  # refusing it is tested


def test_ids_are_counted_before_truncation(t5_folder: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(t5_folder)
    tokenizer = from_source(HuggingFaceTokenizerConfig(str(t5_folder), "whitespace"), 4, False, 600)
    for text in ["", "a dog", "a dog on a sofa " * 40]:
        assert tokenizer.count(text) == len(theirs(text.strip())["input_ids"])
    assert tokenizer("a dog on a sofa " * 40).shape == (1, 4)  # counting does not switch truncation off


def test_a_tokenizer_survives_pickling_another_length_and_plain_values(t5_folder: Path) -> None:
    tokenizer = tokenizer_of(t5_folder, "canonicalize", 16)
    texts = ["A photo of a Tiger.", "grinning face"]
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts), tokenizer(texts))
    assert torch.equal(tokenizer.with_context(9)(texts)[:, :9], tokenizer_of(t5_folder, "canonicalize", 9)(texts))
    again = HuggingFaceTokenizer(**tokenizer.to_dict(), clean="canonicalize", context_length=16, whole=True)
    assert torch.equal(again(texts), tokenizer(texts))
    assert tokenizer.decode(tokenizer(texts)[0].tolist()) == "a photo of a tiger"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("gone", "no tokenizer at"),
        ("damaged", "no tokenizer at"),
        ("no padding", "has no padding token"),
        ("no words", "has no vocabulary; its tokenizer.json, vocab.txt or spiece.model is missing"),
        ("no unknown", "cannot read texts"),
        ("too small", r"has ids up to \d+, but the encoder has 100; it belongs to another model"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_in_one_line(
    spoil: str, message: str, t5_folder: Path, tmp_path: Path
) -> None:
    if spoil == "no words":
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    elif spoil == "no unknown":
        words = Tokenizer(models.WordLevel({"dog": 0, "[PAD]": 1}, unk_token="[UNK]"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path)
    elif spoil not in ("gone", "damaged"):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(t5_folder)
        if spoil == "no padding":
            tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
    elif spoil == "damaged":
        (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = TextTransformerConfig(16, 100, 64, 1, 1, causal=False, tokenizer=HuggingFaceTokenizerConfig(str(tmp_path)))
    if spoil == "no padding":
        text.vocab_size = 1000
    model = CLIP(CLIPConfig(16, VisionTransformerConfig(32, 16, 64, 1, 1), text))
    with pytest.raises(InputError, match=message) as refusal:
        model.tokenize("a dog")
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_with_more_sentinels_than_the_encoder_is_accepted(t5_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(t5_folder)
    size = len(tokenizer)
    tokenizer.add_tokens(
        [f"<extra_id_{i}>" for i in range(100)]
    )  # as in mT5, whose published encoders have no embeddings for them
    tokenizer.save_pretrained(tmp_path)
    config = HuggingFaceTokenizerConfig(str(tmp_path))
    assert from_source(config, 16, whole=True, vocab_size=size)("tiger").shape == (1, 16)
    with pytest.raises(InputError, match="belongs to another model"):
        from_source(config, 16, whole=True, vocab_size=size - 1)
