"""Commands on a CPU keep the memory that they free."""

import os
import platform
from pathlib import Path

import pytest

from tests.helpers import forks

CODE = """
import resource
import torch
from lit_clip.cli.lightning import run
from lit_clip.embedding.encode import make_trainer
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.tools import hardware

def pages():
    '''Pages that the system had to provide for ten tensors of 64 MiB, one after another.'''
    torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

at_first = pages()
{start}
print(at_first, pages())
"""
FIT = "run(['--data', 'datamodules.OpenMoji', '--trainer.accelerator', 'cpu'], execute=False)"
EMBED = "make_trainer(EncodingSettings(accelerator='cpu'))"


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory")
@pytest.mark.parametrize(
    ("start", "is_kept"),
    [
        (FIT, True),
        pytest.param(EMBED, True, marks=pytest.mark.slow),
        ("hardware.keep_freed_memory(torch.device('cuda'))", False),
    ],
    ids=["fit", "embed", "not on a CPU"],
)
def test_commands_keep_freed_memory_on_a_cpu(start: str, is_kept: bool, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CODE.format(start=start), encoding="utf-8")
    program = forks.Program(forks.script, [str(tmp_path / "program.py")], tmp_path, {**os.environ})
    (done,) = forks.run([program], timeout=120)
    assert done.returncode == 0, done.stderr
    at_first, then = map(int, done.stdout.splitlines()[-1].split())
    assert at_first > 300  # with pages of 2 MiB; 163,840 of 4 KiB
    assert (then < at_first / 20) == is_kept
