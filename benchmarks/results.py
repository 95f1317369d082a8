"""Benchmark results as JSON: medians, ratios, versions and machine."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

Figure = float | str
PACKAGES = ("torch", "open-clip-torch", "lit-clip")


@dataclass(frozen=True)
class Ratio:
    """How many times better ours is, over all pairs; above 1 means faster or smaller."""

    median: float
    least: float
    greatest: float
    pairs: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Self:
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f}, {pairs})"


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        name: its key in ``expected_ratios.yaml``.
        title: its name in tables.
        peer: the compared package and its version; empty if there is none.
        peers: the peer's median; None: no peer, or its result is not available.
        ours: our median; None: only ``figures`` were measured.
        unit: of both medians.
        ratio: over the pairs; None: nothing to compare with.
        figures: any other measurements.
        command: the command that measures it.
        versions: of Python and of the packages.
        machine: see :func:`machine`.
    """

    name: str
    title: str
    peer: str = ""
    peers: float | None = None
    ours: float | None = None
    unit: str = "s"
    ratio: Ratio | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Figure] = field(default_factory=dict)

    def value(self, figure: str) -> Figure | None:
        """Return the median ``ratio`` or one of the figures; None: it was not measured."""
        if figure == "ratio":
            return self.ratio and self.ratio.median
        return self.figures.get(figure)


def compared(
    name: str,
    title: str,
    pairs: Iterable[tuple[float, float]],
    unit: str = "s",
    more_is_better: bool = False,
    peer: str = "",
    figures: Mapping[str, Figure] | None = None,
) -> Result:
    """Make a result from pairs (peer's, ours), each measured back to back; ``peer`` defaults to open_clip."""
    pairs = list(pairs)
    ratios = [ours / theirs if more_is_better else theirs / ours for theirs, ours in pairs]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Result(name, title, peer or open_clip_version(), theirs, ours, unit, Ratio.of(ratios), dict(figures or {}))


def shares(result: Result, flops: Sequence[int], peak: float) -> dict[str, Figure]:
    """Return each side's share of the peak FLOP/s, with the FLOPs and the peak.

    Args:
        result: a comparison in seconds.
        flops: the peer's and ours.
        peak: of the machine, in FLOP/s.
    """
    theirs, ours = result.peers or 0.0, result.ours or 0.0
    return {
        "peak_gflops": peak / 1e9,
        "peers_gflop": flops[0] / 1e9,
        "our_gflop": flops[1] / 1e9,
        "peers_share_of_peak": flops[0] / theirs / peak,
        "our_share_of_peak": flops[1] / ours / peak,
    }


def open_clip_version() -> str:
    return f"open_clip {version('open-clip-torch')}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Figure]:
    """Describe the processor, its instructions, the cores of this process, torch's threads, and the GPU if any."""
    import torch

    result: dict[str, Figure] = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))}
    result["threads"], result["instructions"] = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def cpu_model(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Return the processor's name as Linux reports it."""
    path = Path(cpuinfo)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command-line parser with ``--json``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="FILE", help="also write the results to this file")
    return options


def pair_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command-line parser with ``--json`` and ``--pairs``."""
    options = parser(description)
    options.add_argument("--pairs", type=int, default=5, help="measured pairs; the median is printed")
    return options


def need(*packages: str) -> None:
    """Exit if a package that only the peer needs is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        sys.exit(f"open_clip_train needs {' and '.join(missing)}, which lit-clip does not; pip install -e '.[bench]'")


def save(file: str | None, *found: Result) -> None:
    """Write results to a JSON file, with the command, the versions and the machine; do nothing if ``file`` is None."""
    if file is None:
        return
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_json(sys.argv[1:])])
    common = {"command": command, "versions": versions(), "machine": machine()}
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(one) | common for one in found], indent=1) + "\n", encoding="utf-8")


def _without_json(words: Sequence[str]) -> list[str]:
    where = words.index("--json") if "--json" in words else len(words)
    return [*words[:where], *words[where + 2 :]]


def load(paths: Iterable[str]) -> list[Result]:
    """Read results from JSON files and folders of them, sorted by name.

    Raises:
        SystemExit: a path does not exist, or a file was not written by :func:`save`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            sys.exit(f"{path}: no such file or folder")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [_result(row, path) for path in files for row in _rows(path)]


def _rows(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{path}: {error}")
    return rows if isinstance(rows, list) else [rows]


def _result(row: Any, path: Path) -> Result:
    try:
        ratio = row["ratio"] and Ratio(**row["ratio"])
        return Result(**{**row, "ratio": ratio})
    except (KeyError, TypeError) as error:
        sys.exit(f"{path}: not written by a benchmark's --json ({error})")
