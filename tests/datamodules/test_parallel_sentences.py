"""A text encoder learns a toy language from sentences and translations alone; the image encoder serves it as it is."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback

from callbacks import FrozenFeatures
from datamodules import ParallelSentences
from lit_clip import load_model
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.losses import Alignment
from lit_clip.models.clip import CLIP
from lit_clip.models.finetuning import Freeze
from lit_clip.module import LitCLIP
from lit_clip.tools.stored_rows import StoredRows
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.frozen_runs import config_of
from tests.test_module import trainer

LETTERS = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ebcdifghojklmnupqrstavwxyz"[::-1])


def translated(text: str) -> str:
    """Return a text of a toy language: other letters."""
    return text.lower().translate(LETTERS)


@pytest.fixture
def sentences(tmp_path: Path, overfitted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A table of 64 names of drawings and their translations, one without, and the names."""
    with overfitted[1].open(encoding="utf-8") as file:
        names = [row["caption"] for row in csv.DictReader(file)]
    path = tmp_path / "sentences.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [*zip(names, map(translated, names), strict=True), ("not translated", "")]
        csv.writer(file).writerows([("source", "target"), *rows])
    monkeypatch.setattr(ParallelSentences, "cache_folder", tmp_path / "cache")
    return path, names


def fit(module: LitCLIP, data: ParallelSentences, folder: Path, *callbacks: Callback, **options: Any) -> Any:
    options = {"max_epochs": 45, "limit_val_batches": 0, "num_sanity_val_steps": 0, **options}
    fitting = trainer(folder, callbacks=list(callbacks), **options)
    fitting.fit(module, data)
    return fitting


def learner(pretrained: Path, **options: Any) -> LitCLIP:
    rate = {"optimizer": partial(PaperAdamW, lr=2e-3), "lr_scheduler": partial(WarmupCosine, warmup_steps=10)}
    settings: dict[str, Any] = {"loss": Alignment(), "freeze": Freeze("all", temperature=True), **rate, **options}
    return LitCLIP(None, pretrained, **settings)


def named_right(model: CLIP, images: torch.Tensor, names: list[str]) -> float:
    return float((model.encode(names) @ images.T).argmax(dim=0).eq(torch.arange(len(names))).float().mean())


def test_images_are_found_in_the_new_language_and_in_the_old_one(
    sentences: tuple[Path, list[str]], overfitted: tuple[Path, Path], tmp_path: Path
) -> None:
    path, names = sentences
    with overfitted[1].open(encoding="utf-8") as file:
        images = [overfitted[1].parent / row["image"] for row in csv.DictReader(file)]
    before = load_model(overfitted[0])
    features, others = before.encode(images), [translated(name) for name in names]
    module = learner(overfitted[0])
    data = ParallelSentences(str(path), str(path), batch_size=64, num_workers=0)
    metrics = fit(module, data, tmp_path, limit_val_batches=1.0, check_val_every_n_epoch=45).callback_metrics
    assert named_right(before, features, others) < 0.1
    assert named_right(module.model.eval(), features, others) > 0.8 * named_right(before, features, names)
    assert named_right(module.model, features, names) > 0.8 * named_right(before, features, names)
    assert metrics["val/text_to_image_recall@1"] > 0.8
    for name, value in before.visual.state_dict().items():
        assert torch.equal(module.model.visual.state_dict()[name], value)


