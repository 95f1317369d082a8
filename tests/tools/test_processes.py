"""Data workers and ranks end with the process that started them, and not before."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import _utils as torch_workers

from lit_clip.tools.hardware import best_device
from lit_clip.tools.messages import user_error
from lit_clip.tools.processes import let_launcher_end
from lit_clip.tools.workers import loader, shield_worker
from tests.conftest import ROOT
from tests.helpers import forks
from tests.helpers.disks import mounted, why_no_disk
from tests.helpers.forks import CONTEXT

LONG = "a" * 200_000  # more than a pipe holds


class Captions(Dataset[str]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> str:
        return LONG


def started(path: str) -> Iterator[list[str]]:
    """Read a batch, and write the data worker's process id to ``path``; its queue is then full."""
    batches = iter(DataLoader(Captions(), num_workers=1, worker_init_fn=shield_worker, multiprocessing_context="fork"))
    assert next(batches) == [LONG]
    time.sleep(0.3)
    (worker,) = psutil.Process().children()
    Path(path).write_text(str(worker.pid))
    return batches


def leave_a_worker(path: str) -> None:
    batches = started(path)
    assert batches
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
    """Read the rest once the file ``go`` exists."""
    batches = started(path)
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


# Batches of data workers arrive, whether or not shared memory has room; a worker that is killed is one line.


PROGRAM = """
import sys, torch
from torch.utils.data import Dataset
from lit_clip.tools.workers import loader
from tests.helpers.disks import enter
enter(int(sys.argv[1]))
class Batches(Dataset):
    def __len__(self): return 12
    def __getitem__(self, number):
        tokens = torch.full((4, 7), number)
        return {"images": torch.full((2**20,), number, dtype=torch.bfloat16), "more": [tokens[:0], (tokens, "a", None)]}
torch.set_num_threads(1)
for number, batch in enumerate(loader(Batches(), 2)):
    assert batch["images"].dtype == torch.bfloat16 and batch["images"].shape == (2**20,)
    empty, (tokens, text, nothing) = batch["more"]
    assert empty.shape == (0, 7) and (text, nothing) == ("a", None)
    assert (batch["images"] == number).all() and (tokens == number).all()
print("batches:", number + 1)
"""


@pytest.mark.skipif(bool(why_no_disk()), reason=why_no_disk())
def test_batches_larger_than_shared_memory_arrive_whole_and_a_warning_says_how_to_make_them_faster(
    tmp_path: Path,
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    with mounted(Path("/dev/shm"), "64k") as shared_memory:
        words = [str(tmp_path / "program.py"), str(shared_memory.holder)]
        (ran,) = forks.run([forks.Program(forks.script, words, tmp_path, {**os.environ})], timeout=120)
    assert ran.stdout == "batches: 12\n", ran.stderr
    assert "raise --shm-size" in ran.stderr


class Deadly(Dataset[Tensor]):
    """Batches whose third ends its worker."""

    def __init__(self, sent: signal.Signals) -> None:
        self.sent = sent

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Tensor:
        if number == 2:
            os.kill(os.getpid(), self.sent)
        return torch.zeros(3)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGBUS, signal.SIGABRT])
def test_data_worker_that_is_killed_is_one_line_with_a_hint(
    sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch sets its handler of ended workers once, and Lightning restores the one of before at the end of each run.
    monkeypatch.setattr(torch_workers.signal_handling, "_SIGCHLD_handler_set", False)
    for _ in range(2):  # torch's error differs with the order of the signal and the end of the worker's connection
        found = None
        try:  # not pytest.raises, in whose own code torch's handler may raise its error
            list(loader(Deadly(sent), 2))
        except (RuntimeError, OSError, EOFError) as error:
            found = user_error(error)
        assert re.match("a data worker was killed or crashed.*raise --shm-size", str(found))


def test_a_workers_end_that_arrives_while_its_error_is_explained_is_the_same_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = ["DataLoader worker (pid 7) is killed by signal: Killed. ", "a mistake of ours"]

    def of_machine(error: BaseException) -> None:
        if len(late) == 1:
            monkeypatch.undo()
        raise RuntimeError(late.pop(0))

    monkeypatch.setattr("lit_clip.tools.messages._of_machine", of_machine)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        user_error(EOFError())
    late[:] = ["DataLoader worker (pid 7) is killed by signal: Killed. "]
    monkeypatch.setattr("lit_clip.tools.messages._of_machine", of_machine)
    assert "killed or crashed (Killed)" in str(user_error(EOFError()))


# The device that commands use.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_build_of_torch_without_a_gpu_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))  # of such a build
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert best_device() == torch.device("cpu")


def test_no_other_module_chooses_a_device_by_the_build() -> None:
    """Elsewhere ``torch.cuda.is_available`` decides, which is false without a GPU, or Lightning's ``auto``."""
    sources = [path for package in ("lit_clip", "callbacks", "datamodules") for path in (ROOT / package).rglob("*.py")]
    by_the_build = ("current_accelerator", "cuda.is_built", "version.cuda", '"cuda" if')
    found = [path for path in sources if any(word in path.read_text(encoding="utf-8") for word in by_the_build)]
    assert [str(path.relative_to(ROOT)) for path in found] == ["lit_clip/tools/hardware.py"]
