"""Signals and killed processes: what is saved, what is said, how processes end, and that none is left."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from callbacks import EMA
from callbacks.preemption import Preemption
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.optim import AdamWSettings, WarmupCosineSettings
from tests.conftest import ROOT, TINY_YAML, lit_clip_command
from tests.test_module import data_for, trainer

LONG_VALIDATION = (
    *("--trainer.limit_train_batches", "2", "--data.batch_size", "2", "--data.num_workers", "0"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.callbacks+=tests.helpers.ranks_preemption.ValidationMark"),
)
SAVE_LAST = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}"


# One process: the test's own, which really gets the signals.


@pytest.fixture
def _handlers() -> Iterator[None]:
    """A process that was told to end keeps its handlers to the end; this one goes on."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class SignalAt(Callback):
    """Sends this process a signal the n-th time that a hook is called."""

    def __init__(self, hook: str, n: int = 1, signum: int = signal.SIGTERM) -> None:
        self.calls, self.n, self.signum = 0, n, signum
        setattr(self, hook, self.send)

    def send(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.n:
            os.kill(os.getpid(), self.signum)


class Recorder(Callback):
    """What happened: the weights after each step, and how much of validations."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.batches = self.validations = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(pl_module.model.visual.proj.detach().clone())

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.batches += 1

    def on_validation_epoch_end(self, *_: Any, **__: Any) -> None:
        self.validations += 1


def stopped_fit(
    config: CLIPConfig, table: Path, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
) -> tuple[SystemExit, Recorder]:
    """A run that a signal must end: how it ended, and what happened. Epochs have 4 steps, validations 4 batches."""
    module, recorder = (
        LitCLIP(config, optimizer=AdamWSettings(lr=0.01), lr_scheduler=WarmupCosineSettings(1)),
        Recorder(),
    )
    settings = {"max_epochs": 3, "callbacks": [Preemption(), recorder, *callbacks], **options}
    with pytest.raises(SystemExit) as stopped:
        trainer(folder, **settings).fit(module, data_for(module, table), ckpt_path=ckpt_path)
    return stopped.value, recorder


def keeper(folder: Path, save_last: bool = True) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_epochs=100, save_last=save_last)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.usefixtures("_handlers")
def test_a_signal_in_the_middle_of_a_step_ends_the_run_behind_that_step_with_a_whole_checkpoint(
    signum: signal.Signals, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    sender = SignalAt("on_before_optimizer_step", 2, signum)
    stopped, recorder = stopped_fit(tiny_config, caption_table, tmp_path, sender, keeper(tmp_path))
    assert stopped.code == 128 + signum
    assert len(recorder.steps) == 2
    assert names(tmp_path) == {"last.ckpt"}
    saved = load(tmp_path / "last.ckpt")
    assert saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["visual.proj"], recorder.steps[1])
    assert saved["optimizer_states"][0]["state"]
    assert str(stopped).startswith(f"{signum.name}: saved step 2; ")
    assert str(stopped).endswith(f"--ckpt_path {tmp_path}/last.ckpt")


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.usefixtures("_handlers")
def test_a_resumed_run_goes_on_behind_the_saved_step_and_may_be_ended_again(
    step: int, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end; the file is the run's own to replace."""
    run = tiny_config, caption_table, tmp_path
    _, first = stopped_fit(*run, SignalAt("on_before_optimizer_step", step), keeper(tmp_path))
    assert load(tmp_path / "last.ckpt")["global_step"] == len(first.steps) == step
    resume = {"ckpt_path": tmp_path / "last.ckpt"}
    _, second = stopped_fit(*run, SignalAt("on_before_optimizer_step", 4), keeper(tmp_path), **resume)
    assert names(tmp_path) == {"last.ckpt"}
    assert load(tmp_path / "last.ckpt")["global_step"] == len(first.steps) + len(second.steps) == step + 4


@pytest.mark.usefixtures("_handlers")
def test_a_validation_is_cut_short_and_nobody_evaluates_its_part(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """Under a moving average validation has other weights than training; the file holds both, as always."""
    sender = SignalAt("on_validation_batch_start", 2)
    options = {"num_sanity_val_steps": 0, "limit_train_batches": 2}
    average = EMA(decay=0.25)
    stopped, recorder = stopped_fit(tiny_config, caption_table, tmp_path, sender, average, keeper(tmp_path), **options)
    assert stopped.code == 128 + signal.SIGTERM
    assert (len(recorder.steps), recorder.batches, recorder.validations) == (2, 1, 0)
    saved = load(tmp_path / "last.ckpt")
    first, second = recorder.steps
    assert saved["global_step"] == 2
    assert torch.equal(saved["current_model_state"]["model.visual.proj"], second)
    torch.testing.assert_close(saved["state_dict"]["visual.proj"], 0.25 * first + 0.75 * second)


class Diary(Callback):
    """Training steps, epochs' ends, and validations that ended with what they found, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.entries.append(("step", trainer.global_step, float(trainer.callback_metrics["train/loss"])))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        found = float(trainer.callback_metrics["val/loss"])
        self.entries.append(("validation", trainer.global_step, trainer.current_epoch, found))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.entries.append(("epoch", trainer.current_epoch))


@pytest.mark.parametrize(
    ("batch", "options", "average"),
    [
        pytest.param(6, {}, True, id="at the end of an epoch, of averaged weights"),
        pytest.param(6, {"val_check_interval": 1}, False, id="behind the second step of an epoch"),
        pytest.param(10, {}, False, id="the last of all"),
    ],
)
@pytest.mark.usefixtures("_handlers")
def test_a_validation_that_was_cut_short_is_what_the_run_goes_on_with(
    batch: int, options: dict[str, Any], average: bool, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    def fit(name: str, *more: Callback, ckpt_path: Path | None = None) -> list[tuple[Any, ...]]:
        torch.manual_seed(0)
        module, diary = (
            LitCLIP(tiny_config, optimizer=AdamWSettings(lr=0.01), lr_scheduler=WarmupCosineSettings(1)),
            Diary(),
        )
        best = ModelCheckpoint(tmp_path / name, "best", monitor="val/loss", save_last=True)
        callbacks = [Preemption(), diary, *([EMA(decay=0.25)] if average else []), *more, best]
        settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "limit_train_batches": 2, "callbacks": callbacks}
        with suppress(SystemExit):
            trainer(tmp_path, **settings, **options).fit(module, data_for(module, caption_table), ckpt_path=ckpt_path)
        return diary.entries

    whole = fit("whole")
    cut = fit("cut", SignalAt("on_validation_batch_start", batch))
    rest = fit("rest", ckpt_path=tmp_path / "cut/last.ckpt")
    assert rest[0][0] == "validation"
    assert cut + rest == whole
    best = load(tmp_path / "rest/best.ckpt")["global_step"]  # maybe of that validation, before the first step
    first = next(i for i, entry in enumerate(whole) if entry[:2] == ("validation", best))
    assert best >= cut[-1][1]
    again = fit("again", ckpt_path=tmp_path / "rest/best.ckpt")
    assert [entry for entry in again if entry[0] != "epoch"] == [e for e in whole[first + 1 :] if e[0] != "epoch"]


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_validation_batch_start"])
@pytest.mark.usefixtures("_handlers")
def test_before_the_first_step_there_is_nothing_to_save(
    hook: str, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    stopped, recorder = stopped_fit(tiny_config, caption_table, tmp_path, SignalAt(hook), keeper(tmp_path))
    assert stopped.code == 128 + signal.SIGTERM
    assert "nothing to save" in str(stopped)
    assert recorder.steps == []
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("_handlers")
def test_ranks_may_compare_notes_less_often(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    recorder, module = Recorder(), LitCLIP(tiny_config, lr_scheduler=WarmupCosineSettings(1))
    callbacks = [Preemption(every_n_steps=3), recorder, SignalAt("on_before_optimizer_step"), keeper(tmp_path)]
    with pytest.raises(SystemExit):
        trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(module, data_for(module, caption_table))
    assert load(tmp_path / "last.ckpt")["global_step"] == len(recorder.steps) == 3
    with pytest.raises(InputError, match="every_n_steps: 0 must be at least 1"):
        Preemption(every_n_steps=0)


@pytest.mark.usefixtures("_handlers")
def test_without_a_last_checkpoint_there_is_one_of_its_own_name(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(tiny_config, caption_table, tmp_path, sender, keeper(tmp_path, save_last=False))
    assert names(tmp_path) == {"preempted.ckpt"}
    assert load(tmp_path / "preempted.ckpt")["global_step"] == 1
    assert str(stopped).endswith("preempted.ckpt")


@pytest.mark.usefixtures("_handlers")
def test_who_wants_no_checkpoints_gets_none_and_is_told(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(tiny_config, caption_table, tmp_path, sender, enable_checkpointing=False)
    assert stopped.code == 128 + signal.SIGTERM
    assert "no checkpoint" in str(stopped)
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("_handlers")
def test_another_runs_checkpoint_is_not_replaced(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"another run's")
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(tiny_config, caption_table, tmp_path, sender, keeper(tmp_path))
    assert (tmp_path / "last.ckpt").read_bytes() == b"another run's"
    assert load(tmp_path / "last-v1.ckpt")["global_step"] == 1
    assert str(stopped).endswith("last-v1.ckpt")


class SignalWhileSaving(TorchCheckpointIO):
    """Storage so slow that somebody loses patience."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().save_checkpoint(checkpoint, path, storage_options)
        os.kill(os.getpid(), signal.SIGUSR1)


class FullDisk(TorchCheckpointIO):
    """Storage that keeps half of a file and says nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.usefixtures("_handlers")
def test_more_signals_while_saving_change_nothing(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> None:
    run = tiny_config, caption_table, tmp_path
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(*run, sender, keeper(tmp_path), plugins=[SignalWhileSaving()])
    os.kill(os.getpid(), signal.SIGTERM)  # and now that Lightning has torn everything down
    assert stopped.code == 128 + signal.SIGTERM
    assert names(tmp_path) == {"last.ckpt"}
    assert load(tmp_path / "last.ckpt")["global_step"] == 1


@pytest.mark.usefixtures("_handlers")
def test_a_checkpoint_that_is_not_whole_replaces_nothing_and_is_an_error(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """Lightning says nothing of a file that it could not write (footgun L19)."""
    run = tiny_config, caption_table, tmp_path
    stopped_fit(*run, SignalAt("on_before_optimizer_step", 1), keeper(tmp_path))
    module = LitCLIP(tiny_config, lr_scheduler=WarmupCosineSettings(1))
    callbacks = [Preemption(), SignalAt("on_before_optimizer_step", 1), keeper(tmp_path)]
    fitting = trainer(tmp_path, max_epochs=2, callbacks=callbacks, plugins=[FullDisk()])
    with pytest.raises(InputError, match=r"last\.ckpt: could not be written"):
        fitting.fit(module, data_for(module, caption_table), ckpt_path=tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt")["global_step"] == 1


def test_outside_of_fit_a_signal_ends_a_process_at_once(tiny_config: CLIPConfig, caption_table: Path) -> None:
    """Nothing is there to be saved; Lightning's own handler would wait for other ranks, which may not come."""

    class Handlers(Callback):
        def on_validation_start(self, *_: Any) -> None:
            self.sigterm = signal.getsignal(signal.SIGTERM)

    handlers, module = Handlers(), LitCLIP(tiny_config)
    validating = trainer(Path(), callbacks=[Preemption(), handlers])
    validating.validate(module, data_for(module, caption_table), verbose=False)
    assert handlers.sigterm == signal.SIG_DFL


# Several processes: the command, as a person or a scheduler starts it.


class Run:
    """A ``lit-clip fit`` of the tiny model that goes on until it is told to end, in a folder of its own."""

    def __init__(self, folder: Path, table: Path, *words: str, devices: int = 2, val: Path | None = None) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        command = [
            *(str(Path(sys.executable).parent / "lit-clip"), "fit", "--data", "datamodules.Captions"),
            *("--data.train", str(table), "--data.val", str(val or table), "--data.batch_size", "8"),
            *(
                "--model.architecture",
                TINY_YAML,
                "--model.lr_scheduler.warmup_steps",
                "2",
                "--trainer.max_steps",
                "100000",
            ),
            *("--trainer.max_time", "00:00:05:00", "--trainer.accelerator", "cpu", "--trainer.devices", str(devices)),
            *("--trainer.strategy", "auto" if devices == 1 else "ddp", "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger", "--trainer.log_every_n_steps", "1"),
            *("--trainer.logger.init_args.save_dir", ".", "--trainer.logger.init_args.flush_logs_every_n_steps", "1"),
            *words,
        ]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=file,
                stderr=file,
                env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
                process_group=0,
            )
        self.ranks: list[int] = []
        self.everyone: set[psutil.Process] = set()

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are logged; then the processes are known."""
        self._wait(lambda: len(self.logged_steps()) >= step)
        children = psutil.Process(self.process.pid).children()
        self.ranks = [self.process.pid, *(child.pid for child in children if "LOCAL_RANK" in child.environ())]
        self.everyone = {psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)}

    def wait_for_validation(self) -> None:
        """Until both ranks are at it, where they have no collectives; then the processes are known."""
        self._wait(lambda: len(list(self.folder.glob("validating_*"))) == 2)
        self.wait_for_step(2)

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not happened():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def logged_steps(self) -> list[int]:
        path = self.folder / "lightning_logs/version_0/metrics.csv"
        header, *rows = path.read_text().splitlines() if path.exists() else [""]
        columns = header.split(",")
        cells = [row.split(",") for row in rows]
        return [
            int(row[columns.index("step")])
            for row in cells
            if len(row) == len(columns) and row[columns.index("train/loss")]
        ]

    def ends(self, timeout: float) -> int:
        """The exit code; everyone must be gone by then, or shortly after."""
        deadline = time.monotonic() + timeout
        code = self.process.wait(timeout)
        _, alive = psutil.wait_procs(self.everyone, max(deadline - time.monotonic(), 0))
        assert alive == [], f"{alive}: {self.output.read_text()}"
        return code

    def checkpoint(self, name: str = "last.ckpt") -> Path:
        return self.folder / "lightning_logs/version_0/checkpoints" / name

    def last_line(self) -> str:
        return self.output.read_text().splitlines()[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Make a :class:`Run`; nothing of it survives the test."""
    runs: list[Run] = []

    def make(*arguments: Any, **options: Any) -> Run:
        folder = tmp_path / f"run_{len(runs)}"
        folder.mkdir()
        runs.append(Run(folder, *arguments, **options))
        return runs[-1]

    yield make
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait(10)


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory, caption_table: Path) -> Path:
    """A validation of half a minute or more in batches of 2, one of them more on the first of two ranks."""
    header, *rows = caption_table.read_text(encoding="utf-8").splitlines()
    rows = [re.sub(r"^[^,]+", lambda path: str((caption_table.parent / path[0]).resolve()), row) for row in rows]
    path = tmp_path_factory.mktemp("long") / "captions.csv"
    path.write_text("\n".join([header, *(rows * 1000)[:16001]]), encoding="utf-8")
    return path


