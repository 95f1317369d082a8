"""Class heads: whole files with damaged bytes, changed facts, and tensors of other shapes and types."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.heads import Head, load_head
from lit_clip.heads.head import HeadFacts
from lit_clip.weights.fingerprint import fingerprint
from tests.fuzz.inputs import Edit, Input, Inputs, damaged, edited, edits
from tests.fuzz.target import Target
from tests.fuzz.targets.weights import HOSTILE, tiny_model

SHAPES = ((), (0,), (1,), (2,), (3,), (2, 16), (16, 2), (3, 0), (0, 3), (1, 3, 1))


@cache
def tiny_head() -> Head:
    """Return a head of the tiny model with three classes."""
    width, dimension = (features.shape[1] for features in tiny_model().image_features(torch.zeros(1, 3, 32, 32)))
    facts = HeadFacts(fingerprint(tiny_model()).model, ["cat", "dog", "tree"], ["a {}."], False, -1.0, 0.05, 30)
    torch.manual_seed(0)
    return Head(facts, torch.randn(dimension, 3), torch.randn(3, width), torch.randn(3), torch.full((3,), 0.5))


def _file(facts: object, tensors: dict[str, Tensor], form: str = "lit-clip head 1") -> Input:
    from safetensors.torch import save

    return Input("head.safetensors", save(tensors, {"format": form, "head": json.dumps(facts)}))


@cache
def whole_heads() -> dict[str, bytes]:
    """Return a head's file."""
    given = _file(asdict(tiny_head().facts), dict(tiny_head().state_dict()))
    return {given.name: given.data}


def _with_facts(changes: list[Edit]) -> Input:
    return _file(edited(asdict(tiny_head().facts), changes), dict(tiny_head().state_dict()))


def _with_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Input:
    tensor = torch.zeros(shape, dtype=dtype)
    odd = tensor if dtype == torch.bool else tensor + torch.tensor(value).to(dtype)
    return _file(asdict(tiny_head().facts), {**tiny_head().state_dict(), name: odd})


def head_inputs() -> Inputs:
    values = st.sampled_from((0.0, 1.0, float("nan"), float("inf"), 1e38))
    dtypes = st.sampled_from((torch.float32, torch.float16, torch.int64, torch.bool))
    names = st.sampled_from(("text", "weight", "bias", "thresholds", "other", "__metadata__", "../x"))
    tensors = st.builds(_with_tensor, names, st.sampled_from(SHAPES), dtypes, values)
    return st.one_of(damaged(whole_heads), st.builds(_with_facts, edits(HOSTILE)), tensors)


def read_head(folder: Path, given: Input) -> Iterator[str]:
    """Load a head, and classify an image by it."""
    path = folder / given.name
    path.write_bytes(given.data)
    head = load_head(path)
    try:
        found = tiny_model().with_head(head)(torch.zeros(1, 3, 32, 32))
    except InputError:  # it says that it is another model's
        yield "skipped"
        return
    assert found.shape == (1, len(head.facts.names)), found.shape
    assert head.none_of(found).shape == (1,)
    yield "used"


heads = Target(head_inputs, read_head)
