"""Contents of a checkpoint: how they are written and loaded.

Beside Lightning's own keys (epoch, global_step, optimizer_states, lr_schedulers, loops, callbacks, hyper_parameters):

- ``state_dict``: weights under OpenAI's key names, which open_clip can read; of a LoRA only the trained ones
- ``parts``: class and settings of the optimiser, the schedule, the rule of weight decay and the loss, to compare
- ``loss``: parameters of a loss that has some
- ``base``: name and fingerprint of the weights that a LoRA belongs to
- ``tokenizer``: definition of a tokenizer other than the paper's
- ``before``: metrics of a validation before the first step
- ``current_model_state``, ``averaging_state``, ``weights``: from :class:`callbacks.EMA`, whose average is
  ``state_dict``
- ``configuration``: digests of a command's settings, by which ``--ckpt_path last`` knows its runs
- ``random_states``: from :class:`callbacks.RandomStates`
- ``validation_due``: from :class:`callbacks.Preemption`
- ``skipped_samples``: from :class:`callbacks.SkippedSamples`

A data module's state is its sampler's position.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.errors import require
from lit_clip.losses.loss import Loss
from lit_clip.models.clip import CLIP
from lit_clip.models.registry import resolve_architecture
from lit_clip.secrets import plain_without_secrets
from lit_clip.tools.weight_files import Source, read_mapped
from lit_clip.weights.checkpoints import EMA_WEIGHTS, check_base, checkpoint_tokenizer, saved_tokenizer
from lit_clip.weights.load import check_finite_weights, check_weights

PREFIX, LOSS_PREFIX = "model.", "loss."
# EMA's checkpoints hold the average as their state_dict, and the weights of the last step as current_model_state.
STATES = {"state_dict", "current_model_state"}
SETTINGS = {"hyper_parameters", "datamodule_hyper_parameters"}


def pack_checkpoint(
    checkpoint: dict[str, Any], model: CLIP, base: Mapping[str, str] | None, changing: Collection[str]
) -> None:
    """Turn Lightning's checkpoint into ours, in place: OpenAI's key names, the tokenizer, no secrets.

    With the ``base`` that a LoRA belongs to, ``pretrained`` and ``sha256``, only the ``changing`` weights stay.
    """
    _move_own_keys(checkpoint, checkpoint["state_dict"])
    checkpoint |= saved_tokenizer(model)
    for settings in SETTINGS & checkpoint.keys():
        checkpoint[settings] = plain_without_secrets(checkpoint[settings])
    if base:
        checkpoint["base"] = plain_without_secrets(base)
        for states in STATES & checkpoint.keys():
            checkpoint[states] = {
                key: value
                for key, value in checkpoint[states].items()
                if key.removeprefix(PREFIX) in changing
                or (states == "current_model_state" and key.startswith(LOSS_PREFIX))
            }


def _move_own_keys(checkpoint: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Put a module's weights into a checkpoint under our keys: OpenAI's names, and the loss beside the model."""
    checkpoint["state_dict"] = {key[len(PREFIX) :]: value for key, value in state.items() if key.startswith(PREFIX)}
    own = {key[len(LOSS_PREFIX) :]: value for key, value in state.items() if key.startswith(LOSS_PREFIX)}
    checkpoint |= {"loss": own} if own else {}


def unpack_checkpoint(checkpoint: dict[str, Any], module: Any, name: Source, trainer: Any = None) -> None:
    """Turn our checkpoint into Lightning's, in place, and give the model its tokenizer.

    Without a ``trainer``, whose training resumes, the weights are only used.
    """
    model: CLIP = module.model
    # An average is what is used; a run without EMA goes on from the last step.
    averaged = trainer is None or any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    if "current_model_state" in checkpoint and not averaged:
        _use_last_step(checkpoint, name)
    architecture = checkpoint["hyper_parameters"]["architecture"]
    if architecture != model.config.to_dict():
        from lit_clip.weights.sources import check_same

        saved = resolve_architecture(architecture)
        check_same(saved, model.config, name)
        there, here = (getattr(each.preprocessing, "window", None) for each in (saved, model.config))
        asked = f"{name}: its model has the window {json.dumps(there)}, not {json.dumps(here)}"
        require(there == here, f"{asked}; set data.window to the same")
    if module.base_sha256:
        check_base(checkpoint, module.base_sha256, name)
        for states, ours in (("state_dict", model.state_dict()), ("current_model_state", module.state_dict())):
            if states in checkpoint:
                checkpoint[states] = {**ours, **checkpoint[states]}
    state: Mapping[str, Any] = checkpoint["state_dict"]
    check_weights(model, state, name)
    check_finite_weights(state, name)
    loss = _loss_state(checkpoint, module.loss, name, resumed=trainer is not None)
    checkpoint["state_dict"] = {PREFIX + key: value for key, value in state.items()} | loss
    if "tokenizer" in checkpoint:
        model._tokenizer = checkpoint_tokenizer(checkpoint, model.config) or model._tokenizer
    if checkpoint.get("weights") == EMA_WEIGHTS and trainer is None:
        rank_zero_info(f"{name}: these weights are the exponential moving average, not those of the last step")


def adopt_tokenizer(model: CLIP, checkpoint: Source) -> None:
    """Give a model a checkpoint's tokenizer, before data modules ask for the architecture's.

    The source may be gone, or hold another tokenizer by now; and a checkpoint's source is not opened.
    """
    model._tokenizer = checkpoint_tokenizer(read_mapped(Path(checkpoint)), model.config) or model._tokenizer


def _use_last_step(checkpoint: dict[str, Any], name: Source) -> None:
    """Resume a run that ends its average from the weights that match the optimiser's moments."""
    _move_own_keys(checkpoint, checkpoint.pop("current_model_state"))
    if checkpoint.pop("weights", None) == EMA_WEIGHTS:
        rank_zero_info(
            f"{name}: this run has no callbacks.EMA; it resumes from the weights of the last step, and the "
            "exponential moving average in the checkpoint ends here"
        )


def _loss_state(checkpoint: Mapping[str, Any], loss: Loss, name: Source, resumed: bool) -> dict[str, Any]:
    """Return the parameters of a module's loss under its own names; when training resumes, the checkpoint's."""
    saved, ours = checkpoint.get("loss", {}), loss.state_dict()
    there, here = ({key: getattr(value, "shape", None) for key, value in state.items()} for state in (saved, ours))
    if there != here:
        require(not resumed, f"{name}: its loss has other parameters; name the loss it was trained with as model.loss")
        saved = ours  # for use alone: nothing computes the loss
    return {LOSS_PREFIX + key: value for key, value in saved.items()}
