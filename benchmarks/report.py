"""The Markdown of ``docs/benchmarks.md`` from what the benchmarks wrote with ``--json``.

    python benchmarks/report.py FILES OR FOLDERS ...

One table for each machine and set of versions, then what else was found, a line each.
"""

import argparse
from collections.abc import Iterable, Iterator

from results import Figure, Result, load

HEAD = "| work | peer | lit-clip | times better | of the peak: peer, lit-clip | command |\n|---|--:|--:|--:|--:|---|"
IN_TABLE = ("peers_share_of_peak", "our_share_of_peak")


def markdown(results: Iterable[Result]) -> str:
    """Tables, each below a sentence that says where and with what it was measured."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(circumstances(result), []).append(result)
    return "\n".join(f"{where}\n\n{_group(some)}" for where, some in groups.items())


def circumstances(result: Result) -> str:
    """The machine and the versions."""
    machine, versions = result.machine, result.versions
    gpu = f" and one {machine['gpu']}" if "gpu" in machine else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    cpu, instructions, cores, threads = (machine.get(name, "?") for name in ("cpu", "instructions", "cores", "threads"))
    return f"Measured on {cores} cores of {cpu} ({instructions}){gpu}, {threads} threads, with {packages}."


def _group(results: list[Result]) -> str:
    rows = [row(one) for one in results if one.ours is not None]
    found = [line for one in results for line in lines(one)]
    return "\n".join([*([HEAD, *rows, ""] if rows else []), *found, *([""] if found else [])])


def row(result: Result) -> str:
    """A comparison as a line of the table."""
    theirs = "" if result.peers is None else f"{result.peer}: {quantity(result.peers, result.unit)}"
    ours = "" if result.ours is None else quantity(result.ours, result.unit)
    figures = [result.figures.get(name) for name in IN_TABLE]
    share = ", ".join(f"{one:.1%}" for one in figures if isinstance(one, float))
    cells = [result.title, theirs, ours, str(result.ratio or ""), share, f"`{result.command}`"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quantity(value: float, unit: str) -> str:
    """Three digits or so."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f} {unit}"


def lines(result: Result) -> Iterator[str]:
    """What was found besides."""
    figures = [
        f"{name.replace('_', ' ')} {_figure(one)}" for name, one in result.figures.items() if name not in IN_TABLE
    ]
    if figures:
        command = "" if result.ours is not None else f" (`{result.command}`)"
        yield f"- {result.title}: {', '.join(figures)}{command}"


def _figure(value: Figure) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("paths", nargs="+", metavar="PATH", help="JSON files, and folders of them")
    print(markdown(load(options.parse_args().paths)), end="")


if __name__ == "__main__":
    main()
