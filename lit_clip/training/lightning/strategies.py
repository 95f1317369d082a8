"""Settings and states of Lightning's strategies and connectors that have no public name."""

from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.errors import require
from lit_clip.tools.class_paths import find_object


def keep_gradients_in_buckets(strategy: Strategy) -> None:
    """Keep DDP's gradients in the communication buckets, without a second copy."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


def gets_weights(strategy: Any) -> bool:
    """Return whether ``fit`` with a strategy's settings will send this process the first rank's weights."""
    path = getattr(strategy, "class_path", "")
    if not (_get_rank() and isinstance(path, str) and path):
        return False
    from lit_clip.training.lightning.fsdp import FSDP

    return issubclass(find_object(path), FSDP)


def validate_without_synchronising(strategy: Strategy, model: nn.Module) -> None:
    """Give all ranks the first rank's buffers now; a collective.

    DDP would do this in a rank's first batch, and wait for ranks that have none.
    """
    wrapped: Any = strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        distributed.same_buffers(model)
        wrapped.require_forward_param_sync = False


class SyncBatchNorm(LayerSync):
    """Replace BatchNorm by timm's layer, which is synchronised and keeps activations; restore the old layers later."""

    def __init__(self) -> None:
        self._replaced: dict[str, _BatchNorm] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        from timm.layers.norm_act import convert_sync_batchnorm  # takes time, and few runs need it

        self._replaced = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        for name, layer in self._replaced.items():
            synchronised = model.get_submodule(name)
            for kind in ("_parameters", "_buffers"):  # which moved to a device, and were trained
                setattr(layer, kind, getattr(synchronised, kind))
            layer.train(synchronised.training)
            model.set_submodule(name, layer)
        self._replaced = {}
        return model


def synchronise_batch_norm(strategy: Strategy) -> None:
    """Use :class:`SyncBatchNorm` instead of Lightning's."""
    if isinstance(strategy, ParallelStrategy) and type(strategy._layer_sync) is TorchSyncBatchNorm:
        device = strategy.root_device.type
        require(
            device not in ("cpu", "mps"),
            f"trainer.sync_batchnorm: torch has no synchronised BatchNorm for {device}; leave it out",
        )
        strategy._layer_sync = SyncBatchNorm()


def divides_samples(trainer: Trainer) -> bool:
    """Return whether Lightning would also divide a loader's samples among ranks."""
    return trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler


def leave_out_hp_metric(logger: TensorBoardLogger) -> None:
    """Stop a logger from writing its own list of metrics, with only ``hp_metric``."""
    logger._default_hp_metric = False
