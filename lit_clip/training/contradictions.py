"""Contradictions in the settings of a run."""

from collections.abc import Callable

from lit_clip.training.plan import RunPlan

PAPER_BATCH = 32_768  # table 18
PAPER_RATES = (3.6e-4, 5e-4)  # tables 19 and 20, from scratch; 5e-4 at 2,048 pairs too (the run on YFCC)
PAPER_FINE_TUNING_RATE = 2e-5  # table 20: ViT-L/14 for one more epoch at 336 pixels
FAR = 10
FEW_FOR_BATCH_NORM = 16


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
