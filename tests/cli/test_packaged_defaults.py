"""``lit-clip fit`` without ``--config`` and with a packaged one, and the examples of ``lit-clip --help``."""

import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from lit_clip.cli.lightning import CLI, DEFAULTS, run
from lit_clip.cli.subcommands import COMMANDS, EXAMPLES
from lit_clip.errors import InputError
from lit_clip.recipes.sizes import FROM_SCRATCH, sizes
from tests.conftest import ROOT
from tests.test_readme import parser_of

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Return the settings of a command of LightningCLI that runs nothing."""
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(tmp_path)

    def parse(*words: str) -> Any:
        return run(words).config[words[0]].as_dict()

    return parse


def settings() -> Any:
    return yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))


def test_the_config_of_a_table_is_the_packaged_one() -> None:
    assert (ROOT / "configs/table.yaml").samefile(DEFAULTS)


@pytest.mark.parametrize("named", [["--config", "table"], ["--config=table"], ["-c", "table"]])
def test_a_packaged_configuration_is_that_of_its_path_in_any_folder(
    named: list[str], parsed: Callable[..., Any], caption_table: Path
) -> None:
    train = ("--data.train", str(caption_table))
    path = ["--config", str(ROOT / "configs/table.yaml")]
    config, same = parsed("fit", *named, *train), parsed("fit", *path, *train)
    assert {**config, "config": None} == {**same, "config": None}
    assert config["model"]["lr_scheduler"]["init_args"]["warmup_steps"] != 0  # chosen by the file's recipe


def test_a_model_of_your_own_has_the_packaged_settings_of_the_model(
    parsed: Callable[..., Any], caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "packaged_for_own.py").write_text(
        "from lit_clip import LitCLIP\nclass Own(LitCLIP):\n    def __init__(self, penalty: float = 1.0, **options):\n"
        "        super().__init__(**options)\n"
    )
    words = ["--model", "packaged_for_own.Own", "--model.penalty", "2", "--recipe", "null"]
    model = parsed("fit", "--data.train", str(caption_table), *words)["model"]
    assert model["class_path"] == "packaged_for_own.Own"
    assert model["init_args"]["penalty"] == 2
    assert model["init_args"]["architecture"] == settings()["model"]["architecture"]


def test_several_packaged_configurations_are_merged_with_a_file(
    parsed: Callable[..., Any], caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 3}")
    named = ("--config", "table", "--config=fsdp", "--config", "more.yaml")
    trainer = parsed("fit", *named, "--data.train", str(caption_table))["trainer"]
    assert trainer["strategy"]["class_path"] == "lit_clip.training.lightning.fsdp.FSDP"
    assert (trainer["max_epochs"], trainer["default_root_dir"]) == (3, "runs")


@pytest.mark.parametrize("named", [["--config", "table"], ["--config=table"], ["-c", "table"]])
def test_a_typed_option_wins_over_a_file_that_is_named_after_it(
    named: list[str], parsed: Callable[..., Any], caption_table: Path
) -> None:
    typed = ("--data.train", str(caption_table), "--trainer.default_root_dir", "mine", "--data.batch_size", "7")
    before, after = parsed("fit", *typed, *named), parsed("fit", *named, *typed)
    assert before == after
    assert before["trainer"]["default_root_dir"] == "mine"
    assert before["data"]["init_args"]["batch_size"] == 7


@pytest.mark.parametrize(
    ("kind", "other"),
    [("image.timm=resnet18", "image_size=64"), ("image.timm=resnet18", "pool=avg")]
    + [("text.hugging_face=folder", "context_length=32")],
)
def test_single_options_of_an_encoder_of_another_library_are_its_in_any_order(
    kind: str, other: str, parsed: Callable[..., Any], caption_table: Path
) -> None:
    encoder, library = kind.partition("=")[0].split(".")
    options = [f"--model.architecture.{kind}", f"--model.architecture.{encoder}.{other}"]
    words = ["fit", "--data.train", str(caption_table), "--recipe", "null"]
    after, before = parsed(*words, *options), parsed(*words, *reversed(options))
    assert after == before
    found = after["model"]["architecture"][encoder]
    name, _, value = other.partition("=")
    assert library in found
    assert str(found[name]) == value


def test_a_file_of_the_working_folder_comes_before_the_packaged_one(
    parsed: Callable[..., Any], caption_table: Path, tmp_path: Path
) -> None:
    train = ("--data.train", str(caption_table))
    (tmp_path / "fsdp").mkdir()  # a folder is no file of settings
    assert parsed("fit", "--config", "table", "--config", "fsdp", *train)["trainer"]["strategy"] != "auto"
    (tmp_path / "table").write_text("{data: datamodules.Captions, trainer: {max_epochs: 3}}")
    assert parsed("fit", "--config", "table", *train)["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("tabel", "did you mean table"),
        ("minee", "did you mean mine.yaml"),
        ("zzz", "lit-clip configs"),
        ("", "configs"),
    ],
)
def test_a_misspelt_configuration_gets_the_nearest_name(
    typed: str, hint: str, parsed: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(InputError, match=hint):
        parsed("fit", "--config", typed)
    with pytest.raises(InputError, match=r"tabel\.yaml"):  # a path, not a name
        parsed("fit", "--config", "tabel.yaml")


def test_typed_options_come_before_the_packaged_defaults(parsed: Callable[..., Any], caption_table: Path) -> None:
    options = ("--trainer.max_epochs", "3", "--model.optimizer.lr", "0.5", "--data.train", str(caption_table))
    more = ("--trainer.callbacks+=callbacks.PatchDropout", "--trainer.callbacks.share", "0.25")
    config = parsed("fit", *options, *more)
    assert (config["trainer"]["max_epochs"], config["model"]["optimizer"]["init_args"]["lr"]) == (3, 0.5)
    *kept, added, _ = config["trainer"]["callbacks"]  # the last is the recipe's
    assert len(kept) == len(settings()["trainer"]["callbacks"])
    assert added["init_args"]["share"] == 0.25


def test_a_config_replaces_the_packaged_defaults_wholly(parsed: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: {class_path: datamodules.Captions, init_args: {train: x.csv}}")
    config = parsed("fit", "--config", "own.yaml")
    assert (config["trainer"]["max_epochs"], config["trainer"]["callbacks"]) == (None, None)


def test_another_data_module_keeps_the_other_defaults(parsed: Callable[..., Any]) -> None:
    config = parsed("fit", "--data", "datamodules.OpenMoji")
    assert config["data"]["class_path"] == "lit_clip.datamodules.OpenMoji"
    assert config["trainer"]["log_every_n_steps"] == settings()["trainer"]["log_every_n_steps"]
    assert config["trainer"]["max_epochs"] == sizes(1_750, FROM_SCRATCH).epochs


def test_pretrained_weights_are_not_trained_with_the_settings_from_scratch(
    parsed: Callable[..., Any], caption_table: Path, tiny_checkpoint: Path
) -> None:
    train = ("fit", "--data.train", str(caption_table))
    model, scratch = parsed(*train, "--model.pretrained", str(tiny_checkpoint))["model"], parsed(*train)["model"]
    assert model["architecture"] is None
    assert model["optimizer"]["init_args"]["lr"] < scratch["optimizer"]["init_args"]["lr"]


def test_print_config_and_print_plan_need_no_config(caption_table: Path, in_process: Cli) -> None:
    shown = in_process("fit", "--data.train", str(caption_table), "--print_config")
    assert yaml.safe_load(shown.stdout)["data"]["class_path"] == f"lit_clip.{settings()['data']['class_path']}"
    plan = in_process("fit", "--data.train", str(caption_table), "--data.batch_size", "16", "--print_plan")
    assert "pairs per step" in plan.stdout, plan.stderr
    assert plan.returncode == 0


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_help_parse(
    example: str, parsed: Callable[..., Any], tiny_checkpoint: Path, caption_table: Path
) -> None:
    files = {"last.ckpt": str(tiny_checkpoint), "captions.csv": str(caption_table)}
    program, command, *options = shlex.split(example)
    assert program == "lit-clip"
    assert len(EXAMPLES) == 5
    if command in COMMANDS:
        assert parser_of(command).parse_args(options).model == "last.ckpt"
    else:
        assert parsed(command, *(files.get(word, word) for word in options))