@pytest.fixture
def start_and_wait(start: Callable[..., Run], caption_table: Path, long_table: Path) -> Callable[[str], Run]:
    """A run that is in the middle of its training or of a validation."""

    def make(during: str) -> Run:
        if during == "training":
            run = start(caption_table, "--data.num_workers", "1")
            run.wait_for_step(2)
        else:
            run = start(caption_table, *LONG_VALIDATION, val=long_table)
            run.wait_for_validation()
        return run

    return make


@pytest.mark.slow
def test_signals_to_all_processes_again_and_again_end_with_one_whole_checkpoint_that_can_be_resumed(
    start: Callable[..., Run], caption_table: Path
) -> None:
    """Also to data workers, as SLURM does: none of them may die and take its rank along (footgun L16)."""
    run = start(caption_table, f"--trainer.callbacks+={SAVE_LAST}", "--data.num_workers", "1")
    run.wait_for_step(3)
    assert len(run.ranks) == 2
    deadline = time.monotonic() + 40
    while run.process.poll() is None and time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert run.ends(30) == 128 + signal.SIGTERM
    steps = load(run.checkpoint())["global_step"]
    assert run.logged_steps() == list(range(steps))
    assert not list(run.checkpoint().parent.glob("*.part"))
    (command,) = re.findall(r"^lit-clip: SIGTERM: saved step \d+; go on with: lit-clip (.+)$", run.last_line())
    more = ("--trainer.max_steps", str(steps + 2), "--data.num_workers", "0")
    resumed = lit_clip_command(run.folder, *shlex.split(command), *more)
    assert resumed.returncode == 0, resumed.stderr
    (last,) = run.folder.glob("lightning_logs/version_1/checkpoints/last.ckpt")
    assert load(last)["global_step"] == steps + 2


