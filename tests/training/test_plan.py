"""The plan of a run in numbers, and warnings about contradictory settings."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.flop_counter import FlopCounterMode

import callbacks
from datamodules import Captions
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig
from lit_clip.models.finetuning import Freeze
from lit_clip.models.flops import measure
from lit_clip.models.registry import resolve_architecture
from lit_clip.module import LitCLIP
from lit_clip.training.activation_checkpointing import checkpoint_encoders
from lit_clip.training.plan import (
    RunPlan,
    Work,
    contradictions,
    measure_run,
    plan_rows,
    print_next_steps,
    print_summary,
    print_trained,
    resume_command,
    tower_work,
)
from lit_clip.training.schedules import WarmupCosine
from lit_clip.weights.load import create_model
from tests.conftest import TINY_YAML
from tests.helpers.towers import text_config

GOOD = RunPlan(
    trainable=151_277_313,
    frozen=0,
    image=Work(8_820_000_000, True),
    text=Work(5_960_000_000, True),
    batch_norm=False,
    devices=8,
    nodes=16,
    batch=256,
    micro_batch=None,
    checkpointed=False,
    steps_per_epoch=12_207,
    steps=390_624,
    warmup=2000,
    parts={
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 5e-4, "betas": [0.9, 0.98], "amsgrad": False},
        },
        "lr_scheduler": {"class_path": "my_schedules.Steep", "init_args": {}},
        "loss": {
            "class_path": "lit_clip.losses.Sum",
            "init_args": {
                "terms": [{"class_path": "a.B", "init_args": {"c": 1}}, {"class_path": "my.D", "init_args": {}}]
            },
        },
    },
    moments=2,
    max_steps=None,
    max_epochs=32,
)


def test_the_papers_run_has_no_contradictions_and_the_papers_numbers() -> None:
    """12.8 billion pairs; 44.3 GFLOPs of training per pair are 3 x (8.82 + 5.96) of the published tables."""
    assert not [*contradictions(GOOD)]
    rows = dict(plan_rows(GOOD))
    assert rows["pairs per step"] == "32,768 = 256 x 8 ranks x 16 nodes"
    assert rows["steps"] == "390,624, 12,207 per epoch"
    assert rows["warm-up"] == "2,000 steps, 0.5% of the run"
    assert rows["pairs seen"] == "12,799,967,232"
    assert rows["FLOPs per pair"].startswith("14.8 G forward, 44.3 G in training (3 x)")
    assert rows["weights, gradients, moments"].startswith("2.25 GiB")
    assert rows["optimiser"] == "AdamW: lr 0.0005, betas 0.9, 0.98"
    assert rows["schedule"] == "Steep"
    assert rows["loss"] == "Sum: terms B, D"


def test_a_warm_up_longer_than_the_run_has_no_share() -> None:
    assert dict(plan_rows(replace(GOOD, steps=1, warmup=50)))["warm-up"] == "50 steps, longer than the run"


def test_a_single_process_is_not_told_of_ranks() -> None:
    rows = dict(plan_rows(replace(GOOD, devices=1, nodes=1, micro_batch=128)))
    assert rows["pairs per step"] == "256, encoded in 2 micro-batches"
    assert not re.search("rank|shard", " ".join(rows.values()))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"warmup": 390_624}, ["390,624 steps", "warm-up takes 390624", "model.lr_scheduler.warmup_steps"]),
        ({"steps": 299, "warmup": 200}, ["99 steps after its 200 of", "max_epochs, or lower --model.lr_s"]),
        (
            {"steps": 51, "warmup": 50, "max_steps": 51, "max_epochs": None},
            ["only 1 step after", "raise trainer.max_steps"],
        ),
        ({"max_steps": 100}, ["max_steps 100", "max_epochs 32 (390624 steps)", "max_steps ends", "max_epochs out"]),
        ({"max_steps": 10**6}, ["max_epochs ends the run", "leave max_steps out"]),
        ({"micro_batch": 512}, ["micro_batch_size 512", "256 pairs"]),
        ({"batch_norm": True, "micro_batch": 10}, ["BatchNorm computes its statistics over 9 pairs", "at least 16"]),
    ],
)
def test_a_contradiction_says_what_to_change(change: dict[str, Any], parts: list[str]) -> None:
    (sentence,) = contradictions(replace(GOOD, **change))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    "change",
    [
        {"batch_norm": True, "micro_batch": 64},
        {"max_steps": 390_624},
        {"steps": 300, "warmup": 200},
        {"steps": 71, "warmup": 7},  # as a recipe chooses
        {"steps": 50, "warmup": 0},  # no warm-up that ends too late
        {"steps": 50, "warmup": None},
        {"steps_per_epoch": None, "steps": None, "max_steps": 5, "warmup": 10**9},  # length unknown before the run
    ],
)
def test_plausible_settings_give_no_warning(change: dict[str, Any]) -> None:
    assert not [*contradictions(replace(GOOD, **change))]


def test_recomputation_counts_in_the_training_flops() -> None:
    """4 x with checkpointing; all micro-batches but the last are computed twice."""
    assert GOOD.passes == 3
    assert replace(GOOD, micro_batch=256).passes == 3  # a single micro-batch is not recomputed
    assert replace(GOOD, micro_batch=100).passes == 3 + 2 / 3
    assert replace(GOOD, checkpointed=True).passes == 4
    both = replace(GOOD, micro_batch=200, checkpointed=True)
    assert (both.passes, both.micro_batches) == (4.5, 2)
    frozen = replace(both, image=Work(100, False), text=Work(10, True))
    assert frozen.flops == (110, 100 + 45)
    assert replace(GOOD, text=Work(None, True)).flops is None


@pytest.mark.parametrize("checkpointed", [False, True])
def test_passes_match_the_operations_that_torch_counts(checkpointed: bool, tiny_config: CLIPConfig) -> None:
    """A real step costs three forward passes, or nearly four with checkpointing."""
    deep = replace(tiny_config, image=replace(tiny_config.image, layers=6), text=replace(tiny_config.text, layers=6))  # type: ignore
    module = LitCLIP(deep)
    if checkpointed:
        checkpoint_encoders(module.model)
    model, tokens = module.model, torch.zeros(1, 16, dtype=torch.long)
    tokens[:, -1] = 49407
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 32, 32)), model.encode_text(tokens)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        (model.encode_image(torch.zeros(1, 3, 32, 32)).sum() + model.encode_text(tokens).sum()).backward()
    assert counter.get_total_flops() / forward == pytest.approx(4 if checkpointed else 3, rel=0.2)
    assert sum(tower.forward or 0 for tower in tower_work(model)) >= forward  # ours counts all tokens in the last block


def test_flops_of_an_encoder_equal_those_of_lit_clip_models(folders: dict[str, Path]) -> None:
    image, text = tower_work(create_model("ViT-tiny-16-64"))
    size = measure(resolve_architecture("ViT-tiny-16-64"))
    assert (image.forward, text.forward, image.trainable) == (size.image_flops, size.text_flops, True)
    image, _ = tower_work(create_model("RN-tiny-64"))
    assert image.forward == measure(resolve_architecture("RN-tiny-64")).image_flops
    _, text = tower_work(create_model(text_config(folders["bert"], 16)))
    # Two layers of width 32, with 48 in the MLP, and a linear projection to 16.
    assert text.forward == 2 * 32 * 2 * (4 * 32**2 + 2 * 32 * 48 + 2 * 32 * 32) + 2 * 32 * 16  # 32 tokens


def test_counting_flops_leaves_the_model_unchanged(folders: dict[str, Path]) -> None:
    """Statistics of a ResNet, a Hugging Face encoder, and the evaluation mode of frozen modules."""
    text = TextTransformerConfig(16, 50, 64, 1, 1)
    for config in (CLIPConfig(16, ResNetConfig((1, 1, 1, 1), 16, 32), text), text_config(folders["bert"], 16)):
        module = LitCLIP(config, freeze=Freeze(image="all"))
        before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.model.state_dict().items()}
        modes = [layer.training for layer in module.modules()]
        image, _ = tower_work(module.model)
        assert not image.trainable
        assert [layer.training for layer in module.modules()] == modes
        for name, tensor in module.model.state_dict().items():
            assert tensor.data_ptr() == before[name][0]
            assert torch.equal(tensor, before[name][1])


def trainer(**settings: Any) -> Any:
    values = {
        "num_devices": 2,
        "num_nodes": 3,
        "accumulate_grad_batches": 1,
        "max_steps": -1,
        "max_epochs": 4,
    }
    return SimpleNamespace(**{**values, "precision": "32-true", "limit_train_batches": 1.0, **settings})


def test_the_plan_is_read_from_module_and_trainer(tiny_config: CLIPConfig) -> None:
    module = LitCLIP(
        tiny_config, micro_batch_size=5, freeze=Freeze(text="all"), lr_scheduler=partial(WarmupCosine, warmup_steps=7)
    )
    data = SimpleNamespace(steps_per_epoch=10, train_batch_size=12)
    plan = measure_run(module, trainer(datamodule=data))
    assert plan.trainable == sum(p.numel() for p in module.model.visual.parameters()) + 1  # the temperature
    assert plan.trainable + plan.frozen == sum(p.numel() for p in module.parameters())
    assert (plan.global_batch, plan.micro_batches, plan.steps, plan.warmup) == (72, 3, 40, 7)
    assert (plan.image.trainable, plan.text.trainable, plan.max_steps, plan.max_epochs) == (True, False, None, 4)


def test_steps_are_left_out_where_the_data_module_does_not_know_them(tiny_config: CLIPConfig) -> None:
    plan = measure_run(LitCLIP(tiny_config), trainer(datamodule=None))
    assert (plan.steps, plan.batch, plan.global_batch) == (None, None, None)
    assert "steps" not in dict(plan_rows(plan))
    assert not [*contradictions(plan)]


def test_the_steps_of_a_resumed_run_count_those_made_with_another_batch_size(
    cli: Callable[..., CompletedProcess[str]],
    in_process: Callable[..., CompletedProcess[str]],
    caption_table: Path,
    tmp_path: Path,
) -> None:
    words = ["fit", "--model.architecture", TINY_YAML, "--data", "datamodules.Captions", "--data.num_workers", "0"]
    words += ["--data.train", str(caption_table), "--data.val", str(caption_table), "--trainer.accelerator", "cpu"]
    first = cli(*words, "--data.batch_size", "24", "--trainer.max_epochs", "1")
    assert first.returncode == 0, first.stderr
    (file,) = {path.resolve() for path in tmp_path.rglob("*.ckpt")}
    # One epoch of two steps with 24 pairs each, and two epochs of eight with 8.
    resumed = [*words, "--data.batch_size", "8", "--trainer.max_epochs", "3", "--ckpt_path", str(file)]
    for done in (in_process(*resumed, "--print_plan"), cli(*resumed)):
        assert done.returncode == 0, done.stderr
        assert re.findall(r"steps +│ (\d+), (\d+) per epoch", done.stdout) == [("18", "8")]
    assert "step 18 of 18" in done.stdout + done.stderr


def test_print_plan_prints_and_leaves_nothing_behind(
    in_process: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    words = ["fit", "--print_plan", "--model.architecture", TINY_YAML, "--data", "datamodules.Captions"]
    words += ["--data.train", str(caption_table), "--data.val", str(caption_table), "--data.global_batch_size", "24"]
    words += ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    done = in_process(*words, "--trainer.default_root_dir", "here")
    assert done.returncode == 0, done.stderr
    assert "24 = 12 x 2 ranks" in done.stdout
    assert "6, 2 per epoch" in done.stdout
    assert "warm-up takes 2000" in done.stdout
    assert "Epoch" not in done.stdout
    assert not list(tmp_path.iterdir())
    refused = in_process(*words, "--data.global_batch_size", "25")
    assert refused.returncode == 2
    assert "25 pairs cannot be divided evenly among 2 processes; set it to 24 or 26" in refused.stderr


# The end of a run: its commands can be pasted into a shell, and steps that were not saved are named.


@pytest.mark.parametrize("name", ["a run", "$(touch ran)", "it's", "[red]x", "a;b"])
def test_printed_commands_name_the_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    config, checkpoint = folder / "fit_config.yaml", folder / "last.ckpt"
    config.touch()
    print_next_steps(checkpoint, folder, [])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validate again: "))
    for command in (line.removeprefix("validate again: "), resume_command(checkpoint, folder)):
        assert shlex.split(command)[2:] == ["--config", str(config), "--ckpt_path", str(checkpoint)]


def test_metrics_are_in_their_natural_order_and_shares_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["val/loss", *(f"val/merged_image_to_text_recall@{k}" for k in (10, 1, 5)), "train/loss"]
    metrics = {name: torch.tensor(0.5) for name in names}
    print_summary(metrics, dict.fromkeys(names, 0.25), {"val/loss": 0.75})
    printed = capsys.readouterr().out
    rows = [line.replace("│", "").split() for line in printed.splitlines() if "val/" in line]
    assert rows[0] == ["val/loss", "0.5000", "0.2500", "0.7500", "-0.2500"]
    assert [row[0].partition("@")[2] for row in rows[1:]] == ["1", "5", "10"]
    assert rows[1][1:] == ["50.00", "%", "25.00", "%"]
    assert "equal ones count as one" in printed
    assert "train/loss" not in printed


def test_names_stay_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ["val/mean_recall", *(f"val/merged_image_to_text_recall@{k}" for k in (1, 5, 10))]
    metrics = {name: torch.tensor(0.5) for name in names}
    print_summary(metrics, dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.25))
    printed = capsys.readouterr().out
    cells = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    assert "".join(cells) == "".join(names)
    assert max(map(len, printed.splitlines())) <= 80
    assert "val/mean_recall is the one number to compare" in " ".join(printed.split())


def test_a_run_from_python_ends_with_its_results_and_without_advertisements(
    caption_table: Path, tiny_config: CLIPConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As ``fit`` does: the last metrics with their baselines, the checkpoint and the command for the curves."""
    logger = TensorBoardLogger(tmp_path, name="mine")
    trainer = Trainer(callbacks=callbacks.defaults(), logger=logger, max_epochs=1, accelerator="cpu")
    trainer.fit(LitCLIP(tiny_config), Captions(str(caption_table), num_workers=0))
    printed, messages = capfd.readouterr()
    assert "val/image_to_text_recall@1" in printed
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert f"checkpoint: {checkpoint}" in printed
    assert f"curves: tensorboard --logdir {tmp_path / 'mine' / 'version_0'}" in printed
    assert "pairs per step" in printed
    assert "Total FLOPs" not in printed + messages, "the plan is the only summary"
    assert "Tip" not in messages


