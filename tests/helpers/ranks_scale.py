"""One rank of trainings by ``Trainer.fit``: with shards, on a small table, resumed from a checkpoint of its own."""

import json
import os
import re
import resource
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import ActivationCheckpointing
from datamodules import Captions
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses import Contrastive
from lit_clip.losses.loss import LossValue, Pairs
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.lora import LoRA
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP, whole_weights
from lit_clip.training.lightning.sharded_checkpoints import save_sharded
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from lit_clip.weights.load import weights_come_later
from tests.helpers.ranks import CONFIG, PAIRS, make_batch

STRATEGIES = {
    "fsdp": FSDP,
    "hybrid": partial(FSDP, device_mesh=(2, 2)),
    "sharded": partial(FSDP, sharded_checkpoints=True),
    "sharded_hybrid": partial(FSDP, device_mesh=(2, 2), sharded_checkpoints=True),
}


class _Batches(Dataset[CaptionBatch]):
    """This rank's rows of one fixed batch, repeated every step."""

    def __init__(self, steps: int, rank: int, world: int) -> None:
        size = PAIRS // world
        self.steps, self.rows = steps, slice(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CaptionBatch:
        return make_batch(self.rows)


class Tempered(Contrastive):
    """A loss with parameters: a scalar, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, pairs: Pairs) -> LossValue:
        value = super().forward(pairs)
        return value._replace(loss=value.loss * self.factor * self.weights.mean())


class Data(LightningDataModule):
    """The same eight pairs every step, divided among the ranks."""

    steps_per_epoch = 3

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        batches = _Batches(self.steps_per_epoch, trainer.global_rank, trainer.world_size)
        return DataLoader(batches, batch_size=None)


def _trainer(**options: Any) -> Trainer:
    """Return a quiet trainer of one epoch on all ranks."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ["WORLD_SIZE"]),
        "strategy": "ddp",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **options,
    }
    return Trainer(**settings)


