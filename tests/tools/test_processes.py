"""What becomes of processes whose parent is gone."""

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
    """Be killed with a data worker that has read ahead."""
    batches = iter(DataLoader(Captions(), num_workers=1, worker_init_fn=shield_worker, multiprocessing_context="fork"))
    assert next(batches) == [LONG]
    time.sleep(0.3)
    (worker,) = psutil.Process().children()
    Path(path).write_text(str(worker.pid))
    os._exit(2)


def test_a_data_worker_with_a_full_queue_does_not_outlive_its_process(tmp_path: Path) -> None:
    """With torch's own watchdog the worker would wait for ever for somebody to read its queue."""
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
    """Start a rank, and end two seconds later."""
    os.environ |= {"LOCAL_RANK": "1", "LIT_CLIP_LAUNCHER": str(os.getpid())}
    multiprocessing.get_context("fork").Process(target=wait_for_launcher, args=(path,)).start()
    time.sleep(2)
    os._exit(2)


def test_a_rank_with_an_error_lets_the_one_that_started_it_end_first(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=launch, args=(str(tmp_path / "waited"),))
    process.start()
    process.join(60)
    deadline = time.monotonic() + 20
    while not (tmp_path / "waited").exists() or not (tmp_path / "waited").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 1 < float((tmp_path / "waited").read_text()) < 15


def test_a_process_that_nobody_launched_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    start = time.monotonic()
    let_launcher_end(30)
    assert time.monotonic() - start < 1


def read_on(path: str) -> None:
    """Read a batch, tell who the worker is, and read the rest when told to."""
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


def test_a_data_worker_that_a_stranger_signals_reads_on(tmp_path: Path) -> None:
    """Whichever of its threads the signal reaches."""
    path = tmp_path / "worker"
    process = CONTEXT.Process(target=read_on, args=(str(path),))
    process.start()
    wait_until(lambda: path.exists() and path.read_text() != "")
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) * 3:
        os.kill(int(path.read_text()), signum)
    (tmp_path / "go").touch()
    process.join(60)
    assert process.exitcode == 0
