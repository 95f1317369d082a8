"""BatchNorm over all ranks' batches (``trainer.sync_batchnorm``) that keeps what timm puts into its layers."""

from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.errors import require


class SyncBatchNorm(LayerSync):
    """Replace BatchNorm by one that is synchronised, and put the same layers back afterwards.

    Torch's own converter, which Lightning uses, would replace timm's BatchNorm with its activation by one without, and
    the weights would load into another network.
    """

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
    """Use :class:`SyncBatchNorm` in place of Lightning's."""
    if isinstance(strategy, ParallelStrategy) and type(strategy._layer_sync) is TorchSyncBatchNorm:
        device = strategy.root_device.type
        require(
            device not in ("cpu", "mps"),
            f"trainer.sync_batchnorm: torch has no synchronised BatchNorm for {device}; leave it out",
        )
        strategy._layer_sync = SyncBatchNorm()
