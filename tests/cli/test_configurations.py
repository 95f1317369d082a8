"""Checkpoints of another configuration are not resumed by ``--ckpt_path last``, ``auto`` and ``hpc``."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from lit_clip.cli.configurations import configuration, differences, joined, run_folders
from lit_clip.cli.save_config import FIRST, flat_settings
from lit_clip.errors import InputError
from tests.cli.test_main import TINY_YAML

Cli = Callable[..., CompletedProcess[str]]
LAST = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: last}}"
LOGGER = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs, name: mine}}"
WORDS = [
    *("--data", "datamodules.Captions", "--data.batch_size", "32", "--data.num_workers", "0"),
    *("--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *(f"--trainer.callbacks+={LAST}", f"--trainer.logger={LOGGER}"),
]


def checkpoint(run: int) -> Path:
    return Path(f"runs/mine/version_{run}/checkpoints/last.ckpt")


def resumed_from(run: int, folder: Path) -> str:
    saved = yaml.safe_load((folder / checkpoint(run).parents[1] / "fit_config.yaml").read_text(encoding="utf-8"))
    return saved["ckpt_path"] or ""


def test_last_and_auto_take_only_checkpoints_of_the_same_configuration(
    cli: Cli, in_process: Cli, caption_table: Path, tmp_path: Path
) -> None:
    """The newest checkpoint in the folder is of a run with another loss."""
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table)]
    for more in ([], ["--model.loss", "Contrastive", "--model.loss.duplicates", "positives"]):
        run = cli("fit", *WORDS, *data, *more)
        assert run.returncode == 0, run.stderr
    config = ["--config", str(checkpoint(0).parents[1] / "fit_config.yaml")]
    edited = ["--trainer.max_epochs", "2", "--model.optimizer.lr", "1e-5", "--data.num_workers", "1"]
    resumed = cli("fit", *config, *edited, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed_from(2, tmp_path).endswith(str(checkpoint(0)))
    (named,) = [line for line in resumed.stderr.splitlines() if "another configuration" in line]
    assert f"{checkpoint(1)}: passed over; its run had another configuration (model.loss)" in named
    # The run that was resumed belongs to the configuration of the one that began, in both spellings.
    for written in ([*WORDS, *data], ["--config", str(checkpoint(2).parents[1] / "fit_config.yaml")]):
        again = in_process("fit", *written, "--ckpt_path", "auto", "--trainer.max_epochs", "2", "--print_plan")
        assert again.returncode == 0, again.stderr
        assert "another configuration" not in again.stderr
    other = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    for option, names in ((other, "model.optimizer"), (["--data.seed", "3"], "data.seed")):
        refused = in_process("fit", *WORDS, *data, *option, "--ckpt_path", "last")
        assert refused.returncode == 2
        assert f"passed over (and 2 others); its run had another configuration ({names})" in refused.stderr
        assert "--ckpt_path last: no complete checkpoint below checkpoints, runs/mine" in refused.stderr
        assert refused.stderr.rstrip().endswith(f"weights with --model.pretrained {tmp_path / checkpoint(2)}")
    evaluated = cli("validate", "--ckpt_path", "last", *WORDS[:2], *data[2:], *WORDS[-1:])
    assert evaluated.returncode == 0, evaluated.stderr  # without a config any model is evaluated


def test_a_requeued_job_of_another_configuration_is_not_resumed(
    cli: Cli, in_process: Cli, caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table)]
    assert cli("fit", *WORDS, *data).returncode == 0
    shutil.move(tmp_path / checkpoint(0), tmp_path / "hpc_ckpt_1.ckpt")
    other = ["--data.augmentation.grayscale", "0.5"]
    for option in ("hpc", "last"):
        refused = in_process("fit", *WORDS, *data, *other, "--ckpt_path", option)
        assert "hpc_ckpt_1.ckpt: passed over; its run had another configuration (data.augmentation)" in refused.stderr
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", lambda: True)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in (job | {"SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1"}).items():
        monkeypatch.setenv(name, value)
    refused = cli("fit", *WORDS, *data)  # Lightning itself would take it
    assert refused.returncode == 2
    assert "hpc_ckpt_1.ckpt: saved by another SLURM job, which Lightning would resume here; resume" in refused.stderr
    validated = cli("validate", *WORDS, *data)
    assert validated.returncode == 0, validated.stderr
    assert "hpc_ckpt_1.ckpt" not in validated.stdout + validated.stderr
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=False)
    torch.save({**saved, "slurm_job_id": "1"}, tmp_path / "hpc_ckpt_1.ckpt")
    refused = cli("fit", *WORDS, *data, *other)  # as here
    assert refused.returncode == 2
    assert "hpc_ckpt_1.ckpt: Lightning would resume this requeued job, which had another" in refused.stderr
    taken = cli("fit", *WORDS, *data, "--trainer.max_epochs", "2")
    assert taken.returncode == 0, taken.stderr
    (resumed,) = tmp_path.glob("runs/mine/*/checkpoints/last.ckpt")
    assert torch.load(resumed, weights_only=True)["global_step"] == 4


def test_what_a_checkpoint_holds_in_place_of_a_configuration_is_never_the_same() -> None:
    ours = {"model": ["a"], "data.train": ["b"]}
    for saved in (None, 3, [], {"model": "a", "data.train": ["b"]}, {"model": [["a"]], "data.train": ["b"]}):
        assert differences(ours, saved)
        assert joined(ours, saved)["data.train"] == ["b"]
    assert differences(ours, {"model": ["c", "a"], "data.train": ["b"], "data.later": ["d"]}) == []
    assert joined(ours, {"model": ["z"], "data.train": ["y"]}) == {"model": ["z", "a"], "data.train": ["b"]}


def settings(train: Any, loss: Any = None, architecture: Any = "RN-tiny-64", **more: Any) -> dict[str, Any]:
    data = {"class_path": "datamodules.Captions", "init_args": {"train": train, "columns": {"image": "p.csv"}, **more}}
    return {"model": {"loss": loss, "architecture": architecture}, "data": data}


def differing(ours: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    return differences(configuration(ours), configuration(saved))


def test_other_spellings_of_the_same_data_are_no_difference_and_another_loss_is() -> None:
    spellings = ["p.csv", "./p.csv", str(Path.cwd() / "p.csv"), ["p.csv"], ["./p.csv"]]
    for one, other in itertools.product(spellings, repeat=2):
        assert differing(settings(one), settings(other)) == []
    for other in ("q.csv", ["p.csv", "q.csv"], "s3://p.csv", "../p.csv", None):
        assert differing(settings("p.csv"), settings(other)) == ["data.train"]
    for loss in ({"class_path": "mine.Contrastive", "init_args": {}}, {"class_path": "lit_clip.losses.Sigmoid"}):
        assert differing(settings("p.csv", loss), settings("p.csv")) == ["model.loss"]


def test_auto_begins_anew_only_where_there_is_no_checkpoint_and_takes_those_without_a_record(
    cli: Cli, in_process: Cli, caption_table: Path, tmp_path: Path
) -> None:
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table)]
    assert cli("fit", *WORDS, *data).returncode == 0
    file = tmp_path / checkpoint(0)
    other = ["--model.loss", "lit_clip.losses.Sigmoid"]
    refused = in_process("fit", *WORDS, *data, "--data.seed", "3", "--ckpt_path", "auto", "--print_plan")
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert f"{file}: passed over; its run had another configuration (data.seed). Give a checkpoint's path to" in line
    same = in_process("fit", *WORDS, *data, "--ckpt_path", "last", "--print_plan")
    assert same.returncode == 0, same.stderr
    content = torch.load(file, weights_only=True)
    del content["configuration"]
    torch.save(content, file)
    taken = cli("fit", *WORDS, *data, *other, "--ckpt_path", "auto", "--print_plan")
    assert f"{file}: its configuration is not recorded; it is resumed with this command's" in taken.stderr


# Checkpoints of a configuration's runs are searched for where ModelCheckpoint puts them.


LOGGERS = "lightning.pytorch.loggers"
KEEPER = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}


def config(logger: Any, callbacks: Any = None, root: str | None = None) -> dict[str, Any]:
    return {"trainer": {"logger": logger, "callbacks": callbacks, "default_root_dir": root}}


def folder_of(logger: Any, root: str) -> Path:
    """Return Lightning's own folder for a run with this logger."""
    trainer: Any = SimpleNamespace(loggers=[logger], default_root_dir=root)
    return Path(ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(trainer))  # pyright: ignore


