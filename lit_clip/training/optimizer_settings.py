"""What a user may say of the optimiser, and that it beats what a checkpoint says."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_clip.errors import InputError, require


def check_settings(
    learning_rate: float, weight_decay: float, warmup_steps: int, betas: tuple[float, float], eps: float
) -> None:
    """Raise :class:`InputError` for what an optimiser cannot do; the names are those of ``model.``."""
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
    for name, value in settings.items():
        require(value >= 0, f"model.{name}: {value} must be at least 0")
    require(all(0 <= beta < 1 for beta in betas), f"model.betas: {list(betas)} must be at least 0 and below 1")
    require(eps > 0, f"model.eps: {eps} must be above 0")


def keep_what_was_typed(
    checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], betas: Sequence[float], eps: float, name: str
) -> None:
    """A resumed optimiser takes its moments from the checkpoint, its settings from this run.

    Args:
        checkpoint: its optimisers' and schedules' settings are overwritten.
        groups: this run's, as :func:`parameter_groups` makes them.
        betas: this run's.
        eps: likewise.
        name: of the checkpoint.

    Raises:
        InputError: it was made with other groups.
    """
    for optimizer in checkpoint.get("optimizer_states", []):
        theirs = optimizer["param_groups"]
        if [_shape(group) for group in theirs] != [_shape(group) for group in groups]:
            raise InputError(f"{name}: resuming needs the model.freeze, layer_decay and lora that it was made with")
        for group, mine in zip(theirs, groups, strict=True):
            group["lr"] *= mine["lr"] / (group["initial_lr"] or 1.0)
            group |= {
                "name": mine["name"],
                "initial_lr": mine["lr"],
                "weight_decay": mine["weight_decay"],
                "betas": tuple(betas),
                "eps": eps,
            }
    for schedule in checkpoint.get("lr_schedulers", []):
        schedule["base_lrs"] = [group["lr"] for group in groups]


def _shape(group: Mapping[str, Any]) -> tuple[str, int]:
    """What tells an optimiser's parameter groups apart; those of older checkpoints have no name."""
    return group.get("name", "").partition(",")[0] or "all", len(group["params"])
