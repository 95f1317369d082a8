"""Every shipped config parses against the code it names, and states its command, cost and result."""

import importlib
import inspect
import re
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_clip import load_model
from lit_clip.cli.lightning import CLI, run
from lit_clip.commands.configs import configs
from lit_clip.errors import InputError
from lit_clip.evaluation.suite import read_suite
from lit_clip.losses import Sigmoid
from lit_clip.models.registry import resolve_architecture
from tests.conftest import ROOT, TINY_YAML, run_lightning_ranks, torchrun

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SUITES = sorted((ROOT / "configs/evaluation").glob("*.yaml"))
# Tables 18 to 20 of the paper: architecture, learning rate, beta2, epsilon, epochs.
PAPER = {
    "pretrain_rn50": ("RN50", 5e-4, 0.999, 1e-8, 32),
    "pretrain_rn50x64": ("RN50x64", 3.6e-4, 0.999, 1e-8, 32),
    "pretrain_vit_b32": ("ViT-B-32", 5e-4, 0.98, 1e-6, 32),
    "pretrain_vit_b16": ("ViT-B-16", 5e-4, 0.98, 1e-6, 32),
    "pretrain_vit_l14": ("ViT-L-14", 4e-4, 0.98, 1e-6, 32),
    "pretrain_vit_l14_336": ("ViT-L-14", 2e-5, 0.98, 1e-6, 1),
}


def test_the_documented_configs_exist() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "table", "zero_shot_imagenet", "fsdp", *PAPER} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_by_name_in_any_folder_and_its_classes_and_options_exist(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)  # the data may not exist here
    for name in ("IMAGENET", "CLASSES", "HELD_OUT", "IMAGE_WEIGHTS", "TEXT_ENCODER"):
        monkeypatch.setenv(name, name.lower())
    added_to = {"fsdp": "pretrain_vit_l14", "icons_towers": "quickstart_towers"}.get(path.stem)
    base = ["--config", added_to] if added_to else []
    command = run(args=[*base, f"--config={path.stem}"], execute=False)
    architecture = command.config.model.architecture  # None: the checkpoint's
    assert not isinstance(architecture, str) or resolve_architecture(architecture)  # parsing has checked explicit sizes


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suite_parses_by_name_in_any_folder_and_its_classes_accept_their_arguments(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, entry in read_suite(path.stem).items():
        for fold in range(len(entry.folds)):
            for split in entry.splits:
                spec = entry.spec(split, fold)
                module, _, kind = spec["class_path"].rpartition(".")
                known = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
                assert spec["init_args"].keys() <= known.keys(), f"{path.name}: {name} {split}"


@pytest.mark.parametrize("path", [*CONFIGS, *SUITES], ids=lambda path: path.stem)
def test_config_opens_with_its_command_cost_and_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("# ")]
    for word in ("command:", "cost:", "result:"):
        assert any(line.startswith(f"# {word}") for line in head), f"{path.name}: no line '# {word}' in its head"


