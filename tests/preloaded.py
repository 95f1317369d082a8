"""What a process that ``tests/forks.py`` starts has imported already."""

from importlib import import_module

from lit_clip.light_torchmetrics import defer_torchmetrics

defer_torchmetrics()  # before Lightning is imported, as the command does
for name in (
    "timm",
    "torch.utils.tensorboard",
    "callbacks",
    "datamodules.inspect_command",
    "datamodules.shard_command",
    "lit_clip.classify",
    "lit_clip.cli",
    "lit_clip.embed",
    "lit_clip.export",
    "lit_clip.fsdp",
    "lit_clip.lightning_cli",
    "lit_clip.search",
    "lit_clip.wise_ft",
    "tests.ranks_evaluation",
    "tests.ranks_scale",
    "tests.ranks_skipped",
    "tests.ranks_stability",
    "tests.resume_runs",
):
    import_module(name)

# Tests compare numbers, on any machine: what is not said is float32 in them. (test_cli.py tests the default.)
import_module("lit_clip.lightning_cli").computes_in_bfloat16 = lambda accelerator: False