@pytest.mark.parametrize("options", [{"save_dir": "logs"}, {"save_dir": "logs", "name": "mine"}])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_checkpoints_lie_in_the_folder_of_a_logger_on_disk(kind: Any, options: dict[str, str]) -> None:
    (_, folder) = run_folders(config({"class_path": f"{LOGGERS}.{kind.__name__}", "init_args": options}))
    assert folder_of(kind(**options), "root").is_relative_to(folder)


@pytest.mark.parametrize("kind", ["CometLogger", "NeptuneLogger"])
def test_a_logger_with_unknown_folders_needs_a_dirpath(kind: str) -> None:
    logger = {"class_path": f"{LOGGERS}.{kind}", "init_args": {"save_dir": "logs"}}
    with pytest.raises(InputError, match=f"--ckpt_path: the folder of {kind}'s runs is not known in advance; "):
        run_folders(config(logger))
    assert run_folders(config(logger, KEEPER)) == [Path("checkpoints"), Path("kept")]
    csv = {"class_path": f"{LOGGERS}.CSVLogger", "init_args": {"save_dir": "logs"}}
    assert run_folders(config([csv, logger]))[1:] == [Path("logs/lightning_logs")]  # the first logger's folder counts


def test_runs_without_a_logger_use_the_root_and_callbacks_their_dirpath(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    expected = [tmp_path / "checkpoints", tmp_path / "hpc_ckpt_1.ckpt"]
    assert run_folders(config(False, [KEEPER, None], str(tmp_path)))[:2] == expected
    assert run_folders(config(False, KEEPER, str(tmp_path)))[-1] == Path("kept")
    assert run_folders(config(None, None, str(tmp_path)))[-1] == tmp_path / "lightning_logs"


# TensorBoard's HParams page compares runs of the command line, read with the page's own backend.


TENSORBOARD = "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: mine}}"


def page(folder: Path) -> tuple[Any, list[Any]]:
    """Return the lists and rows of the page for all runs in a folder."""
    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(folder))
    backend: Any = backend_context.Context(
        base_plugin.TBContext(logdir=str(folder), multiplexer=events, data_provider=provider)
    )
    request, every = context.RequestContext(), [1, 2, 3, 0]  # all states of a run
    runs, others = backend.hparams_metadata(request, ""), backend.hparams_from_data_provider(request, "", 1000)
    lists = backend.experiment_from_metadata(request, "", True, runs, others)
    columns = [api_pb2.ColParams(metric=each.name) for each in lists.metric_infos]  # pyright: ignore[reportAttributeAccessIssue]  # generated
    asked = api_pb2.ListSessionGroupsRequest(  # pyright: ignore[reportAttributeAccessIssue]  # generated
        start_index=0, slice_size=10, allowed_statuses=every, col_params=columns, include_metrics=True
    )
    return lists, list(list_session_groups.Handler(request, backend, "", asked).run().session_groups)


