"""The plan of a run in numbers."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.losses.tiled import default_tile
from lit_clip.models.flops import forward_flops
from lit_clip.models.layers import TOWERS, tower_blocks, tower_parameters
from lit_clip.models.rates import Rates
from lit_clip.tools.parts import Description
from lit_clip.training.activation_checkpointing import is_checkpointed
from lit_clip.training.optimizers import state_per_weight
from lit_clip.training.schedules import batches_per_epoch, resumed_after, total_steps

# The methods by which a batch may get hard negatives.
MAKE_BATCHES = (
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "training_step"),
    *("sources", "training_pairs", "train_dataloader"),
)
OURS = {"lightning", "lit_clip"}


class Work(NamedTuple):
    """Cost of one encoder."""

    forward: int | None  # FLOPs of one sample; None if they cannot be counted
    trainable: bool  # any of its parameters


@dataclass
class RunPlan:
    """A run in numbers; None for what is unknown before it starts."""

    trainable: int  # number of parameters
    frozen: int
    image: Work
    text: Work  # for a text of full length
    embed_dim: int
    batch_norm: bool  # whether an encoder updates its statistics
    devices: int  # ranks on each node
    nodes: int
    batch: int | None  # pairs per step on each rank
    micro_batch: int | None  # pairs encoded at once, as set
    checkpointed: float  # share of the blocks that compute their activations again
    steps_per_epoch: int | None
    steps: int | None  # of the whole run
    pairs: int | None  # for training
    warmup: int | None  # steps; None for a schedule without that setting
    learning_rate: float  # the highest
    optimizer: Description
    lr_scheduler: Description
    loss: Description
    moments: int | None  # numbers that the optimiser keeps for each weight
    pretrained: bool  # whether training starts from pretrained weights
    own_rates: bool  # of a LoRA or of parts: others than the paper's
    accumulated: int  # batches whose gradients are accumulated
    max_steps: int | None  # as set
    max_epochs: int | None
    precision: str  # Lightning's
    trial: bool = False  # a fast_dev_run, whose settings need not agree
    device: str = "cpu"  # its type
    rows_per_image: float | None = None  # training pairs of one image in an epoch, on average
    captions: float = 1.0  # of an image in a step, on average; above 1 the numbers of pairs here are those of images
    pretrained_encoders: bool = False  # whether both start from weights of their own

    @property
    def world(self) -> int:
        """World size."""
        return self.devices * self.nodes

    @property
    def global_batch(self) -> int | None:
        """Pairs per step over all ranks."""
        return self.batch and self.batch * self.world

    @property
    def parts(self) -> int:
        """Micro-batches per step."""
        return math.ceil(self.batch * self.captions / self.micro_batch) if self.batch and self.micro_batch else 1

    @property
    def passes(self) -> float:
        """Cost of a step of a trainable encoder in forward passes: 1, 2 for the gradients, and recomputation.

        All micro-batches but the last are computed twice, and a checkpointed block once more.
        """
        return 3 + (self.parts - 1) / self.parts + self.checkpointed

    @property
    def forward_flops(self) -> int | None:
        """Forward FLOPs of one pair, of which an image with several captions has its share."""
        if self.image.forward is None or self.text.forward is None:
            return None
        return round(self.image.forward / self.captions) + self.text.forward

    @property
    def training_flops(self) -> float | None:
        """Training FLOPs of one pair; a frozen encoder costs its forward pass, a partly frozen one counts in full."""
        if self.image.forward is None or self.text.forward is None:
            return None
        image, text = (self.passes if work.trainable else 1 for work in (self.image, self.text))
        return self.image.forward * image / self.captions + self.text.forward * text

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and the optimiser's moments in float32."""
        return 4 * (self.frozen + self.trainable) + 4 * (1 + (self.moments or 0)) * self.trainable

    @property
    def loss_bytes(self) -> tuple[int, int] | None:
        """Bytes of the loss as computed, and with a matrix of similarities."""
        pairs = self.batch and round(self.batch * self.captions)
        return None if pairs is None else loss_bytes(pairs, self.world, self.embed_dim, self.device)


def loss_bytes(batch: int, world: int, embed_dim: int, device: str = "cpu") -> tuple[int, int]:
    """Return the bytes of the loss on one rank in float32: in tiles, and dense.

    In tiles: the images' scaled features and gradient and the texts' gradient (B rows each); with several ranks the
    gathered texts, kept from the forward to the backward pass, and their gradient (N rows each); four numbers for each
    row and column; three tiles. Dense: two B x N matrices of logits and their gradients, as in open_clip's local loss.
    B is ``batch``, the pairs of one rank, and N those of all; the device's type decides the tile.
    """
    total = batch * world
    gathered = 0 if world == 1 else 2 * total
    height, width = default_tile(torch.device(device))
    tile = min(height, batch) * min(width, total)
    return 4 * ((3 * batch + gathered) * embed_dim + 4 * (batch + total) + 3 * tile), 4 * 4 * batch * total


