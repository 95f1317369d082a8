"""The plan of a run in numbers, and contradictions in its settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.losses.tiled import default_tile
from lit_clip.models.flops import tower_flops
from lit_clip.models.layers import TOWERS, tower_blocks, tower_parameters
from lit_clip.tools.console import Console
from lit_clip.tools.parts import Description, shown
from lit_clip.training.activation_checkpointing import is_checkpointed
from lit_clip.training.optim import batches_per_epoch, moments, total_steps

PAPER_BATCH = 32_768  # table 18
PAPER_RATES = (3.6e-4, 5e-4)  # tables 19 and 20, from scratch; 5e-4 at 2,048 pairs too (the run on YFCC)
PAPER_FINE_TUNING_RATE = 2e-5  # table 20: ViT-L/14 for one more epoch at 336 pixels
FAR = 10
FEW_FOR_BATCH_NORM = 16
FEW_PAIRS = 6_000  # docs/recipes.md, "Small data": measured with 500, 1,750 and 3,068


class Work(NamedTuple):
    """Cost of one encoder.

    Attributes:
        forward: FLOPs of one sample; None if they cannot be counted.
        trainable: whether any of its parameters is.
    """

    forward: int | None
    trainable: bool


@dataclass
class RunPlan:
    """A run in numbers; None for what is unknown before it starts.

    Attributes:
        trainable: number of trainable parameters.
        frozen: number of frozen parameters.
        image: cost of the image encoder.
        text: cost of the text encoder, for a text of full length.
        embed_dim: channels of the features.
        batch_norm: whether an encoder updates BatchNorm statistics.
        devices: ranks on each node.
        nodes: number of machines.
        batch: pairs per step on each rank.
        micro_batch: pairs encoded at once, as set.
        checkpointed: share of the blocks that compute their activations again.
        steps_per_epoch: of training.
        steps: of the whole run.
        pairs: number of training pairs.
        warmup: steps of warm-up; None for a schedule without that setting.
        learning_rate: the highest.
        optimizer: class and settings.
        lr_scheduler: class and settings.
        loss: class and settings.
        moments: numbers that the optimiser keeps for each weight; None if unknown.
        pretrained: whether training starts from pretrained weights.
        lora: whether a LoRA is trained, whose learning rates differ from the paper's.
        accumulated: batches whose gradients are accumulated.
        max_steps: as set.
        max_epochs: as set.
        precision: Lightning's.
        trial: whether this is a ``fast_dev_run``, whose settings need not agree.
        device: type of the device.
    """

    trainable: int
    frozen: int
    image: Work
    text: Work
    embed_dim: int
    batch_norm: bool
    devices: int
    nodes: int
    batch: int | None
    micro_batch: int | None
    checkpointed: float
    steps_per_epoch: int | None
    steps: int | None
    pairs: int | None
    warmup: int | None
    learning_rate: float
    optimizer: Description
    lr_scheduler: Description
    loss: Description
    moments: int | None
    pretrained: bool
    lora: bool
    accumulated: int
    max_steps: int | None
    max_epochs: int | None
    precision: str
    trial: bool = False
    device: str = "cpu"

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
        return math.ceil(self.batch / self.micro_batch) if self.batch and self.micro_batch else 1

    @property
    def passes(self) -> float:
        """Cost of a step of a trainable encoder in forward passes: 1, 2 for the gradients, and recomputation.

        All micro-batches but the last are computed twice, and a checkpointed block once more.
        """
        return 3 + (self.parts - 1) / self.parts + self.checkpointed

    @property
    def forward_flops(self) -> int | None:
        """Forward FLOPs of one pair."""
        if self.image.forward is None or self.text.forward is None:
            return None
        return self.image.forward + self.text.forward

    @property
    def training_flops(self) -> float | None:
        """Training FLOPs of one pair; a frozen encoder costs its forward pass, a partly frozen one counts in full."""
        towers = [(work.forward, self.passes if work.trainable else 1) for work in (self.image, self.text)]
        if any(forward is None for forward, _ in towers):
            return None
        return sum((forward or 0) * passes for forward, passes in towers)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and the optimiser's moments in float32."""
        return 4 * (self.frozen + self.trainable) + 4 * (1 + (self.moments or 0)) * self.trainable

    @property
    def loss_bytes(self) -> tuple[int, int] | None:
        """Bytes of the loss as computed, and with a matrix of similarities."""
        return None if self.batch is None else loss_bytes(self.batch, self.world, self.embed_dim, self.device)


