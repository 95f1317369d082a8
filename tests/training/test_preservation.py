"""Preservation: kept features stay those of the model before; value and gradients: ``tests/losses/test_loss.py``."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive, Pairs, Sum
from lit_clip.models.config import Preprocessing, ResNetConfig
from lit_clip.module import LitCLIP
from lit_clip.training.micro_batches import StepCounts, encode_step
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.preservation import Preservation
from tests.helpers import ranks
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    """Tables to train on and to keep; neither has the other's images."""
    folders = tmp_path / "new", tmp_path / "kept"
    for folder in folders:
        folder.mkdir()
    new, kept = (write_table(folder, rows) for folder, rows in zip(folders, (8, 20), strict=True))
    lines = kept.read_text(encoding="utf-8").splitlines()
    kept.write_text("\n".join([lines[0], *lines[9:]]), encoding="utf-8")
    return new, kept


def preserving(kept: Path, weight: float = 10.0) -> LitCLIP:
    loss = Sum([Contrastive(), Preservation(str(kept), 5)], [1.0, weight])
    return make_module(loss=loss, optimizer=partial(PaperAdamW, lr=1e-3))


def fit(module: LitCLIP, table: Path, folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Any:
    saves = bool(callbacks)
    trainer = make_trainer(folder, [*callbacks], max_steps=steps, enable_checkpointing=saves, limit_val_batches=0)
    trainer.fit(module, data_for(module, table), **options)
    return trainer


def term_of(module: LitCLIP) -> Preservation:
    (term,) = (part for part in module.loss.modules() if isinstance(part, Preservation))
    return term


def features(module: LitCLIP) -> torch.Tensor:
    """Return the features of the kept pairs, images and texts."""
    kept = term_of(module)
    with torch.no_grad():
        image = module.model.encode_image(module.model.normalize(kept.images), normalize=True)
        return torch.cat([image, module.model.encode_text(kept.tokens, normalize=True)])


def test_a_resumed_run_keeps_the_features_of_the_model_before(tables: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit as the uninterrupted run, also if the module that resumes begins with other weights."""
    whole, second = preserving(tables[1]), preserving(tables[1])
    fit(whole, tables[0], tmp_path, 5, ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}"))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.1)
    fit(second, tables[0], tmp_path, 5, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert whole.state_dict().keys() == second.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert term_of(whole).steps == 5


def test_kept_features_change_less(tables: tuple[Path, Path], tmp_path: Path) -> None:
    changed = []
    for weight in (0.0, 30.0):
        module = preserving(tables[1], weight)
        trainer = fit(module, tables[0], tmp_path, 12)
        before, after = torch.cat([term_of(module).image, term_of(module).text]), features(module)
        changed.append(float((after - before).norm()))
        assert float(trainer.callback_metrics["train/preservation_loss"]) > 0
    assert changed[1] < changed[0] / 3


def test_the_features_before_are_the_only_addition_to_a_checkpoint(tables: tuple[Path, Path], tmp_path: Path) -> None:
    module, plain = preserving(tables[1]), make_module()
    fit(module, tables[0], tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == plain.model.state_dict().keys()
    shapes = {name.removeprefix("terms.1."): tuple(value.shape) for name, value in checkpoint["loss"].items()}
    assert shapes == {"image": (12, 16), "text": (12, 16), "_extra_state": ()}
    described = checkpoint["parts"]["loss"]["init_args"]["terms"][1]["init_args"]
    assert described == {"kept": str(tables[1]), "pairs": 5}
    tables[1].unlink()
    LitCLIP.load_from_checkpoint(tmp_path / "one.ckpt")  # using a model needs no table


def pairs_of(module: LitCLIP) -> Pairs:
    counts = StepCounts(RankCounts(0, (ranks.PAIRS,)), RankCounts(0, (0,)))
    return encode_step(module.model, ranks.make_batch(slice(0, ranks.PAIRS)), counts, 3)


def test_batch_norm_is_that_of_evaluation_and_counts_no_kept_image(tables: tuple[Path, Path]) -> None:
    config = dataclasses.replace(
        ranks.CONFIG, image=ResNetConfig((1, 1, 1, 1), 8, 32), preprocessing=Preprocessing(image_size=32)
    )
    results = []
    for weight in (0.0, 1.0):
        loss = Sum([Contrastive(), Preservation(str(tables[1]), 5)], [1.0, weight])
        module = ranks.make_module(architecture=config, loss=loss, micro_batch_size=3)
        loss.prepare(module.model)
        pairs = pairs_of(module.eval())
        module.train()
        assert float(term_of(module)(pairs).detach()) < 1e-20
        module.training_step(ranks.make_batch(slice(0, ranks.PAIRS)), 0).backward()
        results.append(dict(module.model.named_buffers()))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, {}, r"kept: .*captions.csv: .*"),
        ([], {}, r"kept: .*captions.csv: .*"),
        (["8.png,a"], {"pairs": 0}, "pairs 0 must be at least 1"),
        (["8.png,a", "nowhere.png,b"], {}, r"kept: .*nowhere.png.*"),
        (["8.png,a", "captions.csv,b"], {}, r"kept: .*captions.csv row 3.*"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line(
    rows: list[str] | None, options: dict[str, Any], message: str, tables: tuple[Path, Path]
) -> None:
    if rows is None:
        tables[1].unlink()
    else:
        tables[1].write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    with pytest.raises(InputError, match=f"^model.loss: Preservation.{message}") as refusal:
        Preservation(str(tables[1]), **options).prepare(make_module().model)
    assert "\n" not in str(refusal.value)
