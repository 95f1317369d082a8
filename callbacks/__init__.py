"""What happens around the training loop."""

from callbacks.ema import EMA
from callbacks.linear_probe import LinearProbe
from callbacks.monitor import TrainingMonitor
from callbacks.tensorboard import EmbeddingProjector, SimilarityMatrix
from callbacks.throughput import Throughput
from callbacks.zero_shot import ZeroShot, ZeroShotSet

__all__ = [
    "EMA",
    "EmbeddingProjector",
    "LinearProbe",
    "SimilarityMatrix",
    "Throughput",
    "TrainingMonitor",
    "ZeroShot",
    "ZeroShotSet",
]
