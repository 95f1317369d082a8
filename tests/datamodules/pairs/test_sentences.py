"""Long captions are read by whole sentences that fit, reproducibly; what is cut off of captions is reported."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from torch import Tensor

from datamodules import Captions
from datamodules.open_source import open_source
from datamodules.pairs.reports import FittingCaptions, caption_statistics, fitting, report_captions, sentences
from datamodules.pairs.source import CaptionOptions, Rows
from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Loss, Sigmoid, WholeBatch
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer
from lit_clip.models.tokenizer import CallableTokenizer, CLIPTokenizer, TextTokenizer
from tests.helpers import epochs
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table

CUT = [
    "A dog. |It runs! |Does it? |Yes.",
    "It is approx. 3 m long. |Dr. Smith (U.S. Army) saw it, e.g. A. Jones. |The end.",
    "He said “Go.” |Then he left ... and came back?! |(Really.) |It has v1.2 of 3.5 at www.a.com.",
    "犬がいる。|「走る。」|とても速い！？|値は３．５です。",
    "一只狗。|它在跑！|真的吗？",
    "यह कुत्ता है। |यह बिल्ली है।",
    "هل هذا كلب؟ |نعم. |هذا كلب.",
    "A list:\n|1. A dog\n|2. A cat that a mail programme\nwrapped.\r\n\r\n|The end",
    "a dog runs. |it is approx. 3 m long. |the end",
    "!!! wow",
    "...",
    "123",
    "no end",
]
LONG = "A red dog runs. It is approx. 3 m long. Two cats sleep on the mat. The sun shines! Is it warm? It is."


def unigrams(context_length: int) -> HuggingFaceTokenizer:
    """A SentencePiece-like tokenizer, whose tokens of a text are not the sum of those of its sentences."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([LONG.lower()], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return HuggingFaceTokenizer(tokenizer.to_str(), 0, "lower", context_length, whole=False)


@pytest.mark.parametrize("marked", CUT)
def test_texts_are_cut_after_their_sentences_and_nothing_is_lost(marked: str) -> None:
    assert sentences(marked.replace("|", "")) == marked.split("|")
    assert sentences("") == []


