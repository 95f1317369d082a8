"""Batches of data workers arrive, whether or not shared memory has room; a worker that is killed is one line."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import _utils as torch_workers

from lit_clip.tools.messages import user_error
from lit_clip.tools.workers import loader
from tests.helpers import forks
from tests.helpers.disks import mounted, why_no_disk

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


@pytest.mark.parametrize(
    ("sent", "said"),
    [(signal.SIGKILL, "killed, probably because memory ran out"), (signal.SIGBUS, "raise --shm-size")]
    + [(signal.SIGABRT, "crashed .Aborted.; set num_workers to 0")],
)
def test_data_worker_that_is_killed_is_one_line_with_a_hint(
    sent: signal.Signals, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch sets its handler of ended workers once, and Lightning restores the one of before at the end of each run.
    monkeypatch.setattr(torch_workers.signal_handling, "_SIGCHLD_handler_set", False)
    for _ in range(5):  # torch's error differs with the order of the signal and the end of the worker's connection
        with pytest.raises((RuntimeError, OSError, EOFError)) as raised:
            list(loader(Deadly(sent), 2))
        fixable = user_error(raised.value)
        assert fixable is not None
        assert "\n" not in str(fixable)
        assert re.search(said, str(fixable))


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
    assert "killed, probably because memory ran out" in str(user_error(EOFError()))
