"""Weights in: whatever a user has of a published or trained model -> a model that is ready to embed."""

import dataclasses
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Size
from lit_clip.models.lora import merge_lora
from lit_clip.models.registry import resolve_architecture
from lit_clip.models.resize import resize_weights, resized
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.weight_files import Source, is_path
from lit_clip.weights.checkpoints import check_base, read_checkpoint
from lit_clip.weights.sources import Weights, check_same, open_weights

__all__ = ["check_architecture", "check_weights", "create_model", "load_model", "read_checkpoint"]

DEFAULT_ARCHITECTURE = "ViT-B-32"


def check_weights(model: CLIP, state: Mapping[str, Any], name: Source) -> None:
    """Raise :class:`InputError` naming a weight that is missing, unknown, of another shape or quantised."""
    ours = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in ours.items()}
    theirs = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    wrong = sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key))
    if wrong:
        there, here = (side.get(wrong[0], "absent") for side in (theirs, shapes))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{name}: weights do not fit: {wrong[0]}{more} is {there} there and {here} here")
    for key, value in ours.items():
        if value.is_floating_point() != state[key].is_floating_point():
            raise InputError(f"{name}: weights do not fit: {key} is {state[key].dtype} there and {value.dtype} here")


def check_architecture(checkpoint: dict[str, Any], config: CLIPConfig, name: Source) -> None:
    """:func:`check_same` for a checkpoint of lit-clip's."""
    check_same(CLIPConfig.from_dict(checkpoint["hyper_parameters"]["architecture"]), config, name)


def whole_name(architecture: str | CLIPConfig | None, pretrained: Source) -> Source:
    """``model:tag`` for a mere tag of open_clip's beside an architecture's name; anything else as it is."""
    tag = os.fspath(pretrained)
    if isinstance(architecture, str) and not is_path(tag) and "/" not in tag and ":" not in tag:
        return f"{architecture}:{tag}"
    return pretrained


def create_model(
    name: str | CLIPConfig | None,
    pretrained: Source | None = None,
    image_size: Size | None = None,
    context_length: int | None = None,
) -> CLIP:
    """A model by name (:func:`list_models`) or by its sizes, with random or published weights.

    Args:
        name: the architecture, weights of another are refused; None: that of ``pretrained``, or without it ViT-B-32. A
            name leaves the preprocessing to the weights.
        pretrained: whatever :func:`load_model` opens, or a tag of open_clip's for that name.
        image_size: other than the architecture's, see :func:`load_model`.
        context_length: likewise.

    Raises:
        InputError: an unknown name, or weights that cannot be read or are of another architecture.
    """
    config = resolve_architecture(name) if name is not None else None
    if pretrained is None:
        return CLIP(resized(config or resolve_architecture(DEFAULT_ARCHITECTURE), image_size, context_length))
    weights = open_weights(whole_name(name, pretrained))
    if config and isinstance(name, str):
        config = _with_preprocessing(config, weights)
    return _model(weights, config, image_size, context_length)


def load_model(
    source: Source,
    architecture: str | CLIPConfig | None = None,
    image_size: Size | None = None,
    context_length: int | None = None,
) -> CLIP:
    """A trained or published model, ready to embed: on the CPU, float32, in evaluation mode, with its preprocessing.

    Args:
        source: a checkpoint of ``lit-clip fit``; OpenAI's ``.pt``; open_clip's ``.bin``, ``.pt``, ``.safetensors`` or
            a folder with ``open_clip_config.json``; a folder of Hugging Face's ``CLIPModel`` or ``SiglipModel``; a name
            ``org/name`` on the Hugging Face hub; ``model:tag`` of open_clip's registry; or ``model:file``.
        architecture: for a file that does not say of what model it is; if it does, the two must agree. A name leaves
            the preprocessing to the weights.
        image_size: other than the weights': the position embedding is interpolated (bicubic, antialiased).
        context_length: other than the weights': positions are cut off at the end, or continued with copies of the last
            one, so that features of captions which fit either way stay the same.

    Raises:
        InputError: nothing of that name, not readable, of another architecture, or not saying of which; nothing in a
            file is ever executed.
    """
    config = resolve_architecture(architecture) if architecture is not None else None
    weights = open_weights(source)
    if config and isinstance(architecture, str):
        config = _with_preprocessing(config, weights)
    return _model(weights, config, image_size, context_length).eval()


