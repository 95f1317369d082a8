"""Data workers and ranks end with the process that started them, and not before."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from lit_clip.tools.processes import let_launcher_end
from lit_clip.tools.workers import shield_worker
from tests.helpers.forks import CONTEXT

LONG = "a" * 200_000  # more than a pipe holds


class Captions(Dataset[str]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> str:
        return LONG


def leave_a_worker(path: str) -> None:
    """Exit abruptly while a data worker's queue is full."""
    batches = iter(DataLoader(Captions(), num_workers=1, worker_init_fn=shield_worker, multiprocessing_context="fork"))
    assert next(batches) == [LONG]
    time.sleep(0.3)
    (worker,) = psutil.Process().children()
    Path(path).write_text(str(worker.pid))
    os._exit(2)


def test_a_data_worker_with_a_full_queue_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """With torch's own watchdog alone, the worker would wait forever for its queue to be read."""
    process = CONTEXT.Process(target=leave_a_worker, args=(str(tmp_path / "worker"),))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    worker = int((tmp_path / "worker").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_launcher(path: str) -> None:
    start = time.monotonic()
    let_launcher_end(30)
    Path(path).write_text(f"{time.monotonic() - start}")


def launch(path: str) -> None:
    """Start a rank, and exit two seconds later."""
    os.environ |= {"LOCAL_RANK": "1", "LIT_CLIP_LAUNCHER": str(os.getpid())}
    multiprocessing.get_context("fork").Process(target=wait_for_launcher, args=(path,)).start()
    time.sleep(2)
    os._exit(2)


def test_a_failed_rank_waits_for_its_launcher_to_exit_first(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=launch, args=(str(tmp_path / "waited"),))
    process.start()
    process.join(60)
    deadline = time.monotonic() + 20
    while not (tmp_path / "waited").exists() or not (tmp_path / "waited").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 1 < float((tmp_path / "waited").read_text()) < 15


def test_a_process_without_a_launcher_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    start = time.monotonic()
    let_launcher_end(30)
    assert time.monotonic() - start < 1


def read_on(path: str) -> None:
    """Read a batch, write the worker's process id to ``path``, and read the rest once the file ``go`` exists."""
    batches = iter(DataLoader(Captions(), num_workers=1, worker_init_fn=shield_worker, multiprocessing_context="fork"))
    assert next(batches) == [LONG]
    time.sleep(0.3)
    (worker,) = psutil.Process().children()
    Path(path).write_text(str(worker.pid))
    wait_until(Path(path).with_name("go").exists)
    assert sum(1 for _ in batches) == 99


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_data_worker_ignores_signals_from_other_processes(tmp_path: Path) -> None:
    """No matter which of its threads receives the signal."""
    path = tmp_path / "worker"
    process = CONTEXT.Process(target=read_on, args=(str(path),))
    process.start()
    wait_until(lambda: path.exists() and path.read_text() != "")
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) * 3:
        os.kill(int(path.read_text()), signum)
    (tmp_path / "go").touch()
    process.join(60)
    assert process.exitcode == 0
