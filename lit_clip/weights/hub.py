"""Download published weights by name, with huggingface_hub or open_clip's registry.

Both libraries take seconds to import, so they are imported on use.
"""

import dataclasses
import glob
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.models.config import Activation, CLIPConfig
from lit_clip.models.registry import resolve_architecture
from lit_clip.tools.hub_client import checked_commit, hub_errors, is_relative

_ABSENT = "no such file or folder, and not available from the hub"
# Files that a model needs beside its weights.
_SMALL = [
    *("*config.json", "*.index.json", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json"),
]


def download(name: str) -> Path:
    """Download configuration, tokenizer and weights of ``org/name``, and return their folder in the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_errors(f"{name}: {_ABSENT}"):
        folder = _snapshot(name, _SMALL)
        indices = {path.name for path in folder.glob("*.index.json")}
        if indices and not (folder / "open_clip_config.json").exists():
            safe = indices != {"pytorch_model.bin.index.json"}
            return _snapshot(name, ["*.safetensors" if safe else "pytorch_model-*.bin"])
        for weights in OPEN_CLIP_WEIGHTS:
            with suppress(EntryNotFoundError):  # includes LocalEntryNotFoundError: not in the cache
                hf_hub_download(name, weights)
                return folder
    raise InputError(f"{name}: has none of {', '.join(OPEN_CLIP_WEIGHTS)} on the hub")


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=patterns))
    checked_commit(folder.name)  # without a network it is what a file of the cache says
    return folder


def is_file(name: str) -> bool:
    """Return whether a name is a file in a repository, ``org/name/file.pt``, and not in a local folder."""
    organisation, *rest = name.split("/")
    weights = name.endswith((".pt", ".pth", ".bin", ".safetensors"))
    return len(rest) > 1 and weights and is_relative(name) and not Path(organisation).exists()


def download_file(name: str) -> Path:
    """Download ``org/name/file.pt``, and return the file in the hub's cache."""
    organisation, repository, file = name.split("/", 2)
    with hub_errors(f"{name}: {_ABSENT}"):
        folder = _snapshot(f"{organisation}/{repository}", [glob.escape(file)])
    if not (folder / file).is_file():
        raise InputError(f"{name}: not in the repository {organisation}/{repository}, or without a network not cached")
    return folder / file


def download_tag(name: str) -> tuple[Path, CLIPConfig]:
    """Download ``model:tag`` from open_clip's registry; return the file and its architecture.

    The registry knows the activation and preprocessing that the weights were trained with; they override the model's.
    """
    model, _, tag = name.partition(":")
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    cfg: dict[str, Any] = get_pretrained_cfg(model, tag)
    if not cfg:
        tags = list_pretrained_tags_by_model(model)
        known = f"tags: {', '.join(tags)}" if tags else "lit-clip models --pretrained lists all"
        if near := get_close_matches(tag, tags, n=1, cutoff=0.8):
            known = f"did you mean {model}:{near[0]}?"
        raise InputError(f"{name}: not in open_clip's registry; {known}")
    config = tagged(resolve_architecture(model), cfg)
    hint = f"; without a network, get the file elsewhere and give {model}:FILE"
    with hub_errors(f"{name}: cannot be downloaded", hint):
        return Path(download_pretrained(cfg)), config


def tagged(config: CLIPConfig, cfg: dict[str, Any]) -> CLIPConfig:
    """Return the architecture with a registry entry's activation and preprocessing."""
    assert config.preprocessing is not None
    preprocessing = dataclasses.replace(config.preprocessing)
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if cfg.get(key) is not None:
            setattr(preprocessing, key, tuple(cfg[key]) if key in ("mean", "std") else cfg[key])
    plain: Activation = "gelu" if config.activation == "quick_gelu" else config.activation
    activation: Activation = "quick_gelu" if cfg.get("quick_gelu") else plain
    return dataclasses.replace(config, activation=activation, preprocessing=preprocessing)


# In open_clip's order of preference.
OPEN_CLIP_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin"),
)