def loss_bytes(batch: int, world: int, embed_dim: int, device: str = "cpu") -> tuple[int, int]:
    """Return the bytes of the loss on one rank in float32: in tiles, and dense.

    In tiles: the images' scaled features and gradient and the texts' gradient (B rows each); with several ranks the
    gathered texts, kept from the forward to the backward pass, and their gradient (N rows each); four numbers for each
    row and column; three tiles. Dense: two B x N matrices of logits and their gradients, as in open_clip's local loss.

    Args:
        batch: B, pairs of one rank.
        world: number of ranks; N = B * world.
        embed_dim: channels of the features.
        device: type of the device, which decides the tile.
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
    per_epoch = batches_per_epoch(trainer)
    hparams, model = module.hparams, module.model
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
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
        checkpointed=_checkpointed_share(model),
        steps_per_epoch=per_epoch,
        trial=bool(getattr(trainer, "fast_dev_run", False)),
        steps=None if per_epoch is None else total_steps(trainer),
        pairs=len(source) if (source := getattr(data, "train_source", None)) is not None else None,
        warmup=hparams.lr_scheduler["init_args"].get("warmup_steps"),
        learning_rate=module.optimization.lr,
        optimizer=hparams.optimizer,
        lr_scheduler=hparams.lr_scheduler,
        loss=module.loss.describe() if module.loss else hparams.loss,
        moments=moments(module.optimization.optimizer),
        pretrained=module.starts_trained,
        lora=bool(hparams.lora),
        accumulated=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        max_epochs=trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None,
        precision=str(trainer.precision),
        device=trainer.strategy.root_device.type,
    )


def _checkpointed_share(model: Any) -> float:
    blocks = [block for tower in TOWERS for block in tower_blocks(model, tower)]
    return sum(is_checkpointed(block) for block in blocks) / len(blocks)


def tower_work(model: Any) -> tuple[Work, Work]:
    """Return the cost of the image and the text encoder."""
    images, texts = torch.zeros(1, *model.preprocessing.shape), torch.full((1, model.context_length), 5)  # no padding
    flops = [_forward_flops(tower, x) for tower, x in ((model.visual, images), (model.text_encoder, texts))]
    trainable = [any(p.requires_grad for p in tower_parameters(model, tower).values()) for tower in TOWERS]
    image, text = (Work(*both) for both in zip(flops, trainable, strict=True))
    return image, text


@torch.no_grad()
def _forward_flops(tower: nn.Module, inputs: Tensor) -> int | None:
    try:
        return tower_flops(tower, inputs)
    except Exception:  # whatever external encoders raise
        return None


def plan_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the rows of the plan's table."""
    rows = [("parameters", f"{plan.trainable:,} trainable, {plan.frozen:,} frozen")]
    forward, training = plan.forward_flops, plan.training_flops
    if forward is not None and training is not None:
        work = f"{_short(forward)} forward, {_short(training)} in training ({plan.passes:g} x); texts of full length"
        rows.append(("FLOPs per pair", work))
    else:
        rows.append(("FLOPs per pair", "unknown; an encoder cannot be counted"))
    kept = "weights, gradients, moments" if plan.moments is not None else "weights, gradients"
    several = plan.world > 1
    rows.append((kept, _bytes(plan.state_bytes) + " on each rank without sharding" * several))
    if plan.loss_bytes is not None:
        tiled, dense = plan.loss_bytes
        instead = (
            f" (with a similarity matrix: {_bytes(dense)})" if dense > tiled else ""
        )  # it is smaller for a small batch
        rows.append(("memory of the loss", _bytes(tiled) + " on each rank" * several + instead))
        rows.append(("pairs per step", _pairs_a_step(plan)))
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} per epoch"))
    if plan.steps is not None and plan.warmup is not None:
        of_run = "longer than the run" if plan.warmup > plan.steps else f"{plan.warmup / plan.steps:.1%} of the run"
        rows.append(("warm-up", f"{plan.warmup:,} steps, {of_run}"))
    if plan.steps is not None and plan.global_batch is not None:
        rows.append(("pairs seen", f"{plan.steps * plan.global_batch:,}" + _left_out(plan)))
    if plan.pairs is not None and plan.pairs <= FEW_PAIRS and not (plan.pretrained or plan.frozen):
        rows.append(("training pairs", _few_pairs(plan.pairs)))
    rows.append(("loss", shown(plan.loss)))
    rows.append(("optimiser", shown(plan.optimizer)))
    rows.append(("schedule", shown(plan.lr_scheduler)))
    return rows


def _pairs_a_step(plan: RunPlan) -> str:
    nodes = f" x {plan.nodes} nodes" if plan.nodes > 1 else ""
    ranks = f" = {plan.batch:,} x {plan.devices} ranks{nodes}" if plan.world > 1 else ""
    parts = f", encoded in {plan.parts} micro-batches" if plan.parts > 1 else ""
    return f"{plan.global_batch:,}{ranks}{parts}"


