"""Faults in what a command is started with, and in what a run is resumed from."""

from collections.abc import Sequence
from typing import NamedTuple


class Surrounding(NamedTuple):
    """A fault of a command's surroundings.

    Attributes:
        text: what is wrong.
        commands: to which it is done.
        outcome: what must follow.
        test: its name, after its file's if that is not ``tests/test_surroundings.py``.
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
        "one line that names the limit",
        "test_few_open_files_are_one_line_that_names_the_limit",
    ),
    Surrounding(
        "another run writes the same output",
        "`embed`, `score`",
        "one line that names the output; the other run loses nothing",
        "test_an_output_that_another_run_writes_is_refused_at_once",
    ),
    Surrounding(
        "the output folder holds other files",
        "`shard`",
        "one line that names a file; nothing is written",
        "test_a_folder_with_other_files_is_not_filled_with_shards",
    ),
    Surrounding(
        "the disk becomes full, at each of a dozen places",
        "`export`",
        "one line that names the folder; no folder is left",
        "test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing",
    ),
    Surrounding(
        "`SLURM_NTASKS=2` without tasks per node",
        "`embed`",
        "one line with what to set",
        "test_slurm_tasks_that_lightning_refuses_are_one_line",
    ),
    Surrounding(
        "a SLURM script of several tasks without `srun`, or of one for several devices",
        "`fit`, `embed`",
        "one line with what to write; Lightning would wait, or use one device",
        "test_tasks_that_slurm_has_not_started_are_neither_waited_for_nor_done_without",
    ),
    Surrounding(
        "under SLURM, the checkpoint of a requeued training run in the working folder",
        "`embed`",
        "encodes with its own model; Lightning would load the checkpoint",
        "test_a_requeued_jobs_checkpoint_in_the_working_folder_is_not_taken_for_the_encoders",
    ),
    Surrounding(
        "`--trainer.num_nodes 2` without torchrun or SLURM",
        "`fit`",
        "one line with what starts the others; Lightning would wait",
        "test_machines_that_nobody_starts_are_not_waited_for",
    ),
)

RESUMED = (
    Surrounding(
        "the newest checkpoint is of another configuration",
        "`fit --ckpt_path auto`, `last`",
        "passed over in one line that names the settings; the newest of this configuration is resumed",
        "tests/cli/test_configurations.py::test_last_and_auto_take_only_checkpoints_of_the_same_configuration",
    ),
    Surrounding(
        "a new SLURM job finds the checkpoint of a requeued one",
        "`fit`",
        "one line that names the checkpoint and how to resume it, exit code 2",
        "tests/cli/test_configurations.py::test_a_requeued_job_of_another_configuration_is_not_resumed",
    ),
    Surrounding(
        "a requeued SLURM job has another configuration",
        "`fit`",
        "one line that names the checkpoint, exit code 2",
        "tests/cli/test_configurations.py::test_a_requeued_job_of_another_configuration_is_not_resumed",
    ),
    Surrounding(
        "the run was finished, and kept an average of its weights",
        "`fit --ckpt_path`",
        "nothing is trained; the module and its next checkpoint have the average",
        "tests/callbacks/test_ema.py::test_a_finished_run_that_is_resumed_has_the_average_in_its_module",
    ),
    Surrounding(
        "the run kept an average of its weights, the resumed one does not",
        "`fit --ckpt_path`",
        "it goes on from the weights of the last step, and a line says so",
        "tests/callbacks/test_ema.py::test_a_run_resumed_without_the_average_goes_on_from_the_weights_of_the_last_step",
    ),
    Surrounding(
        "the run had another optimiser",
        "`fit --ckpt_path`",
        "one line that names both, exit code 2",
        "tests/training/test_optimizers.py::test_another_optimiser_cannot_resume",
    ),
)


def tables() -> str:
    """Return the sections of ``docs/evidence/faults.md``."""
    ends = "Where one line is required, the command ends with it and exit code 2."
    started = f"Each has a test in `tests/test_surroundings.py`. {ends}"
    resumed = "Each has a test, which `benchmarks/faults/surroundings.py` names."
    return "\n".join(
        [
            *_section("When a command starts", started, SURROUNDINGS),
            *_section("When a run is resumed", resumed, RESUMED),
        ]
    )


def _section(title: str, tests: str, faults: Sequence[Surrounding]) -> list[str]:
    rows = [f"| {each.text} | {each.commands} | {each.outcome} |" for each in faults]
    return [f"## {title}", "", tests, "", "| fault | command | required |", "|---|---|---|", *rows, ""]
