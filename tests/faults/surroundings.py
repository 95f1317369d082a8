"""Faults in what a command is started with: closed streams, few files, another command at work, a full disk."""

from typing import NamedTuple


class Surrounding(NamedTuple):
    """A fault of a command's surroundings; ``tests/faults/test_surroundings.py`` has a test of each.

    Attributes:
        text: what is wrong.
        commands: to which it is done.
        outcome: what must follow.
        test: its name.
    """

    text: str
    commands: str
    outcome: str
    test: str


SURROUNDINGS = (
    Surrounding(
        "standard error is closed (`2>&-`)",
        "`fit`, `embed`",
        "works; an error is one line on standard output, exit code 2",
        "test_a_command_works_without_a_stream",
    ),
    Surrounding(
        "standard output is closed (`>&-`)", "`fit`, `embed`", "works", "test_a_command_works_without_a_stream"
    ),
    Surrounding(
        "at most 24 open files (`ulimit -n 24`)",
        "`fit`, `embed`",
        "one line that names the limit, exit code 2",
        "test_few_open_files_are_one_line_that_names_the_limit",
    ),
    Surrounding(
        "another run writes the same output",
        "`embed`, `score`",
        "one line that names the output, exit code 2; the other run loses nothing",
        "test_an_output_that_another_run_writes_is_refused_at_once",
    ),
    Surrounding(
        "the output folder holds other files",
        "`shard`",
        "one line that names a file, exit code 2; nothing is written",
        "test_a_folder_with_other_files_is_not_filled_with_shards",
    ),
    Surrounding(
        "the disk becomes full, at each of a dozen places",
        "`export`",
        "one line that names the folder, exit code 2; no folder is left",
        "test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing",
    ),
    Surrounding(
        "`SLURM_NTASKS=2` without tasks per node",
        "`embed`",
        "one line with what to set, exit code 2",
        "test_slurm_tasks_that_lightning_refuses_are_one_line",
    ),
)


def table() -> str:
    """Return the section of ``docs/faults.md``."""
    rows = [f"| {each.text} | {each.commands} | {each.outcome} |" for each in SURROUNDINGS]
    lines = ["## When a command starts", "", "Each has a test in `tests/faults/test_surroundings.py`.", ""]
    return "\n".join([*lines, "| fault | command | required |", "|---|---|---|", *rows, ""])
