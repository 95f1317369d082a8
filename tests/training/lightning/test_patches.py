"""Each patch of Lightning is still needed: these tests see Lightning itself do what the patch is for.

One that fails after an upgrade is good news: remove its patch, see ``lit_clip/training/lightning/__init__.py``.
"""

import inspect
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_clip import LitCLIP
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, TimmConfig
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.training.lightning import __doc__ as table
from lit_clip.training.lightning import strategies
from lit_clip.training.lightning.strategies import SyncBatchNorm, synchronise_batch_norm
from tests.helpers.forks import CONTEXT

ROOM = Path(inspect.getfile(sys.modules["lit_clip.training.lightning"])).parent


def quiet(**settings: Any) -> Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, **off, **settings)


def test_every_patch_is_in_the_table() -> None:
    assert table is not None
    named = {line.split("``")[1] for line in table.splitlines() if line.startswith("- ``")}
    assert named == {file.stem for file in ROOM.glob("*.py")} - {"__init__"}


def test_signals_lightning_broadcasts_before_every_step_and_in_its_handler() -> None:
    trainer = quiet()
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(trainer.fit_loop.epoch_loop).advance)
    assert "broadcast" in inspect.getsource(type(trainer._signal_connector)._sigterm_notifier_fn)


def test_loop_counts_lightning_begins_an_epoch_that_it_does_not_count(tmp_path: Path) -> None:
    """A run that is resumed after an epoch's last step saves, within the next one, that no epoch is under way."""

    def fit(every: int, resumed: Path | None = None) -> None:
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every)
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[saver],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
            limit_train_batches=2,
            limit_val_batches=0,
        )
        trainer.fit(BoringModel(), ckpt_path=resumed, weights_only=False)

    fit(2)
    fit(1, tmp_path / "step=2.ckpt")
    loops = torch.load(tmp_path / "step=3.ckpt", weights_only=False)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["processed"] == 1
    assert loops["epoch_progress"]["current"]["started"] == loops["epoch_progress"]["current"]["processed"]


def test_strategies_lightning_kills_the_first_rank() -> None:
    assert "_launch_process_observer" in inspect.getsource(_SubprocessScriptLauncher.launch)
    assert "SIGKILL" in inspect.getsource(_ChildProcessObserver)


def test_checkpoint_io_lightning_is_silent_when_it_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(type(fsspec.filesystem("file"))):
        def open(self, *args: Any, **kwargs: Any) -> Any:
            raise PermissionError("read-only")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path, **_: (Forbidden(skip_instance_cache=True), path))
    TorchCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_checkpoint_io_lightning_removes_a_checkpoint_before_the_next_one_is_written(tmp_path: Path) -> None:
    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.3)
            super().save_checkpoint(*args, **kwargs)

    plugin = AsyncCheckpointIO(Slow())
    (tmp_path / "first").touch()
    plugin.save_checkpoint({}, tmp_path / "second")
    plugin.remove_checkpoint(tmp_path / "first")
    assert not any(tmp_path.iterdir())  # a run that is killed now has no checkpoint
    plugin.teardown()


def test_checkpoint_io_lightning_may_run_a_program_from_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **options: asked.append(options))
    _load("http://127.0.0.1/a.ckpt")
    assert [options["weights_only"] for options in asked] == [False]


def test_resume_checks_lightning_takes_states_unchecked() -> None:
    trainer = quiet()
    state = trainer.fit_loop.state_dict()
    state["epoch_progress"]["current"]["completed"] = "a text"
    trainer.fit_loop.load_state_dict(state)
    assert trainer.fit_loop.epoch_progress.current.completed == "a text"


def test_folder_locks_lightning_gives_two_runs_one_version(tmp_path: Path) -> None:
    first, second = (TensorBoardLogger(str(tmp_path)) for _ in range(2))
    assert first.version == second.version == 0


def test_run_folder_lightnings_log_dir_is_the_folder_of_all_runs(tmp_path: Path) -> None:
    class Named(DummyLogger):  # as W&B's and MLflow's: a folder for all runs, a name and a version
        save_dir, name, version = str(tmp_path), "runs", "7"

    trainer = quiet()
    trainer.loggers = [Named()]
    assert trainer.log_dir == str(tmp_path)


def test_sync_batch_norm_torch_drops_timms_activation() -> None:
    layer = BatchNormAct2d(3)
    (converted,) = TorchSyncBatchNorm().apply(nn.Sequential(layer)).children()
    assert type(converted) is nn.SyncBatchNorm


def test_strategies_ddp_by_name_copies_its_gradients() -> None:
    strategy = quiet(strategy="ddp", devices=1).strategy
    assert isinstance(strategy, DDPStrategy)
    assert "gradient_as_bucket_view" not in strategy._ddp_kwargs


def test_fsdp_lightnings_strategies_cannot_hold_a_scalar_and_restore_by_themselves(tmp_path: Path) -> None:
    assert not FSDPStrategy().lightning_restore_optimizer
    assert not ModelParallelStrategy().lightning_restore_optimizer
    module = nn.Module()
    module.scale = nn.Parameter(torch.zeros(()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="scalar"):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_loops_a_due_validation_has_no_public_name() -> None:
    loop = quiet().fit_loop.epoch_loop
    assert hasattr(loop, "_should_check_val_fx")
    assert not [name for name in dir(loop) if not name.startswith("_") and "check_val" in name]


def test_command_line_a_checkpoints_settings_override_typed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sized(BoringModel):
        def __init__(self, size: int = 1) -> None:
            super().__init__()
            self.size = size

    torch.save({"hyper_parameters": {"size": 3}}, tmp_path / "a.ckpt")
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: None)
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda self: None)
    words = ["fit", "--model.size", "2", "--ckpt_path", str(tmp_path / "a.ckpt"), "--trainer.logger", "false"]
    parsed = LightningCLI(Sized, args=words, save_config_callback=None)
    assert parsed.config["fit"]["model"]["size"] == 3


