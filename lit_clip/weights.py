"""Checkpoints in: reading them safely, and refusing those that do not fit."""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from lit_clip.config import CLIPConfig, resolve_architecture
from lit_clip.errors import InputError
from lit_clip.model import CLIP


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a file that ``lit-clip fit`` wrote, on the CPU; nothing in it is executed.

    Raises:
        InputError: no such file, not a checkpoint, or not one of lit-clip's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "architecture" not in checkpoint.get("hyper_parameters", {}):
        raise InputError(f"{path}: not a lit-clip checkpoint (it names no architecture)")
    return checkpoint


def _flat(config: CLIPConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    nested = {f"{tower}.{key}": value for tower in ("image", "text") for key, value in values.pop(tower).items()}
    return {**values, **nested}


def check_architecture(checkpoint: dict[str, Any], config: CLIPConfig, name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` with every difference unless the checkpoint's architecture is ``config``."""
    theirs, ours = _flat(CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"])), _flat(config)
    differences = [f"{key} {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if differences:
        raise InputError(f"{name} is of another architecture: {', '.join(differences)}; set --model.architecture")


def create_model(name: str | CLIPConfig, pretrained: str | os.PathLike[str] | None = None) -> CLIP:
    """A model by name (:func:`list_models`) or by its sizes, with random weights or those of a checkpoint.

    Raises:
        InputError: an unknown name, or a checkpoint that cannot be read or is of another architecture.
    """
    model = CLIP(resolve_architecture(name))
    if pretrained is not None:
        checkpoint = read_checkpoint(pretrained)
        check_architecture(checkpoint, model.config, pretrained)
        model.load_state_dict(checkpoint["state_dict"])
    return model


def load_model(path: str | os.PathLike[str]) -> CLIP:
    """The model of a checkpoint, ready to embed: on the CPU, in evaluation mode, with its own preprocessing.

    Raises:
        InputError: no checkpoint of lit-clip's lies there.
    """
    checkpoint = read_checkpoint(path)
    model = CLIP(CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"]))
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()