@pytest.mark.parametrize(
    ("every", "best"),
    [
        pytest.param("1", True, marks=pytest.mark.slow),
        ("2", True),
        pytest.param("2", False, marks=pytest.mark.slow),
    ],
)
def test_the_last_steps_are_saved_whether_or_not_a_validation_is_due(
    every: str, best: bool, cli: Callable[..., Any], caption_table: Path, tmp_path: Path
) -> None:
    data = ["--data", "datamodules.Captions", "--data.train", str(caption_table), "--data.val", str(caption_table)]
    data += ["--data.num_workers", "0", "--model.architecture", TINY_YAML, "--trainer.accelerator", "cpu"]
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    if best:  # beside the last one
        data += [f"--trainer.callbacks+={saver}"] * 2 + ["--trainer.callbacks.monitor", "val/loss"]
    result = cli("fit", *data, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", every)
    assert result.returncode == 0, result.stderr
    last, *others = tmp_path.rglob("*.ckpt")
    assert len(others) == (best and every == "1")
    assert {torch.load(file, weights_only=True)["global_step"] for file in (last, *others)} == {1}
    assert ("too few to tell the best model; take" in result.stdout) == (best and every == "1")
    again = [*data, "--trainer.check_val_every_n_epoch", "5", "--ckpt_path", str(last), "--trainer.max_epochs", "3"]
    result = cli("fit", *again)
    assert result.returncode == 0, result.stderr
    (resumed,) = [file for file in tmp_path.rglob("*.ckpt") if torch.load(file, weights_only=True)["global_step"] == 3]
    assert str(resumed.name) in result.stdout


def test_groups_of_an_optimiser_without_weight_decay_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    groups = torch.optim.Rprop([{"params": [torch.nn.Parameter(torch.zeros(3))], "name": "heads"}], lr=0.1).param_groups
    print_trained(groups, torch.nn.Identity())
    assert re.search(r"heads +│ +full +│ +3 │ +1.00e-01 │ +- │", capsys.readouterr().out)
