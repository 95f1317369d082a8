"""Weights and checkpoints: whole files with damaged bytes, and their trees with changed values."""

import copy
import io
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.models import open_clip_configs
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    CLIPConfig,
    Preprocessing,
    ResNetConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from tests.fuzz.inputs import (
    CANARY,
    Edit,
    Input,
    Inputs,
    Target,
    damaged,
    damaged_members,
    edited,
    edited_json,
    edits,
    to_json,
)

TINY = CLIPConfig(
    8, VisionTransformerConfig(32, 16, 8, 1, 1), TextTransformerConfig(8, 50, 8, 1, 1), preprocessing=Preprocessing(32)
)
RESNET = CLIPConfig(8, ResNetConfig((1, 1, 1, 1), 2, 32), TextTransformerConfig(8, 50, 8, 1, 1))
MOST = 10**6  # numbers in a described tensor
DTYPES = ("torch.float16", "torch.bfloat16", "torch.float64", "torch.int64", "torch.bool", "torch.complex64")
# Numbers and words of an architecture, of which most combinations are one.
SIZES: dict[str, tuple[Any, ...]] = {
    "embed_dim": (1, 8, 16),
    "activation": ("gelu", "quick_gelu", "gelu_tanh"),
    "logit_bias": (True, False),
    "image.image_size": (32, 64, [32, 64], 224),
    "image.width": (2, 8, 16),
    "image.layers": (1, 2, [1, 2, 1, 1]),
    "text.context_length": (3, 8, 77),
    "text.vocab_size": (50, 1, 49408),
    "text.width": (8, 16),
    "text.layers": (1, 3),
    "text.heads": (1, 2, 8),
    "text.causal": (True, False),
    "text.projection": (True, False),
    "text.projection_bias": (True, False),
    "text.layer_norm_eps": (1e-5, 0, 1),
    "preprocessing.image_size": (32, 8, 64),
    "preprocessing.crop_pct": (1.0, 0.5),
}
SECRET = Path(tempfile.gettempdir()) / "fuzz-outside.pt"  # a file that no input may have opened
# Values that must lead to no import, no file and no look-up.
HOSTILE = (
    f"{CANARY}.Evil",
    {"class_path": f"{CANARY}.Evil"},
    {"class_path": f"{CANARY}.Evil", "init_args": {"a": 1}},
    {"class_path": "subprocess.Popen", "init_args": {"args": "true"}},
    "${oc.env:HOME}",
    "org/name",
    "hf-hub:org/name",
    str(SECRET),
    {"checkpoint_path": str(SECRET)},
)


@cache
def tiny_model(resnet: bool = False) -> CLIP:
    """Return a model of a few thousand weights."""
    torch.manual_seed(0)
    return CLIP(RESNET if resnet else TINY).eval()


def use(model: CLIP) -> str:
    """Encode an image and a text, of which only the shapes can be known."""
    odd = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    assert not odd, f"{odd} are not finite"
    with torch.inference_mode():
        config = model.config
        size = config.image.image_size or 32
        height, width = size if isinstance(size, tuple | list) else (size, size)
        assert height * width <= 10**6, f"an image size of {height} x {width}"
        image = model.encode_image(torch.zeros(1, 3, height, width))
        text = model.encode_text(torch.zeros(1, config.text.context_length, dtype=torch.long))
    assert image.shape == text.shape == (1, config.embed_dim), (image.shape, text.shape)
    return "used"


@cache
def whole_weights() -> dict[str, bytes]:
    """Return weight files of each format; the suffix, or the name, says how each is opened."""
    from safetensors.torch import save

    state = dict(tiny_model().state_dict())
    checkpoint = {"hyper_parameters": {"architecture": TINY.to_dict()}, "state_dict": state}
    return {
        "last.ckpt": saved(checkpoint),
        "old.ckpt": saved(checkpoint, _use_new_zipfile_serialization=False),
        "epoch.pt": saved({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}),
        "plain.bin": saved(state),
        "w.safetensors": save(state),
    }


def saved(values: Any, **options: Any) -> bytes:
    """Return the bytes of a file of torch's."""
    file = io.BytesIO()
    torch.save(values, file, **options)
    return file.getvalue()


def weight_inputs() -> Inputs:
    return st.one_of(damaged(whole_weights), damaged_members(whole_weights), damaged_members(whole_weights))


def read_weight_file(folder: Path, given: Input) -> Iterator[str]:
    """Load a weight file."""
    path = folder / given.name
    path.write_bytes(given.data)
    yield use(load_model(path, None if path.suffix == ".ckpt" else TINY))


