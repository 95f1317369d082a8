"""Settings and states of Lightning's strategies and connectors that have no public name; and a watch of started ranks.

A run ends with a clear error when a rank started by the first one has ended, or nothing starts one.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.errors import InputError, require
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


BY_HAND = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}  # set by people who start each machine's process
PERIOD = 1.0  # seconds between looks
GRACE = 5.0  # seconds for the first rank to notice by itself, at its next collective, and to report and save
CODE = 2  # the exit code of a first rank that notices by itself


class _Launcher(subprocess_script._SubprocessScriptLauncher):
    """Lightning's launcher with our thread to watch started ranks; its own gives the first rank no time to save."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def watch_started_ranks(trainer: Trainer) -> None:
    """Make a trainer end clearly where Lightning would kill its first rank; call this before ranks start.

    Raises:
        InputError: nothing starts the other ranks, for which Lightning would wait.
    """
    strategy: Any = trainer.strategy
    _check_started(trainer, getattr(strategy, "cluster_environment", None))
    launcher = strategy.launcher
    if type(launcher) is subprocess_script._SubprocessScriptLauncher:
        strategy._launcher = _Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)


def _check_started(trainer: Trainer, environment: ClusterEnvironment | None) -> None:
    """Raise :class:`InputError` where Lightning would wait for processes that nobody starts, or skip them."""
    devices, nodes = trainer.num_devices, trainer.num_nodes
    if isinstance(environment, SLURMEnvironment):
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # that srun has started
        require(
            tasks >= devices * nodes,
            f"SLURM starts {tasks} of the {devices * nodes} processes ({devices} devices x {nodes} nodes): give the "
            f"job --nodes={nodes} --ntasks-per-node={devices} and write srun before lit-clip, or set fewer devices",
        )
        try:
            environment.validate_settings(devices, nodes)
        except ValueError as error:  # more tasks than processes
            raise InputError(f"trainer: {error}") from error
    by_hand = not BY_HAND.isdisjoint(os.environ) or type(environment) is not LightningEnvironment
    require(
        by_hand or nodes == 1,
        f"trainer.num_nodes {nodes}: nothing starts the processes of the other machines: run this by srun, or on each "
        "of them by torchrun, or set trainer.num_nodes 1",
    )


def _watch(processes: Sequence[Any]) -> None:
    """Wait until a process fails, or all have ended; if one fails, end this process."""
    codes = [process.poll() for process in processes]
    while None in codes and not any(codes):
        time.sleep(PERIOD)
        codes = [process.poll() for process in processes]
    if not any(codes):
        return
    time.sleep(GRACE)
    rank, code = next((rank, code) for rank, code in enumerate(codes, start=1) if code)
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    for process in processes:
        process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
    error = f"another process has ended (rank {rank} of this machine, {how}); its error, if it printed one, is above"
    sys.stderr.write(f"lit-clip: error: {error}\n")
    sys.stderr.flush()
    os._exit(CODE)
