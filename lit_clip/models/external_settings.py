"""Settings that only the encoders of timm, of Hugging Face's transformers or of your own know.

Apart from :mod:`lit_clip.models.external` because naming an architecture needs no torch. Either library is imported
when one of its encoders is named: both take seconds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from lit_clip.errors import InputError, require
from lit_clip.models.config import CLIPConfig, HuggingFaceTextConfig, Preprocessing, TimmConfig, height_width
from lit_clip.models.external_config import HUB, CustomImageConfig, CustomTextConfig, check_timm_options
from lit_clip.tools.hub_client import checked_relative, hub_errors
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import check_names_nothing

_WITH_KERNELS = ("mra", "rwkv", "yoso")  # models of transformers
# What of timm's ``pretrained_cfg`` is about images and names of weights; the rest says where the weights are.
_DATA = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("classifier", "pool_size"),
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


def with_external_settings(config: CLIPConfig) -> CLIPConfig:
    """Return the architecture, with settings filled in that only its encoders know.

    That is image size, preprocessing and text configuration of other libraries' encoders, and image size and context
    length of encoders by class path. An explicit image size or preprocessing wins over timm's. Architectures of our own
    encoders come back unchanged.
    """
    image, text, preprocessing = config.image, config.text, config.preprocessing
    if isinstance(image, TimmConfig):
        if image.on_hub and image.model is None:
            image = replace(image, model=timm_hub_model(image.timm))
        timms = timm_preprocessing(image)
        preprocessing = preprocessing or timms
        own = preprocessing if preprocessing.max_patches is not None else timms
        image = replace(image, image_size=own.image_size)
    if isinstance(text, HuggingFaceTextConfig) and text.model is None:
        text = replace(text, model=hugging_face_config(text.hugging_face))
    if isinstance(image, CustomImageConfig) and image.image_size is None:
        from lit_clip.models.custom import create_encoder, size_of  # needs torch

        image = replace(image, image_size=size_of(create_encoder(image, config.embed_dim), image))
    if isinstance(text, CustomTextConfig) and not text.context_length:
        from lit_clip.models.custom import create_encoder, size_of

        text = replace(text, context_length=size_of(create_encoder(text, config.embed_dim), text))
    if image is config.image and text is config.text:
        return config
    return replace(config, image=image, text=text, preprocessing=preprocessing)


def timm_name(config: TimmConfig) -> str:
    """Return timm's name of a model."""
    return config.timm if config.model is None else config.model["architecture"]


def timm_pretrained_cfg(config: TimmConfig) -> Any:
    """Return timm's entry for a model's weights, or for the model itself; it includes the data config."""
    import timm

    name = timm_name(config)
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        names = timm.list_models()
        near = timm.list_models(f"*{bare}*")[:5] or get_close_matches(bare, names, n=5)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(names)}, see timm.list_models()"
        raise InputError(f"architecture.image: timm has no model {name!r}; {hint}")
    if tag and not timm.is_model_pretrained(name):
        known = ", ".join(timm.list_pretrained(f"{bare}.*")) or "none, leave it out"
        raise InputError(f"architecture.image: timm's {bare} has no weights {tag!r}; known: {known}")
    if config.model is not None:
        from timm.models import PretrainedCfg  # pyright: ignore[reportPrivateImportUsage]  # timm's documented home

        return PretrainedCfg(**config.model["data"])
    return timm.get_pretrained_cfg(name) or timm.create_model(name, pretrained=False).pretrained_cfg


def timm_preprocessing(config: TimmConfig) -> Preprocessing:
    """Return the preprocessing of timm's data config for a model, at the configured size."""
    from timm.data import resolve_data_config  # pyright: ignore[reportPrivateImportUsage]  # timm's documented home

    cfg = timm_pretrained_cfg(config)
    data = resolve_data_config({}, pretrained_cfg=cfg if isinstance(cfg, dict) else cfg.to_dict())
    size = config.image_size or cast(tuple[int, int], tuple(data["input_size"][1:]))
    interpolation, mode = data["interpolation"], data["crop_mode"]
    known = interpolation in ("bicubic", "bilinear") and mode in ("center", "squash")
    problem = f"needs {interpolation} {mode} preprocessing, which lit-clip lacks"
    require(known, f"architecture.image: timm's {config.timm} {problem}")
    patch = naflex_patch_size(config)
    return Preprocessing(
        image_size=size,
        max_patches=patch and math.prod(side // patch for side in height_width(size)),
        patch_size=patch,
        mean=data["mean"],
        std=data["std"],
        interpolation=interpolation,
        resize_mode="squash" if mode == "squash" else "shortest",
        crop_pct=data["crop_pct"],
    )


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
    problem = f"{name} has none of {', '.join(_WEIGHTS)} on the hub, or in its cache if the hub cannot be reached"
    raise InputError(f"architecture.image: {problem}; download them once with the network")


def _download(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download  # takes seconds

    repository, _, revision = name.removeprefix(HUB).partition("@")
    with hub_errors(f"architecture.image: no {file} of {name} on the hub or in its cache"):
        if revision:
            checked_relative(revision)  # a checkpoint may give the name
        return Path(hf_hub_download(repository, file, revision=revision or None))


def is_naflex(config: TimmConfig) -> bool:
    """Return whether a model reads patch sequences, by timm's name prefix for such models."""
    return timm_name(config).startswith("naflexvit_")


def naflex_patch_size(config: TimmConfig) -> int | None:
    """Return the patch side of a model that reads patch sequences; None for any other model."""
    if not is_naflex(config):
        return None
    import timm
    import torch

    options = ({} if config.model is None else config.model["model_args"]) | config.options
    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(timm_name(config).partition(".")[0], num_classes=0, **options)
    except Exception:  # the encoder itself will say what is wrong with the options
        return None
    (height, width), linear = trunk.embeds.patch_size, trunk.embeds.is_linear
    return height if linear and height == width else None


def hugging_face_config(source: str) -> dict[str, Any]:
    """Return the configuration of a text encoder as plain values."""
    from transformers import AutoConfig

    with hub_errors(f"architecture.text: no Hugging Face model at {source!r}"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_text_only(config, source)
    padded = getattr(config, "pad_token_id", None) is not None
    where = f"architecture.text: {source}"
    require(padded, f"{where} has no padding token to mark the ends of texts; choose another encoder")
    return json.loads(config.to_json_string(use_diff=False))


def check_text_only(config: Any, source: str) -> None:
    """Raise :class:`InputError` for a model that is not a text encoder, or that fetches something when created.

    Some models have another encoder, which transformers may download; timm's among them open the file or repository
    that their configuration names, and three start a compiler or load compiled code from the hub.
    """
    other = any(part in entry for entry in config.to_dict() for part in ("vision", "audio", "backbone"))
    where = f"architecture.text: {source}"
    require(not other, f"{where} has an image encoder too; open the whole model with load_model")
    from transformers import MODEL_MAPPING

    kinds = MODEL_MAPPING.get(type(config), None)
    kind: Any = kinds[0] if isinstance(kinds, tuple) else kinds
    reads, name = getattr(kind, "input_modalities", "text"), config.model_type
    known = reads in ("text", ["text"], ("text",)) and name not in _WITH_KERNELS
    require(known, f"{where} is of the type {name}, which is no text encoder that lit-clip can use")
