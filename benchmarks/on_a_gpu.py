"""Measure lit-clip on one GPU in under nine minutes, without network: correctness, speed beside open_clip, feeding.

    python benchmarks/on_a_gpu.py [--only machine steps ...] [--out runs/on_a_gpu.jsonl]

Each part runs in a process of its own and has a time budget, which what earlier parts left over extends; it skips what
does not fit, and is killed if it hangs. Every figure is a line of the file as soon as it is measured, so an
aborted run keeps what it has. What fails is a line with its message, and the rest goes on. Prints the table last:
target, reached and open_clip for each model, and the largest gaps.

``--device cpu --tiny`` tries the script without a GPU; its figures mean nothing.
"""

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lit-clip itself need not be installed

import torch
from gpu.setting import Row, Setting, message_of
from gpu.summary import print_summary

PARTS = {"machine": 20, "correctness": 75, "steps": 205, "kernels": 55, "profile": 40, "feeding": 80, "ranks": 35}
GRACE = 10.0  # seconds until a part that does not end by itself is killed


class Lines:
    """Append rows to the file, and print them."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # closed after each row, which flushes it
            file.write(json.dumps({"part": self.part, **row}) + "\n")
        print(f"{self.part}: {', '.join(f'{name} {_short(value)}' for name, value in row.items())}", flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(part: str, setting: Setting, path: Path) -> None:
    """Run a part in the current process and write its rows; the last one is its end."""
    os.setsid()  # so that its data workers can be killed with it
    lines, since = Lines(path, part), time.time()
    module = import_module(f"gpu.{part}")
    gc.freeze()  # what is imported stays, and the search for garbage after each figure would look through it
    if setting.tiny:
        torch.set_num_threads(1)  # more would wait for each other longer than they compute
    try:
        for row in module.rows(setting):
            lines.add(row)
    except Exception as error:
        lines.add({"failed": message_of(error), "seconds": time.time() - since})
    else:
        lines.add({"end": True, "seconds": time.time() - since})


@contextmanager
def started(part: str, setting: Setting, path: Path) -> Iterator[BaseProcess]:
    """Start a part, and kill it with its workers after the body."""
    # A fork of this process could not use CUDA; without CUDA a fork saves the time of the imports.
    context: Any = multiprocessing.get_context("spawn" if setting.cuda else "fork")
    process = context.Process(target=run_part, args=(part, setting, path))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive() and process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def run_parts(parts: list[str], device: str, tiny: bool, path: Path) -> None:
    until = time.time()
    for part in parts:
        until += 600 if tiny else PARTS[part]
        with started(part, Setting(device, tiny, until), path) as process:
            process.join(until + GRACE - time.time())
            if process.exitcode is None:
                Lines(path, part).add({"failed": f"killed {GRACE:.0f} s after the end of its time"})
            elif process.exitcode:
                Lines(path, part).add({"failed": f"ended with exit code {process.exitcode}"})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options.add_argument("--out", type=Path, default=Path("runs/on_a_gpu.jsonl"), metavar="FILE")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--tiny", action="store_true", help="tiny models and one or two steps")
    given = options.parse_args()
    if given.device == "cpu":
        for part in given.only:  # before the forks
            import_module(f"gpu.{part}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("", encoding="utf-8")
    run_parts(given.only, given.device, given.tiny, given.out)
    print_summary([json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()])


if __name__ == "__main__":
    main()
