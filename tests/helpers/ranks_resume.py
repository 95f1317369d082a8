"""One rank of runs on a small table: resumed from a checkpoint of this rank's own, or sharded."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules import Captions
from lit_clip import LitCLIP, distributed
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.lora import LoRA
from lit_clip.training.lightning.fsdp import FSDP, whole_weights
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

IMAGE = VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1)
CONFIG = CLIPConfig(16, IMAGE, TextTransformerConfig(context_length=16, width=16, layers=2, heads=1))


def _trainer(**options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "devices": int(os.environ["WORLD_SIZE"]),
        "strategy": "ddp",
        "logger": False,
        "enable_checkpointing": False,
        **options,
    }
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def _module(**options: Any) -> LitCLIP:
    torch.manual_seed(0)
    optimizer, schedule = partial(PaperAdamW, eps=1e-3), partial(WarmupCosine, warmup_steps=1)
    return LitCLIP(**{"architecture": CONFIG, **options}, optimizer=optimizer, lr_scheduler=schedule)


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
    (again,) = trainer.validate(module, training, verbose=False)
    assert again == metrics
    trainer.save_checkpoint(f"{output}.ckpt")
    if trainer.is_global_zero:
        torch.save(metrics, f"{output}.metrics")


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
