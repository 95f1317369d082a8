"""Checkpoints in: reading them safely, and refusing those that do not fit."""

import dataclasses
import os
import pickle
from collections.abc import Mapping
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
    except pickle.UnpicklingError as error:  # its own text advises to load the file unsafely
        raise InputError(f"{path}: not a checkpoint of tensors and plain values; nothing in it was run") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable checkpoint; it may be incomplete") from error
    try:
        CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"])
        dict(checkpoint["state_dict"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a lit-clip checkpoint (it has no weights or names no architecture)") from error
    return checkpoint


def load_weights(model: CLIP, checkpoint: dict[str, Any], name: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into a model of its architecture.

    Raises:
        InputError: another architecture, or weights missing, unknown or of another shape.
    """
    check_architecture(checkpoint, model.config, name)
    check_weights(model, checkpoint["state_dict"], name)
    model.load_state_dict(checkpoint["state_dict"])


def check_weights(model: CLIP, state: Mapping[str, Any], name: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` naming a weight that is missing, unknown or of another shape."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    wrong = sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key))
    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (theirs, shapes))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{name}: weights do not fit: {wrong[0]}{more} is {there} there and {here} here")


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
        load_weights(model, read_checkpoint(pretrained), pretrained)
    return model


def load_model(path: str | os.PathLike[str]) -> CLIP:
    """The model of a checkpoint, ready to embed: on the CPU, in evaluation mode, with its own preprocessing.

    Raises:
        InputError: no checkpoint of lit-clip's lies there.
    """
    checkpoint = read_checkpoint(path)
    model = CLIP(CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"]))
    load_weights(model, checkpoint, path)
    return model.eval()
