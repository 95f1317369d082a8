"""Settings of DDP that its constructor has, and Lightning's strategies by name do not."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed


def keep_gradients_in_buckets(strategy: Strategy) -> None:
    """Keep DDP's gradients in the buckets that are sent instead of a second copy."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


def validate_without_synchronising(strategy: Strategy, model: nn.Module) -> None:
    """Give all ranks the first one's buffers now; a collective.

    DDP would do this in a rank's first batch, and wait for ranks that have none.
    """
    wrapped: Any = strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        distributed.same_buffers(model)
        wrapped.require_forward_param_sync = False