def test_no_two_packaged_files_have_the_same_name() -> None:
    names = [path.stem for path in [*CONFIGS, *SUITES]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", [*CONFIGS, *SUITES], ids=lambda path: path.stem)
def test_a_listed_command_names_packaged_files_and_the_listing_says_what_its_variables_are(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs([])
    listing = capsys.readouterr().out
    (about,) = re.findall(rf"^{path.stem}: .*?(?:\n\n|\Z)", listing, re.MULTILINE | re.DOTALL)
    command, *rest = about.partition("    command: ")[2].splitlines()
    named = re.findall(r"--(?:config|suite) (\S+)", command)
    assert {*named} <= {each.stem for each in [*CONFIGS, *SUITES]}
    assert path.stem in named or path.stem == "table"  # the defaults
    words = " ".join(line.strip() for line in rest)
    assert re.search(r"cost: \S.* result: \S", words)
    variables = {*re.findall(r"oc\.env:(\w+)", path.read_text(encoding="utf-8"))}
    assert variables <= {*re.findall(r"\w+", words.partition("cost: ")[0])}


def test_a_packaged_file_is_printed_as_it_is_and_a_misspelt_name_gets_a_similar_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (ROOT / "configs/table.yaml", ROOT / "configs/evaluation/mine.yaml"):
        configs([path.stem])
        assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="finetune_clip"):
        configs(["fine_tune_clip"])
    with pytest.raises(InputError, match="one file"):
        configs(["table", "mine"])


@pytest.mark.parametrize("name", PAPER)
def test_pretraining_configs_have_the_papers_hyperparameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    config = run(args=["--config", str(ROOT / f"configs/{name}.yaml")], execute=False).config
    architecture, rate, beta2, eps, epochs = PAPER[name]
    model, data, trainer = config.model, config.data.init_args, config.trainer
    assert model.architecture == f"{architecture}-quickgelu"
    optimizer, schedule = model.optimizer, model.lr_scheduler
    assert (optimizer.class_path, schedule.class_path) == (
        "lit_clip.training.optimizers.PaperAdamW",
        "lit_clip.training.schedules.WarmupCosine",
    )
    optimizer, schedule = optimizer.init_args, schedule.init_args
    assert (optimizer.lr, tuple(optimizer.betas), optimizer.eps) == (rate, (0.9, beta2), eps)
    assert (optimizer.weight_decay, schedule.warmup_steps) == (0.2, 2000)
    assert (trainer.max_epochs, trainer.precision) == (epochs, "bf16-mixed")
    assert data.global_batch_size == 32_768
    assert data.global_batch_size % (trainer.devices * trainer.num_nodes) == 0
    assert (model.image_size, model.pretrained) == ((336, "l14.ckpt") if epochs == 1 else (None, None))


def test_the_siglip_that_is_fine_tuned_exists_and_its_bias_is_corrected() -> None:
    model = yaml.safe_load((ROOT / "configs/finetune_siglip2.yaml").read_text(encoding="utf-8"))["model"]
    assert (model["architecture"], model["pretrained"]) in open_clip.list_pretrained()
    architecture = resolve_architecture(model["architecture"])
    assert Sigmoid(**model["loss"]["init_args"]).pretraining_batch == 32_768
    assert architecture.logit_bias
    assert architecture.text.context_length == 64


FOR_ANY_MACHINE = (
    "another_language",
    "finetune_clip",
    "finetune_siglip2",
    "table",
    "quickstart",
    "pretrained_encoders",
)


@pytest.mark.parametrize("name", FOR_ANY_MACHINE)
def test_configs_for_any_machine_do_not_set_the_precision(name: str) -> None:
    """Processors without bfloat16 instructions emulate it, ten times slower than float32."""
    assert "precision" not in yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))["trainer"]


@pytest.mark.parametrize("name", ["table", "quickstart"])
def test_last_ckpt_is_the_last_epoch_even_if_it_is_not_the_best(name: str) -> None:
    """With a ``monitor``, Lightning's ``save_last`` copies the best: the final table described another model."""
    train = ["--data.train", "x.csv"] if name == "table" else []
    trainer = run(args=["--config", str(ROOT / f"configs/{name}.yaml"), *train], execute=False).trainer
    saving = trainer.checkpoint_callback
    assert isinstance(saving, ModelCheckpoint)
    assert (saving.filename, saving.monitor, saving._enable_version_counter) == ("last", None, False)


@pytest.mark.parametrize("launcher", ["forks", "torchrun"])  # the latter: new interpreters
@pytest.mark.slow
def test_pretraining_config_with_fsdp_trains_under_torchrun_and_saves_a_model(
    launcher: str, tmp_path: Path, caption_table: Path
) -> None:
    """``configs/pretrain_vit_l14.yaml`` with ``configs/fsdp.yaml``, a tiny model, and two processes on CPU."""
    words = ["fit"]
    for name in ("pretrain_vit_l14", "fsdp"):
        words += ["--config", str(ROOT / f"configs/{name}.yaml")]
    for option, value in {
        "model.architecture": TINY_YAML,
        "model.micro_batch_size": 8,
        "model.lr_scheduler.warmup_steps": 1,
        "data.train": caption_table,
        "data.val": caption_table,
        "data.num_workers": 0,
        "data.global_batch_size": 32,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.num_nodes": 1,
        "trainer.max_epochs": 1,
    }.items():
        words += [f"--{option}", str(value)]
    if launcher == "torchrun":
        output = torchrun(tmp_path, 2, "-m", "lit_clip", *words)
    else:
        output = run_lightning_ranks(2, tmp_path, "lit-clip", *words)
    assert output.count("32 = 16 x 2 ranks, encoded in 2 micro-batches") == 1  # printed by rank 0 only
    checkpoint = tmp_path / "runs/pretrain_vit_l14/version_0/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert load_model(checkpoint).visual.proj.shape == (64, 16)
