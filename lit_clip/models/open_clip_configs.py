"""Translate open_clip's configurations of models that lit-clip supports."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lit_clip.errors import InputError, require
from lit_clip.models.config import (
    Activation,
    CLIPConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    ImageConfig,
    Preprocessing,
    ResNetConfig,
    TextConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.external_settings import is_naflex, timm_hub_model, timm_preprocessing
from lit_clip.tools.own_files import installed_file
from lit_clip.tools.reading import reason
from lit_clip.tools.untrusted import shortened

HALF = (0.5, 0.5, 0.5)
# Entries with one meaning in both libraries: open_clip's names, our fields and open_clip's defaults.
VISION = {
    "patch_size": ("patch_size", 16),
    "width": ("width", 768),
    "layers": ("layers", 12),
    "mlp_ratio": ("mlp_ratio", 4.0),
}
POOLER = {"attn_pooler_queries": ("pool_queries", 256), "attn_pooler_heads": ("pool_heads", 8)}
TEXT = ("vocab_size", "width", "layers", "heads", "mlp_ratio")
# Poolings of a text encoder of transformers.
TEXT_POOLERS: dict[str, Literal["mean", "cls", "pooler"]] = {
    "mean_pooler": "mean",
    "cls_last_hidden_state_pooler": "cls",
    "cls_pooler": "pooler",
}
# Entries to ignore: None for any value (it concerns training only), otherwise open_clip's defaults.
_NEUTRAL = {
    "custom_text": (True, False),
    "multimodal_cfg": None,  # CoCa's caption decoder, which no features depend on
    "init_logit_scale": None,
    "timm_model_pretrained": None,
    "timm_drop": None,
    "timm_drop_path": None,
    "patch_dropout": None,
    "patch_size": None,
    "hf_model_pretrained": None,
    "output_tokens": None,
    "pos_embed_type": ("learnable",),
    "ls_init_value": (None,),
    "tokenizer_mode": (None, ""),
}


class _CheckedDict:
    """A dictionary with entries that must all be used, or be in :data:`_NEUTRAL`."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values, self.name = dict(values), name

    def take(self, key: str, default: Any = None) -> Any:
        return self.values.pop(key, default)

    def taken(self, *keys: str) -> dict[str, Any]:
        return {key: self.values.pop(key) for key in keys if key in self.values}

    def check(self, known: bool, key: str, value: Any) -> None:
        require(known, f"{self.name}: {key} {shortened(value)} is not supported by lit-clip")

    def done(self) -> None:
        for key, value in self.values.items():
            allowed = _NEUTRAL.get(key, ())
            self.check(allowed is None or value in allowed, key, value)


def configs_folder() -> Path:
    """Return the configuration folder of the installed ``open-clip-torch``, without importing the package."""
    return installed_file("open_clip", "open-clip-torch", "model_configs")


@lru_cache(maxsize=1)
def open_clip_names() -> tuple[str, ...]:
    """List every model name with a configuration in open_clip."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.json")))


def model_config(name: str) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` for a name of :func:`open_clip_names`."""
    return json.loads((configs_folder() / f"{name}.json").read_text(encoding="utf-8"))


def from_open_clip(model: Mapping[str, Any], preprocess: Mapping[str, Any] | None, name: str) -> CLIPConfig:
    """Translate ``model_cfg`` and ``preprocess_cfg`` of an ``open_clip_config.json``; messages name its source.

    Without the latter it is open_clip's default for that kind of model.
    """
    top = _CheckedDict(model, name)
    plain: Activation = "quick_gelu" if top.take("quick_gelu", False) else "gelu"
    embed_dim, bias = top.take("embed_dim"), top.take("init_logit_bias") is not None
    vision, text = _CheckedDict(top.take("vision_cfg", {}), name), _CheckedDict(top.take("text_cfg", {}), name)
    own_image, own_text = _activation(vision, plain), _activation(text, plain)
    vit = not (vision.values.get("timm_model_name") or isinstance(vision.values.get("layers"), list))
    texts = not text.values.get("hf_model_name")
    top.done()
    try:
        return CLIPConfig(
            embed_dim=embed_dim,
            image=_image(vision, own_image),
            text=_text(text, own_text),
            # The one that is read: timm's and Hugging Face's encoders have their own.
            activation=own_text if texts else own_image if vit else plain,
            preprocessing=_preprocessing(preprocess, model["vision_cfg"], bias),
            logit_bias=bias,
        )
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    except Exception as error:  # a file's values are of any type
        raise InputError(f"{name}: not an open_clip configuration ({reason(error)})") from error


def _activation(tower: _CheckedDict, plain: Activation) -> Activation:
    return "gelu_tanh" if (tower.take("act_kwargs") or {}).get("approximate") == "tanh" else plain


