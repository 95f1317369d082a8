"""Check benchmark results against expected bounds on ratios and shares, which hardly depend on the machine.

    python benchmarks/check_ratios.py FILES OR FOLDERS ... [--against benchmarks/expected_ratios.yaml] [--all]

Prints a line for each figure that is out of bounds, and exits with code 1 if there is one. ``--all``: figures that were
not measured count too.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from results import Result, load

BOUNDS = {"least": "below", "most": "above"}
EXPECTED = Path(__file__).parent / "expected_ratios.yaml"

Bounds = Mapping[str, Mapping[str, Mapping[str, float]]]


def broken(results: Sequence[Result], expected: Bounds, everything: bool = False) -> Iterator[str]:
    """Yield a line for each figure that is out of bounds.

    Args:
        results: of any benchmarks; those without bounds are ignored.
        expected: a result's name -> the bounds, ``least`` and ``most``, of its figures.
        everything: also yield a line for each result that was not measured.
    """
    for name, bounds in expected.items():
        some = [one for one in results if one.name == name]
        if everything and not some:
            yield f"{name}: not measured"
        for result in some:
            for bound, figures in bounds.items():
                for figure, limit in figures.items():
                    yield from _out_of_bound(result, bound, figure, limit)


def _out_of_bound(result: Result, bound: str, figure: str, limit: float) -> Iterator[str]:
    value = result.value(figure)
    if not isinstance(value, int | float):
        yield f"{result.name}: {figure} was not measured"
    elif not (value >= limit if bound == "least" else value <= limit):  # NaN is out of any bounds
        pairs = f", pairs {result.ratio}" if figure == "ratio" else ""
        yield f"{result.name}: {figure} {value:.4g} is {BOUNDS[bound]} {limit:g}{pairs}"


def read_expected(path: Path) -> Bounds:
    """Read bounds from YAML.

    Raises:
        SystemExit: no such file, or an entry is malformed.
    """
    if not path.exists():
        sys.exit(f"{path}: no such file")
    expected: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name, bounds in expected.items():
        if not isinstance(bounds, dict) or not bounds or bounds.keys() - BOUNDS:
            sys.exit(f"{path}: {name} must have least or most, and figures in them")
        for figure, limit in (item for figures in bounds.values() for item in figures.items()):
            if not isinstance(limit, int | float):  # YAML reads 1e-4 as text, 1.0e-4 as a number
                sys.exit(f"{path}: {name}: {figure} must be a number, it is {limit!r}")
    return expected


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("paths", nargs="+", metavar="PATH", help="JSON files, and folders of them")
    options.add_argument("--against", type=Path, default=EXPECTED, metavar="YAML")
    options.add_argument("--all", action="store_true", help="expected figures that were not measured count too")
    chosen = options.parse_args()
    results, expected = load(chosen.paths), read_expected(chosen.against)
    out = list(broken(results, expected, chosen.all))
    checked = sum(one.name in expected for one in results)
    print(*out, f"{len(out)} figures out of bounds, {checked} results checked", sep="\n")
    sys.exit(1 if out else 0)


if __name__ == "__main__":
    main()