@cache
def checkpoint_trees() -> dict[str, Any]:
    """Return checkpoints in which tensors are described by their shapes and types."""
    common = {"epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.6.0", "loops": {}, "callbacks": {}}
    trees = {}
    for name, resnet in (("vit.ckpt", False), ("resnet.ckpt", True)):
        model = tiny_model(resnet)
        hparams = {
            "architecture": json.loads(json.dumps(model.config.to_dict())),
            "pretrained": None,
            "image_size": None,
            "context_length": None,
            "lora": None,
            "freeze": {"image": None, "text": {"unlock_last": 1}},
            "rates": None,
            "distill": None,
        }
        trees[name] = {**common, "hyper_parameters": hparams, "state_dict": _state_of(model)}
    return trees


def _state_of(model: CLIP) -> dict[str, Any]:
    return {key: [str(value.dtype), *value.shape] for key, value in model.state_dict().items()}


def build_checkpoint(tree: Any) -> Any:
    """Make the tensors that a tree describes; ``@7`` as a key is the number 7, ``@None`` is None."""
    if isinstance(tree, dict):
        return {_key(key): build_checkpoint(value) for key, value in tree.items()}
    if isinstance(tree, list):
        if tree and isinstance(tree[0], str) and tree[0].startswith("torch."):
            return _tensor(tree)
        return [build_checkpoint(value) for value in tree]
    return tree


def _key(key: str) -> Any:
    return {"@7": 7, "@None": None}.get(key, key)


def _tensor(described: list[Any]) -> Any:
    dtype, *shape = described
    kind = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype) or not all(type(side) is int and 0 <= side <= MOST for side in shape):
        return described
    number = 1
    for side in shape:
        number *= side
    return torch.zeros(shape, dtype=kind) if number <= MOST and len(shape) < 60 else described


def checkpoint_inputs() -> Inputs:
    words = ("@7", "@None", ["torch.int8", 8], ["torch.float16", 8, 8], ["torch.bool"], ["torch.complex64", 2])
    anywhere = edited_json(checkpoint_trees, (*HOSTILE, *words))
    names = st.sampled_from(sorted(checkpoint_trees()))
    settings = st.builds(_with_other_settings, names, edits(HOSTILE, most=2))
    sizes = st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.integers(0, 10)), min_size=1, max_size=4)
    states = st.builds(_with_other_states, names, sizes, st.integers(0, 2**64))
    return st.one_of(anywhere, settings, states)


def _with_other_settings(name: str, changes: list[Edit]) -> Input:
    """Return a checkpoint in which something but the weights was changed."""
    tree = dict(checkpoint_trees()[name])
    state = tree.pop("state_dict")
    changed = edited(tree, changes)
    return Input(name, to_json({"state_dict": state, **changed} if isinstance(changed, dict) else changed))


def _with_other_states(name: str, sizes: list[tuple[str, int]], seed: int) -> Input:
    """Return a checkpoint of another architecture, with its weights or the old ones, some of which may be changed."""
    tree, rng = copy.deepcopy(checkpoint_trees()[name]), random.Random(seed)
    for key, choice in sizes:
        *parents, last = key.split(".")
        part = tree["hyper_parameters"]["architecture"]
        for each in parents:
            part = part[each]
        part[last] = SIZES[key][choice % len(SIZES[key])]
    if rng.random() < 0.7:
        with suppress(InputError), torch.device("meta"):
            tree["state_dict"] = _state_of(CLIP(CLIPConfig.from_dict(tree["hyper_parameters"]["architecture"])))
    state, kind = tree["state_dict"], rng.randrange(6)
    for key in rng.sample(sorted(state), rng.choice((0, 0, 1, 2, len(state)))):
        dtype, *shape = state[key]
        if kind == 0:
            state[key] = [rng.choice(DTYPES), *shape]
        elif kind == 1:
            state[key] = [dtype, *rng.choice((shape[::-1], [*shape, 1], shape[1:], [2 * side for side in shape], [0]))]
        elif kind == 2:
            state[rng.choice(("module.", "_orig_mod.", "model.", "0")) + key] = state.pop(key)
        elif kind == 3:
            state[key] = state[rng.choice(sorted(state))]
        elif kind == 4:
            del state[key]
        else:
            state[f"{key}x"] = [dtype, *shape]
    return Input(name, to_json(tree))


def save_checkpoint(folder: Path, given: Input) -> Path:
    """Write the checkpoint that an input describes."""
    path = folder / given.name
    try:
        values = build_checkpoint(json.loads(given.data))
    except (ValueError, RecursionError):
        values = {}
    torch.save(values, path)
    return path


def read_checkpoint_file(folder: Path, given: Input) -> Iterator[str]:
    """Load a checkpoint."""
    yield use(load_model(save_checkpoint(folder, given)))


