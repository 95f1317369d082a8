"""Fully sharded data parallel training: Lightning's strategy adapted to CLIP."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as Sharded
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.training.optimizers import Optimization, is_elementwise


class FSDP(FSDPStrategy):
    """Shard weights, gradients and optimiser states over ranks; gather one block at a time to use it.

    Results and checkpoints match DDP's; either can resume from the other's. Mixed precision is autocast, as elsewhere:
    shards and what is sent are float32. Scalars (temperature and bias), and what is frozen outside of blocks, are whole
    on every rank. Weights are sharded under ``fit``, including its validations; ``validate``, ``test`` and ``predict``
    use full weights. With ``model.micro_batch_size`` weights and gradients are whole within a step, and sharded between
    steps, except for frozen weights, which stay whole. Runs on CPU too.

    Args:
        sharding_strategy: ``FULL_SHARD``, ``SHARD_GRAD_OP`` (weights stay whole between forward and backward pass), or
            ``HYBRID_SHARD`` (sharded within a machine, replicated over machines), which needs ``device_mesh``.
        device_mesh: machines, and GPUs of each; or torch's DeviceMesh.
        kwargs: of Lightning's FSDPStrategy and of torch's FullyShardedDataParallel.
    """

    def __init__(
        self,
        sharding_strategy: str = "FULL_SHARD",
        device_mesh: tuple[int, int] | DeviceMesh | None = None,
        **kwargs: Any,
    ) -> None:
        require(
            "HYBRID" not in sharding_strategy or device_mesh is not None,
            f"trainer.strategy: {sharding_strategy} needs device_mesh; set it to [machines, GPUs of each]",
        )
        mesh = tuple(device_mesh) if isinstance(device_mesh, list | tuple) else device_mesh
        require(
            not isinstance(mesh, tuple) or mesh[-1] > 1,
            f"trainer.strategy: device_mesh {mesh} shards nothing, and torch would not average the gradients; use ddp",
        )
        super().__init__(
            sharding_strategy=sharding_strategy,  # pyright: ignore[reportArgumentType]  # torch checks the name
            device_mesh=mesh,  # pyright: ignore[reportArgumentType]  # of two numbers
            state_dict_type="full",
            **kwargs,
        )
        self._whole_parameters: list[nn.Parameter] = []
        self._sharded: Sharded | None = None

    def setup_environment(self) -> None:
        """Connect the ranks; the mesh is of this strategy's devices, where Lightning's would be of GPUs only."""
        mesh = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if isinstance(mesh, tuple):
            mesh = init_device_mesh(self.root_device.type, mesh)
        if mesh is not None:
            self.kwargs["device_mesh"] = mesh

    def setup(self, trainer: Trainer) -> None:
        """Wrap the blocks, and leave out what stays whole."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer)
            module: Any = self.lightning_module
            require(  # by name: peft need not be installed
                not any(type(layer).__name__ == "ParamWrapper" for layer in module.modules()),
                "trainer.strategy: FSDP cannot shard a LoRA of in_proj_weight, which is added to the weight itself; "
                "set model.lora.targets to other layers, such as c_fc and c_proj, or use ddp",
            )
            _check_optimizer(module.optimization)
            self._prepare(self.lightning_module)
        super().setup(trainer)

    def _prepare(self, module: Any) -> None:
        blocks = {id(block) for tower in TOWERS for block in tower_blocks(module.model, tower)}
        if module.hparams.micro_batch_size:  # FSDP cannot gather a block for a forward pass within a backward pass
            blocks = set()
        if hasattr(module.model.text_encoder, "in_groups"):
            module.model.text_encoder.in_groups = False
        for tensor in [*module.parameters(), *module.buffers()]:  # FSDP does this itself, but not on CPU
            of_rank_0 = tensor.data.to(self.root_device)
            dist.broadcast(of_rank_0, 0)
            tensor.data.copy_(of_rank_0)
        in_blocks = {id(each) for block in module.modules() if id(block) in blocks for each in block.parameters()}
        # A frozen weight that shares a shard with a trained one would be differentiated, and all that its encoder
        # computes from it: frozen blocks are sharded by themselves, and what is frozen outside of them stays whole.
        self._whole_parameters = [
            each for each in module.parameters() if each.ndim == 0 or not (each.requires_grad or id(each) in in_blocks)
        ]
        for parameter in self._whole_parameters:
            parameter.data = parameter.data.to(self.root_device)  # FSDP moves only what it shards
        self.kwargs |= {
            "auto_wrap_policy": CustomPolicy(lambda block: id(block) in blocks),
            "ignored_states": self._whole_parameters,
        }

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._sharded is not None and self._sharded.module is model:
            return self._sharded
        if not self._whole_parameters:  # nothing is being trained
            return model.to(self.root_device)
        # Lightning passes the device's index, and a CPU has none.
        settings: dict[str, Any] = {"sharding_strategy": self.sharding_strategy, "cpu_offload": self.cpu_offload}
        self._sharded = Sharded(model, device_id=self.root_device, **settings, **self.kwargs)
        return self._sharded

    def _check(self, trainer: Any) -> None:
        for callback in trainer.callbacks:
            require(
                not (isinstance(callback, WeightAveraging) or getattr(callback, "needs_whole_weights", False)),
                f"trainer.strategy: FSDP has no whole weights, which {type(callback).__name__} needs; remove it and "
                "validate the checkpoint afterwards, or use ddp",
            )

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = None if precision_plugin is None else _Precision(precision_plugin.precision, self)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of whole parameters over ranks, as FSDP does with the rest."""
        for parameter in self._whole_parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    def _whole(self, rank0_only: bool) -> Any:
        where: dict[str, bool] = {"rank0_only": rank0_only, "offload_to_cpu": self.root_device.type != "cpu"}
        configs = FullStateDictConfig(**where), FullOptimStateDictConfig(**where)
        return Sharded.state_dict_type(self._root, StateDictType.FULL_STATE_DICT, *configs)

    @property
    def _root(self) -> Sharded:
        assert isinstance(self.model, Sharded)
        return self.model

    # Checkpoints: Lightning's own strategy loads weights before LightningModule.on_load_checkpoint has seen them, and
    # numbers optimiser states differently from DDP.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not isinstance(self.model, Sharded):
            assert self.model is not None
            return self.model.state_dict()
        with self._whole(rank0_only=True):
            return self._root.state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state in torch's form: parameters numbered in the order of the groups."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        with self._whole(rank0_only=True):
            state = Sharded.optim_state_dict(self._root, optimizer)
        return _renamed(state, {name: i for i, name in enumerate(_names(state))}) if state else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            with self._whole(rank0_only=False):
                ours = _names(Sharded.optim_state_dict(self._root, optimizer))
                require(len(ours) == len(_names(state)), "the checkpoint's optimiser has other parameters")
                state = _renamed(state, dict(zip(_names(state), ours, strict=True)))
                optimizer.load_state_dict(Sharded.optim_state_dict_to_load(self._root, optimizer, state))


def compute_missing_batches(trainer: Any, model: Any) -> None:
    """Compute as many batches without a pair as other ranks have more, if they compute theirs together; a collective.

    At the start of a validation: at its end callbacks' collectives would meet the other ranks' batches.
    """
    strategy = trainer.strategy
    if not (isinstance(strategy, FSDP) and isinstance(strategy.model, Sharded)):
        return
    loop = trainer._evaluation_loop
    mine = sum(map(_count, loop._combined_loader.flattened, loop.max_batches))
    images = torch.zeros(0, *model.preprocessing.shape, dtype=torch.uint8, device=model.device)
    for _ in range(distributed.maximum(mine) - mine):
        strategy.validation_step(CaptionBatch(images, images.new_zeros(0, 1, dtype=torch.long), []), 0)


def _count(loader: Any, most: float) -> int:
    """Return the number of a loader's batches; 0 if it is unknown."""
    batches = getattr(getattr(loader, "batch_sampler", None), "batches", None)  # a rank without any reports one
    return int(min(most, math.inf if batches is None else len(batches))) if math.isfinite(most) else 0


def _check_optimizer(optimization: Optimization) -> None:
    require(
        is_elementwise(optimization.optimizer),
        "trainer.strategy: FSDP gives an optimiser flat parts of weights, and "
        f"{optimization.descriptions['optimizer']['class_path']} needs whole matrices; use ddp",
    )


def _names(state: Mapping[str, Any]) -> list[Any]:
    return [name for group in state["param_groups"] for name in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "state": {names[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


class _Precision(FSDPPrecision):
    """Autocast on any device, and clipping by the norm over all shards."""

    def __init__(self, precision: Any, strategy: FSDP) -> None:
        super().__init__(precision)
        self._strategy = strategy

    @property
    def mixed_precision_config(self) -> Any:
        return None

    def forward_context(self) -> Any:
        if "mixed" not in self.precision:
            return super().forward_context()
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self._strategy.root_device.type, dtype)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float, *_: Any, **__: Any) -> None:
        self._strategy._root.clip_grad_norm_(clip_val)
