"""Rows of the options of Lightning's trainer."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from benchmarks.combinations.checks import RESUMED, SAME, TRAINED, Check, near, shows, stopped_at
from benchmarks.combinations.rows import TRAINER, Settings, option, refused, works
from benchmarks.combinations.runs import CONFIG, STEPS, Run
from lit_clip.models.config import CLIPConfig, ResNetConfig
from lit_clip.training.lightning.fsdp import FSDP


class Validations(Callback):
    """Record the step of each validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.batches: list[int] = []

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)
            self.batches.append(0)

    def on_validation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking:
            self.batches[-1] += 1

    @staticmethod
    def of(run: Run) -> "Validations":
        return next(callback for callback in run.trainer.callbacks if isinstance(callback, Validations))


def validates(*steps: int) -> Check:
    def check(run: Run) -> None:
        assert Validations.of(run).steps == list(steps)

    after = f"after steps {', '.join(map(str, steps))}" if steps else "never"
    return Check(f"validates {after}", check)


def watched(**values: Any) -> Settings:
    return lambda folder: {**values, "callbacks": [Validations()]}


@shows("runs one batch")
def one_batch(run: Run) -> None:
    assert run.trainer.global_step == 1


works(TRAINER, "accelerator: cpu", SAME, RESUMED, trainer=option(accelerator="cpu"), covers=["accelerator", "devices"])
works(TRAINER, "precision: 32-true", SAME, trainer=option(precision="32-true"), covers=["precision"])
works(TRAINER, "precision: bf16-mixed", near(0.01), RESUMED, trainer=option(precision="bf16-mixed"))
works(TRAINER, "precision: 16-mixed", near(0.01), RESUMED, trainer=option(precision="16-mixed"))
works(TRAINER, "precision: 64-true", near(1e-5), RESUMED, trainer=option(precision="64-true"))
refused(TRAINER, "precision: 16-true", "weights kept in float16", trainer=option(precision="16-true"))
refused(TRAINER, "precision: bf16-true", "weights kept in bfloat16", trainer=option(precision="bf16-true"))
works(TRAINER, "fast_dev_run: true", one_batch, trainer=option(fast_dev_run=True))
works(TRAINER, "max_epochs: 1", stopped_at(4), trainer=option(max_epochs=1))
works(TRAINER, "min_epochs: 1", SAME, trainer=option(min_epochs=1))
works(TRAINER, "max_steps: 5", stopped_at(5), RESUMED, trainer=option(max_steps=5))
works(TRAINER, "min_steps: 2", SAME, trainer=option(min_steps=2))
works(TRAINER, "max_time: 1 day", SAME, RESUMED, trainer=option(max_time="01:00:00:00"))
works(TRAINER, "limit_train_batches: 3", stopped_at(6), RESUMED, trainer=option(limit_train_batches=3), saved_at=2)
works(TRAINER, "limit_train_batches: 0.5", stopped_at(4), RESUMED, trainer=option(limit_train_batches=0.5), saved_at=1)


@shows("validates on two batches")
def two_batches(run: Run) -> None:
    assert Validations.of(run).batches == [2, 2]


works(TRAINER, "limit_val_batches: 2", SAME, two_batches, trainer=watched(limit_val_batches=2))
works(TRAINER, "limit_val_batches: 0", SAME, validates(), trainer=watched(limit_val_batches=0))


@shows("tests and predicts on one batch")
def one_of_each(run: Run) -> None:
    run.trainer.test(run.module, run.data, verbose=False)
    run.data.val = run.data.train
    assert len(run.trainer.predict(run.module, run.data)) == 1


works(
    TRAINER,
    "limit_test_batches, limit_predict_batches: 1",
    one_of_each,
    trainer=option(limit_test_batches=1, limit_predict_batches=1),
    covers=["limit_test_batches", "limit_predict_batches"],
)


@shows("repeats one batch")
def one_repeated(run: Run) -> None:
    assert len(set(Keys.of(run).keys)) == 1


