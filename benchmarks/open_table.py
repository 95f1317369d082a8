"""Measure time and memory for opening a large parquet table, the first time and later.

    python benchmarks/open_table.py [--millions 20] [--folder DIR] [--same]

Writes a table of paths and captions (all different; --same: one caption for all rows, which parquet stores as a number)
and opens it three times, each in its own process. Prints seconds and memory (Linux's VmHWM, above what the process held
before) until the number of usable rows is known and the last one's caption has been read. The first opening also
searches for rows without a caption, and copies the row group that it reads.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from processes import forget_peak, held, in_a_process
from rich.console import Console
from rich.table import Table

from datamodules.open_source import open_source
from datamodules.pairs import parquet  # noqa: F401  # imported before the measurement starts

WORDS = ("a", "dog", "on", "the", "sofa", "red", "bicycle", "in", "rain", "two", "children", "with", "kite", "old")


def write(path: Path, millions: int, same: bool) -> None:
    rows = 1_000_000
    with pq.ParquetWriter(path, pa.schema({"image": pa.string(), "caption": pa.string()})) as writer:
        for million in range(millions):
            first = million * rows
            names = [f"folder/{first + row:09}.jpg" for row in range(rows)]
            words = [" ".join(WORDS[(row >> shift) % len(WORDS)] for shift in range(0, 18, 2)) for row in range(rows)]
            captions = (
                ["caption of a row"] * rows if same else [f"{text} {first + row}" for row, text in enumerate(words)]
            )
            captions[-1] = ""
            writer.write_table(pa.table({"image": names, "caption": captions}))


def measure(path: str) -> None:
    """Print the seconds and bytes for opening the table, and its number of rows."""
    before, start = forget_peak(), time.perf_counter()
    source = open_source(path)
    rows = len(source)
    caption = source.captions(rows - 1)
    seconds = time.perf_counter() - start
    assert caption[0]
    json.dump({"seconds": seconds, "peak": held("VmHWM") - before, "rows": rows}, sys.stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--millions", type=int, default=20)
    options.add_argument("--folder", help="where to write and keep the table; default: a temporary folder")
    options.add_argument("--same", action="store_true")
    options.add_argument("--measure", nargs=1, metavar="WORD", help="(used by itself)")
    arguments = options.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(arguments.folder or temporary) / f"{arguments.millions}_{arguments.same}.parquet"
        if not path.exists():
            write(path, arguments.millions, arguments.same)
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"  # an empty cache, which knows nothing about the table
        table = Table("time", "seconds", "memory", "rows", title=f"{path.stat().st_size / 1e6:,.0f} MB of parquet")
        for name in ("first", "second", "third"):
            result = in_a_process(__file__, path)
            table.add_row(name, f"{result['seconds']:.2f}", f"{result['peak'] / 1e6:.0f} MB", f"{result['rows']:,.0f}")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