def _left_out(plan: RunPlan) -> str:
    if plan.pairs is None or not plan.global_batch or plan.steps_per_epoch != plan.pairs // plan.global_batch:
        return ""
    return f"; {plan.pairs % plan.global_batch:,} of {plan.pairs:,} are left out of an epoch"


def _few_pairs(pairs: int) -> str:
    return f"{pairs:,} are few: pretrained encoders learn far more from them (docs/encoders.md)"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} T"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def contradictions(plan: RunPlan) -> list[str]:
    """Return the contradictions in a plan, each a sentence that says what to change."""
    checks: list[Callable[[RunPlan], str | None]] = [
        _accumulation,
        _warmup,
        _two_ends,
        _micro_batch,
        _few_for_batch_norm,
        _rate,
        _half_weights,
    ]
    return [sentence for check in checks if (sentence := check(plan))]


def _accumulation(plan: RunPlan) -> str | None:
    if plan.accumulated == 1:
        return None
    return (
        f"trainer.accumulate_grad_batches {plan.accumulated}: adds no negatives and is refused; "
        "raise the batch size and set model.micro_batch_size"
    )


def _warmup(plan: RunPlan) -> str | None:
    if plan.steps is None or plan.warmup is None or plan.warmup < plan.steps:
        return None
    steps = "1 step" if plan.steps == 1 else f"{plan.steps} steps"
    return (
        f"the run has {steps} and warm-up takes {plan.warmup}: lower --model.lr_scheduler.warmup_steps "
        "(in Python lr_scheduler=partial(WarmupCosine, warmup_steps=...))"
    )


def _two_ends(plan: RunPlan) -> str | None:
    if not plan.steps_per_epoch or plan.max_steps is None or plan.max_epochs is None:
        return None
    ends = plan.max_epochs * plan.steps_per_epoch
    if plan.max_steps == ends:
        return None
    first, second = (
        ("max_steps", "max_epochs") if plan.max_steps < ends else ("max_epochs", "max_steps")
    )  # what ends the run, and what is never reached
    return (
        f"trainer.max_steps {plan.max_steps} and max_epochs {plan.max_epochs} ({ends} steps) disagree: "
        f"{first} ends the run; leave {second} out"
    )


def _micro_batch(plan: RunPlan) -> str | None:
    if plan.micro_batch is None or plan.batch is None or plan.micro_batch <= plan.batch:
        return None
    return (
        f"model.micro_batch_size {plan.micro_batch} exceeds the {plan.batch} pairs per step of each rank: it "
        "has no effect"
    )


def _few_for_batch_norm(plan: RunPlan) -> str | None:
    if not plan.batch_norm or plan.batch is None:
        return None
    least = plan.batch // plan.parts
    if least >= FEW_FOR_BATCH_NORM:
        return None
    return (
        f"BatchNorm computes its statistics over {least} pairs: "
        f"set batch_size and model.micro_batch_size to at least {FEW_FOR_BATCH_NORM}"
    )


def _rate(plan: RunPlan) -> str | None:
    """Warn of a learning rate of Adam or AdamW that is more than ten times away from the paper's.

    From scratch it used 3.6e-4 to 5e-4 at 32,768 pairs (tables 19, 20) and 5e-4 at 2,048 too, so the batch hardly
    matters; from pretrained weights 2e-5. Smaller rates are only suspicious with a batch as large as that.
    """
    rate, large = plan.learning_rate, (plan.global_batch or 0) >= 2048
    if plan.lora or rate == 0 or "Adam" not in plan.optimizer["class_path"]:
        return None
    low, high = (PAPER_FINE_TUNING_RATE,) * 2 if plan.pretrained else PAPER_RATES
    if rate > FAR * high or (large and not plan.pretrained and rate < low / FAR):
        start = "from pretrained weights" if plan.pretrained else "from scratch"
        used = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return (
            f"model.optimizer.lr {rate:g} is more than {FAR} times away from the paper's {start}, {used} at "
            f"{PAPER_BATCH:,} pairs per step"
        )
    return None


def _half_weights(plan: RunPlan) -> str | None:
    if plan.precision not in ("16-true", "bf16-true"):
        return None
    return f"trainer.precision {plan.precision}: 16-bit weights lose small updates; use bf16-mixed"


def print_plan(plan: RunPlan) -> None:
    """Print the table, and below it the contradictions."""
    table = Table(title="Plan", show_header=False)
    for row in plan_rows(plan):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for sentence in contradictions(plan) if not plan.trial else ():
        console.print(f"warning: {sentence}", style="yellow", soft_wrap=True)