def test_command_line_ctrl_c_becomes_an_exit() -> None:
    class Interrupted(BoringModel):
        def training_step(self, *args: Any) -> Any:
            raise KeyboardInterrupt

    module: LightningModule = Interrupted()
    with pytest.raises(SystemExit) as stopped:
        quiet().fit(module)
    assert stopped.value.code == 1
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)


# A run whose other ranks have ended, ends with a line of its own.


def lead(scripts: Sequence[str], path: str) -> None:
    """Be busy while others run; record stderr and whether they have ended."""
    sys.stderr = open(path, "w")  # noqa: SIM115
    strategies.GRACE = strategies.PERIOD = 0.1  # pyright: ignore
    others = [subprocess.Popen([sys.executable, "-S", "-c", script]) for script in scripts]
    strategies._watch(others)
    for other in others:
        other.wait()


@pytest.mark.parametrize(
    ("end", "how"), [("os.kill(os.getpid(), 9)", "killed by signal 9"), ("sys.exit(3)", "exit code 3")]
)
def test_a_rank_that_fails_ends_the_first_one_and_the_others(end: str, how: str, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    forever = f"import time\nwhile True: open({str(alive)!r}, 'w').close(); time.sleep(0.05)"
    process = CONTEXT.Process(target=lead, args=((forever, f"import os, sys; {end}"), str(tmp_path / "stderr")))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "stderr").read_text() == (
        f"lit-clip: error: another process has ended (rank 2 of this machine, {how}); its error, if it printed one, is "
        "above\n"
    )
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()


def test_ranks_that_end_well_end_nothing(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=lead, args=(("", "import time; time.sleep(0.5)"), str(tmp_path / "stderr")))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "stderr").read_text() == ""


# ``trainer.sync_batchnorm`` keeps the network, what is frozen in it, and its checkpoints.


IMAGES: dict[str, Any] = {
    "openai": ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8),
    "efficientnet": TimmConfig(timm="test_efficientnet", image_size=32),
    "efficientnet_lite": TimmConfig(timm="tf_efficientnet_lite0", image_size=32),
    "resnet": TimmConfig(timm="test_resnet", image_size=32),
}


def module_with(image: str, **options: Any) -> LitCLIP:
    text = TextTransformerConfig(context_length=8, width=16, layers=1, heads=1, vocab_size=49408)
    return LitCLIP(CLIPConfig(embed_dim=16, image=IMAGES[image], text=text), **options)


@pytest.mark.parametrize("image", IMAGES)
def test_the_network_is_the_same_while_batch_norm_is_synchronised_and_afterwards(image: str) -> None:
    module = module_with(image).eval()
    for name, buffer in module.named_buffers():  # as if it had been trained
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = module.model.visual(images)
    kinds = {name: type(layer) for name, layer in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    plugin = SyncBatchNorm()
    assert plugin.apply(module) is module
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules())
    with torch.no_grad():
        assert torch.equal(module.model.visual(images), expected)
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    for layer in module.modules():  # trained, and moved to another device
        if isinstance(layer, nn.SyncBatchNorm) and layer.running_mean is not None:
            layer.running_mean = layer.running_mean + 0.25
            layer.weight.data = layer.weight.data * 1.5
    with torch.no_grad():
        trained = module.model.visual(images)
    assert not torch.equal(trained, expected)
    assert plugin.revert(module) is module
    assert {name: type(layer) for name, layer in module.named_modules()} == kinds
    with torch.no_grad():
        assert torch.equal(module.model.visual(images), trained)


@pytest.mark.parametrize("image", ["openai", "efficientnet", "resnet"])
def test_frozen_batch_norm_stays_in_evaluation_mode(image: str) -> None:
    module = module_with(image, freeze=Freeze(image=UnlockLast(1)))
    before = {name: layer.training for name, layer in module.named_modules()}
    plugin = SyncBatchNorm()
    plugin.apply(module)
    module.eval()
    module.train()
    assert {name: layer.training for name, layer in module.named_modules()} == before
    modes = {layer.training for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)}
    assert modes == {True, False}
    plugin.revert(module)
    module.train()
    assert {name: layer.training for name, layer in module.named_modules()} == before


def test_it_replaces_lightnings_own_and_is_refused_where_torch_has_none() -> None:
    on_cpu = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2)
    synchronise_batch_norm(on_cpu)  # not asked for
    synchronise_batch_norm(SingleDeviceStrategy("cpu"))  # nothing to synchronise
    on_cpu._layer_sync = TorchSyncBatchNorm()
    with pytest.raises(InputError, match="^trainer.sync_batchnorm: torch has no synchronised BatchNorm for cpu; leave"):
        synchronise_batch_norm(on_cpu)
    on_gpu = DDPStrategy(parallel_devices=[torch.device("cuda", 0)] * 2)
    on_gpu._layer_sync = TorchSyncBatchNorm()
    synchronise_batch_norm(on_gpu)
    assert isinstance(on_gpu._layer_sync, SyncBatchNorm)
