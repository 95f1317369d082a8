"""Caption lengths against the context length, and the refusal to truncate."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from datamodules.open_source import open_source
from datamodules.pairs.reports import caption_statistics, report_captions
from lit_clip import LitCLIP
from lit_clip.losses import Contrastive, Loss, Sigmoid, WholeBatch
from lit_clip.models.tokenizer import CLIPTokenizer
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table

SIGLIP = replace(make_module().model.config, logit_bias=True)


class Mine(Loss):
    """A user's loss, which treats equal captions in its own way."""

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        return -((pairs.image @ pairs.text.T) * pairs.same).mean()


WORDS = [1, 3, 6, 9, 20]  # "cat" is one token; start and end are two more


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lists = [["cat " * WORDS[0]], ["cat " * WORDS[1], "cat " * WORDS[2]], ["cat " * WORDS[3]], ["cat " * WORDS[4]]]
    rows = [{"image": "none.png", "caption": captions} for captions in lists]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


def test_share_of_truncated_captions_and_tokens_lost(table: Path) -> None:
    """No image is read: there is none."""
    found = caption_statistics(open_source(table), CLIPTokenizer(context_length=8))
    assert found.captions == 5
    assert found.truncated == 2 / 5  # of 3, 5, 8, 11 and 22 tokens
    assert found.tokens_lost == (3 + 14) / 2
    none = caption_statistics(open_source(table), CLIPTokenizer())
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