@pytest.mark.parametrize(
    ("rank", "signum"), [pytest.param(0, signal.SIGUSR1, marks=pytest.mark.slow), (1, signal.SIGTERM)]
)
def test_a_signal_to_one_rank_ends_all(
    rank: int, signum: signal.Signals, start: Callable[..., Run], caption_table: Path
) -> None:
    run = start(caption_table, "--data.num_workers", "0")
    run.wait_for_step(2)
    os.kill(run.ranks[rank], signum)
    assert run.ends(30) == 128 + signum
    assert load(run.checkpoint("preempted.ckpt"))["global_step"] == len(run.logged_steps())


def test_signals_during_a_validation_of_uneven_ranks_end_it(start_and_wait: Callable[[str], Run]) -> None:
    run = start_and_wait("validation")
    for rank in run.ranks:
        os.kill(rank, signal.SIGTERM)
    assert run.ends(30) == 128 + signal.SIGTERM
    assert load(run.checkpoint("preempted.ckpt"))["global_step"] == 2


@pytest.mark.parametrize("during", ["training", pytest.param("validation", marks=pytest.mark.slow)])
def test_the_first_rank_ends_with_an_error_when_another_is_killed(
    during: str, start_and_wait: Callable[[str], Run]
) -> None:
    run = start_and_wait(during)
    os.kill(run.ranks[1], signal.SIGKILL)
    assert run.ends(60) != 0


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "validation"])
def test_the_other_ranks_end_with_an_error_when_the_first_is_killed(
    during: str, start_and_wait: Callable[[str], Run]
) -> None:
    """In a validation, which has no collectives, they would go on to its end."""
    run = start_and_wait(during)
    os.kill(run.ranks[0], signal.SIGKILL)
    assert run.ends(60) == -signal.SIGKILL
    # Whichever it notices first: what it waits for in the group, or that the process that started it is gone.
    said = ("another process has ended", "the first process of this machine has ended")
    assert any(words in run.last_line() for words in said)


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "validation"])
def test_a_sharded_run_is_saved_whole_by_all_ranks(
    during: str, start: Callable[..., Run], caption_table: Path, tmp_path: Path
) -> None:
    """With a strategy that may compute each batch on all ranks together, a validation is finished first."""
    val = tmp_path / "val.csv"
    header, *rows = caption_table.read_text(encoding="utf-8").splitlines()
    folder = str(caption_table.parent)
    val.write_text("\n".join([header, *(rows * 10)]), encoding="utf-8")
    sharded = ("--trainer.strategy", "{class_path: lit_clip.training.fsdp.FSDP}", "--data.root", folder)
    run = start(caption_table, *LONG_VALIDATION, *sharded, val=val)
    if during == "training":
        run.wait_for_step(1)
    else:
        run.wait_for_validation()
    assert "lit_clip.training.fsdp.FSDP" in (run.folder / "lightning_logs/version_0/fit_config.yaml").read_text()
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.ends(60) == 128 + signal.SIGTERM
    saved = load(run.checkpoint("preempted.ckpt"))
    assert saved["global_step"] == len(run.logged_steps())
    assert saved["optimizer_states"][0]["state"]


