"""Fully sharded data parallel training (FSDP2): torch's ``fully_shard`` instead of DDP's wrapper."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_map

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.tools import sharded_files
from lit_clip.tools.atomic import draft_of, remove
from lit_clip.tools.weight_files import read_sharded
from lit_clip.training.lightning.sharded_checkpoints import save_sharded
from lit_clip.training.optimizers import is_elementwise


class FSDP(DDPStrategy):
    """Shard weights, gradients and optimiser states over ranks; gather one block at a time to use it.

    Lightning's FSDPStrategy and ModelParallelStrategy fail on the temperature, a scalar that cannot be sharded. This is
    DDP's, whose processes, samplers and checkpoints stay, with another ``configure_ddp``.

    Results and checkpoints match DDP's; either can resume from the other's. Mixed precision is autocast, as elsewhere:
    shards and what is sent are float32. Scalars (temperature and bias) are whole on every rank. Weights are sharded by
    ``fit``, and stay so. With ``model.micro_batch_size`` weights and gradients are whole within a backward pass. Runs
    on CPU too.

    Args:
        reshard_after_forward: whether a block's weights are gathered again for the backward pass; without it they stay
            whole from their forward to their backward pass.
        device_mesh: machines, and GPUs of each: shard within a machine, and replicate over machines. None: shard over
            all ranks.
        sharded_checkpoints: whether each rank writes its own rows into a checkpoint, which is a folder then, on a disk
            that all machines share; otherwise the first rank writes a file, and holds all of it in memory.
        kwargs: of Lightning's DDPStrategy.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        device_mesh: tuple[int, int] | None = None,
        sharded_checkpoints: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sharded_checkpoints = sharded_checkpoints
        self.reshard_after_forward, self.mesh_shape = reshard_after_forward, device_mesh
        self._scalars: list[nn.Parameter] = []

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _check(trainer)
            if self.sharded_checkpoints:
                _check_saving(trainer)
        super().setup(trainer)
        module = self.lightning_module
        if module is not None and is_sharded(module):
            self.model = _Called(module)

    def model_to_device(self) -> None:
        module: Any = self.lightning_module
        if module.trainer.state.fn != TrainerFn.FITTING:  # sharding moves one block at a time
            super().model_to_device()

    def configure_ddp(self) -> None:
        """Broadcast rank 0's weights and shard them: block by block, then the remaining weights together."""
        module: Any = self.lightning_module
        # fully_shard divides the first dimension, which a scalar lacks; what it ignores stays on its device.
        self._scalars = [each for each in module.parameters() if each.ndim == 0]
        if is_sharded(module):  # by an earlier fit
            return
        # Groups by length would have ranks call the blocks unequally often, and wait for each other.
        if hasattr(module.model.text_encoder, "in_groups"):
            module.model.text_encoder.in_groups = False
        shape = tuple(self.mesh_shape or (1, self.world_size))
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("machines", "devices"))
        if self.mesh_shape is None:
            mesh = mesh["devices"]
        for scalar in self._scalars:
            scalar.data = scalar.data.to(self.root_device)
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(self._scalars)}
        for block in (block for tower in TOWERS for block in tower_blocks(module.model, tower)):
            self._broadcast(block)
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        self._broadcast(module)
        fully_shard(module, **options)
        _state(module)._lazy_init()  # otherwise the first block that a callback calls would be the root
        # Before a validation Lightning's DDPStrategy.setup would broadcast these, which is for whole tensors.
        module._ddp_params_and_buffers_to_ignore = [*module.state_dict()]

    def _broadcast(self, part: nn.Module) -> None:
        for tensor in [*part.parameters(), *part.buffers()]:
            if not isinstance(tensor, DTensor):
                whole = tensor.data.to(self.root_device).contiguous()  # a ResNet's convolutions may not be
                dist.broadcast(whole, 0)
                tensor.data = whole.to(tensor.device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        self._use_known_kernels()

    def _use_known_kernels(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
                group["fused"] = None  # torch's fused SGD knows no shards

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of scalars over ranks, as FSDP does with the other gradients.

        Of accumulated batches the part of the earlier ones is averaged again, which changes nothing: it is equal on
        all ranks.
        """
        for parameter in self._scalars:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    # For a whole checkpoint the first rank gathers one tensor at a time.

    @property
    def _saves_shards(self) -> bool:
        return self.sharded_checkpoints and is_sharded(self.lightning_module)

    def _whole(self, states: Any) -> Any:
        if self._saves_shards:
            return states
        whole = tree_map(lambda each: _gathered(each, self.is_global_zero), states)
        return whole if self.is_global_zero else {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._whole(dict(super().lightning_module_state_dict()))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._whole(super().optimizer_state(optimizer))

    @property
    def _shards(self) -> int:
        """Number of ranks that together hold a whole tensor, each some of its rows; further ranks hold copies."""
        return self.mesh_shape[1] if self.mesh_shape else self.world_size

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._saves_shards:
            save_sharded(checkpoint, Path(filepath), self._shards)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        if not sharded_files.is_sharded(filepath):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:  # renamed first: a killed run leaves no part of a checkpoint
            remove(Path(filepath).rename(draft_of(Path(filepath))))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; from a sharded one, read only this rank's rows of optimiser states."""
        if sharded_files.is_sharded(checkpoint_path):
            return read_sharded(Path(checkpoint_path), self._my_rows)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def compute_missing_batches(self) -> None:
        """Compute empty batches until all ranks have equally many; a collective.

        At the start of a validation: at its end callbacks' collectives would meet the other ranks' batches.
        """
        module: Any = self.lightning_module
        if not is_sharded(module):
            return
        loop, model = module.trainer._evaluation_loop, module.model
        mine = sum(map(_count, loop._combined_loader.flattened, loop.max_batches))
        images = torch.zeros(0, *model.preprocessing.shape, dtype=torch.uint8, device=model.device)
        for _ in range(distributed.maximum(mine) - mine):
            self.validation_step(CaptionBatch(images, images.new_zeros(0, 1, dtype=torch.long), []), 0)

    @property
    def _gets_weights(self) -> bool:
        """Return whether this rank will get all weights from the first one."""
        module: Any = self.lightning_module
        return module.trainer.state.fn == TrainerFn.FITTING and self.global_rank > 0 and not is_sharded(module)

    def _my_rows(self, name: str, rows: int) -> range:
        if sharded_files.rows_of_weights(name, rows):  # weights are loaded whole, before they are sharded
            return range(0 if self._gets_weights else rows)
        each, rank = -(-rows // self._shards), self.global_rank % self._shards  # torch divides so, too
        return range(min(each * rank, rows), min(each * (rank + 1), rows))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._gets_weights:  # configure_ddp broadcasts them
            return
        module: Any = self.lightning_module
        ours = module.state_dict()
        state = {name: _shard(value, ours.get(name)) for name, value in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = (number for group in saved["param_groups"] for number in group["params"])
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            of = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _shard(value, of[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
        self._use_known_kernels()


class _Called(nn.Module):
    """Wrapper that calls a module: Lightning runs a step through its forward, so that its hooks gather weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _state(module: nn.Module) -> Any:
    return fully_shard.state(module)  # pyright: ignore[reportFunctionMemberAccess]  # torch's decorator adds it


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return several
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # torch 2.11 has one or None


def is_sharded(module: Any) -> bool:
    """Return whether a module's weights are sharded."""
    return isinstance(module, FSDPModule)


def _gathered(value: Any, keep: bool) -> Any:
    """Return a sharded tensor whole on the CPU, or None unless ``keep``; a collective."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if keep else None


def _shard(value: Any, like: Any) -> Any:
    """Return this rank's shard of a whole tensor, sharded like another tensor of its shape."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _check(trainer: Any) -> None:
    for callback in trainer.callbacks:
        name, averages = type(callback).__name__, isinstance(callback, WeightAveraging)
        require(not averages, f"trainer.strategy: FSDP has no whole weights for {name} to average; use ddp")
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    mixed = "trainer.precision: 16-mixed scales gradients, which torch cannot do with shards and scalars together"
    require(not scaled, f"{mixed}; use bf16-mixed, or trainer.strategy ddp")
    optimization = trainer.lightning_module.optimization
    require(
        is_elementwise(optimization.optimizer),
        "trainer.strategy: FSDP gives an optimiser parts of weights, and "
        f"{optimization.descriptions['optimizer']['class_path']} needs whole matrices; use ddp",
    )


def _check_saving(trainer: Any) -> None:
    plugin, option = trainer.strategy.checkpoint_io, "trainer.strategy.sharded_checkpoints:"
    known = isinstance(plugin, TorchCheckpointIO)
    require(known, f"{option} every rank writes by itself, without {type(plugin).__name__}; leave out one of the two")
    for folder in (str(getattr(callback, "dirpath", "")) for callback in trainer.checkpoint_callbacks):
        require("://" not in folder, f"{option} cannot be written to {folder}; set ModelCheckpoint's dirpath to a disk")


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Keep a module's weights whole, so that ranks can encode different amounts; a collective if sharded."""
    shards: Any = [each for each in module.modules() if isinstance(each, FSDPModule)]
    groups = [group for each in shards for group in _groups(_state(each))]
    before = [group.post_forward_mesh_info for group in groups]
    for each in shards:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    for group in groups:
        group._to_sharded = lambda: None  # torch's state_dict() calls it, and would shard them again
    try:
        yield
    finally:
        for group in groups:
            del group._to_sharded
            # Otherwise the next backward pass would gather ahead in the order of these calls, and ranks wait for ever.
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # absent before the first pass
        for each in shards:
            each.reshard()
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh


def _count(loader: Any, most: float) -> int:
    """Return the number of a loader's batches; 0 if unknown."""
    batches = getattr(getattr(loader, "batch_sampler", None), "batches", None)  # a rank without any reports one
    return int(min(most, math.inf if batches is None else len(batches))) if math.isfinite(most) else 0
