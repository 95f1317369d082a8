"""The imports of the server that ``tests/helpers/forks.py`` forks."""

import sys
from importlib import import_module
from typing import Any

from lit_clip.cli.lazy_torchmetrics import defer_torchmetrics

defer_torchmetrics()  # before Lightning is imported, as in the command
for name in (
    "numpy.testing",  # numpy 1.26 starts lscpu when it is imported, which the fuzzer would take for a file's doing
    "timm",
    "torch.utils.tensorboard",
    "callbacks",
    "datamodules.commands.inspect",
    "datamodules.commands.shard",
    "lit_clip.commands.classify",
    "lit_clip.cli.main",
    "lit_clip.embedding.encode",
    "lit_clip.commands.export",
    "lit_clip.training.fsdp",
    "lit_clip.cli.lightning",
    "lit_clip.commands.search",
    "lit_clip.commands.wise_ft",
    "tests.fuzz.worker",
    "tests.fuzz.targets.evaluation",
    "tests.fuzz.targets.settings",
    "tests.fuzz.targets.stores",
    "tests.fuzz.targets.words",
    "tests.helpers.ranks_evaluation",
    "tests.helpers.ranks_scale",
    "tests.helpers.ranks_skipped",
    "tests.helpers.ranks_stability",
    "tests.helpers.resume_runs",
):
    import_module(name)

# Tests compare numbers on any machine, so their default precision is float32 (tests/cli/ tests the real default). It is
# said in words: Lightning starts other ranks as new programs with these, which would choose bfloat16 where they can.
lightning: Any = import_module("lit_clip.cli.lightning")
lightning.computes_in_bfloat16 = lambda accelerator: False
lightning.CLI._choose_precision = lambda self, settings: sys.argv.extend(["--trainer.precision", "32-true"])
