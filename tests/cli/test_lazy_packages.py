"""Deferring the import of torchmetrics and of torch's compiler leaves them fully usable."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "timm", "open_clip", "scipy.signal")

DEFERRED = f"""
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
"""

COMPILING = """
import torch
from lightning.pytorch.utilities.compile import OptimizedModule
from torchvision.tv_tensors import Mask, wrap

from lit_clip.models.flops import tower_flops

def modules():
    return len([name for name in sys.modules if name.startswith("torch._dynamo.")])

layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
wrap(torch.ones(2), like=Mask(torch.ones(2)))
print(tower_flops(layer, torch.ones(1, 2)), isinstance(layer, OptimizedModule), modules())

from torch._dynamo.utils import counters

first = sys.modules["torch._dynamo.utils"]
assert first is torch._dynamo.utils and first.counters is counters and first.__spec__.origin == first.__file__
assert modules() > 50

def step(inputs):
    loss = layer(inputs).sum()
    torch._dynamo.graph_break()
    optimizer.zero_grad()  # refuses to be compiled, also after calls without the compiler
    return loss * 2

compiled = torch.compile(step, backend="eager")
assert torch.equal(compiled(torch.ones(1, 2)), 2 * layer(torch.ones(1, 2)).sum())
assert optimizer.zero_grad.__wrapped__.__dynamo_disable is not optimizer.zero_grad.__wrapped__
print(counters["stats"]["unique_graphs"], isinstance(torch.compile(layer), OptimizedModule))
"""

MEASURING = """
import torch

before = torchmetrics
from torchmetrics import Accuracy
from torchmetrics.text import BLEUScore

assert sys.modules["torchmetrics"] is before and type(before) is ModuleType
from lightning.pytorch.trainer.connectors.logger_connector.result import Metric

assert Metric is before.Metric
assert issubclass(BLEUScore, Metric)
accuracy = Accuracy(task="multiclass", num_classes=3)
accuracy.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
print(float(accuracy.compute()), hasattr(before, "nothing"))
"""


def printed_by(program: str) -> list[str]:
    """Return the lines of a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_training_needs_no_heavy_metrics_and_no_compiler_and_what_is_compiled_loads_it_whole() -> None:
    assert printed_by(DEFERRED + COMPILING) == ["[] False", "16 False 0", "2 True"]


@pytest.mark.slow  # the server of forks (tests/helpers/preloaded.py) defers them, too, before it imports some
def test_the_heavy_metrics_are_imported_on_use() -> None:
    assert printed_by(DEFERRED + MEASURING) == ["[] False", "0.75 False"]
