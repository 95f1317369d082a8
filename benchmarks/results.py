"""What a benchmark found, as JSON: medians and ratios, of what versions, on what machine."""

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
    """How many times better ours did in each pair; above 1 is faster or smaller."""

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
        name: what it is called in ``expected_ratios.yaml``.
        title: what it is, for people.
        peer: who did the same work, and of what version; empty if nobody did.
        peers: the peer's median; None: nobody did the same, or it could not be had.
        ours: our median; None: only ``figures`` were taken.
        unit: of both.
        ratio: of the pairs; None: there was nothing to compare with.
        figures: whatever else was found.
        command: what to type for it.
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
        """``ratio`` (the median) or one of the figures; None: it was not measured."""
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
    """Of pairs (peer's, ours), taken one right after the other. ``peer`` is open_clip unless it is named."""
    pairs = list(pairs)
    ratios = [ours / theirs if more_is_better else theirs / ours for theirs, ours in pairs]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Result(name, title, peer or open_clip_version(), theirs, ours, unit, Ratio.of(ratios), dict(figures or {}))


def shares(result: Result, flops: Sequence[int], peak: float) -> dict[str, Figure]:
    """FLOP/s of peer and ours over the peak, and what they are made of.

    Args:
        result: of seconds.
        flops: the peer's and ours.
        peak: FLOP/s.
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
    """The processor, its instructions, the cores this process may use, torch's threads, and the GPU if there is one."""
    import torch

    result: dict[str, Figure] = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))}
    result["threads"], result["instructions"] = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def cpu_model(cpuinfo: str = "/proc/cpuinfo") -> str:
    """As Linux calls it."""
    path = Path(cpuinfo)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with ``--json``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="FILE", help="write what was found to this file as well")
    return options


def pair_parser(description: str | None) -> argparse.ArgumentParser:
    """Also with how many pairs to measure."""
    options = parser(description)
    options.add_argument("--pairs", type=int, default=5, help="measured pairs; the median is printed")
    return options


def need(*packages: str) -> None:
    """End if a package that only the peer wants is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        sys.exit(f"open_clip_train needs {' and '.join(missing)}, which lit-clip does not: pip install -e '.[bench]'")


def save(file: str | None, *found: Result) -> None:
    """Write results to a JSON file, with the command, the versions and the machine; without a file nothing is done."""
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
    """Of JSON files and of folders of them, in the order of their names.

    Raises:
        SystemExit: a path is neither, or a file is not of :func:`save`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            sys.exit(f"{path}: there is no such file or folder")
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
        sys.exit(f"{path}: was not written by a benchmark's --json ({error})")
