"""A run whose other ranks have ended, ends with a line of its own."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lit_clip.training.lightning import rank_watchdog
from tests.helpers.forks import CONTEXT


def lead(scripts: Sequence[str], path: str, saved: str = "") -> None:
    """Be busy while others run; record stderr and whether they have ended."""
    sys.stderr = open(path, "w")  # noqa: SIM115
    rank_watchdog.GRACE = rank_watchdog.PERIOD = 0.1  # pyright: ignore
    others = [subprocess.Popen([sys.executable, "-S", "-c", script]) for script in scripts]
    rank_watchdog._watch(others, lambda: saved)
    for other in others:
        other.wait()


@pytest.mark.parametrize(
    ("end", "how"), [("os.kill(os.getpid(), 9)", "killed by signal 9"), ("sys.exit(3)", "exit code 3")]
)
def test_a_rank_that_fails_ends_the_first_one_and_the_others(end: str, how: str, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    forever = f"import time\nwhile True: open({str(alive)!r}, 'w').close(); time.sleep(0.05)"
    process = CONTEXT.Process(target=lead, args=((forever, f"import os, sys; {end}"), str(tmp_path / "stderr")))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "stderr").read_text() == (
        f"lit-clip: error: another process has ended (rank 2 of this machine, {how}); its error, if it printed one, is "
        "above\n"
    )
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()


def test_the_error_of_a_killed_rank_says_how_to_resume(tmp_path: Path) -> None:
    saved = "step 3 is saved; resume with: lit-clip fit --ckpt_path last.ckpt"
    process = CONTEXT.Process(target=lead, args=(("import os; os.kill(os.getpid(), 9)",), str(tmp_path / "e"), saved))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "e").read_text().endswith(f"is above; {saved}\n")


def test_ranks_that_end_well_end_nothing(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=lead, args=(("", "import time; time.sleep(0.5)"), str(tmp_path / "stderr")))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "stderr").read_text() == ""
