"""The ``lit-clip`` command: precedence of settings, the files a run writes, and errors in one line."""

import errno
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import lit_clip
from lit_clip.cli import lightning
from lit_clip.cli.lightning import CLI, computes_in_bfloat16, run
from lit_clip.cli.main import _thread_error
from lit_clip.cli.plain_help import short_help
from lit_clip.cli.subcommands import COMMANDS, CONFIGURED, FIRST, help_text
from lit_clip.errors import InputError
from lit_clip.tools.messages import one_line, user_error
from tests.conftest import ROOT, TINY_YAML, lit_clip_command, without_packaged_defaults

Completed = subprocess.CompletedProcess[str]
Cli = Callable[..., Completed]


def words(subcommand: str, table: Path, architecture: bool = True) -> list[str]:
    """Return a command that uses the table and the tiny model; ``fit`` takes four steps, one epoch."""
    model = ["--model.architecture", TINY_YAML] if architecture else []
    steps = ["--trainer.max_steps", "4", "--data.train", str(table)] if subcommand == "fit" else []
    return [
        subcommand,
        *("--data", "datamodules.Captions", "--data.val", str(table), "--data.batch_size", "16"),
        *("--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *model,
        *steps,
    ]


def bare(subcommand: str, table: Path) -> list[str]:
    return without_packaged_defaults(words(subcommand, table))


def results(output: str) -> dict[str, str]:
    """Return the rows of the printed summary: metric -> value."""
    return dict(re.findall(r"^│ (\S+)\s+│\s+([\d.]+(?: %)?) │", output, re.MULTILINE))


@pytest.fixture(scope="module")
def trained(caption_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed]:
    """Folder and output of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    result = lit_clip_command(folder, *words("fit", caption_table), "--model.optimizer.lr", "0.5")
    assert result.returncode == 0, result.stderr
    return folder / "lightning_logs/version_0", result


def checkpoint_of(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    return path


def test_validate_prints_the_metrics_of_fit_and_reads_the_architecture_from_the_checkpoint(
    trained: tuple[Path, Completed], caption_table: Path, cli: Cli
) -> None:
    folder, fitted = trained
    command = words("validate", caption_table, architecture=False)
    validated = cli(*command, "--ckpt_path", str(checkpoint_of(folder)))
    assert validated.returncode == 0, validated.stderr
    assert len(results(fitted.stdout)) == 10  # loss, mean recall, and three recalls and a median rank in two directions
    assert results(validated.stdout) == results(fitted.stdout)
    (suggestion,) = re.findall(r"lit-clip (validate --config \S+ --ckpt_path \S+)", fitted.stdout)
    suggested = lit_clip_command(folder.parents[1], *suggestion.split())
    assert results(suggested.stdout) == results(fitted.stdout), suggested.stderr


def test_typed_options_override_the_checkpoint(
    trained: tuple[Path, Completed], caption_table: Path, tmp_path: Path, cli: Cli
) -> None:
    """By itself Lightning silently uses the checkpoint's learning rate (footgun L8)."""
    folder, _ = trained
    resume = ("--ckpt_path", str(checkpoint_of(folder)), "--trainer.max_steps", "8")
    result = cli(*words("fit", caption_table), "--model.optimizer.lr", "0.001", *resume)
    assert result.returncode == 0, result.stderr
    (resumed,) = (tmp_path / "lightning_logs/version_0/checkpoints").glob("*.ckpt")
    state = torch.load(resumed, weights_only=True)
    assert [group["initial_lr"] for group in state["optimizer_states"][0]["param_groups"]] == [0.001, 0.001]
    assert all(group["lr"] <= 0.001 for group in state["optimizer_states"][0]["param_groups"])
    saved = tmp_path / "lightning_logs/version_0/fit_config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["optimizer"]["init_args"]["lr"] == 0.001


def test_a_checkpoint_of_another_architecture_is_refused(
    trained: tuple[Path, Completed], caption_table: Path, in_process: Cli
) -> None:
    folder, _ = trained
    other = TINY_YAML.replace("embed_dim: 16", "embed_dim: 32")
    command = [word.replace(TINY_YAML, other) for word in words("validate", caption_table)]
    result = in_process(*command, "--ckpt_path", str(checkpoint_of(folder)))
    assert_user_error(result, "another architecture", "embed_dim 16 there and 32 here")


def test_a_run_without_a_logger_writes_no_config_into_the_current_folder(
    caption_table: Path, tmp_path: Path, cli: Cli
) -> None:
    assert cli(*words("validate", caption_table), "--trainer.logger", "false").returncode == 0
    assert list(tmp_path.glob("*")) == []


def test_configs_are_merged_and_interpolated(caption_table: Path, tmp_path: Path, in_process: Cli) -> None:
    (tmp_path / "model.yaml").write_text(f"model: {{architecture: {TINY_YAML}, optimizer: {{lr: 0.25}}}}")
    (tmp_path / "data.yaml").write_text(
        "data: {class_path: datamodules.Captions, init_args: {val: '${oc.env:TABLE}', batch_size: 16}}\n"
        "model: {optimizer: {weight_decay: '${model.optimizer.lr}'}}"
    )
    configs = ("--config", "model.yaml", "--config", "data.yaml", "--model.optimizer.lr", "0.125")
    result = in_process("validate", *configs, "--print_config", environment={"TABLE": str(caption_table)})
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert config["data"]["init_args"]["val"] == "${oc.env:TABLE}"  # variables may hold secrets
    assert config["model"]["optimizer"]["init_args"]["weight_decay"] == "${.lr}"  # as typed
    command = run(args=[*configs, "--trainer.logger", "false"], execute=False)
    assert command.config["data"]["init_args"]["val"] == str(caption_table)
    assert command.config["model"]["optimizer"]["init_args"]["weight_decay"] == 0.125  # the typed value, across files


def test_the_data_module_gets_the_models_preprocessing_and_tokenizer(caption_table: Path) -> None:
    _, *options = words("fit", caption_table)
    command = run(args=[*options, "--trainer.logger", "false"], execute=False)
    command.trainer.validate(command.model, command.datamodule, verbose=False)
    assert command.datamodule.preprocessing.image_size == 32
    assert command.datamodule.tokenize(["a"]).shape == (1, 16)


def assert_user_error(result: Completed, *parts: str) -> None:
    """Check for exit code 2, no traceback, and a last line that contains every part."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lit-clip: error: ")
    for part in parts:
        assert part in last


def test_data_that_are_not_there_are_named(caption_table: Path, in_process: Cli) -> None:
    typed = [each if each != str(caption_table) else "nowhere.csv" for each in words("fit", caption_table)]
    assert_user_error(in_process(*typed), "nowhere.csv: no such file or folder")


def test_a_configuration_for_gpus_says_how_to_run_it_elsewhere() -> None:
    """Lightning's words, which a machine with a GPU would not say."""
    line = one_line(InputError("No supported gpu backend found!"))
    advice = "the settings ask for one; add --trainer.accelerator cpu, also to see the plan"
    assert line == f"No supported gpu backend found!; {advice}"


def test_a_broken_image_in_a_data_worker_is_one_line_with_its_table_row(tmp_path: Path, cli: Cli) -> None:
    for i in range(32):
        Image.effect_noise((40, 40), 50 + i).convert("RGB").save(tmp_path / f"{i}.jpg")
    data = (tmp_path / "7.jpg").read_bytes()
    (tmp_path / "7.jpg").write_bytes(data[: len(data) // 2])
    table = tmp_path / "table.csv"
    table.write_text("image,caption\n" + "".join(f"{i}.jpg,noise {i}\n" for i in range(32)))
    result = cli(*words("validate", table), "--data.num_workers", "2")
    assert_user_error(result, f"{table} row 9: cannot read image", "7.jpg", "truncated")


def test_a_class_list_of_the_wrong_length_names_both_counts(tmp_path: Path, in_process: Cli) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "set" / name / "0.png")
    images = "{class_path: datamodules.ImageFolderClasses, init_args: {root: set, class_names: [cat, dog, cow]}}"
    callback = f"{{class_path: callbacks.ZeroShot, init_args: {{sets: {{pets: {{images: {images}}}}}}}}}"
    command = ("validate", "--data", "datamodules.NoCaptions", "--model.architecture", TINY_YAML)
    assert_user_error(in_process(*command, f"--trainer.callbacks+={callback}"), "3 names for the 2 classes", "cat")


def test_only_user_errors_lose_their_traceback() -> None:
    assert user_error(RuntimeError("a bug")) is None
    wrapped = ValueError("jsonargparse's")
    wrapped.__cause__ = InputError("row 3")
    assert one_line(user_error(wrapped) or wrapped) == "row 3"


def test_a_threads_error_is_one_line_unless_it_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug")):
        _thread_error(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lit-clip: No space left on device: a disk or shared memory")
    assert lines[1].startswith("Exception in thread")
    assert lines[-1] == "RuntimeError: a bug"


def test_commands_import_no_heavy_package_that_they_do_not_need(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In one process of its own, in an order in which each command may import more than those before."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)
    classify = ["classify", str(photo), "--model", str(tiny_checkpoint), "--classes", "cat", "dog", "--output", "csv"]
    not_by_classify = (
        "lightning",
        "torchmetrics.metric",
        "torch._dynamo.eval_frame",  # of the loaded compiler; the package itself is a deferred one
        "torchvision.ops.misc",
        "transformers",
        "scipy",
    )
    commands = [
        (["--help"], ("torch", "lightning", "numpy")),
        (["fit", "--help"], ("torch", "lightning", "numpy")),
        (classify, not_by_classify),
        (["embed", "--help"], ("transformers", "timm", "open_clip", "pandas")),
        (["fit", "--help", "all"], ("transformers", "timm", "open_clip", "scipy.signal")),
    ]
    code = (
        f"import sys\nfor words, names in {commands}:\n"
        "    sys.argv = ['lit-clip', *words]\n    import lit_clip.cli.main\n"
        "    try: lit_clip.cli.main.main()\n    except SystemExit: pass\n"
        "    print('imported', words[0], [name for name in names if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("usage: lit-clip") == 4
    assert photo.name in result.stdout
    imported = [line for line in result.stderr.splitlines() if line.startswith("imported ")]
    assert imported == [f"imported {words[0]} []" for words, _ in commands]


def test_the_version_is_printed(in_process: Cli) -> None:
    assert in_process("--version").stdout == f"lit-clip {lit_clip.__version__}\n"


def test_no_module_is_suggested_for_a_misspelt_class() -> None:
    assert "did you mean" not in one_line(InputError("model.loss: wants Loss or null, not Combined"))  # combined.py


def test_help_describes_six_commands_and_names_the_others() -> None:
    assert CONFIGURED.keys() == CLI.subcommands().keys()  # a copy, because importing LightningCLI is slow
    text = help_text()
    assert len(text.splitlines()) <= 30
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = re.sub(r"\n {13}", " ", text).splitlines()
    described = {line.split()[0]: line for line in lines if line.startswith("  ") and not line.startswith("  lit-clip")}
    assert [*described] == ["fit", "evaluate", "classify", "search", "export", "demo"]
    assert all(line.endswith(".") for line in described.values())
    for name, module in ((each, COMMANDS[each].partition(":")[0]) for each in described if each != "fit"):
        assert FIRST[name] == (getattr(import_module(module), name).__doc__ or "").splitlines()[0]
    named = re.findall(r"[a-z-]+", text.partition("More commands:")[2].partition(".")[0])
    assert {*named} == {*CONFIGURED, *COMMANDS} - {*described}


@pytest.mark.parametrize("command", sorted(CONFIGURED))
def test_help_of_a_configured_command_is_a_page(command: str) -> None:
    lines = short_help(f"lit-clip {command}").splitlines()
    assert len(lines) <= 50
    assert all(len(line) <= 80 for line in lines)


def test_the_whole_help_names_losses_and_recipes_that_fit_imports_on_use(cli: Cli) -> None:
    text = cli("fit", "--help", "all").stdout
    for name in ("losses.Alignment", "losses.Sum", "losses.WeightedContrastive", "recipes.PretrainedEncoders"):
        assert f"lit_clip.{name}" in text


def test_a_given_progress_bar_replaces_the_default(caption_table: Path, tmp_path: Path, cli: Cli) -> None:
    command = [word for word in words("validate", caption_table) if "progress_bar" not in word and word != "false"]
    bar = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"
    result = cli(*command, "--trainer.logger", "false", bar)
    assert result.returncode == 0, result.stderr
    assert "litlogger" not in result.stderr


def test_a_checkpoint_with_other_weights_names_one_that_does_not_fit(
    trained: tuple[Path, Completed], caption_table: Path, tmp_path: Path, in_process: Cli
) -> None:
    checkpoint = torch.load(checkpoint_of(trained[0]), weights_only=True)
    del checkpoint["state_dict"]["ln_final.weight"]
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    result = in_process(*words("fit", caption_table), "--ckpt_path", "broken.ckpt")
    assert_user_error(result, "broken.ckpt", "weights do not fit", "ln_final.weight")


@pytest.mark.parametrize("part", ["optimizer", "lr_scheduler", "decay", "loss"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        {"class_path": 1, "init_args": {}},
    ],
)
def test_a_checkpoint_whose_names_of_parts_are_damaged_is_one_line(
    part: str, value: Any, trained: tuple[Path, Completed], caption_table: Path, tmp_path: Path, in_process: Cli
) -> None:
    checkpoint = torch.load(checkpoint_of(trained[0]), weights_only=True)
    checkpoint["parts"][part] = value
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    result = in_process(*words("fit", caption_table), "--ckpt_path", "broken.ckpt")
    assert_user_error(result, f"broken.ckpt: parts.{part}")


def test_resuming_past_max_epochs_says_which_option_to_raise(
    trained: tuple[Path, Completed], caption_table: Path, tmp_path: Path, in_process: Cli
) -> None:
    checkpoint = torch.load(checkpoint_of(trained[0]), weights_only=True)
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress.update(dict.fromkeys(progress, 74))
    torch.save(checkpoint, tmp_path / "long.ckpt")
    command = [*words("fit", caption_table), "--ckpt_path", "long.ckpt", "--trainer.max_epochs", "12"]
    parts = ["current_epoch=74", "max_epochs=12", "raise --trainer.max_epochs", "--model.pretrained FILE"]
    assert_user_error(in_process(*command), *parts)


def test_ctrl_c_ends_a_run_with_exit_code_130_and_says_how_to_resume(
    cli: Callable[..., subprocess.CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    def interrupted(step: int, *others: str) -> str:
        callback = f"{{class_path: tests.helpers.ranks_stability.CtrlC, init_args: {{step: {step}}}}}"
        options = ["--trainer.max_steps", "12", f"--trainer.callbacks+={callback}", *others]
        done = cli(*words("fit", caption_table), *options)
        assert done.returncode == 130
        return done.stderr.strip().splitlines()[-1]

    assert interrupted(2) == "lit-clip: interrupted: no checkpoint yet; SIGTERM saves one, Ctrl-C does not"
    message = interrupted(6)  # an epoch has 4 steps
    run = "lightning_logs/version_1"
    command = f"lit-clip fit --config {run}/fit_config.yaml --ckpt_path {run}/checkpoints/epoch=0-step=4.ckpt"
    assert message == f"lit-clip: interrupted: step 4 is saved; resume with: {command}"
    resumed = ["--ckpt_path", f"{run}/checkpoints/epoch=0-step=4.ckpt"]
    assert interrupted(5, *resumed) == f"lit-clip: interrupted: nothing new is saved; resume with: {command}"
    resumed = cli(*shlex.split(command)[1:], "--trainer.callbacks", "null")
    assert resumed.returncode == 0, resumed.stderr
    assert torch.load(tmp_path / "lightning_logs/version_3/checkpoints/epoch=2-step=12.ckpt", weights_only=True)


def test_evaluating_random_weights_warns(
    cli: Callable[..., subprocess.CompletedProcess[str]], caption_table: Path
) -> None:
    validated = cli(*words("validate", caption_table))
    assert validated.returncode == 0, validated.stderr
    advice = "set trained ones with --ckpt_path or --model.pretrained"
    assert f"validate: evaluates random weights; {advice}" in " ".join(validated.stderr.split())


@pytest.mark.parametrize(
    ("capabilities", "accelerator", "expected"),
    [
        ({"avx512_bf16": True}, "cpu", True),
        ({"avx512_bf16": True}, "auto", True),
        ({"amx_bf16": True}, "auto", True),
        ({"avx512_f": True, "avx512_bf16": False}, "cpu", False),
        ({"avx512_bf16": True}, "tpu", None),
    ],
)
def test_bfloat16_support_follows_the_processors_instructions(
    capabilities: dict[str, bool], accelerator: str, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_in_bfloat16(accelerator) is expected


def test_training_uses_bfloat16_where_supported_and_saves_the_choice_in_the_config(
    caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "computes_in_bfloat16", lambda accelerator: True)
    options = ["--trainer.limit_val_batches", "1", "--trainer.max_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["lit-clip", *bare("fit", caption_table), *options])
    run(sys.argv[1:])
    saved = yaml.safe_load((tmp_path / "lightning_logs/version_0/fit_config.yaml").read_text())
    assert saved["trainer"]["precision"] == "bf16-mixed"
    monkeypatch.setattr(sys, "argv", ["lit-clip", *bare("validate", caption_table)])
    run(sys.argv[1:])
    saved = yaml.safe_load((tmp_path / "lightning_logs/validate_0/validate_config.yaml").read_text())
    assert saved["trainer"]["precision"] is None  # evaluation stays in float32


@pytest.mark.parametrize(("has_instructions", "warned"), [(False, True), (True, False), (None, False)])
def test_emulated_bfloat16_warns(
    has_instructions: bool | None,
    warned: bool,
    caption_table: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(lightning, "computes_in_bfloat16", lambda accelerator: has_instructions)
    _, *options = words("validate", caption_table)
    run(args=[*options, "--trainer.precision", "bf16-mixed", "--trainer.logger", "false"], execute=False)
    messages = [str(each.message) for each in recwarn if "is emulated on this processor" in str(each.message)]
    assert bool(messages) == warned
    assert all("--trainer.precision 32-true" in message for message in messages)


# What mistakes on the command line and in YAML files say: the table of ``tests/messages.yaml``.


ROWS: list[Any] = yaml.safe_load((ROOT / "tests/messages.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not {"parts", "encoders"} & {*row}], ids=lambda row: next(iter(row.values()))[:60]
)
def test_a_mistake_is_one_line(
    row: Mapping[str, str], in_process: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text("model: {optimizer: {lr: 1}}", encoding="utf-8")
    (tmp_path / "typo.yaml").write_text(row.get("file", ""), encoding="utf-8")
    fit = ["fit", "--data", "datamodules.Captions", "--data.train", str(caption_table), "--data.val"]
    fit += [str(caption_table), "--data.batch_size", "16", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    fit += ["--model.architecture", TINY_YAML, "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false"]
    fit += ["--config", "typo.yaml"] if "file" in row else []
    typed = shlex.split(row.get("call", row.get("command", "")))
    result = in_process(*typed) if "command" in row else in_process(*fit, *typed)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lit-clip: error: ")
    assert row["line"] in last
    assert len(last) < 700
