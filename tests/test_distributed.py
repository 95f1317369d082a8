"""Several processes are one: gradients, metrics and weights do not depend on the number of ranks."""

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_YAML
from tests.ranks import PAIRS, make_batch, make_module

Ranks = Callable[..., None]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_gradient_of_ranks_equals_that_of_one_process_with_the_whole_batch(
    world: int, ranks: Ranks, tmp_path: Path
) -> None:
    module = make_module()
    module.training_step(make_batch(slice(0, PAIRS)), 0).backward()
    ranks("gradients", world, str(tmp_path / "gradients.pt"))
    distributed = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in module.model.named_parameters():
        expected = parameter.grad
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        error = (distributed[name] - expected).norm() / expected.norm()
        assert error < 1e-6, f"{name}: relative error {error}"


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_rows_are_gathered_in_rank_order(world: int, ranks: Ranks) -> None:
    """Each rank asserts for itself (``tests/ranks.py``); the fixture fails unless all of them end well."""
    ranks("uneven_gather", world)


def _fit(cli: Cli, table: Path, cache: Path, name: str, devices: int, batch_size: int, save: Path) -> None:
    zero_shot = (
        "{class_path: callbacks.ZeroShot, init_args: {examples: 3, batch_size: 5, sets: {groups: {images: {class_path: "
        f"datamodules.OpenMojiClasses, init_args: {{drawings: held_out, classes: group, cache_dir: {cache}}}}}}}}}}}}}"
    )
    result = cli(
        "fit",
        *("--data", "datamodules.CaptionTable", "--data.train", str(table), "--data.val", str(table)),
        *("--data.batch_size", str(batch_size), "--data.num_workers", "0"),
        *("--model.architecture", TINY_YAML, "--model.warmup_steps", "2"),
        *("--trainer.max_steps", "6", "--trainer.accelerator", "cpu", "--trainer.devices", str(devices)),
        *("--trainer.strategy", "auto" if devices == 1 else "ddp", "--trainer.log_every_n_steps", "1"),
        *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"),
        *("--trainer.logger.init_args.save_dir", str(save), "--trainer.logger.init_args.name", name),
        f"--trainer.callbacks+={zero_shot}",
        "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}",
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _metrics(folder: Path) -> dict[str, list[float]]:
    with (folder / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_training_and_validation_on_two_ranks_equal_one_process(
    cli: Cli, caption_table: Path, drawings_cache: Path, tmp_path: Path
) -> None:
    """``lit-clip fit`` on 1 x 16 and 2 x 8 pairs a step: the same samples, loss curve, weights and metrics."""
    _fit(cli, caption_table, drawings_cache, "one", 1, 16, tmp_path)
    _fit(cli, caption_table, drawings_cache, "two", 2, 8, tmp_path)
    one, two = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one["train/loss"]) == 6
    assert {"val/loss", "val/image_to_text_recall@1", "zero_shot/groups/top1"} <= one.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, abs=1e-4), name
    checkpoints = [
        torch.load(tmp_path / name / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for key, value in checkpoints[0].items():
        if key.endswith("in_proj_bias"):  # the gradient of the keys' bias is zero; Adam makes steps of its rounding
            keys = slice(len(value) // 3, 2 * len(value) // 3)
            value[keys] = checkpoints[1][key][keys]
        torch.testing.assert_close(checkpoints[1][key], value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
