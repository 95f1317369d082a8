"""Deferring the import of torchmetrics leaves it fully usable."""

import subprocess
import sys

HEAVY = ("transformers", "timm", "open_clip", "scipy.signal")

PROGRAM = f"""
import sys
from types import ModuleType

from lit_clip.cli.lazy_packages import defer_packages

defer_packages()
import lit_clip.cli.lightning
import torchmetrics

print([name for name in {HEAVY} if name in sys.modules], "torchmetrics.text" in sys.modules)
assert torchmetrics.Metric is torchmetrics.metric.Metric
assert not hasattr(torchmetrics, "__wrapped__")
from importlib.metadata import version
assert torchmetrics.__version__ == version("torchmetrics")
assert type(torchmetrics) is not ModuleType

before = torchmetrics
from torchmetrics import Accuracy
from torchmetrics.text import BLEUScore

assert sys.modules["torchmetrics"] is before and type(before) is ModuleType
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import Metric

assert Metric is before.Metric
assert issubclass(BLEUScore, Metric)
accuracy = Accuracy(task="multiclass", num_classes=3)
accuracy.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
print(float(accuracy.compute()), hasattr(before, "nothing"))
"""


def test_lightning_starts_without_the_heavy_metrics_and_they_are_imported_on_use() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] False", "0.75 False"]
