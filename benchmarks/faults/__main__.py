"""Run the matrix of faults and write its table: ``python -m benchmarks.faults --markdown docs/evidence/faults.md``."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that are forked

from benchmarks.faults.cells import RANKS, SOURCES, WORKERS, Cell, Harness, Outcome, all_cells
from benchmarks.faults.report import markdown
from benchmarks.faults.server import serving


def main(words: Sequence[str] | None = None) -> int:
    """Run the cells asked for and return 1 if one of them is neither the same nor a clear end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cells whose name contains one of these")
    parser.add_argument("--points", type=int, default=1, help="random moments for each cell")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after these")
    parser.add_argument("--record", type=Path, help="JSON lines of outcomes: read if it exists, and added to")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--list", action="store_true", help="list the cells and end")
    options = parser.parse_args(words)
    cells = [cell for cell in all_cells() if not options.only or any(text in str(cell) for text in options.only)]
    if options.list:
        sys.stdout.write("".join(f"{cell}\n" for cell in cells))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run at hand is ended too
    outcomes = _read(options.record)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data") as store:
        harness = Harness(Path(folder), store, options.seed)
        for cell in _spread(cells):
            for point in range(options.points):
                if (cell, point) in outcomes or time.monotonic() - start > 60 * options.minutes:
                    continue
                outcome = outcomes[cell, point] = harness.run(cell, point)
                sys.stdout.write(f"{cell}: {outcome.outcome}, {outcome.seconds:.1f} s  {outcome.message}\n")
                sys.stdout.flush()
                if options.record:
                    with options.record.open("a", encoding="utf-8") as file:
                        file.write(f"{json.dumps([cell, point, outcome])}\n")
    if options.markdown:
        options.markdown.write_text(markdown(outcomes), encoding="utf-8")
    asked = [outcomes[key] for key in outcomes if key[0] in cells]
    return int(any(outcome.outcome == "other" for outcome in asked))


def _read(record: Path | None) -> dict[tuple[Cell, int], Outcome]:
    if record is None or not record.exists():
        return {}
    rows = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    return {(Cell(*cell), point): Outcome(*outcome) for cell, point, outcome in rows}


def _spread(cells: Sequence[Cell]) -> list[Cell]:
    """Order cells so that a run that is cut short has seen every fault, source and number of ranks and workers."""
    kinds = [(source, ranks, workers) for source in SOURCES for ranks in RANKS for workers in WORKERS]
    faults = list(dict.fromkeys(cell.fault for cell in cells))

    def turn(cell: Cell) -> tuple[int, int]:
        kind, fault = kinds.index((cell.source, cell.ranks, cell.workers)), faults.index(cell.fault)
        return (kind * 5 + fault * 7) % len(kinds), fault

    return sorted(cells, key=turn)


if __name__ == "__main__":
    sys.exit(main())
