"""``lit-clip fit`` in processes of its own: the first rank starts the others, as on a user's machine."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.faults import clock
from benchmarks.faults.recorder import PREFIX
from tests.helpers import disks, forks
from tests.helpers.fork_ranks import command_of_ranks

ARCHITECTURE = (
    "{embed_dim: 16, image: {timm: vit_tiny_patch16_224, image_size: 32, options: {depth: 1, proj_drop_rate: 0.3}}, "
    "text: {context_length: 16, width: 16, layers: 1, heads: 1}}"
)
GLOBAL_BATCH = 6
EPOCHS = 3
STEPS = 4 * EPOCHS
EVERY = 3  # steps between checkpoints; the last step has one
SAVING = f"{{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{every_n_train_steps: {EVERY}}}}}"
EPS = 1e-4  # of AdamW: gradients that are rounding errors, as of attention's key biases, move no weight visibly
START_LIMIT = 120.0  # seconds until the first step, on a busy machine
GROUP_TIMEOUT = 10  # seconds, of the process group, where a cell sets it


class Settings(NamedTuple):
    """What one run is started with.

    Attributes:
        folder: the run's working folder.
        record: path of the record without the rank and the extension.
        data: the table's path or address, or the shards'.
        ranks: number of ranks.
        workers: data workers of each rank.
        group_timeout: whether the process group gives up after ``GROUP_TIMEOUT``.
        store_timeout: seconds after which a request counts as unanswered; None: the store client's own limit.
        disk: process that holds the run's disk; None: the folder is an ordinary one.
        clock: file that turns the run's clock; None: it is the machine's.
    """

    folder: Path
    record: Path
    data: str
    ranks: int
    workers: int
    group_timeout: bool = False
    store_timeout: float | None = None
    disk: int | None = None
    clock: Path | None = None

    def words(self) -> list[str]:
        """Return the command line."""
        strategy = "auto" if self.ranks == 1 else "ddp"
        if self.group_timeout and self.ranks > 1:
            init_args = f"{{timeout: '0:00:{GROUP_TIMEOUT:02}'}}"
            strategy = f"{{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {init_args}}}"
        return [
            *("lit-clip", "fit", "--config", str(forks.ROOT / "tests/helpers/no_settings.yaml")),
            *("--data", "datamodules.Captions", "--data.train", self.data, "--data.val", self.data),
            *("--data.batch_size", str(GLOBAL_BATCH // self.ranks), "--data.num_workers", str(self.workers)),
            *("--model.architecture", ARCHITECTURE, "--model.lr_scheduler.warmup_steps", "2"),
            *("--model.optimizer.eps", str(EPS)),
            *("--seed_everything", "1", "--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", "2"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", str(self.ranks), "--trainer.strategy", strategy),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
            *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger", "--trainer.log_every_n_steps", "1"),
            *("--trainer.logger.init_args.save_dir", ".", "--trainer.callbacks+=benchmarks.faults.recorder.Recorder"),
            *(f"--trainer.callbacks+={SAVING}", "--ckpt_path", "auto"),
        ]


class Run:
    """A run that has been started."""

    def __init__(self, settings: Settings) -> None:
        forks.start_server()
        self.settings, self.started = settings, time.monotonic()
        self._files = [settings.record.with_suffix(f".{name}") for name in ("out", "err")]
        caches = {"XDG_CACHE_HOME": str(settings.record.parent / "cache"), PREFIX: str(settings.record)}
        environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **caches}
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        # The folder may be on a disk that only the run sees, so the run itself goes there.
        program = forks.Program(partial(_lead, settings), settings.words(), settings.record.parent, environment)
        self._process = forks.CONTEXT.Process(target=forks.become, args=(program, *map(str, self._files)))
        self._process.start()
        self.pid: int = self._process.pid or 0

    def steps(self, rank: int = 0) -> list[str]:
        """Return the lines of a rank's record; the last one may be incomplete if the run was killed."""
        path = Path(f"{self.settings.record}_{rank}.txt")
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        """Wait until all ranks have begun a step, counted from 0 over the whole training."""
        deadline = time.monotonic() + START_LIMIT
        while not all(any(int(line.split()[0]) >= step for line in self._whole(rank)) for rank in self.ranks):
            assert self._process.is_alive(), f"the run ended before step {step}: {self.output()}"
            assert time.monotonic() < deadline, f"step {step} was not reached: {self.output()}"
            time.sleep(0.005)

    def _whole(self, rank: int) -> list[str]:
        return [line for line in self.steps(rank) if len(line.split()) > 3]

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self.settings.ranks)

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank."""
        return int(Path(f"{self.settings.record}_{rank}.pid").read_text())

    def make_busy(self, rank: int) -> None:
        """Let a rank's next step be a long one, and return once it has begun."""
        file = Path(f"{self.settings.record}_{rank}.busy")
        file.touch()
        deadline = time.monotonic() + 10
        while file.exists():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def data_workers(self, rank: int) -> list[int]:
        """Return the data workers' processes of a rank."""
        others = {self.pid_of(other) for other in self.ranks}
        return [child.pid for child in psutil.Process(self.pid_of(rank)).children() if child.pid not in others]

    def members(self) -> list[psutil.Process]:
        """Return the living processes of this run."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait(self, seconds: float) -> int | None:
        """Wait for all processes to end, except those stopped by a signal and their data workers.

        Returns:
            The exit code of the first rank; None: it had not ended in time, or others had not.
        """
        deadline = time.monotonic() + seconds
        while any(self._goes_on(pid) for pid in {self.pid, *(process.pid for process in self.members())}):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        self._process.join(max(0.0, min(1.0, deadline - time.monotonic())))
        return self._process.exitcode

    def _goes_on(self, pid: int) -> bool:
        ranks = {int(path.read_text() or 0) for path in self.settings.record.parent.glob("*.pid")}
        try:
            process = psutil.Process(pid)
            parent = None if pid in ranks else process.parent()  # a rank's is another rank
            stopped = psutil.STATUS_STOPPED in (process.status(), parent.status() if parent else "")
            return not stopped and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def signal(self, signum: int) -> None:
        """Send all processes of the run a signal."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop all processes meanwhile, so that the run does not get ahead of what is done to it."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all processes that are left, and wait for their end."""
        for process in self.members():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        deadline = time.monotonic() + 10
        while self.members():
            assert time.monotonic() < deadline, self.members()
            time.sleep(0.02)

    def output(self) -> str:
        """Return what the run has printed."""
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in self._files if file.exists()]
        return "".join(texts)


# In the run's own process.


def _lead(settings: Settings) -> None:
    """Become the first rank, with the run's disk, clock and time limit of a request."""
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if settings.disk is not None:
        disks.enter(settings.disk)
    os.chdir(settings.folder)
    if settings.store_timeout is not None:
        import aiohttp

        from lit_clip.tools import hub_client

        hub_client.SILENT_SECONDS = settings.store_timeout  # pyright: ignore
        aiohttp.client.DEFAULT_TIMEOUT = aiohttp.ClientTimeout(total=settings.store_timeout)
    if settings.clock is not None:
        clock.follow_clock(settings.clock)
    command_of_ranks(settings.ranks)
