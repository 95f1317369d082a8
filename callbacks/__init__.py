"""What happens around the training loop."""

from callbacks.ema import EMA
from callbacks.monitor import TrainingMonitor
from callbacks.tensorboard import EmbeddingProjector, SimilarityMatrix
from callbacks.zero_shot import ZeroShot, ZeroShotSet

__all__ = ["EMA", "EmbeddingProjector", "SimilarityMatrix", "TrainingMonitor", "ZeroShot", "ZeroShotSet"]
