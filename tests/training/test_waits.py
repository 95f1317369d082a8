"""A training step between two logged ones does not wait for the device, and sends only what it must."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import callbacks
from callbacks import progress
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.tools import console, hardware
from tests.callbacks.test_non_finite import WITH_BATCH_NORM
from tests.helpers import pretended
from tests.helpers.small_sets import write_table
from tests.helpers.waits import counted
from tests.test_module import data_for, trainer


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
        ("tiny", {"gradient_clip_val": 1.0}),
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


def test_two_ranks_send_only_the_losses_rows_and_one_check(ranks: Callable[..., None], tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    ranks("count", 2, str(output), str(write_table(tmp_path, 32)), script="ranks_waits.py")
    found = {int(step): Counter(calls) for step, calls in json.loads(output.read_text()).items()}
    assert found[4] != found[5]  # the logged one gathers the ranks' counts of samples
    for step in (2, 3, 5, 6):
        of_loss = {name: calls for name, calls in found[step].items() if name.split()[1] in OF_LOSS}
        assert sum(of_loss.values()) == 4  # texts, two of the log-sum-exp, and their gradient
        assert found[step] - Counter(of_loss) == {"all_reduce sum_over_ranks": 1}
