"""What one process alone writes to: held while it works, free afterwards however it ended, and no lock file is left."""

import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lit_clip.errors import InputError
from lit_clip.tools.atomic import Share, claim, claimed
from tests.helpers import forks

PROCESSES, TIMES = 3, 8


def add(counter: Path, times: int) -> None:
    """Add 1 to a number in a file, without any other care than a claim."""
    while times:
        try:
            with claimed(counter):
                number = int(counter.read_text())
                counter.write_text(str(number + 1))
                times -= 1
        except InputError:
            continue


def hold(path: Path) -> None:
    assert claim(path) == ""
    path.with_name("held").touch()
    time.sleep(60)


def started(function: Any, *arguments: Any) -> Any:
    forks.start_server()
    process = forks.CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def test_processes_that_claim_and_release_all_the_time_never_hold_together(tmp_path: Path) -> None:
    """Each release removes the lock file, which another process may have opened already."""
    counter = tmp_path / "counter.txt"
    counter.write_text("0")
    for process in [started(add, counter, TIMES) for _ in range(PROCESSES)]:
        process.join()
        assert process.exitcode == 0
    assert counter.read_text() == str(PROCESSES * TIMES)
    assert [path.name for path in tmp_path.iterdir()] == ["counter.txt"]


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    path = tmp_path / "index.usearch"
    process = started(hold, path)
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.02)
    line = rf"index.usearch: another process writes there \(process {process.pid} on .*\); wait for its end, or give"
    with pytest.raises(InputError, match=f"{line} another --output$"), claimed(path):
        raise AssertionError("it is held")
    process.kill()
    process.join()
    with claimed(path):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["held"]


def test_a_process_may_claim_what_it_holds_and_holds_it_to_the_end_of_the_first_claim(tmp_path: Path) -> None:
    path, lock = tmp_path / "a.npy", tmp_path / ".a.npy.lock"
    with claimed(path):
        with claimed(path, tmp_path / "b.npy"):
            assert (tmp_path / ".b.npy.lock").exists()
        assert [each.name for each in tmp_path.iterdir()] == [lock.name]
        with pytest.raises(ZeroDivisionError), claimed(path):
            raise ZeroDivisionError
        assert lock.exists()
    assert not lock.exists()


def test_shares_are_written_together_and_all_of_an_output_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with FileLock(tmp_path / ".scores.parquet-1-of-2.lock"):  # another process's
        with claimed(path, share=Share(1, 2)):
            pass
        for share in (Share(0, 2), Share()):
            with pytest.raises(InputError, match=r"scores.parquet: another process"), claimed(path, share=share):
                pass
    with claimed(path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_where_nothing_can_be_locked_it_counts_as_held(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: FileLock, **options: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with claimed(tmp_path / "a.npy", None):
        (tmp_path / "a.npy").touch()
    assert [each.name for each in tmp_path.iterdir()] == ["a.npy"]


def test_folders_above_an_output_are_made_and_stay_only_if_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "new/deep/folder"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "new/deep/folder"):
        (tmp_path / "new/deep/folder").mkdir()
    assert [each.name for each in (tmp_path / "new/deep").iterdir()] == ["folder"]
    monkeypatch.chdir(tmp_path / "new/deep")
    with claimed(Path()):
        assert (tmp_path / "new/.deep.lock").exists()
