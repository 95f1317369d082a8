"""``lit-clip configs``: list the packaged configurations, or print one."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path

from lit_clip.errors import require
from lit_clip.tools.console import Console, write_results
from lit_clip.tools.packaged import CONFIGS, SUITES, packaged_file
from lit_clip.tools.text_files import read_text

TITLES = {CONFIGS: "Configurations (--config NAME)", SUITES: "Suites of evaluation sets (--suite NAME)"}
ENTRIES = ("command", "needs", "cost", "result")


def configs(name: list[str]) -> None:
    """List the packaged configurations with their command, needs, cost and result, or print one.

    Args:
        name: print this file, such as finetune_clip > mine.yaml; by default list all.
    """
    require(len(name) < 2, f"configs: prints one file; type lit-clip configs {' '.join(name[:1])}")
    if name:
        write_results(read_text(packaged_file(name[0], "configs", CONFIGS, SUITES)))
        return
    lines = []
    for folder, title in TITLES.items():
        lines += [title, ""]
        for file in sorted(folder.glob("*.yaml")):
            lines += [*_described(file.stem, _head(file)), ""]
    write_results("\n".join(lines))


def _described(name: str, entries: Mapping[str, str]) -> Iterator[str]:
    """Yield lines: name and purpose, then each entry; the command stays on one line for copying."""
    wrap = partial(textwrap.fill, width=Console(file_width=120).width, break_long_words=False, break_on_hyphens=False)
    yield wrap(f"{name}: {entries['']}")
    yield f"    command: {entries['command']}"
    for entry in ENTRIES[1:]:
        if entry in entries:
            yield wrap(f"{entry}: {entries[entry]}", initial_indent="    ", subsequent_indent="    ")


def _head(file: Path) -> dict[str, str]:
    """Return the entries of the comment at a file's head; an empty name has the sentences before them.

    Continued lines are indented by three spaces; other comments after the first entry are left out.
    """
    entries, name = {"": ""}, ""
    for line in takewhile(lambda line: line.startswith("#"), read_text(file).splitlines()):
        found = re.match(f"# ({'|'.join(ENTRIES)}): (.*)", line)
        if found:
            name = found[1]
        elif name and not line.startswith("#   "):
            name = "other"
        words = found[2] if found else line[1:].strip()
        entries[name] = f"{entries.get(name, '')} {words}".strip().removesuffix(" \\")
    return entries
