"""Heads on disk: safetensors with facts as JSON. Nothing in a file is executed, and every field is checked."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.zero_shot import check_templates
from lit_clip.heads.head import Head, HeadFacts
from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import check_fields, from_plain
from lit_clip.tools.weight_files import read_file

FORMAT = "lit-clip head 1"
MOST_BYTES = 2**32
MOST_CLASSES = 2**20
LARGEST = 1e18  # of a weight: its products with features stay far below what float32 can hold
TENSORS = ("text", "weight", "bias", "thresholds")


def save_head(head: Head, path: str | Path) -> None:
    """Write a head to a ``.safetensors`` file."""
    from safetensors.torch import save_file

    path = Path(path)
    require(path.suffix == ".safetensors", f"{path}: a head is written to a .safetensors file")
    tensors = {name: getattr(head, name).cpu().contiguous() for name in TENSORS}
    metadata = {"format": FORMAT, "head": json.dumps(asdict(head.facts), ensure_ascii=False)}
    with replacing(path) as draft:
        save_file(tensors, draft, metadata=metadata)
        draft.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read


def load_head(path: str | Path) -> Head:
    """Read a file of :func:`save_head`."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such head file")
    require(path.suffix == ".safetensors", f"{path}: a head is a .safetensors file")
    require(path.stat().st_size <= MOST_BYTES, f"{path}: larger than any head; classify --save_head writes heads")
    with reading(path, "head", hint="classify --save_head writes heads"):
        values = json.loads(_metadata(path))
    tensors = {name: tensor.clone() for name, tensor in read_file(path).items()}
    with naming(path):
        return _checked(values, tensors)


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
    require(found.get("format") == FORMAT, f"{path}: not a head of this version; classify --save_head writes heads")
    return found["head"]


def _checked(values: Any, tensors: dict[str, Tensor]) -> Head:
    """Return a head from a file's values, after checking each of them."""
    facts = from_plain(HeadFacts, values, "head")
    check_fields(facts, "head")
    classes = len(facts.names)
    require(0 < classes <= MOST_CLASSES, f"head: names: {classes} classes; must be from 1 to {MOST_CLASSES:,}")
    require(all(facts.names) and len(set(facts.names)) == classes, "head: names: one is empty or there twice")
    check_templates(facts.templates, "head: templates")
    require(sorted(tensors) == sorted(TENSORS), f"tensors: there must be {', '.join(TENSORS)}")
    wanted = {"text": (None, classes), "weight": (classes, None), "bias": (classes,), "thresholds": (classes,)}
    for name, tensor in tensors.items():
        fits = len(tensor.shape) == len(wanted[name]) and all(
            size in (None, found) for size, found in zip(wanted[name], tensor.shape, strict=True)
        )
        if tensor.dtype != torch.float32 or not fits:
            raise InputError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not float32 for {classes} classes")
        whole = bool((tensor.abs() < LARGEST).all())  # not of NaN either
        require(whole, f"{name}: not finite, or so large that probabilities would overflow; fit the head anew")
    return Head(facts, *(tensors[name] for name in TENSORS))