def _with_preprocessing(config: CLIPConfig, weights: Weights) -> CLIPConfig:
    """A mere name says nothing of the preprocessing: many published weights have another than their kind's usual."""
    theirs = weights.config and weights.config.preprocessing
    if theirs and theirs.image_size == config.image.image_size:
        return dataclasses.replace(config, preprocessing=theirs)
    return config


def _model(weights: Weights, expected: CLIPConfig | None, image_size: Size | None, context_length: int | None) -> CLIP:
    if weights.config and expected:
        sizes = image_size, context_length  # said beside the architecture, they may be in it already
        check_same(resized(weights.config, *sizes), resized(expected, *sizes), weights.name)
    config = weights.config or expected  # they agree, and the weights' own says where its tokenizer lies
    if config is None:
        raise InputError(
            f"{weights.name}: weights do not say of which model they are; write its name before the file's, as in "
            f"{DEFAULT_ARCHITECTURE}:{weights.name} (lit-clip models lists the names), or give a folder of open_clip's"
        )
    state = _adapted(weights.state, config)
    larger = resized(config, image_size, context_length)
    if larger != config:
        check_weights(_empty(config), state, weights.name)
        state = resize_weights(state, config, larger)
        if weights.tokenizer is not None:
            weights.tokenizer = weights.tokenizer.with_context(larger.text.context_length)
    return _filled(larger, state, weights)


def _empty(config: CLIPConfig, tokenizer: TextTokenizer | None = None) -> CLIP:
    """A model without memory behind its weights."""
    with torch.device("meta"):
        return CLIP(config.without_pretrained(), tokenizer)


def _filled(config: CLIPConfig, state: dict[str, Tensor], weights: Weights) -> CLIP:
    """A model whose weights are those tensors themselves: nothing lies in memory twice."""
    model = _empty(config, weights.tokenizer)
    check_weights(model, state, weights.name)
    model.load_state_dict(state, assign=True)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        # A tower of another library has buffers that are in no state dict; they must be computed.
        model = CLIP(config.without_pretrained(), weights.tokenizer)
        model.load_state_dict(state)
    return model


_NO_WEIGHTS = (
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "text.transformer.embeddings.position_ids",
)


def _adapted(state: dict[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """The same weights under our names: what OpenAI's archives and older versions of open_clip have otherwise."""
    if config.papers_layout and "text.token_embedding.weight" in state:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in _NO_WEIGHTS}
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(())
    return state


def with_base(checkpoint: dict[str, Any], name: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint as it is, or if it holds a LoRA alone, with all weights, the additions merged into them.

    Raises:
        InputError: the base is neither where it was nor beside the checkpoint, or has other weights.
    """
    if "base" not in checkpoint:
        return checkpoint
    from lit_clip.module import LitCLIP
    from lit_clip.weights.load import check_weights

    hparams = checkpoint["hyper_parameters"]
    base = hparams["pretrained"]
    beside = Path(name).parent / Path(base).name  # moved together; the fingerprint tells whether it is the one
    try:
        found = str(beside) if is_path(base) and not Path(base).exists() and beside.exists() else base
        module = LitCLIP(**{**hparams, "distill": None, "pretrained": found})
    except InputError as error:
        raise InputError(f"{name}: the weights that its LoRA belongs to cannot be opened: {error}") from error
    check_base(checkpoint, module.base_sha256, name)
    model = module.model
    state: dict[str, Tensor] = {**model.state_dict(), **checkpoint["state_dict"]}
    check_weights(model, state, name)
    model.load_state_dict(state)
    merge_lora(model)
    plain = {key: value for key, value in hparams.items() if key not in ("lora", "pretrained")}
    kept = {key: value for key, value in checkpoint.items() if key != "base"}
    return {**kept, "hyper_parameters": plain, "state_dict": model.state_dict()}
