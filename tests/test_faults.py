"""Faults in the middle of a run: the same samples and weights, or a clear end in time; see docs/evidence/faults.md."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from benchmarks.faults.__main__ import main
from benchmarks.faults.catalogue import BY_NAME
from benchmarks.faults.cells import Cell, Harness, Outcome, all_cells
from benchmarks.faults.report import markdown
from benchmarks.faults.server import serving

# The others take 5 to 20 s each. Signals, lost workers and full disks also have tests beside the code that meets them.
FAST = Cell("kill_run", "table", 1, 0)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("faults")
    with serving(folder / "data") as store:
        yield Harness(folder, store)


def check(harness: Harness, cell: Cell, point: int = 0) -> None:
    outcome = harness.run(cell, point)
    if outcome.outcome == "skipped":
        pytest.skip(outcome.message)
    assert outcome.outcome == ("same" if BY_NAME[cell.fault].codes == (0,) else "clear end"), outcome
    assert outcome.ids_equal
    assert outcome.weights_equal


def test_a_run_that_is_killed_and_goes_on_is_the_same(harness: Harness) -> None:
    check(harness, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in all_cells() if cell != FAST], ids=str)
def test_run_is_the_same_after_a_fault_or_ends_clearly(cell: Cell, harness: Harness) -> None:
    check(harness, cell, 1)


@pytest.mark.slow
def test_a_cell_leaves_no_process_mount_socket_or_file(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails: here nothing is judged right."""
    monkeypatch.setattr("benchmarks.faults.cells._close", lambda *_: False)
    cell, expected = Cell("read_only", "store", 1, 2), harness.expected(FAST)
    before = Path("/proc/self/mounts").read_text()
    with serving(tmp_path / "data") as store:
        address = urlsplit(store.url)
        other = Harness(tmp_path, store)
        monkeypatch.setattr(other, "expected", lambda _: expected)  # another run's: nothing is compared with it
        assert other.run(cell).outcome in ("other", "skipped")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert Path("/proc/self/mounts").read_text() == before
    ours = [word for process in psutil.process_iter(["cmdline", "cwd"]) for word in process.info["cmdline"] or ()]
    assert not any(str(tmp_path) in word for word in ours)
    assert not any((process.info["cwd"] or "").startswith(str(tmp_path)) for process in psutil.process_iter(["cwd"]))
    with socket.socket() as client:
        assert client.connect_ex((address.hostname or "", address.port or 0)) != 0


def test_the_table_counts_what_was_run_and_names_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = Cell("kill_rank", "tars", 2, 0), Cell("kill_rank", "tars", 3, 2)
    outcomes = {
        (right, 0): Outcome("clear end", 1.25, "lit-clip: error: x", True, True),
        (wrong, 0): Outcome("other", 20.0, "a | traceback"),
    }
    text = markdown(outcomes)
    assert "| `kill_rank` | kill -9 of the last rank | clear end | 2 | 2 | 1 | 20.0 | 20 |" in text
    assert f"2 of {len(all_cells())} cells run: 0 same, 1 clear ends, 1 others." in text
    assert f"- `{wrong}`: a / traceback" in text
    assert main(["--only", str(right), str(wrong), "--list"]) == 0
    assert capsys.readouterr().out == f"{right}\n{wrong}\n"
