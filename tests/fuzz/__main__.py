"""Fuzz the code that reads files, for as long as it is given.

    python -m tests.fuzz --minutes 10 [--target NAME ...] [--seed N]
    python -m tests.fuzz --replay FILE ...

Prints the number of inputs by target, and what was found; the exit code is 1 if anything was. Findings are kept in
``runs/fuzz/found/TARGET/``, each with its story: the seed, the traceback, and how to see it again.
"""

import argparse
import sys
from pathlib import Path

from tests.fuzz.driver import Driver, Summary, read_case
from tests.fuzz.targets import NAMES

OUT = Path("runs/fuzz/found")


def report(summary: Summary, out: Path) -> str:
    """Return the table and the findings, the most frequent first."""
    lines = [summary.table()]
    for found in sorted(summary.found.values(), key=lambda each: -each.times):
        finding = found.finding
        message = " ".join(finding.message.split())[:160].encode("unicode_escape").decode()
        lines += ["", f"{found.times:6} x {found.target}: {finding.kind} at {finding.place}", f"         {message}"]
    if summary.found:
        lines += ["", f"Found {len(summary.found)}; the inputs and their stories are in {out}."]
        lines += ["Mend each, copy its input to tests/corpus/TARGET/WHAT-IS-WRONG--NAME, and see it replayed by:"]
        lines += ["  pytest tests/fuzz/test_corpus.py"]
    return "\n".join(lines)


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the code that reads files.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--target", action="append", help=f"one of {', '.join(NAMES)}; all in turn without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--replay", type=Path, nargs="+", help="cases: TARGET/NAME--FILE")
    options = parser.parse_args()
    driver = Driver(options.out)
    if options.replay:
        for path in options.replay:
            driver.out = None
            driver.batch(path.parent.name, 0, 600, 1, [read_case(path)])
            for found in driver.summary.found.values():
                sys.stdout.write(f"{found.finding.traceback}\n")
    else:
        driver.fuzz(options.minutes, options.target or NAMES, options.seed)
    sys.stdout.write(f"{report(driver.summary, options.out)}\n")
    asked = [] if options.replay else options.target or NAMES
    if left := [name for name in asked if f"\n{name} " not in driver.summary.table()]:
        sys.stdout.write(f"No time was left for {', '.join(left)}; set more --minutes.\n")
    return int(bool(driver.summary.found))


if __name__ == "__main__":
    sys.exit(main())
