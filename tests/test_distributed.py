"""Gradients, metrics and weights do not depend on the number of ranks."""

import csv
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import callbacks
from callbacks import progress
from lit_clip import distributed
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.tools import console, hardware
from tests.callbacks.test_non_finite import WITH_BATCH_NORM
from tests.conftest import TINY_YAML, run_lightning_ranks
from tests.helpers import pretended
from tests.helpers.ranks import CASES
from tests.helpers.small_sets import write_table
from tests.helpers.waits import counted
from tests.test_module import data_for, trainer

Ranks = Callable[..., Any]


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3)), 4])
def test_every_gradient_equals_that_of_one_process_with_the_whole_batch(world: int, ranks: Ranks) -> None:
    """Softmax and sigmoid, micro-batches, tiles, frozen encoders, duplicates: cases in ``helpers/ranks.py``."""
    errors = ranks("gradients", world)
    assert errors.keys() == set(map(str, CASES))
    assert max(errors.values()) < 1e-6, max(errors.items(), key=lambda item: item[1])


def test_a_step_of_several_micro_batches_is_synchronised_once(ranks: Ranks) -> None:
    ranks("synchronisations", 2)


def test_other_ranks_wait_for_the_first_ranks_work_without_a_time_out(ranks: Ranks) -> None:
    ranks("long_work", 2)


@pytest.mark.parametrize("world", [2, 3])
def test_the_gradient_of_gathered_rows_is_the_sum_of_all_ranks_gradients(world: int, ranks: Ranks) -> None:
    ranks("summed_rows", world)


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_rows_are_gathered_in_rank_order(world: int, ranks: Ranks) -> None:
    """Each rank asserts for itself (``tests/helpers/ranks.py``); the fixture fails unless all of them succeed."""
    ranks("uneven_gather", world)