def _preprocessing(values: Mapping[str, Any] | None, vision: Mapping[str, Any], siglip: bool) -> Preprocessing:
    size = vision.get("image_size", 224)
    if (name := vision.get("timm_model_name")) and is_naflex(timms := _timm(name)):  # of SigLIP 2
        found = timm_preprocessing(replace(timms, image_size=size))
        if found.max_patches is None:
            raise InputError(f"timm's {name} reads no patches, which lit-clip needs of that class")
        budget, given = vision.get("image_seq_len") or found.max_patches, values or {}
        mean, std = given.get("mean") or HALF, given.get("std") or HALF
        same = {"interpolation": "bilinear", "resize_mode": "shortest", "crop_pct": 1.0}
        return replace(found, mean=mean, std=std, max_patches=budget, **same)
    default = Preprocessing(size)
    if values is None:
        return replace(default, mean=HALF, std=HALF, resize_mode="squash") if siglip else default
    mode = values.get("resize_mode") or "shortest"
    interpolation = values.get("interpolation") or "bicubic"
    known = mode in ("shortest", "squash") and interpolation in ("bicubic", "bilinear")
    problem = f"resize_mode {mode!r} with interpolation {interpolation!r} is not supported by lit-clip"
    require(known, f"preprocess_cfg: {problem}")
    return Preprocessing(
        values.get("size") or size,
        values.get("mean") or default.mean,
        values.get("std") or default.std,
        interpolation,
        mode,
        values.get("crop_pct", 1.0),  # ours: open_clip leaves it out, and the window
        window=values.get("window"),
    )


def _timm(name: str) -> TimmConfig:
    """Return timm's model of a name; a name on the hub is looked up there."""
    timms = TimmConfig(name)
    return replace(timms, model=timm_hub_model(name)) if timms.on_hub else timms


def _image(values: _CheckedDict, activation: Activation) -> ImageConfig:
    image_size = values.take("image_size", 224)
    timm_name = values.take("timm_model_name")
    if timm_name:
        pool, kind = values.take("timm_pool", "avg"), values.take("timm_proj", "linear")
        values.check(pool not in ("abs_attn", "rot_attn"), "timm_pool", pool)
        values.check(kind in ("linear", "mlp", "none", None, ""), "timm_proj", kind)
        timms = _timm(timm_name)
        budget = values.take("image_seq_len") if is_naflex(timms) else None
        size = tuple(image_size) if isinstance(image_size, list) else image_size
        result: ImageConfig = replace(
            timms,
            image_size=None if budget else size,  # of as many patches
            pool=pool or None,
            projection=kind or "classifier",
            projection_bias=values.take("timm_proj_bias", False),
            options={"drop_path_rate": drop_path} if (drop_path := values.take("timm_drop_path")) else {},
        )
    elif isinstance(values.values.get("layers"), list):
        result = ResNetConfig(values.take("layers"), values.take("width", 64), image_size)
    else:
        result = _vision_transformer(values, image_size, activation)
    values.done()
    return result


def _vision_transformer(values: _CheckedDict, image_size: Any, activation: Activation) -> VisionTransformerConfig:
    sizes = {ours: values.take(theirs, usual) for theirs, (ours, usual) in (VISION | POOLER).items()}
    attention, pool = values.take("attentional_pool", False), values.take("pool_type", "tok")
    norm_last = values.take("final_ln_after_pool", False)
    values.check(attention in (True, False), "attentional_pool", attention)
    values.check(pool == "tok" or (pool == "avg" and not attention), "pool_type", pool)
    values.check(pool == "tok" or norm_last, "final_ln_after_pool", norm_last)
    return VisionTransformerConfig(
        image_size,
        **sizes,
        heads=sizes["width"] // values.take("head_width", 64),
        ln_pre=not values.take("no_ln_pre", False),
        pool="attention" if attention else "mean" if pool == "avg" else "class",
        layer_norm_eps=(values.take("norm_kwargs") or {}).get("eps", 1e-5),
        activation=activation,
    )


def _text(values: _CheckedDict, activation: Activation) -> TextConfig:
    context, hf = values.take("context_length", 77), values.take("hf_model_name")
    if hf:
        kind, pooling = values.take("hf_proj_type", "mlp"), values.take("hf_pooler_type", "mean_pooler")
        values.taken("vocab_size", "width", "heads", "layers")
        values.check(kind in ("linear", "mlp") and pooling in TEXT_POOLERS, "hf_pooler_type", pooling)
        result: TextConfig = HuggingFaceTextConfig(hf, False, context, TEXT_POOLERS[pooling], kind)
        named = _tokenizer(values)
        usual = named is None or replace(named, source=hf) == result.tokenizer
        values.check(usual, "tokenizer_kwargs", f"of {hf}")
    else:
        causal, pool = not values.take("no_causal_mask", False), values.take("pool_type", "argmax")
        values.check(pool in ("argmax", "eos", "last"), "pool_type", pool)
        pool, pad_id = "class" if values.take("embed_cls", False) else pool, values.take("pad_id", 0)
        values.check(pad_id == 0 or pool != "class", "pad_id", pad_id)
        result = TextTransformerConfig(
            context,
            causal=causal,
            projection=values.take("proj_type", "linear") != "none",
            projection_bias=values.take("proj_bias", False),
            layer_norm_eps=(values.take("norm_kwargs") or {}).get("eps", 1e-5),
            tokenizer=_tokenizer(values),
            pool=pool,
            activation=activation,
            **values.taken(*TEXT, "eos_id"),
        )
    values.done()
    return result


def _tokenizer(values: _CheckedDict) -> HuggingFaceTokenizerConfig | None:
    source, given = values.take("hf_tokenizer_name"), values.take("tokenizer_kwargs") or {}
    known = {"clean": "whitespace", "strip_sep_token": False} if source else {"clean": "lower"}
    for name, value in given.items():
        usual = name in known and (bool(source) or value == known[name])
        values.check(usual, f"tokenizer_kwargs.{name}", value)
    return HuggingFaceTokenizerConfig(source, **{**known, **given}) if source else None
