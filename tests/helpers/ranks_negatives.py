"""Training with hard negatives that a hook adds; the ``ranks`` fixture starts this in each rank's process."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules import Captions
from lit_clip import LitCLIP, distributed
from lit_clip.batch import CaptionBatch
from lit_clip.losses.contrastive import contrastive_loss, unit
from lit_clip.training.micro_batches import encode_pairs
from tests.helpers.ranks import serve
from tests.helpers.small_sets import make_module, make_trainer

STEPS = 3


def with_negatives(batch: CaptionBatch, tokenize: Any) -> CaptionBatch:
    """Add a hard negative to each pair with an even number, so that ranks may have different numbers of them."""
    texts = [f"no {caption}" if int(Path(key).stem) % 2 == 0 else "" for key, caption in _pairs(batch)]
    found = [text for text in texts if text]
    tokens = tokenize(found) if found else None
    return batch._replace(negatives=texts, negative_tokens=tokens)


def _pairs(batch: CaptionBatch) -> list[tuple[str, str]]:
    return list(zip(batch.keys, batch.captions, strict=True))


class Before(LitCLIP):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return with_negatives(batch, self.tokenize) if self.trainer.training else batch


class After(LitCLIP):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return with_negatives(batch, self.tokenize) if self.trainer.training else batch


class Step(LitCLIP):
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        return super().training_step(with_negatives(batch, self.tokenize), batch_idx)


class Data(Captions):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return with_negatives(batch, self.tokenize) if getattr(self.trainer, "training", False) else batch


class Move(Captions):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = with_negatives(batch, self.tokenize) if getattr(self.trainer, "training", False) else batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


MODULES = {"before": Before, "after": After, "step": Step}
DATA = {"data": Data, "move": Move}
HOOKS = (*MODULES, *DATA)


def module_of(hook: str) -> LitCLIP:
    """Return the same model for every hook; plain SGD shows the gradient as it is."""
    module = make_module(
        optimizer=partial(torch.optim.SGD, lr=0.05), lr_scheduler=partial(torch.optim.lr_scheduler.ConstantLR, factor=1)
    )
    module.__class__ = MODULES.get(hook, LitCLIP)
    return module


def data_of(hook: str, table: str, listed: bool, batch: int) -> Captions:
    """Return the data module, with ``train`` as a path or as a list of one."""
    train = [table] if listed else table
    return DATA.get(hook, Captions)(train, table, batch_size=batch, num_workers=0, augmentation=[])


def plain_loop(table: str) -> dict[str, Tensor]:
    """Train in one process by a loop over the loss's definition, and return the weights."""
    module, data = module_of("after"), data_of("after", table, True, 8)
    data.preprocessing, data.tokenize = module.preprocessing, module.tokenize
    data.setup("fit")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for batch in list(data.train_dataloader())[:STEPS]:
        image, text = encode_pairs(module.model, batch)
        found = [f"no {caption}" for key, caption in _pairs(batch) if int(Path(key).stem) % 2 == 0]
        wrong = unit(module.model.encode_text(module.tokenize(found)))
        scale = module.model.logit_scale.exp()
        optimizer.zero_grad()
        contrastive_loss(image, text, image, text, scale, 0, negative_MD=wrong).backward()
        optimizer.step()
    return module.model.state_dict()


def train(output: str, table: str, hooks: str) -> None:
    """Train three steps with each hook; the first rank writes the weights.

    Every other hook has ``train`` as a list of a path instead of a path, on two ranks the others.
    """
    rank, world = distributed.rank_and_world()
    found = {}
    for place, hook in enumerate(hooks.split(",")):
        module = module_of(hook)
        options = {"max_steps": STEPS, "limit_val_batches": 0, "enable_checkpointing": False}
        trainer = make_trainer(Path(output).parent, [], **options)
        trainer.fit(module, data_of(hook, table, (place + world) % 2 == 0, 8 // world))
        found[hook] = module.model.state_dict()
    if rank == 0:
        torch.save(found, output)


if __name__ == "__main__":
    serve(globals())
