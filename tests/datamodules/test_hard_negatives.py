"""Hard negative captions: from a column of a table to the batch."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.open_source import open_source
from datamodules.pairs.source import Columns
from lit_clip import LitCLIP, distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import Loss, WholeBatch
from lit_clip.models.tokenizer import CLIPTokenizer
from tests.helpers.epochs import opened, tabulated
from tests.helpers.ranks import make_batch
from tests.helpers.ranks_negatives import HOOKS, After, plain_loop
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table

ROWS = [["0.png", "a", ["not a"]], ["1.png", "b", []], ["2.png", "c", ["not c", "no c at all"]], ["3.png", "d", None]]


def table(folder: Path, suffix: str) -> Path:
    for name, *_ in ROWS:
        Image.new("RGB", (8, 8)).save(folder / name)
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(("image", "caption", "wrong"))}
    if suffix == ".csv":  # a text in each row
        columns["wrong"] = [(cell or [""])[0] for cell in columns["wrong"]]
    return tabulated(folder / f"captions{suffix}", columns)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_one_of_a_rows_negatives_is_drawn_and_validation_reads_none(suffix: str, tmp_path: Path) -> None:
    source = open_source(table(tmp_path, suffix), columns=Columns(negative="wrong"))
    drawn = [{source.load(row, random.Random(seed)).negative for seed in range(20)} for row in range(4)]
    both = {"not c"} if suffix == ".csv" else {"not c", "no c at all"}
    assert drawn == [{"not a"}, {""}, both, {""}]
    assert [source.load(row, None).negative for row in range(4)] == [""] * 4


def test_a_batch_has_the_tokens_of_the_negatives_that_there_are(tmp_path: Path) -> None:
    path, tokenize = table(tmp_path, ".csv"), CLIPTokenizer(16)
    data = opened(path, val=str(path), columns=Columns(negative="wrong"))
    data.tokenize = tokenize
    (batch,) = data.train_dataloader()
    assert sorted(batch.negatives) == ["", "", "not a", "not c"]
    found = [text for text in batch.negatives if text]
    assert batch.negative_tokens.tolist() == tokenize(found)[:, : max(batch.negative_lengths)].tolist()
    assert all(f"not {caption}" == text for caption, text in zip(batch.captions, batch.negatives, strict=True) if text)
    parts = batch.split(3)
    assert [text for part in parts for text in part.negatives] == batch.negatives
    rows = [row for part in parts for row in part.negative_tokens.tolist()]
    assert rows == batch.negative_tokens.tolist()
    longer: CaptionBatch = batch.stretched(9)
    assert (len(longer.images), [text for text in longer.negatives if text]) == (9, found)
    (validation,) = data.val_dataloader()
    assert validation.negatives == ()


def test_a_source_without_columns_refuses_a_column_of_negatives(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a")
    with pytest.raises(InputError, match="is not a table, but columns.negative is 'wrong'; leave it out"):
        open_source(tmp_path, columns=Columns(negative="wrong"))
    with pytest.raises(InputError, match="shards have no such column, but columns.negative is 'wrong'; leave it out"):
        open_source(tmp_path / "a.tar", columns=Columns(negative="wrong"))


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_hard_negatives_that_a_hook_adds_count_on_any_ranks_wherever_the_data_come_from(
    world: int, ranks: Callable[..., None], tmp_path: Path
) -> None:
    path, output = str(write_table(tmp_path, 32)), tmp_path / "weights.pt"
    ranks("train", world, str(output), path, ",".join(HOOKS), script="ranks_negatives.py")
    expected = plain_loop(path)
    found = torch.load(output, weights_only=True)
    assert len(found) == len(HOOKS)
    for name, weights in found.items():
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")


class WithoutTokens(LitCLIP):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(negatives=["no"] * len(batch.keys))


class OnlyTokens(LitCLIP):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(negative_tokens=batch.tokens)


class Moves(LitCLIP):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class Matching(Loss):
    """A loss that uses no hard negatives."""

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        return -(pairs.image * pairs.text).sum(dim=1).mean()


@pytest.mark.parametrize(
    ("kind", "loss", "message"),
    [
        (WithoutTokens, None, "4 hard negatives and 0 rows of negative_tokens; give a row to each"),
        (OnlyTokens, None, "0 hard negatives and 4 rows of negative_tokens; give a row to each"),
        (Moves, None, "Moves.transfer_batch_to_device: Lightning would not call it, because Captions has its own; use"),
        (After, Matching(), "Matching does not use hard negatives; leave them out, or use lit_clip.losses.Contras"),
    ],
)
def test_hard_negatives_that_would_not_count_are_refused(
    kind: type[LitCLIP], loss: Loss | None, message: str, tmp_path: Path
) -> None:
    module = make_module(loss=loss)
    module.__class__ = kind
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0, enable_checkpointing=False).fit(
            module, data_for(module, write_table(tmp_path, 8))
        )


def test_hard_negatives_that_ranks_cannot_know_of_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as those of a patched collate function: a rank that has none would not know of another's."""
    module = make_module()
    data = data_for(module, write_table(tmp_path, 8))
    fitting = make_trainer(tmp_path, [], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    fitting.fit(module, data)
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (0, 1))
    hard = make_batch(slice(0, 4))._replace(negatives=["a", "b", "", ""], negative_tokens=torch.ones(2, 3).long())
    assert module.begin_step(hard).negatives.counts == (2,)
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(type(fitting), "world_size", 2)
    loader: Any = fitting.train_dataloader
    monkeypatch.setattr(loader.batch_sampler, "world", 2)
    assert module.begin_step(make_batch(slice(0, 4))).negatives.counts == (0, 0)
    with pytest.raises(InputError, match="hard negatives.*; add them in on_after_batch_transfer of the module"):
        module.begin_step(hard)