@pytest.mark.parametrize("text", ["a. ", ".", " \n", "\"'", ".!", ".)", "\n", "．", "。」", "A.B "])
def test_hostile_texts_are_cut_in_linear_time(text: str) -> None:
    """What is quadratic takes minutes here."""
    whole = text * (60_000 // len(text)) + "a"
    assert "".join(sentences(whole)) == whole


@pytest.mark.parametrize(
    "tokenizer", [CLIPTokenizer(20), CLIPTokenizer(77), unigrams(60)], ids=["20", "77", "unigrams"]
)
def test_sentences_are_whole_in_their_order_fit_and_differ_between_epochs(tokenizer: TextTokenizer) -> None:
    parts = [part.strip() for part in sentences(LONG)]
    if tokenizer.count(LONG) <= tokenizer.context_length:
        assert fitting(LONG, tokenizer, random.Random(0)) == LONG
        return
    drawn = [fitting(LONG, tokenizer, random.Random(seed)) for seed in range(50)]
    assert drawn == [fitting(LONG, tokenizer, random.Random(seed)) for seed in range(50)]
    for text in [*drawn, fitting(LONG, tokenizer, None)]:
        assert tokenizer.count(text) <= tokenizer.context_length
        chosen = [part.strip() for part in sentences(text)]
        assert chosen
        assert [part for part in parts if part in chosen] == chosen
    assert {part for text in drawn for part in parts if part in text} == set(parts)
    first = fitting(LONG, tokenizer, None)
    assert LONG.startswith(first)
    rest = LONG[len(first) :].strip()
    assert tokenizer.count(f"{first} {sentences(rest)[0]}") > tokenizer.context_length


def test_a_sentence_that_is_too_long_gives_way_to_those_that_fit_or_is_truncated() -> None:
    endless = "Cat " * 30
    tokenizer = CLIPTokenizer(10)
    assert fitting(f"{endless}. A dog. Two.", tokenizer, None) == "A dog. Two."
    assert {fitting(f"{endless}. A dog. {endless}", tokenizer, random.Random(seed)) for seed in range(9)} == {"A dog."}
    assert fitting(endless, tokenizer, None) == endless.strip()
    assert tokenizer([endless]).shape == (1, 10)
    assert fitting("犬がいる。" * 9, tokenizer, None) == "犬がいる。"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve long captions, one of them a single sentence without an end."""
    rows = []
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        text = " ".join(f"Sentence {word} of {number}." for word in ("one", "two", "three", "four", "five"))
        rows.append({"image": f"{number}.png", "caption": text if number else "cat " * 30})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


def opened(table: Path, **options: Any) -> Captions:
    data = epochs.opened(table, **{"val": str(table), "captions": CaptionOptions("sentences"), **options})
    data.tokenize = CLIPTokenizer(14)
    return data


def texts(loader: Any, epoch: int | None = None) -> dict[str, str]:
    if epoch is not None:
        loader.batch_sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        assert torch.equal(batch.tokens[:, :14], CLIPTokenizer(14)(batch.captions)[:, : batch.tokens.shape[1]])
        found.update(zip(batch.keys, batch.captions, strict=True))
    return found


def test_every_epoch_reads_other_sentences_the_same_on_any_worker_and_after_a_resume(table: Path) -> None:
    loader = opened(table).train_dataloader()
    first, second, again = (texts(loader, epoch) for epoch in (0, 1, 0))
    assert first == again != second
    assert texts(opened(table).train_dataloader(), 1) == second  # a process that begins with this epoch
    assert texts(opened(table, num_workers=2).train_dataloader(), 1) == second
    assert texts(opened(table, seed=1).train_dataloader(), 1) != second
    assert first["0.png"].strip() == ("cat " * 30).strip()
    valid = texts(opened(table).val_dataloader())
    assert valid["3.png"] == "Sentence one of 3. Sentence two of 3."
    assert valid == texts(opened(table).val_dataloader())


def test_sentences_do_not_depend_on_the_number_of_ranks(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, data = texts(opened(table).train_dataloader(), 1), opened(table)
    shared: dict[str, str] = {}
    data.batch_size = 2
    for rank in range(2):
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, 2))
        shared.update(texts(data.train_dataloader(), 1))
    assert shared == alone


def test_captions_that_no_sentence_of_fits_are_counted(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(table).val_source
    assert source is not None
    found = caption_statistics(source, CLIPTokenizer(14))
    assert (found.truncated, found.endless) == (1, 1 / 12)
    lines: list[str] = []
    monkeypatch.setattr("datamodules.pairs.reports.rank_zero_info", lines.append)
    report_captions(source, CLIPTokenizer(14), "sentences")
    report_captions(source, CLIPTokenizer(14), "truncate")
    report_captions(source, CLIPTokenizer(77), "sentences")
    (line, other) = lines
    assert line.startswith("captions: 100.0% of the first 12 exceed 14 tokens and are read by sentences that fit; 8.3%")
    assert "are truncated to 14 tokens" in other


def test_a_tokenizer_that_cannot_count_and_an_unknown_policy_are_refused(table: Path) -> None:
    source = opened(table).val_source
    assert source is not None
    with pytest.raises(InputError, match=r"^data\.captions\.long: sentences needs a tokenizer that counts"):
        FittingCaptions(Rows(source, torch.arange(2).numpy()), CallableTokenizer(CLIPTokenizer(14), 14))
    with pytest.raises(InputError, match=r"^data\.captions\.long: 'words' must be one of truncate, sentences"):
        CaptionOptions("words")  # pyright: ignore[reportArgumentType]


SIGLIP = replace(make_module().model.config, logit_bias=True)


class Mine(Loss):
    """A user's loss, which treats equal captions in its own way."""

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        return -((pairs.image @ pairs.text.T) * pairs.same).mean()


WORDS = [1, 3, 6, 9, 20]  # "cat" is one token; start and end are two more


@pytest.fixture
def lists_table(tmp_path: Path) -> Path:
    lists = [["cat " * WORDS[0]], ["cat " * WORDS[1], "cat " * WORDS[2]], ["cat " * WORDS[3]], ["cat " * WORDS[4]]]
    rows = [{"image": "none.png", "caption": captions} for captions in lists]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


def test_share_of_truncated_captions_and_tokens_lost(lists_table: Path) -> None:
    """No image is read: there is none."""
    found = caption_statistics(open_source(lists_table), CLIPTokenizer(context_length=8))
    assert found.captions == 5
    assert found.truncated == 2 / 5  # of 3, 5, 8, 11 and 22 tokens
    assert found.tokens_lost == (3 + 14) / 2
    none = caption_statistics(open_source(lists_table), CLIPTokenizer())
    assert (none.truncated, none.tokens_lost) == (0, 0)


def test_captions_that_repeat_are_reported_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i}.png,{'ab'[i > 7]} {i // 4}\n" for i in range(9)))
    source = open_source(tmp_path / "t.csv")
    assert caption_statistics(source, CLIPTokenizer()).repeated == 8 / 9
    with caplog.at_level(logging.INFO):
        report_captions(source, CLIPTokenizer(), "truncate")
    assert "89% of the first 9 occur more than once" in caplog.text
    assert "--model.loss.duplicates positives" in caplog.text
    assert '(in Python loss=Contrastive(duplicates="positives"))' in caplog.text


@pytest.mark.parametrize(
    ("loss", "advice"),
    [(Contrastive(), "Contrastive"), (Sigmoid(), "Sigmoid"), (Contrastive("ignored"), ""), (Mine(), "")],
)
def test_a_loss_that_knows_what_to_do_with_equal_captions_is_left_alone(
    loss: Loss, advice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(tmp_path)
    path.write_text("image,caption\n" + "".join(f"{row}.png,the same\n" for row in range(8)), encoding="utf-8")
    module = make_module(loss=loss) if advice != "Sigmoid" else LitCLIP(SIGLIP, loss=loss)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0).fit(module, data_for(module, path))
    assert ("occur more than once" in caplog.text) == bool(advice)
    assert (
        not advice
        or f"--model.loss {advice} --model.loss.duplicates positives (in Python loss={advice}(" in caplog.text
    )


def test_unusable_captions_are_skipped(tmp_path: Path) -> None:
    for name, text in (("a", b"a cat"), ("b", b"\xff"), ("c", b" ")):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    assert caption_statistics(open_source(tmp_path), CLIPTokenizer()).captions == 1
