"""Preemption: the checkpoint, message and exit code after a signal or a kill, with no process left over."""

import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor

from callbacks import EMA
from callbacks.preemption import Preemption
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.tools import hardware
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO
from lit_clip.training.lightning.signals import Signals
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import ROOT, TINY_YAML, lit_clip_command
from tests.helpers import forks
from tests.helpers.fork_ranks import command_of_ranks
from tests.test_module import data_for, trainer

LONG_VALIDATION = (
    *("--trainer.limit_train_batches", "2", "--data.batch_size", "2", "--data.num_workers", "0"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.callbacks+=tests.helpers.ranks_stability.ValidationMark"),
)
SAVE_LAST = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}"


# One process: this one, which really gets the signals.


class SignalAt(Callback):
    """Send this process a signal the n-th time a hook is called."""

    def __init__(self, hook: str, n: int = 1, signum: int = signal.SIGTERM) -> None:
        self.calls, self.n, self.signum = 0, n, signum
        setattr(self, hook, self.send)

    def send(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.n:
            os.kill(os.getpid(), self.signum)


class Recorder(Callback):
    """Record the weights after each step, and count validations and their batches."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.batches = self.validations = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(pl_module.model.visual.proj.detach().clone())

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.batches += 1

    def on_validation_epoch_end(self, *_: Any, **__: Any) -> None:
        self.validations += 1


StoppedFit = Callable[..., tuple[SystemExit, Recorder]]


@pytest.fixture
def stopped_fit(tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path) -> StoppedFit:
    """Run a fit that a signal must end; return the exit and the record. Epochs have 4 steps, validations 4 batches."""

    def run(*callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> tuple[SystemExit, Recorder]:
        rates: Any = {"optimizer": partial(PaperAdamW, lr=0.01), "lr_scheduler": partial(WarmupCosine, warmup_steps=1)}
        module, recorder = LitCLIP(tiny_config, **rates), Recorder()
        settings = {"max_epochs": 3, "num_sanity_val_steps": 2, **options}
        settings["callbacks"] = [Preemption(), recorder, *callbacks]
        with pytest.raises(SystemExit) as stopped:
            trainer(tmp_path, **settings).fit(module, data_for(module, caption_table), ckpt_path=ckpt_path)
        return stopped.value, recorder

    return run


def keeper(folder: Path, save_last: bool = True) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_epochs=100, save_last=save_last)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_a_step_saves_a_complete_checkpoint_after_that_step(
    signum: signal.Signals, stopped_fit: StoppedFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sender = SignalAt("on_before_optimizer_step", 2, signum)
    stopped, recorder = stopped_fit(sender, keeper(tmp_path))
    assert stopped.code == 128 + signum
    assert len(recorder.steps) == 2
    assert names(tmp_path) == {"last.ckpt"}
    saved = load(tmp_path / "last.ckpt")
    assert saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["visual.proj"], recorder.steps[1])
    assert saved["optimizer_states"][0]["state"]
    how = f"the same command and --ckpt_path {tmp_path}/last.ckpt (in Python trainer.fit(..., ckpt_path=...))"
    assert str(stopped) == f"{signum.name}: saved step 2; resume with: {how}"
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"lit-clip: {stopped}"
    assert sum(signum.name in line for line in told) == 1


@pytest.mark.parametrize("later", [False, True])
def test_where_reading_would_wait_ranks_act_one_step_later(
    later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "runs_ahead", lambda device: later)
    signals, device = Signals(trainer(tmp_path)), torch.device("cpu")
    assert not signals.read(device)  # no collective: the ranks have to ask each other
    none = torch.cat(signals.flags(torch.zeros(0)))
    signals.received = signal.SIGTERM
    one = torch.cat(signals.flags(torch.zeros(0)))
    assert float(one.sum()) == 1
    agreed = []
    for counts in (none, one + none, one + one):
        signals.note(counts)
        assert signals.read(device)
        agreed.append(signals.agreed)
    assert agreed == ([0, 0, signal.SIGTERM] if later else [0, signal.SIGTERM, signal.SIGTERM])


def test_a_signal_stops_a_validation_and_discards_its_results(stopped_fit: StoppedFit, tmp_path: Path) -> None:
    """With EMA, validation uses other weights than training; the checkpoint holds both as usual."""
    sender = SignalAt("on_validation_batch_start", 2)
    options = {"num_sanity_val_steps": 0, "limit_train_batches": 2}
    average = EMA(decay=0.25)
    stopped, recorder = stopped_fit(sender, average, keeper(tmp_path), **options)
    assert stopped.code == 128 + signal.SIGTERM
    assert (len(recorder.steps), recorder.batches, recorder.validations) == (2, 1, 0)
    saved = load(tmp_path / "last.ckpt")
    first, second = recorder.steps
    assert saved["global_step"] == 2
    assert torch.equal(saved["current_model_state"]["model.visual.proj"], second)
    torch.testing.assert_close(saved["state_dict"]["visual.proj"], 0.25 * first + 0.75 * second)


def test_a_signal_after_the_exchange_of_a_step_is_seen_before_the_validation_that_follows(
    stopped_fit: StoppedFit, tmp_path: Path
) -> None:
    """It may take longer than the grace period."""
    options = {"num_sanity_val_steps": 0, "limit_train_batches": 2}
    sender, validation = SignalAt("on_train_batch_end", 2), SignalAt("on_validation_batch_start", -1)
    used = sender, validation, keeper(tmp_path)
    stopped, recorder = stopped_fit(*used, **options)
    assert stopped.code == 128 + signal.SIGTERM
    assert (len(recorder.steps), validation.calls) == (2, 0)
    saved = load(tmp_path / "last.ckpt")
    assert (saved["global_step"], saved["validation_due"]) == (2, True)


class Diary(Callback):
    """Record steps, ends of epochs, and the results of complete validations, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.entries.append(("step", trainer.global_step, float(trainer.callback_metrics["train/loss"])))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        self.entries.append(("validation", trainer.global_step, trainer.current_epoch, loss))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.entries.append(("epoch", trainer.current_epoch))


@pytest.mark.parametrize(
    ("batch", "options", "average"),
    [
        pytest.param(4, {}, True, id="at the end of an epoch, with averaged weights"),
        pytest.param(4, {"val_check_interval": 1}, False, id="after the second step of an epoch"),
        pytest.param(6, {}, False, id="at the end of the run", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_begins_with_the_validation_that_was_stopped(
    batch: int, options: dict[str, Any], average: bool, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    def fit(name: str, *more: Callback, ckpt_path: Path | None = None) -> list[tuple[Any, ...]]:
        torch.manual_seed(0)
        module = LitCLIP(
            tiny_config, optimizer=partial(PaperAdamW, lr=0.01), lr_scheduler=partial(WarmupCosine, warmup_steps=1)
        )
        diary = Diary()
        best = ModelCheckpoint(tmp_path / name, "best", monitor="val/loss", save_last=True)
        callbacks = [Preemption(), diary, *([EMA(decay=0.25)] if average else []), *more, best]
        limits = {"limit_train_batches": 2, "limit_val_batches": 2, **options}
        settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "callbacks": callbacks, **limits}
        with suppress(SystemExit):
            trainer(tmp_path, **settings).fit(module, data_for(module, caption_table), ckpt_path=ckpt_path)
        return diary.entries

    whole = fit("whole")
    cut = fit("cut", SignalAt("on_validation_batch_start", batch))
    rest = fit("rest", ckpt_path=tmp_path / "cut/last.ckpt")
    assert rest[0][0] == "validation"
    assert cut + rest == whole
    best = load(tmp_path / "rest/best.ckpt")["global_step"]  # may come from that first validation, before any step
    first = next(i for i, entry in enumerate(whole) if entry[:2] == ("validation", best))
    assert best >= cut[-1][1]
    again = fit("again", ckpt_path=tmp_path / "rest/best.ckpt")
    assert [entry for entry in again if entry[0] != "epoch"] == [e for e in whole[first + 1 :] if e[0] != "epoch"]


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_validation_batch_start"])
def test_a_signal_before_the_first_step_saves_nothing(hook: str, stopped_fit: StoppedFit, tmp_path: Path) -> None:
    stopped, recorder = stopped_fit(SignalAt(hook), keeper(tmp_path))
    assert stopped.code == 128 + signal.SIGTERM
    assert "nothing to save" in str(stopped)
    assert recorder.steps == []
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("saves", "message", "files"), [(True, "preempted.ckpt", {"preempted.ckpt"}), (False, "nothing saved", set())]
)
def test_without_save_last_the_checkpoint_is_called_preempted_and_without_a_saver_there_is_none(
    saves: bool, message: str, files: set[str], stopped_fit: StoppedFit, tmp_path: Path
) -> None:
    savers = [keeper(tmp_path, save_last=False)] if saves else []
    stopped, _ = stopped_fit(SignalAt("on_before_optimizer_step", 1), *savers, enable_checkpointing=saves)
    assert stopped.code == 128 + signal.SIGTERM
    assert message in str(stopped)
    assert names(tmp_path) == files


def test_another_runs_checkpoint_is_not_replaced(stopped_fit: StoppedFit, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"another run's")
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(sender, keeper(tmp_path))
    assert (tmp_path / "last.ckpt").read_bytes() == b"another run's"
    assert load(tmp_path / "last-v1.ckpt")["global_step"] == 1
    assert "last-v1.ckpt" in str(stopped)


class SignalWhileSaving(TorchCheckpointIO):
    """Slow storage: more signals arrive while it writes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().save_checkpoint(checkpoint, path, storage_options)
        os.kill(os.getpid(), signal.SIGUSR1)


class FullDisk(TorchCheckpointIO):
    """Storage that silently keeps half of a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        os.truncate(path, os.path.getsize(path) // 2)


def test_signals_while_saving_are_ignored(stopped_fit: StoppedFit, tmp_path: Path) -> None:
    sender = SignalAt("on_before_optimizer_step", 1)
    stopped, _ = stopped_fit(sender, keeper(tmp_path), plugins=[SignalWhileSaving()])
    os.kill(os.getpid(), signal.SIGTERM)  # also after Lightning's teardown
    assert stopped.code == 128 + signal.SIGTERM
    assert names(tmp_path) == {"last.ckpt"}
    assert load(tmp_path / "last.ckpt")["global_step"] == 1


class Slow(WholeCheckpointIO):
    """Write after a while, as a large checkpoint is written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        time.sleep(0.4)
        super().save_checkpoint(checkpoint, path, storage_options)


class Wrapper(_WrappingCheckpointIO):
    """A plugin that knows nothing of what it wraps."""


@pytest.mark.parametrize("wrap", [AsyncCheckpointIO, lambda plugin: Wrapper(AsyncCheckpointIO(plugin))])
def test_a_checkpoint_written_in_another_thread_is_complete_when_the_run_ends(
    stopped_fit: StoppedFit, tmp_path: Path, wrap: Any
) -> None:
    often = ModelCheckpoint(tmp_path, "often", every_n_train_steps=1, save_last=True, enable_version_counter=False)
    stopped, _ = stopped_fit(SignalAt("on_before_optimizer_step", 2), often, plugins=[wrap(Slow())])
    assert stopped.code == 128 + signal.SIGTERM
    assert "saved step 2" in str(stopped.args[0])
    assert names(tmp_path) == {"often.ckpt", "last.ckpt"}
    assert load(tmp_path / "last.ckpt")["global_step"] == 2
    assert load(tmp_path / "often.ckpt")["global_step"] == 2


def test_an_incomplete_checkpoint_is_an_error_and_replaces_nothing(
    stopped_fit: StoppedFit, tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    """By itself Lightning is silent when it cannot write a checkpoint (footgun L19)."""
    stopped_fit(SignalAt("on_before_optimizer_step", 1), keeper(tmp_path))
    module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    callbacks = [Preemption(), SignalAt("on_before_optimizer_step", 1), keeper(tmp_path)]
    fitting = trainer(tmp_path, max_epochs=2, callbacks=callbacks, plugins=[FullDisk()])
    with pytest.raises(InputError, match=r"last\.ckpt: the checkpoint could not be written; check the free space"):
        fitting.fit(module, data_for(module, caption_table), ckpt_path=tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt")["global_step"] == 1


def test_outside_fit_a_signal_ends_the_process_at_once(tiny_config: CLIPConfig, caption_table: Path) -> None:
    """There is nothing to save, and Lightning's own handler would wait for ranks that may not come."""

    class Handlers(Callback):
        def on_validation_start(self, *_: Any) -> None:
            self.sigterm = signal.getsignal(signal.SIGTERM)

    handlers, module = Handlers(), LitCLIP(tiny_config)
    validating = trainer(Path(), callbacks=[Preemption(), handlers])
    validating.validate(module, data_for(module, caption_table), verbose=False)
    assert handlers.sigterm == signal.SIG_DFL


# Several processes: the command, started as a user or a scheduler starts it.


def _in_its_own_group(devices: int) -> None:
    os.setpgid(0, 0)
    command_of_ranks(devices)


class Run:
    """A ``lit-clip fit`` of the tiny model in its own folder, which runs until a signal ends it."""

    def __init__(self, folder: Path, table: Path, *words: str, devices: int = 2, val: Path | None = None) -> None:
        self.folder, self.output, self.devices = folder, folder / "output.txt", devices
        command = [
            *(str(Path(sys.executable).parent / "lit-clip"), "fit"),
            *("--config", str(ROOT / "tests/helpers/no_settings.yaml"), "--data", "datamodules.Captions"),
            *("--data.train", str(table), "--data.val", str(val or table), "--data.batch_size", "8"),
            *("--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "2"),
            *("--trainer.max_steps", "100000"),
            *("--trainer.max_time", "00:00:05:00", "--trainer.accelerator", "cpu", "--trainer.devices", str(devices)),
            *("--trainer.strategy", "auto" if devices == 1 else "ddp", "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger", "--trainer.log_every_n_steps", "1"),
            *("--trainer.logger.init_args.save_dir", ".", "--trainer.logger.init_args.flush_logs_every_n_steps", "1"),
            *words,
        ]
        forks.start_server()
        program = forks.Program(partial(_in_its_own_group, devices), command, folder, {**os.environ, "COLUMNS": "200"})
        self.process = forks.CONTEXT.Process(target=forks.become, args=(program, *[str(self.output)] * 2))
        self.process.start()
        self.pid: int = self.process.pid or 0
        self.ranks: list[int] = []
        self.processes: set[psutil.Process] = set()

    def wait_for_step(self, step: int) -> None:
        """Wait until that many steps are logged, then collect the processes."""
        self._wait(lambda: len(self.logged_steps()) >= step)
        first = psutil.Process(self.pid)
        children = sorted(child.pid for child in first.children())  # other ranks before data workers
        self.ranks = [self.pid, *children[: self.devices - 1]]
        self.processes = {first, *first.children(recursive=True)}

    def wait_for_validation(self) -> None:
        """Wait until both ranks validate, which has no collectives, then collect the processes."""
        self._wait(lambda: len(list(self.folder.glob("validating_*"))) == 2)
        self.wait_for_step(2)

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not happened():
            assert self.process.is_alive(), self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def logged_steps(self) -> list[int]:
        path = self.folder / "lightning_logs/version_0/metrics.csv"
        text = path.read_text() if path.exists() else ""  # empty while it is written anew
        header, *rows = text.splitlines() or [""]
        columns = header.split(",")
        cells = [row.split(",") for row in rows]
        return [
            int(row[columns.index("step")])
            for row in cells
            if len(row) == len(columns) and row[columns.index("train/loss")]
        ]

    def exit_code(self, timeout: float) -> int:
        """Wait for the run to end; all of its processes must be gone within the timeout."""
        deadline = time.monotonic() + timeout
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, self.output.read_text()
        _, alive = psutil.wait_procs(self.processes, max(deadline - time.monotonic(), 0))
        assert alive == [], f"{alive}: {self.output.read_text()}"
        return code

    def checkpoint(self, name: str = "last.ckpt") -> Path:
        return self.folder / "lightning_logs/version_0/checkpoints" / name

    def last_line(self) -> str:
        return self.output.read_text().splitlines()[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a :class:`Run`, killed at the end of the test."""
    runs: list[Run] = []

    def make(*arguments: Any, **options: Any) -> Run:
        folder = tmp_path / f"run_{len(runs)}"
        folder.mkdir()
        runs.append(Run(folder, *arguments, **options))
        return runs[-1]

    yield make
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.process.join(10)


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory, caption_table: Path) -> Path:
    """A validation of at least half a minute in batches of 2; of two ranks the first has one batch more."""
    header, *rows = caption_table.read_text(encoding="utf-8").splitlines()
    rows = [re.sub(r"^[^,]+", lambda path: str((caption_table.parent / path[0]).resolve()), row) for row in rows]
    path = tmp_path_factory.mktemp("long") / "captions.csv"
    path.write_text("\n".join([header, *(rows * 1000)[:16001]]), encoding="utf-8")
    return path


@pytest.fixture
def start_and_wait(start: Callable[..., Run], caption_table: Path, long_table: Path) -> Callable[[str], Run]:
    """Start a run and wait until it trains or validates."""

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
def test_repeated_signals_to_all_processes_leave_one_complete_checkpoint_that_resumes(
    start: Callable[..., Run], caption_table: Path
) -> None:
    """Data workers get them too, as under SLURM; none may die and take its rank along (footgun L16)."""
    run = start(caption_table, f"--trainer.callbacks+={SAVE_LAST}", "--data.num_workers", "1")
    run.wait_for_step(3)
    assert len(run.ranks) == 2
    deadline = time.monotonic() + 40
    while run.process.is_alive() and time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert run.exit_code(30) == 128 + signal.SIGTERM
    steps = load(run.checkpoint())["global_step"]
    assert run.logged_steps() == list(range(steps))
    assert not list(run.checkpoint().parent.glob("*.part"))
    (command,) = re.findall(r"^lit-clip: SIGTERM: saved step \d+; resume with: lit-clip (.+)$", run.last_line())
    more = ("--trainer.max_steps", str(steps + 2), "--data.num_workers", "0")
    resumed = lit_clip_command(run.folder, *shlex.split(command), *more)
    assert resumed.returncode == 0, resumed.stderr
    (last,) = run.folder.glob("lightning_logs/version_1/checkpoints/last.ckpt")
    assert load(last)["global_step"] == steps + 2


@pytest.mark.parametrize(
    ("rank", "signum"), [pytest.param(0, signal.SIGUSR1, marks=pytest.mark.slow), (1, signal.SIGTERM)]
)
def test_a_signal_to_one_rank_ends_all_ranks(
    rank: int, signum: signal.Signals, start: Callable[..., Run], caption_table: Path
) -> None:
    run = start(caption_table, "--data.num_workers", "0")
    run.wait_for_step(2)
    os.kill(run.ranks[rank], signum)
    assert run.exit_code(30) == 128 + signum
    assert load(run.checkpoint("preempted.ckpt"))["global_step"] == len(run.logged_steps())
    assert run.last_line().startswith(f"lit-clip: {signum.name}: saved step ")
    assert run.output.read_text().count("saved step") == 1


@pytest.mark.slow
def test_signals_stop_a_validation_with_uneven_ranks(start_and_wait: Callable[[str], Run]) -> None:
    run = start_and_wait("validation")
    for rank in run.ranks:
        os.kill(rank, signal.SIGTERM)
    assert run.exit_code(30) == 128 + signal.SIGTERM
    assert load(run.checkpoint("preempted.ckpt"))["global_step"] == 2


@pytest.mark.parametrize("during", ["training", pytest.param("validation", marks=pytest.mark.slow)])
def test_the_first_rank_ends_with_an_error_when_another_is_killed(
    during: str, start_and_wait: Callable[[str], Run]
) -> None:
    run = start_and_wait(during)
    os.kill(run.ranks[1], signal.SIGKILL)
    assert run.exit_code(60) != 0


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "validation"])
def test_the_other_ranks_end_with_an_error_when_the_first_is_killed(
    during: str, start_and_wait: Callable[[str], Run]
) -> None:
    """A validation has no collectives, so they would otherwise run to its end."""
    run = start_and_wait(during)
    os.kill(run.ranks[0], signal.SIGKILL)
    assert run.exit_code(60) == -signal.SIGKILL
    # Depends on which it notices first: the lost connection or the end of its parent.
    messages = ("another process has ended", "the first process of this machine has ended")
    assert any(message in run.last_line() for message in messages)


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "validation"])
def test_a_sharded_run_saves_a_complete_checkpoint(
    during: str, start: Callable[..., Run], caption_table: Path, tmp_path: Path
) -> None:
    """A validation finishes first, because sharded ranks compute each batch together."""
    val = tmp_path / "val.csv"
    header, *rows = caption_table.read_text(encoding="utf-8").splitlines()
    folder = str(caption_table.parent)
    val.write_text("\n".join([header, *(rows * 10)]), encoding="utf-8")
    sharded = ("--trainer.strategy", "{class_path: lit_clip.training.lightning.fsdp.FSDP}")
    sharded += ("--data.columns.root", folder)
    run = start(caption_table, *LONG_VALIDATION, *sharded, val=val)
    if during == "training":
        run.wait_for_step(1)
    else:
        run.wait_for_validation()
    assert (
        "lit_clip.training.lightning.fsdp.FSDP" in (run.folder / "lightning_logs/version_0/fit_config.yaml").read_text()
    )
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.exit_code(60) == 128 + signal.SIGTERM
    saved = load(run.checkpoint("preempted.ckpt"))
    assert saved["global_step"] == len(run.logged_steps())
    assert saved["optimizer_states"][0]["state"]


def test_slurms_requeue_signal_saves_for_the_next_job_and_requeues(
    start: Callable[..., Run], caption_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``scontrol`` is replaced by a script that records its arguments."""
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
    os.kill(run.pid, signal.SIGUSR1)
    assert run.exit_code(30) == 128 + signal.SIGUSR1
    assert (tmp_path / "called").read_text().split() == ["requeue", "41"]
    assert load(run.folder / "hpc_ckpt_1.ckpt")["global_step"] == len(run.logged_steps())


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_a_complete_checkpoint(start: Callable[..., Run], caption_table: Path) -> None:
    moments = random.Random(0)
    for _ in range(10):
        run = start(caption_table, f"--trainer.callbacks+={SAVE_LAST}", "--data.num_workers", "0")
        run.wait_for_step(moments.randrange(1, 30))
        time.sleep(moments.random() / 5)
        for rank in run.ranks:
            os.kill(rank, signal.SIGTERM)
        assert run.exit_code(60) == 128 + signal.SIGTERM
        assert load(run.checkpoint())["global_step"] == len(run.logged_steps())
