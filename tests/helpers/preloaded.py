"""The imports of the server that ``tests/helpers/forks.py`` forks."""

import gc
import os
import sys
import weakref
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from io import StringIO
from typing import Any

import pyarrow

from lit_clip.cli.lazy_packages import defer_packages

gc.disable()  # a fifth of the time of the imports, which leave no garbage
defer_packages()  # before Lightning is imported, as in the command
registry: Any = import_module("lightning.fabric.utilities.registry")
for name in (
    "attrs",
    "omegaconf",
    "numpy.testing",  # numpy 1.26 starts lscpu when it is imported, which the fuzzer would take for a file's doing
    "tensorboard.plugins.hparams.api_pb2",
    "timm",
    "torch.utils.tensorboard",
    "torchmetrics.classification",
    "callbacks",
    "datamodules.commands.inspect",
    "datamodules.commands.shard",
    "lit_clip.commands.classify",
    "lit_clip.cli.main",
    "lit_clip.embedding.encode",
    "lit_clip.commands.export",
    "lit_clip.training.lightning.fsdp",
    "lit_clip.cli.lightning",
    "lit_clip.commands.search",
    "lit_clip.commands.wise_ft",
    "tests.fuzz.worker",
    "tests.fuzz.targets.evaluation",
    "tests.fuzz.targets.settings",
    "tests.fuzz.targets.stores",
    "tests.fuzz.targets.words",
    "tests.helpers.charts",
    "tests.helpers.counted",
    "tests.helpers.ranks_evaluation",
    "tests.helpers.ranks_scale",
    "tests.helpers.ranks_skipped",
    "tests.helpers.ranks_stability",
    "tests.helpers.resume_runs",
    "tests.helpers.towers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",  # brings what all models of transformers need
):
    import_module(name)
registry.entry_points = cache(registry.entry_points)  # as in tests/helpers/fixtures.py
registry.entry_points(group="lightning.pytorch.callbacks_factory")
pyarrow.array([""])  # the first one imports pandas, where it is installed
import_module("lit_clip.models.tokenizer").byte_pair_tokenizer()  # read once per process

# The parser keeps the options of each class that it has read: a sixth of the time of a fork that fits for a step.
lightning: Any = import_module("lit_clip.cli.lightning")
with redirect_stdout(StringIO()), suppress(SystemExit):
    lightning.run(["fit", "--print_config"])

# Tests compare numbers on any machine, so their default precision is float32 (tests/cli/ tests the real default). It is
# said in words: Lightning starts other ranks as new programs with these, which would choose bfloat16 where they can.
lightning.computes_in_bfloat16 = lambda accelerator: False
lightning.CLI._choose_precision = lambda self, settings: sys.argv.extend(["--trainer.precision", "32-true"])

os.fsync = lambda fd: None  # as in tests/helpers/fixtures.py
sys.modules["tests.helpers.charts"].leave_out()
sys.modules["tests.helpers.counted"].count_once()
IMAGE: Any = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "heads": 1}
configs: Any = import_module("lit_clip.models.config")
with import_module("torch").random.fork_rng([]):
    for dim, length in ((16, 16), (64, 32)):  # the models of tests/conftest.py and tests/test_readme.py
        text = configs.TextTransformerConfig(context_length=length, width=16, layers=1, heads=1)
        config = configs.CLIPConfig(dim, configs.VisionTransformerConfig(**IMAGE), text)
        import_module("lit_clip.training.plan").tower_work(import_module("lit_clip.models.clip").CLIP(config))

# At the end of a process torch takes each operator of its libraries back, and a fork would copy all that they lie in.
for each in list(weakref.finalize._registry):  # pyright: ignore
    each.atexit = False

# What is imported stays: a fork that looked through it for garbage would take its own copy of all these pages.
gc.collect()
gc.freeze()
gc.enable()
