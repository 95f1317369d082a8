"""What happens around the training loop."""

from callbacks.monitor import TrainingMonitor
from callbacks.tensorboard import EmbeddingProjector, SimilarityMatrix
from callbacks.zero_shot import ZeroShot, ZeroShotSet

__all__ = ["EmbeddingProjector", "SimilarityMatrix", "TrainingMonitor", "ZeroShot", "ZeroShotSet"]
