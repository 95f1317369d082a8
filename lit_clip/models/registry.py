"""Architectures by name: the paper's, open_clip's that lit-clip supports, and two tiny ones; and with another size.

Names and sizes are open_clip's; a test compares the paper's with its tables.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import yaml

from lit_clip.errors import InputError, require
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceImageConfig,
    ResNetConfig,
    TextConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.models.external_config import CustomEncoderConfig
from lit_clip.models.external_settings import with_external_settings
from lit_clip.models.size import Size, height_width
from lit_clip.tools.reading import parse_yaml

# Tables 19 and 20 of the paper. Its activation is QuickGELU; open_clip's names without -quickgelu mean GELU.
_PAPER = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"]

# Our own, for small images on a CPU: 8.2 and 17.7 million parameters, most of them in the token embedding.
_TINY = {
    "RN-tiny-64": CLIPConfig(
        256, ResNetConfig((1, 1, 1, 1), 16, 64), TextTransformerConfig(32, width=128, layers=2, heads=2)
    ),
    "ViT-tiny-16-64": CLIPConfig(
        256, VisionTransformerConfig(64, 16, 256, 4, 4), TextTransformerConfig(32, width=256, layers=2, heads=4)
    ),
}

KEPT_POSITIONS = 20  # of a text: Long-CLIP's count of the positions that CLIP's short captions have trained well


def papers_models() -> list[str]:
    """Return the names of the paper's nine models: open_clip's without ``-quickgelu``."""
    return list(_PAPER)


def list_models() -> list[str]:
    """List names for :func:`lit_clip.create_model` and ``--model.architecture``.

    Names of open_clip that are not listed work too if lit-clip supports that kind of model.
    """
    from lit_clip.models.open_clip_configs import open_clip_names

    papers = [name for paper in _PAPER for name in (paper, f"{paper}-quickgelu")]
    return [*_TINY, *papers, *(name for name in open_clip_names() if "SigLIP" in name)]


def resolve_architecture(architecture: "str | CLIPConfig | Mapping[str, Any]") -> CLIPConfig:
    """Return the configuration of a name or a checkpoint's mapping, with other libraries' settings filled in."""
    if isinstance(architecture, CLIPConfig):
        return with_external_settings(architecture)
    if isinstance(architecture, Mapping):
        return with_external_settings(CLIPConfig.from_dict(architecture))
    if architecture.lstrip().startswith("{"):  # a CLIPConfig on the command line that did not parse
        with suppress(yaml.YAMLError):
            with_external_settings(CLIPConfig.from_dict(parse_yaml(architecture)))  # says what is wrong
        raise InputError(f"model.architecture: {architecture} has an unknown entry or a value of the wrong type")
    if architecture in _TINY:
        return CLIPConfig.from_dict(_TINY[architecture].to_dict())
    from lit_clip.models.open_clip_configs import from_open_clip, model_config, open_clip_names

    if architecture in open_clip_names():
        return with_external_settings(from_open_clip(model_config(architecture), None, architecture))
    names = {name.casefold(): name for name in [*open_clip_names(), *_TINY]}
    near = get_close_matches(architecture.casefold(), names, n=1)
    hint = f"did you mean {names[near[0]]}?" if near else f"known: {', '.join(list_models())}"
    raise InputError(f"no model is called {architecture!r}; {hint}")


def resized(config: CLIPConfig, image_size: Size | None, context_length: int | None) -> CLIPConfig:
    """Return the architecture with other sizes; None keeps a size."""
    image, text, preprocessing = config.image, config.text, config.preprocessing
    assert preprocessing is not None
    if image_size is not None and height_width(image_size) != height_width(preprocessing.image_size):
        _not_custom(image, "image_size")
        if preprocessing.max_patches is not None and (patch := preprocessing.patch_size) is not None:
            patches = math.prod(side // patch for side in height_width(image_size))
            require(patches > 0, f"image_size: {image_size} holds no patch of {patch} pixels")
            preprocessing = dataclasses.replace(preprocessing, max_patches=patches)
            image_size = preprocessing.image_size
        image = dataclasses.replace(image, image_size=image_size)
        preprocessing = dataclasses.replace(preprocessing, image_size=image_size)
    if context_length is not None and context_length != text.context_length:
        shorter = context_length < text.context_length or getattr(text, "pool", None) == "class"
        why = "this text encoder attends to padding too, so another length would change the features"
        known = f"context_length: must be the weights' {text.context_length}"
        require(not (shorter and reads_padding(text)), f"{known}, not {context_length}; {why}")
        _not_custom(text, "context_length")
        text = dataclasses.replace(text, context_length=context_length)
    return dataclasses.replace(config, image=image, text=text, preprocessing=preprocessing)


def reads_padding(text: TextConfig) -> bool:
    """Return whether the features of every text depend on the context length (SigLIP)."""
    return isinstance(text, TextTransformerConfig) and text.padding_read > 0


def _not_custom(tower: object, size: str) -> None:
    if isinstance(tower, HuggingFaceImageConfig):
        raise InputError(f"{size}: transformers' {tower.model['model_type']} keeps the weights' {tower.image_size}")
    if isinstance(tower, CustomEncoderConfig):
        raise InputError(f"{size}: {tower.class_path} chooses its own; set it with architecture's init_args")