def measure_run(module: Any, trainer: Trainer) -> RunPlan:
    """Return the plan of a :class:`lit_clip.LitCLIP` and its trainer, whose data module has been set up.

    To be called before the strategy wraps the module: the sizes of shards say nothing.
    """
    data: Any = getattr(trainer, "datamodule", None)
    per_epoch, source = batches_per_epoch(trainer), getattr(data, "train_source", None)
    hparams, parts, model = module.hparams, module.parts, module.model
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    blocks = [block for tower in TOWERS for block in tower_blocks(model, tower)]
    norms = (layer for layer in model.modules() if isinstance(layer, _BatchNorm))
    return RunPlan(
        trainable=sum(size for size, trainable in sizes if trainable),
        frozen=sum(size for size, trainable in sizes if not trainable),
        **dict(zip(TOWERS, tower_work(model), strict=True)),
        embed_dim=model.config.embed_dim,
        batch_norm=any(layer.training for layer in norms),
        devices=trainer.num_devices,
        nodes=trainer.num_nodes,
        batch=getattr(data, "train_batch_size", None),
        micro_batch=hparams.micro_batch_size,
        checkpointed=sum(map(is_checkpointed, blocks)) / len(blocks),
        steps_per_epoch=per_epoch,
        trial=bool(getattr(trainer, "fast_dev_run", False)),
        steps=None if per_epoch is None else total_steps(trainer, *resumed_after(trainer)),
        pairs=None if source is None else getattr(source, "pairs_per_epoch", len(source)),
        warmup=parts["lr_scheduler"]["init_args"].get("warmup_steps"),
        learning_rate=module.optimization.lr,
        optimizer=parts["optimizer"],
        lr_scheduler=parts["lr_scheduler"],
        loss=parts["loss"],
        moments=state_per_weight(module.optimization.optimizer),
        pretrained=module.starts_trained,
        pretrained_encoders=all(
            getattr(tower, "pretrained", False) for tower in (model.config.image, model.config.text)
        ),
        own_rates=bool(hparams.lora)
        or any((module.optimization.rates or Rates()).of(tower).lr != 1 for tower in TOWERS),
        accumulated=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        max_epochs=trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None,
        precision=str(trainer.precision),
        device=trainer.strategy.root_device.type,
        rows_per_image=getattr(data, "rows_per_image", None),
        captions=getattr(data, "captions_per_image", 1.0),
    )


def tower_work(model: Any) -> tuple[Work, Work]:
    """Return the cost of the image and the text encoder."""
    images, texts = torch.zeros(1, *model.preprocessing.shape), torch.full((1, model.context_length), 5)  # no padding
    flops = [forward_flops(tower, x) for tower, x in ((model.visual, images), (model.text_encoder, texts))]
    trainable = [any(p.requires_grad for p in tower_parameters(model, tower).values()) for tower in TOWERS]
    image, text = (Work(*both) for both in zip(flops, trainable, strict=True))
    return image, text


def even_batches(trainer: "Trainer", negatives: bool) -> int | None:
    """Return the number of pairs in each rank's every training batch, if the data module guarantees it; else None.

    It does if bad samples end the run (``on_error: error``), its sampler divides global batches among the ranks, and
    a sample is a pair.
    If hard negatives matter, files must be known to have none, as their number may differ, and no hook may add them.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(data, "on_error", None) != "error" or captions_together(data):
        return None
    if negatives and not (getattr(data, "negative_column", "unknown") is None and isinstance(data.train, str)):
        return None
    if negatives and _makes_batches(trainer.lightning_module, data):
        return None
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    world = getattr(sampler, "world", None)
    return getattr(sampler, "batch_size", None) if world == trainer.world_size else None


def captions_together(data: Any) -> bool:
    """Return whether a sample of a data module is an image with all of its captions."""
    return getattr(getattr(data, "captions", None), "per_image", None) == "together"


def _makes_batches(*owners: Any) -> bool:
    """Return whether a method of a module or data module by which a batch may get hard negatives is not one of ours."""
    methods = [getattr(owner, name, None) for owner in owners for name in MAKE_BATCHES]
    packages = {str(getattr(method, "__module__", "")).partition(".")[0] for method in methods if method is not None}
    return not packages <= OURS