def train(
    output: str,
    strategy: str,
    resume: str | None = None,
    checkpointed: bool = False,
    own_loss: bool = False,
    saver: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Train with ``Trainer.fit``, three steps an epoch, and save a checkpoint; ``saver`` is of a ModelCheckpoint."""
    settings = {"precision": "32-true", **options.pop("trainer", {})}
    torch.manual_seed(int(os.environ["RANK"]) if strategy in STRATEGIES else 0)  # FSDP must broadcast rank 0's weights
    if own_loss:
        options["loss"] = Tempered()
    # With a smaller eps, AdamW would amplify rounding errors of gradients that are zero.
    module = LitCLIP(
        CONFIG, **options, optimizer=partial(PaperAdamW, eps=1e-3), lr_scheduler=partial(WarmupCosine, warmup_steps=1)
    )
    module.model._tokenizer = CLIPTokenizer(16)  # only its padding id is read
    differentiated: list[bool] = []
    module.model.visual.register_forward_hook(lambda _, __, features: differentiated.append(features.requires_grad))
    savers = [ModelCheckpoint(**saver)] if saver else []
    trainer = _trainer(
        callbacks=[*([ActivationCheckpointing()] if checkpointed else []), *savers],
        strategy=STRATEGIES[strategy]() if strategy in STRATEGIES else strategy,
        enable_checkpointing=bool(savers),
        **settings,
    )
    trainer.fit(module, Data(), ckpt_path=resume)
    assert any(differentiated) != ("image" in options.get("freeze", {})), "a frozen encoder keeps no activations"
    trainer.save_checkpoint(output)


class _Memory(Callback):
    """The most memory until training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.most = _memory("HWM")


def _memory(which: str) -> int:
    """Return its memory (``RSS``) or the most it has had (``HWM``), in KiB, unlike ``ru_maxrss`` not its parent's."""
    found = re.search(rf"Vm{which}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def start(width: str) -> None:
    """Train a step of a model of which the first rank alone draws the weights; print the memory that it took."""
    rank, before = int(os.environ["RANK"]), _memory("RSS")
    tower: Any = {"width": int(width), "layers": 6, "heads": 8}
    config = CLIPConfig(16, VisionTransformerConfig(32, 16, **tower), TextTransformerConfig(16, 50, **tower))
    with weights_come_later() if rank else nullcontext():
        module = LitCLIP(config, lr_scheduler=partial(WarmupCosine, warmup_steps=1))
    module.model._tokenizer = CLIPTokenizer(16)
    created, watch = _memory("RSS"), _Memory()
    trainer = _trainer(max_steps=1, strategy=FSDP(), callbacks=[watch])
    trainer.fit(module, Data())
    os.write(1, f"rank {rank} takes {created - before} and {watch.most - before} KiB\n".encode())


def save_twice(folder: str) -> None:
    """Save tensors of different numbers of rows in shards, and again where the last rank has no space left."""
    dist.init_process_group("gloo")
    rank, world = distributed.rank_and_world()
    mesh, path = init_device_mesh("cpu", (world,)), Path(folder, "new folder/last.ckpt")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for step in (1, 2):
        whole = {name: torch.full((rows, 3), float(step)) for name, rows in (("one", 1), ("many", 5), ("a/b~c", 4))}
        shards = {name: distribute_tensor(each, mesh, [Shard(0)]) for name, each in whole.items()}
        states = [{"state": {7: {"step": torch.tensor(2.0), "exp_avg": shards["many"].bfloat16()}}, "lr": 0.5}]
        checkpoint = {"global_step": step, "state_dict": shards, "optimizer_states": states, "seen": (rank, None)}
        if step == 2 and rank == world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            save_sharded(checkpoint, path, world)
        except InputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # of the standard error, too
            os.write(2, f"rank {rank} raises {error}\n".encode())


def train_all(jobs: str) -> None:
    """Run several trainings in the same processes; ``jobs`` is JSON of :func:`train`'s arguments."""
    for job in json.loads(jobs):
        train(**job)


# One rank of runs on a small table: resumed from a checkpoint of this rank's own, or sharded.


IMAGE = VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1)
TINY = CLIPConfig(16, IMAGE, TextTransformerConfig(context_length=16, width=16, layers=2, heads=1))


def _module(**options: Any) -> LitCLIP:
    torch.manual_seed(0)
    optimizer, schedule = partial(PaperAdamW, eps=1e-3), partial(WarmupCosine, warmup_steps=1)
    return LitCLIP(**{"architecture": TINY, **options}, optimizer=optimizer, lr_scheduler=schedule)


def resume(table: str, *places: str) -> None:
    """Resume on every rank from the file of its number; write what is raised to ``<rank>.error``."""
    rank = int(os.environ["RANK"])
    path = places[rank]
    try:
        data = Captions(table, table, batch_size=3, num_workers=0)
        _trainer().fit(_module(), data, ckpt_path=None if path == "none" else path, weights_only=True)
    except InputError as error:
        Path(f"{rank}.error").write_text(str(error), encoding="utf-8")


class Encoding(Callback):
    """Encodes images on one of two ranks between steps, as a set of few images needs."""

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module: Any = pl_module
        with whole_weights(module):
            if not trainer.is_global_zero:
                module.model.encode_image(module.model.normalize(batch.images))


def shard(
    output: str, table: str, strategy: str, batch_size: str, lora: str = "", nodes: str = "1", targets: str = ""
) -> None:
    """Train one step, on as many pairs as ranks can share, validate, and save the metrics and the checkpoint."""
    world, rows = int(os.environ["WORLD_SIZE"]), len(Path(table).read_text(encoding="utf-8").splitlines()) - 1
    kind = FSDP() if strategy == "fsdp" else strategy
    options: dict[str, Any] = (
        {"pretrained": lora, "lora": LoRA(r=2, targets=[*targets.split()] or None), "architecture": None}
        if lora
        else {}
    )
    training = Captions(
        table, table, batch_size=int(batch_size), global_batch_size=rows // world * world, num_workers=0
    )
    trainer = _trainer(strategy=kind, devices=world // int(nodes), num_nodes=int(nodes), callbacks=[Encoding()])
    module = _module(**options)
    trainer.fit(module, training)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    for evaluate in (trainer.validate, trainer.test):
        (again,) = evaluate(module, training, verbose=False)
        assert {name.replace("test/", "val/"): value for name, value in again.items()} == metrics
    trainer.save_checkpoint(f"{output}.ckpt")
    if trainer.is_global_zero:
        torch.save(metrics, f"{output}.metrics")


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
