"""Format results that the benchmarks wrote with ``--json`` as Markdown for ``docs/evidence/benchmarks.md``.

    python benchmarks/report.py FILES OR FOLDERS ...

Prints one table for each machine and set of versions, followed by a line for each result with other figures.
"""

import argparse
from collections.abc import Iterable, Iterator

from results import Figure, Result, load

HEAD = "| work | peer | lit-clip | times better | of the peak: peer, lit-clip | command |\n|---|--:|--:|--:|--:|---|"
IN_TABLE = ("peers_share_of_peak", "our_share_of_peak")


def markdown(results: Iterable[Result]) -> str:
    """Return the tables, each below a sentence that names the machine and the versions."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(circumstances(result), []).append(result)
    return "\n".join(f"{where}\n\n{_group(some)}" for where, some in groups.items())


def circumstances(result: Result) -> str:
    """Describe the machine and the versions in a sentence."""
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
    """Format a comparison as a table row."""
    theirs = "" if result.peers is None else f"{result.peer}: {quantity(result.peers, result.unit)}"
    ours = "" if result.ours is None else quantity(result.ours, result.unit)
    figures = [result.figures.get(name) for name in IN_TABLE]
    share = ", ".join(f"{one:.1%}" for one in figures if isinstance(one, float))
    cells = [result.title, theirs, ours, str(result.ratio or ""), share, f"`{result.command}`"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quantity(value: float, unit: str) -> str:
    """Format a value with about three significant digits and its unit."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f"{value:,.{digits}f} {unit}"


def lines(result: Result) -> Iterator[str]:
    """Yield a line with the result's other figures, if there are any."""
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