def test_two_runs_can_be_compared_by_settings_and_final_metrics(
    cli: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table), f"--trainer.logger={TENSORBOARD}"]
    for rate in ("1e-3", "2e-3"):
        run = cli("fit", *WORDS, *data, "--model.optimizer.lr", rate)
        assert run.returncode == 0, run.stderr
    lists, rows = page(tmp_path / "runs")
    settings, metrics = [each.name for each in lists.hparam_infos], [each.name.tag for each in lists.metric_infos]
    assert {*settings[:4]} == {*FIRST} - {
        "model.architecture"
    }  # which is a mapping here; the page shows the first five
    assert {"model.optimizer", "data", "data.num_workers", "trainer.callbacks"} <= {*settings}
    assert metrics[:3] == ["val/loss", "val/image_to_text_recall@1", "val/text_to_image_recall@1"]
    assert [row.hparams["model.optimizer.lr"].number_value for row in rows] == [1e-3, 2e-3]
    for number, row in enumerate(rows):
        found = {each.name.tag: each.value for each in row.metric_values}
        events = EventAccumulator(str(tmp_path / f"runs/mine/version_{number}")).Reload()
        assert found.keys() == {*metrics}
        for name, value in found.items():
            assert value == events.Scalars(name)[-1].value


def test_settings_are_flat_plain_values_without_passwords() -> None:
    callback = {"class_path": "callbacks.EMA", "init_args": {"decay": 0.9, "start_step": None}}
    lightnings = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "last"}}
    given = {
        "model": {"loss": {"class_path": "mine.Loss", "init_args": {"power": 2}}, "freeze": None},
        "data": {"class_path": "datamodules.Captions", "init_args": {"train": "https://me:word@host/a.csv"}},
        "trainer": {"max_epochs": 3, "logger": {"class_path": "x"}, "callbacks": [lightnings, callback]},
    }
    expected = {
        **{"model.loss": "mine.Loss", "model.loss.power": 2, "data": "datamodules.Captions"},
        **{"data.train": "https://me:***@host/a.csv", "trainer.max_epochs": 3},
        "trainer.callbacks": "EMA(decay=0.9), ModelCheckpoint",
    }
    assert flat_settings(yaml.safe_load(yaml.safe_dump(given))) == expected
    assert flat_settings({"trainer": {"callbacks": None}}) == {"trainer.callbacks": ""}
