"""``lit-clip configs``: list the packaged configurations, or print one."""

from itertools import takewhile

from lit_clip.errors import require
from lit_clip.tools.console import write_results
from lit_clip.tools.own_files import CONFIGS, SUITES, packaged_file
from lit_clip.tools.reading import read_text

TITLES = {CONFIGS: "Configurations (--config NAME)", SUITES: "Suites of evaluation sets (--suite NAME)"}


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
            head = takewhile(lambda line: line.startswith("#"), read_text(file).splitlines())
            about = "\n    ".join(line[1:].strip() for line in head if line != "#")
            lines += [f"{file.stem}: {about}", ""]
    write_results("\n".join(lines))