def _fit(table: Path, cache: Path, save: Path, name: str, devices: int, *options: str) -> None:
    zero_shot = (
        "{class_path: callbacks.ZeroShot, init_args: {examples: 3, batch_size: 5, sets: {groups: {images: {class_path: "
        f"datamodules.OpenMojiClasses, init_args: {{drawings: held_out, classes: group, cache_dir: {cache}}}}}}}}}}}}}"
    )
    words = (
        *("lit-clip", "fit"),
        *("--data", "datamodules.Captions", "--data.train", str(table), "--data.val", str(table)),
        *("--data.batch_size", str(64 // devices), "--data.num_workers", "0"),
        *("--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "2"),
        *("--trainer.max_steps", "6", "--trainer.check_val_every_n_epoch", "6"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(devices)),
        *("--trainer.strategy", "auto" if devices == 1 else "ddp", "--trainer.log_every_n_steps", "1"),
        *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"),
        *("--trainer.logger.init_args.save_dir", str(save), "--trainer.logger.init_args.name", name),
        *(f"--trainer.callbacks+={zero_shot}", "--trainer.callbacks-=ExpectedTime"),  # which logs in slow runs alone
        "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}",
        *options,
    )
    run_lightning_ranks(devices, save, *words)


def _metrics(folder: Path) -> dict[str, list[float]]:
    with (folder / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


@pytest.mark.parametrize("others", [["four"], pytest.param(["two", "four"], marks=pytest.mark.slow)], ids=str)
def test_training_and_validation_do_not_depend_on_ranks_or_micro_batches(
    others: list[str], caption_table: Path, drawings_cache: Path, tmp_path: Path
) -> None:
    """``lit-clip fit`` with 1 x 64, 2 x 32 and 4 x 16 pairs per step: equal samples, losses, weights and metrics."""
    kinds = {"two": (2,), "four": (4, "--model.micro_batch_size", "5")}
    runs = {"one": (1,)} | {name: kinds[name] for name in others}
    for name, (devices, *options) in runs.items():
        _fit(caption_table, drawings_cache, tmp_path, name, devices, *options)
    one = _metrics(tmp_path / "one")
    assert len(one["train/loss"]) == 6
    assert {"val/loss", "val/image_to_text_recall@1", "zero_shot/groups/top1", "train/in_batch_accuracy"} <= one.keys()
    for name in others:
        metrics = _metrics(tmp_path / name)
        assert one.keys() == metrics.keys()
        for metric, values in one.items():
            assert metrics[metric] == pytest.approx(values, abs=1e-4), f"{name}: {metric}"
    first, *rest = (torch.load(tmp_path / name / "version_0/checkpoints/last.ckpt", weights_only=True) for name in runs)
    assert first["global_step"] == 6
    for other in rest:
        assert other["global_step"] == 6  # optimiser steps, not micro-batches
        for key, value in first["state_dict"].items():
            ours = other["state_dict"][key]
            if key.endswith("in_proj_bias"):  # the keys' bias has gradient zero; Adam amplifies its rounding
                keys = slice(len(value) // 3, 2 * len(value) // 3)
                ours[keys] = value[keys]
            torch.testing.assert_close(ours, value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_the_group_for_values_on_the_cpu_has_the_time_limit_of_the_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its collectives are where the ranks wait for one that hangs."""
    monkeypatch.setattr(distributed, "_host_group", None)
    limit = timedelta(seconds=77)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("cpu:gloo", init_method=store, rank=0, world_size=1, timeout=limit)  # not plain gloo
    try:
        group = distributed.host_group()
        assert group is not dist.group.WORLD
        assert group._get_backend(torch.device("cpu")).options._timeout == limit
    finally:
        dist.destroy_process_group()


# A training step between two logged ones does not wait for the device, and sends only what it must.


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as on a device for which the host does not wait."""
    monkeypatch.setattr(hardware, "runs_ahead", lambda device: True)
    monkeypatch.setattr(progress, "ENOUGH", (0, 0.0))  # it synchronises when it is sure, and then no more
    for name in ("FIRST", "EVERY"):
        monkeypatch.setattr(console, name, 0.0)  # a line of progress after each step


OF_LOSS = {"gather_rows", "logsumexp_over_ranks", "sum_rows"}  # functions of lit_clip.distributed
LOGGED = range(4, 10, 5)  # steps, with log_every_n_steps of 5


def fit(folder: Path, table: Path, config: CLIPConfig, **options: Any) -> dict[int, Counter[str]]:
    """Train 10 steps with the callbacks of the configs, and return the waits of each."""
    module = LitCLIP(config)
    with counted() as waits:
        used = [callbacks.TrainingMonitor(), callbacks.Throughput(), callbacks.SimilarityMatrix(), waits]
        settings: dict[str, Any] = {
            "accelerator": pretended.NAME,
            "log_every_n_steps": 5,
            "limit_val_batches": 0,
            "limit_train_batches": 10,
            "logger": CSVLogger(folder),
            "enable_progress_bar": True,
            "callbacks": callbacks.defaults(*used, ModelCheckpoint(folder)),
            **options,
        }
        trainer(folder, max_epochs=1, **settings).fit(module, data_for(module, table, batch_size=4))
    return waits.found


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("tiny", {}),
        pytest.param("tiny", {"gradient_clip_val": 1.0}, marks=pytest.mark.slow),
        ("batch norm", {"precision": "bf16-mixed"}),
        pytest.param("tiny", {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param("batch norm", {}, marks=pytest.mark.slow),
        pytest.param("batch norm", {"gradient_clip_val": 1.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_that_is_not_logged_never_waits(
    config: str,
    options: dict[str, Any],
    tiny_config: CLIPConfig,
    caption_table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "runs_ahead", lambda device: True)
    found = fit(tmp_path, caption_table, tiny_config if config == "tiny" else WITH_BATCH_NORM, **options)
    between = {step: found.get(step, Counter()) for step in range(2, 10) if step not in LOGGED}
    assert between == dict.fromkeys(between, Counter())
    assert all(found[step] for step in LOGGED)  # the counter counts


def test_two_ranks_send_only_the_losses_rows_and_one_check(ranks: Ranks, tmp_path: Path) -> None:
    counts = ranks("count", 2, write_table(tmp_path, 32), script="ranks_callbacks.py")
    found = {int(step): Counter(calls) for step, calls in counts.items()}
    assert found[4] != found[5]  # the logged one gathers the ranks' counts of samples
    for step in (2, 3, 5, 6):
        of_loss = {name: calls for name, calls in found[step].items() if name.split()[1] in OF_LOSS}
        assert sum(of_loss.values()) == 4  # texts, two of the log-sum-exp, and their gradient
        assert found[step] - Counter(of_loss) == {"all_reduce sum_over_ranks": 1}
