"""TensorBoard's HParams page compares runs of the command line, read with the page's own backend."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from lit_clip.cli.hparams import FIRST, flat_settings
from tests.cli.test_configurations import WORDS

LOGGER = "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: mine}}"


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
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table), f"--trainer.logger={LOGGER}"]
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


@pytest.mark.parametrize(
    "logger", ["false", "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: a}}"]
)
def test_runs_without_tensorboard_write_no_events(
    logger: str, cli: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    data = ["--data.train", str(caption_table), "--data.val", str(caption_table), f"--trainer.logger={logger}"]
    run = cli("fit", *WORDS, *data, "--trainer.max_steps", "1")
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