def test_slurms_requeue_signal_saves_where_the_next_job_looks_and_requeues(
    start: Callable[..., Run], caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler itself is a script that notes how it was called."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    slurm = {"NTASKS": "1", "JOB_ID": "41", "JOB_NAME": "clip", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = start(caption_table, "--data.num_workers", "0", devices=1)
    run.wait_for_step(2)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.ends(30) == 128 + signal.SIGUSR1
    assert (tmp_path / "called").read_text().split() == ["requeue", "41"]
    assert load(run.folder / "hpc_ckpt_1.ckpt")["global_step"] == len(run.logged_steps())


@pytest.mark.slow
def test_ten_of_ten_runs_end_with_a_whole_checkpoint_wherever_the_signal_hits(
    start: Callable[..., Run], caption_table: Path
) -> None:
    moments = random.Random(0)
    for _ in range(10):
        run = start(caption_table, f"--trainer.callbacks+={SAVE_LAST}", "--data.num_workers", "0")
        run.wait_for_step(moments.randrange(1, 30))
        time.sleep(moments.random() / 5)
        for rank in run.ranks:
            os.kill(rank, signal.SIGTERM)
        assert run.ends(60) == 128 + signal.SIGTERM
        assert load(run.checkpoint())["global_step"] == len(run.logged_steps())