class Losses(Callback):
    """Keep batches and losses, and compute each loss one pair at a time."""

    def __init__(self, teacher: CLIP) -> None:
        self.teacher, self.found, self.expected, self.kept = teacher, [], [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ours = pl_module.model.encode(list(batch.captions)).double()
        theirs = self.teacher.encode(batch.keys).double()
        total = sum(float(((a - b) ** 2).sum()) for a, b in zip(ours, theirs, strict=True))
        self.expected.append(total / len(batch.keys))
        self.kept += [caption == key for caption, key in zip(batch.captions, batch.keys, strict=True)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(float(pl_module.last_step.loss))


def test_the_loss_is_the_distance_to_the_teachers_features_and_half_of_the_samples_are_the_source(
    sentences: tuple[Path, list[str]], overfitted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Losses(load_model(overfitted[0]))
    data = ParallelSentences(str(sentences[0]), batch_size=19, num_workers=0)
    fit(learner(overfitted[0], micro_batch_size=8), data, tmp_path, losses, max_epochs=4)
    assert losses.found == pytest.approx(losses.expected, rel=1e-4)
    assert 0.35 < sum(losses.kept) / len(losses.kept) < 0.65
    monkeypatch.setattr(StoredRows, "write", None)  # a second run encodes nothing
    none = Losses(losses.teacher)
    data = ParallelSentences(str(sentences[0]), teacher=str(overfitted[0]), keep_source=False, num_workers=0)
    fit(learner(overfitted[0]), data, tmp_path, none, max_epochs=1)
    assert not any(none.kept)


@pytest.mark.slow
def test_a_run_resumed_within_an_epoch_ends_like_one_that_was_not_stopped(
    sentences: tuple[Path, list[str]], overfitted: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(steps: int, resumed: Path | None = None) -> LitCLIP:
        module = learner(overfitted[0])
        fitting = trainer(tmp_path, max_epochs=3, max_steps=steps, limit_val_batches=0)
        data = ParallelSentences(str(sentences[0]), str(sentences[0]), batch_size=16, num_workers=0)
        fitting.fit(module, data, ckpt_path=resumed, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = run(9)
    run(6)
    resumed = run(9, tmp_path / "6.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_two_ranks_train_as_one(
    sentences: tuple[Path, list[str]], overfitted: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = []
    for world in (1, 2):
        (folder := tmp_path / str(world)).mkdir()
        options = {
            "model.pretrained": overfitted[0],
            "data.train": sentences[0],
            "data.val": sentences[0],
            "data.batch_size": 16 // world,
            "data.num_workers": 0,
            "trainer.max_epochs": 2,
            "trainer.devices": world,
            "trainer.accelerator": "cpu",
            "trainer.strategy": "ddp" if world > 1 else "auto",
        }
        words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
        config = str(ROOT / "configs/another_language.yaml")
        run_lightning_ranks(world, folder, "lit-clip", "fit", "--config", config, *words)
        weights.append(load_model(next(folder.rglob("last.ckpt"))).state_dict())
    before = load_model(overfitted[0]).state_dict()
    assert not torch.equal(before["token_embedding.weight"], weights[0]["token_embedding.weight"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-5, msg=name)


def test_validation_has_the_first_translation_of_sentences_that_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"en": f"text {i % 20}", "xx": [f"first {i}", f"second {i}"]} for i in range(40)]
    (tmp_path / "sentences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ParallelSentences(str(tmp_path / "sentences.jsonl"), source="en", target="xx")
    train, val = data.sources(fit=True)
    assert train is not None
    trained, validated = ({source.key(row) for row in range(len(source))} for source in (train, val))
    assert (len(trained), len(validated), trained & validated) == (18, 2, set())
    assert [val.text(row, None).caption for row in range(len(val))] == [val.captions(row)[0] for row in range(len(val))]
    assert all(val.captions(row)[0].startswith("first ") for row in range(len(val)))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (["", ""], ["x", "y"], "2 rows without a sentence"),
        (["a", "b"], ["", ""], "2 rows without a translation"),
        (["a", "a"], ["x", "y"], "one sentence cannot be divided; set data.val"),
    ],
)
def test_what_a_table_lacks_is_told_in_words_of_sentences(
    source: list[str], target: list[str], message: str, tmp_path: Path
) -> None:
    rows = [f"{a},{b}" for a, b in zip(source, target, strict=True)]
    (tmp_path / "few.csv").write_text("\n".join(["source,target", *rows]))
    with pytest.raises(InputError, match=message) as error:
        ParallelSentences(str(tmp_path / "few.csv")).setup("fit")
    assert "image" not in str(error.value)


def test_a_missing_sentence_of_a_parquet_file_is_named_by_its_row(
    overfitted: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"source": ["a", None, "b", "c"], "target": list("wxyz")}), path)
    message = refused({}, path, overfitted[0], tmp_path)
    assert "some.parquet row 1: no sentence; add one or remove the row" in message


def refused(change: dict[str, Any], path: Path, weights: Path, folder: Path, *callbacks: Callback, **model: Any) -> str:
    with pytest.raises(InputError) as error:
        fit(learner(weights, **model), ParallelSentences(str(path), **change), folder, *callbacks)
    return str(error.value)


def test_what_would_teach_nothing_is_refused(
    sentences: tuple[Path, list[str]], overfitted: tuple[Path, Path], tmp_path: Path
) -> None:
    path, weights = sentences[0], overfitted[0]
    save(CLIP(config_of("vit")), tmp_path / "other.ckpt", {})
    other = {"teacher": str(tmp_path / "other.ckpt")}
    assert "set model.freeze.image to all" in refused({}, path, weights, tmp_path, freeze=None)
    assert "other.ckpt has 16 channels and the model " in refused(other, path, weights, tmp_path)
    assert "its columns are source, target; set --data.source" in refused({"source": "en"}, path, weights, tmp_path)
    callback = FrozenFeatures(str(tmp_path / "cache"))
    assert "without callbacks.FrozenFeatures; remove it" in refused({}, path, weights, tmp_path, callback)
    module = LitCLIP(config_of("vit"), freeze=Freeze("all"))
    with pytest.raises(InputError, match=r"data.teacher: who reads the sentences of data.source\? set it, or"):
        fit(module, ParallelSentences(str(path)), tmp_path)