@cache
def whole_folder(kind: str) -> dict[str, bytes]:
    """Return the files of an export."""
    from safetensors.torch import save

    from lit_clip.weights.export import write_open_clip
    from lit_clip.weights.hugging_face import to_hugging_face
    from lit_clip.weights.hugging_face_processor import image_processor

    model = tiny_model()
    if kind == "open_clip":
        with tempfile.TemporaryDirectory() as name:
            write_open_clip(CLIP(replace(TINY, preprocessing=Preprocessing(32, crop_pct=0.875))), Path(name))
            return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}
    values, state = to_hugging_face(model)  # without the tokenizer, which needs a large vocabulary
    return {
        "config.json": json.dumps(values).encode(),
        "preprocessor_config.json": json.dumps(image_processor(model.preprocessing, "CLIPImageProcessor")).encode(),
        "model.safetensors": save(state),
    }


def _folder_inputs(kind: str) -> Inputs:
    files = whole_folder(kind)
    trees = {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}
    if kind == "hugging_face":
        shards = {"metadata": {"total_size": 1}, "weight_map": {"visual_projection.weight": "model.safetensors"}}
        trees["model.safetensors.index.json"] = copy.deepcopy(shards)
    json_files = edited_json(lambda: trees, HOSTILE)
    return st.one_of(json_files, json_files, damaged(lambda: files))


def _read_folder(kind: str, folder: Path, given: Input) -> Iterator[str]:
    top = folder / "model"
    top.mkdir()
    for name, data in whole_folder(kind).items():
        (top / name).write_bytes(data)
    if given.name == "model.safetensors.index.json":
        os.rename(top / "model.safetensors", top / "model-1.safetensors")
    (top / given.name).write_bytes(given.data)
    yield use(load_model(top))


SETTINGS = {
    **dict.fromkeys(("force_context_length", "force_image_size", "image_interpolation", "image_mean", "image_std"), ""),
    **{"force_quick_gelu": "False", "image_resize_mode": "", "model": "tiny", "pretrained": "", "siglip": "False"},
}
ODD = (
    *("True", "None", "[32, 32]", "64", "-1", "1e999", "[0.5, 0.5, 0.5]", "[NaN, 1, 1]", "squash", "random", "longest"),
    *("[" * 60_000, "9" * 5000, "x" * 70_000, "../../secret", "\x00", "\u202e", "tiny-rn", "laion2b_s34b_b79k", "'"),
    *(str(value) for value in HOSTILE),
)


@cache
def run_files() -> dict[str, bytes]:
    """Return a run of open_clip's trainer, as one that lists two tiny models writes it."""
    params = "".join(f"{name}: {value}\n" for name, value in SETTINGS.items()).encode()
    state = {f"module.{key}": value for key, value in tiny_model().state_dict().items()}
    return {"params.txt": params, "epoch_1.pt": saved({"epoch": 1, "name": "run", "state_dict": state})}


def _with_settings(changes: list[tuple[str, str]]) -> Input:
    return Input("params.txt", "".join(f"{k}: {v}\n" for k, v in (SETTINGS | dict(changes)).items()).encode())


def run_inputs() -> Inputs:
    changes = st.lists(st.tuples(st.sampled_from([*SETTINGS, "other"]), st.sampled_from(ODD)), min_size=1, max_size=3)
    return st.one_of(st.builds(_with_settings, changes), damaged(run_files))


@cache
def _listed() -> dict[str, str]:
    """Return the list of models that takes the place of open_clip's, whose models have millions of weights."""
    from lit_clip.weights.open_clip import open_clip_model

    models = {"tiny": tiny_model(), "tiny-rn": tiny_model(resnet=True)}
    return {f"{name}.json": json.dumps(open_clip_model(model)) for name, model in models.items()}


def read_run(folder: Path, given: Input) -> Iterator[str]:
    """Load a checkpoint of open_clip's trainer by its path, with the settings of its run above it."""
    run, models = folder / "run", folder / "models"
    (run / "checkpoints").mkdir(parents=True)
    models.mkdir()
    for name, model in _listed().items():
        (models / name).write_text(model)
    for name, data in {**run_files(), given.name: given.data}.items():
        (run / name if name == "params.txt" else run / "checkpoints" / name).write_bytes(data)
    with mock.patch.object(open_clip_configs, "configs_folder", return_value=models):
        open_clip_configs.open_clip_names.cache_clear()
        yield use(load_model(run / "checkpoints/epoch_1.pt"))


weight_files = Target(weight_inputs, read_weight_file, bytewise=True)
checkpoints = Target(checkpoint_inputs, read_checkpoint_file)
open_clip_runs = Target(run_inputs, read_run)
open_clip_folders = Target(lambda: _folder_inputs("open_clip"), lambda *each: _read_folder("open_clip", *each))
hugging_face_folders = Target(lambda: _folder_inputs("hugging_face"), lambda *each: _read_folder("hugging_face", *each))