class Keys(Callback):
    """Record the keys of each step's pairs."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, ...]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.keys.append(tuple(batch.keys))

    @staticmethod
    def of(run: Run) -> "Keys":
        return next(callback for callback in run.trainer.callbacks if isinstance(callback, Keys))


works(
    TRAINER,
    "overfit_batches: 1",
    one_repeated,
    stopped_at(STEPS),
    trainer=lambda folder: {"overfit_batches": 1, "max_epochs": STEPS, "callbacks": [Keys()]},
)
works(TRAINER, "overfit_batches: 2", stopped_at(4), RESUMED, trainer=option(overfit_batches=2))
works(TRAINER, "val_check_interval: 2", SAME, RESUMED, validates(2, 4, 6, 8), trainer=watched(val_check_interval=2))
works(TRAINER, "val_check_interval: 0.25", SAME, validates(*range(1, 9)), trainer=watched(val_check_interval=0.25))
works(
    TRAINER,
    "val_check_interval: 3, check_val_every_n_epoch: null",
    SAME,
    validates(3, 6),
    RESUMED,
    trainer=watched(val_check_interval=3, check_val_every_n_epoch=None),
)
one_day = watched(val_check_interval="01:00:00:00")
works(TRAINER, "val_check_interval: 1 day", SAME, validates(), ranks=[1], trainer=one_day)
refused(TRAINER, "val_check_interval: 1 day", "by its own clock", ranks=[2], trainer=one_day)
works(TRAINER, "check_val_every_n_epoch: 2", SAME, validates(8), trainer=watched(check_val_every_n_epoch=2))
works(TRAINER, "num_sanity_val_steps: 0", SAME, RESUMED, trainer=option(num_sanity_val_steps=0))
works(TRAINER, "num_sanity_val_steps: -1", SAME, RESUMED, trainer=option(num_sanity_val_steps=-1))
works(TRAINER, "log_every_n_steps: 1", SAME, trainer=option(log_every_n_steps=1))
works(TRAINER, "enable_checkpointing: false", SAME, trainer=option(enable_checkpointing=False))
works(TRAINER, "enable_progress_bar: true", SAME, trainer=option(enable_progress_bar=True))
works(TRAINER, "enable_model_summary: true", SAME, trainer=option(enable_model_summary=True))
refused(TRAINER, "accumulate_grad_batches: 2", "adds no negatives", (1, 2), trainer=option(accumulate_grad_batches=2))


CLIP_AT = 0.001  # far below the norm, and the largest value, of any step's gradient


class Gradients(Callback):
    """Record the gradients' norm and largest value when the optimiser has used them.

    RankCounts of weights are recorded by rank: their squares are summed over ranks when they are read.
    """

    def __init__(self) -> None:
        self.squares: list[tuple[float, float]] = []  # of weights, of scalars: FSDP has those whole on every rank
        self.largest: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.record)

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        gradients = [each.grad for each in parameters if each.grad is not None]
        gradients = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        gradients = [each for each in gradients if each.numel()]
        squares = [(each.ndim, float(each.double().square().sum())) for each in gradients]
        self.squares.append((sum(n for ndim, n in squares if ndim), sum(n for ndim, n in squares if not ndim)))
        self.largest.append(max(float(each.abs().max()) for each in gradients))

    @staticmethod
    def of(run: Run) -> "Gradients":
        return next(callback for callback in run.trainer.callbacks if isinstance(callback, Gradients))


def is_the_limit(values: list[float]) -> None:
    assert len(values) == STEPS
    assert all(CLIP_AT * 0.99 < value < CLIP_AT * 1.0001 for value in values), values


@shows(f"gradients of norm {CLIP_AT} in each step")
def clips_norm(run: Run) -> None:
    weights, scalars = map(torch.tensor, zip(*Gradients.of(run).squares, strict=True))
    if isinstance(run.trainer.strategy, FSDP):
        torch.distributed.all_reduce(weights)
    is_the_limit((weights + scalars).sqrt().tolist())


@shows(f"gradients of at most {CLIP_AT} in each step")
def clips_value(run: Run) -> None:
    is_the_limit(Gradients.of(run).largest)


def clipped(algorithm: str, make: Callable[[], Any] | None = None, **values: Any) -> Settings:
    clip = {"gradient_clip_val": CLIP_AT, "gradient_clip_algorithm": algorithm, **values}
    return lambda folder: {**clip, "callbacks": [Gradients()], **({"strategy": make()} if make else {})}


for algorithm, check in (("norm", clips_norm), ("value", clips_value)):
    name = f"gradient_clip_val: {CLIP_AT}, gradient_clip_algorithm: {algorithm}"
    covers, quick = ["gradient_clip_val", "gradient_clip_algorithm"], [1] if algorithm == "norm" else []
    works(TRAINER, name, check, RESUMED, trainer=clipped(algorithm), covers=covers, quick=quick)
    works(TRAINER, f"{name}, FSDP", check, RESUMED, ranks=[2], trainer=clipped(algorithm, FSDP))
    works(
        TRAINER, f"{name}, precision: bf16-mixed", check, ranks=[1], trainer=clipped(algorithm, precision="bf16-mixed")
    )
works(TRAINER, "deterministic: true", SAME, RESUMED, trainer=option(deterministic=True))
works(TRAINER, "deterministic: warn", SAME, trainer=option(deterministic="warn"))
works(TRAINER, "benchmark: true", SAME, trainer=option(benchmark=True))
works(TRAINER, "inference_mode: false", SAME, RESUMED, trainer=option(inference_mode=False))
works(TRAINER, "use_distributed_sampler: true", SAME, RESUMED, ranks=[1], trainer=option(use_distributed_sampler=True))
refused(
    TRAINER,
    "use_distributed_sampler: true",
    "divides the samples among processes",
    (2,),
    trainer=option(use_distributed_sampler=True),
    covers=["use_distributed_sampler"],
)
works(TRAINER, "detect_anomaly: true", SAME, RESUMED, trainer=option(detect_anomaly=True))
works(TRAINER, "barebones: true", SAME, trainer=option(barebones=True), quick=[1])
refused(
    TRAINER,
    "reload_dataloaders_every_n_epochs: 1",
    "every epoch has its own order",
    (1, 2),
    trainer=option(reload_dataloaders_every_n_epochs=1),
)
works(TRAINER, "default_root_dir", SAME, trainer=lambda folder: {"default_root_dir": folder / "root"})
works(TRAINER, "enable_autolog_hparams: false", SAME, trainer=option(enable_autolog_hparams=False))
works(
    TRAINER,
    "num_nodes: 2",
    SAME,
    ranks=[2],
    devices=1,
    trainer=option(num_nodes=2),
    environment={"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
)
RESNET = CLIPConfig(16, ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32), CONFIG.text)


works(
    TRAINER,
    "sync_batchnorm: true (ResNet)",
    TRAINED,
    RESUMED,
    ranks=[1],
    model=option(architecture=RESNET),
    trainer=option(sync_batchnorm=True),
)
refused(
    TRAINER,
    "sync_batchnorm: true (ResNet)",
    "no synchronised BatchNorm for cpu",
    (2,),
    model=option(architecture=RESNET),
    trainer=option(sync_batchnorm=True),
    covers=["LayerSync", "TorchSyncBatchNorm", "sync_batchnorm"],
)
