"""timm models by their name on the Hugging Face hub: settings and weights, read as data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError, require
from lit_clip.models.external_config import HUB, check_timm_options
from lit_clip.tools.hub_client import guard_hub
from lit_clip.tools.reading import naming, reading, reason
from lit_clip.tools.remote_names import checked_relative
from lit_clip.tools.untrusted import check_names_nothing

# What of timm's ``pretrained_cfg`` is about images and names of weights; the rest says where the weights are.
_DATA = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("classifier", "pool_size"),
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


def timm_hub_model(name: str) -> dict[str, Any]:
    """Read the model of a hub name: ``hf-hub:org/name``, optionally with ``@revision``.

    Return ``architecture``, timm's name of the model, ``model_args``, its arguments, and ``data``, its preprocessing.
    """
    file = _download(name, "config.json")
    with naming(name), reading(file, "configuration of a timm model"):
        values = json.loads(file.read_text(encoding="utf-8"))
        require(isinstance(values, Mapping) and isinstance(values.get("architecture"), str), "names no architecture")
        check_names_nothing(values, "config.json")
        data, arguments = values.get("pretrained_cfg", values), dict(values.get("model_args") or {})
        arguments.pop("num_classes", None)
        check_timm_options(arguments, f"{name}: model_args")
        sized = {}
        if (size := arguments.pop("img_size", None)) is not None:  # of a model whose positions depend on it
            sized = {"input_size": [3, *([size, size] if isinstance(size, int) else size)], "fixed_input_size": True}
        return {
            "architecture": values["architecture"],
            "model_args": arguments,
            "data": {key: data[key] for key in _DATA if data.get(key) is not None} | sized,
        }


def timm_hub_weights(name: str) -> Path:
    """Return the weight file of a hub name; :mod:`lit_clip.tools.weight_files` reads it."""
    from huggingface_hub.errors import EntryNotFoundError

    for file in _WEIGHTS:  # all of them even without the network: the cache may hold a later one
        try:
            return _download(name, file)
        except InputError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
    problem = f"{name} has none of {', '.join(_WEIGHTS)} on the hub, or without the network in its cache"
    raise InputError(f"architecture.image: {problem}")


def _download(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download  # takes seconds

    guard_hub()
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        if revision:
            checked_relative(revision)  # a checkpoint may give the name
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:  # no such repository or file, no network, a name that is none
        where = f"architecture.image: no {file} of {name}"
        raise InputError(f"{where} on the hub or in its cache ({reason(error)})") from error
