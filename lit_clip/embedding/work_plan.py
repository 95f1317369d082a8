"""The plan of a command's work on all rows, from a short measurement: what it would read, write, hold and take."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from lit_clip.embedding import encode
from lit_clip.embedding.precision import autocast
from lit_clip.embedding.reading import in_batches
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import in_words, per_second, size_in_bytes
from lit_clip.tools.hardware import peak_of_process
from lit_clip.tools.workers import loader
from lit_clip.training.plan_table import print_rows

SECONDS = 5.0  # of a measurement
SAMPLED = 100  # rows whose size is looked up, or that are written


@dataclass(frozen=True)
class PlanOptions:
    """What is planned instead of done.

    Args:
        print_plan: measure a few rows, print what the command would read, write, hold and take, and stop.
        plan_rows: rows that the plan is made for; by default those of the data.
        plan_processes: processes at once on all machines; by default those of this command and its --share.
        plan_speed: rows a second of one process; by default measured.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    print_plan: bool = False
    plan_rows: int | None = None
    plan_processes: int | None = None
    plan_speed: float | None = None

    def check(self) -> None:
        """Raise :class:`InputError` for numbers that are not positive, and for those of no plan."""
        for name in ("plan_rows", "plan_processes", "plan_speed"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} {value}: must be positive")
            require(value is None or self.print_plan, f"--{name}: belongs to --print_plan; add that, or leave it out")


class Sample(NamedTuple):
    """Measurement on a few rows."""

    rows: int
    seconds: float  # of one process
    read: float  # bytes of a row, on average
    written: float  # likewise


@dataclass(frozen=True)
class Work:
    """What a command does with its rows."""

    rows: int  # of the data
    processes: int
    unit: tuple[str, int]  # plural name and rows of what is dealt to the processes
    sample: Sample
    files: str  # what the processes write, and what becomes of it
    files_of_unit: int | None  # None: a process writes one every few seconds
    held: float = 0  # bytes that each process holds of every row, besides what the source of the data holds
    joined: float = 0  # bytes that the last process holds of every row


def print_work(work: Work, options: PlanOptions) -> None:
    """Print the plan as a table."""
    print_rows(work_rows(work, options))


def work_rows(work: Work, options: PlanOptions) -> list[tuple[str, str]]:
    """Return the rows of the table."""
    total, processes = options.plan_rows or work.rows, options.plan_processes or work.processes
    name, size = work.unit
    units = math.ceil(total / size)
    each = min(total, math.ceil(units / processes) * size)  # rows of the process with the most
    sample = work.sample
    speed = options.plan_speed or sample.rows / sample.seconds
    how = "as typed" if options.plan_speed else f"measured on {sample.rows:,} rows with this machine as busy as it is"
    seconds = each / speed
    parts = min(units, processes * math.ceil(seconds / encode.SECONDS_BETWEEN_PARTS))
    files = parts if work.files_of_unit is None else units * work.files_of_unit
    now = size_in_bytes(peak_of_process())
    rows = [
        ("rows", f"{total:,}" + (f", by {work.rows:,} of the data" if total != work.rows else "")),
        (name, f"{units:,} of {size:,} rows"),
        ("processes", f"{processes:,}" + (f", each with up to {each:,} rows" if processes > 1 else "")),
        ("speed of a process", f"{per_second(speed, 1, 'rows')}, {how}"),
        ("time", in_words(seconds)),
        ("read", f"{size_in_bytes(total * sample.read)}, {size_in_bytes(sample.read)} a row"),
        ("written", f"{size_in_bytes(total * sample.written)}, {size_in_bytes(sample.written)} a row; {work.files}"),
        ("files", f"{files:,}"),
        ("memory of a process", f"{now} now" + _of_rows(total * work.held)),
    ]
    if work.joined:
        rows.append(("memory of the last one", f"{now} now" + _of_rows(total * (work.held + work.joined))))
    return rows


def _of_rows(size: float) -> str:
    return f", and about {size_in_bytes(size)} for all rows" if size else ""


def sizes(rows: int, size_of: Callable[[int], int]) -> float:
    """Return the mean size of a few rows spread over all; those that cannot be read count as none."""
    found = []
    for row in sampled(rows):
        try:
            found.append(size_of(row))
        except InputError:
            found.append(0)
    return sum(found) / len(found)


def sampled(rows: int) -> range:
    """Return at most ``SAMPLED`` rows, spread over all."""
    return range(0, rows, math.ceil(rows / SAMPLED))


def measure(
    model: CLIP,
    task: encode.EncodingTask,
    rows: int,
    settings: encode.EncodingSettings,
    size_of: Callable[[int], int],
) -> Sample:
    """Read and encode batches spread over the data for ``SECONDS``, from the second on if there are several."""
    batches = in_batches(range(rows), settings.batch_size)
    chosen = [batches[number] for number in sampled(len(batches))]
    device = encode.make_trainer([], settings).strategy.root_device
    model.to(device).eval()
    started, seconds, done = time.monotonic(), 0.0, 0
    finished: encode.Finished = []
    with torch.no_grad(), autocast(device, settings.precision):
        for number, batch in enumerate(loader(task.read(chosen, None), settings.num_workers)):
            features = task.step(batch, device, settings.batch_size).cpu().numpy()
            if batch.rows:
                finished.append((batch._replace(inputs=None, texts=None), features))
            if number == 0 and len(chosen) > 1:  # starts workers, and compiles
                started = time.monotonic()
                continue
            seconds, done = time.monotonic() - started, done + len(chosen[number])
            if seconds > SECONDS:
                break
    require(
        bool(finished), "--print_plan: none of the rows that were tried can be read; see them with lit-clip inspect"
    )
    written = sum(array.nbytes for array in task.part(finished).values())
    return Sample(done, seconds, sizes(rows, size_of), written / sum(len(batch.rows) for batch, _ in finished))


def size_in_memory(values: tuple[object, ...]) -> int:
    """Bytes of a tuple and its values, and of its place in a list."""
    return sys.getsizeof(values) + sum(map(sys.getsizeof, values)) + 8
