"""Convert Hugging Face's models to ours (:data:`FORMS`), and ours to CLIPModel, SiglipModel and Siglip2Model.

Weight names are in :mod:`lit_clip.weights.hugging_face_keys`. A setting that would silently change the features
(another activation or crop) is an error that names both sides. timm and transformers take seconds to import,
so functions import them.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.config import (
    Activation,
    CLIPConfig,
    HuggingFaceTokenizerConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
    described,
)
from lit_clip.models.tokenizer import EOT_ID, SOT_ID
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import check_names_nothing, convert, shortened
from lit_clip.tools.weight_files import read_tensors
from lit_clip.weights import hugging_face_forms as forms
from lit_clip.weights.hugging_face_forms import (
    ACTIVATIONS,
    Converted,
    Folder,
    activation,
    clip_config,
    complete,
    ratio,
    text_transformer,
    timm_options,
)
from lit_clip.weights.hugging_face_keys import clip_pairs, renamed, siglip_pairs
from lit_clip.weights.hugging_face_processor import (
    agree,
    check_vocabulary,
    naflex_preprocessing,
    preprocessing_of,
    read_json,
    square,
)

SIGLIP_EPS = 1e-6  # LayerNorm epsilon of timm's
ARGMAX = 2  # with this eos_token_id CLIPModel pools at the highest id, as OpenAI's code and ours do
# timm's SigLIP image encoders by (width, layers, heads); each exists for some patch and image sizes.
SIGLIP_SIZES = {(768, 12, 12): "base", (1024, 24, 16): "large", (1152, 27, 16): "so400m", (1536, 40, 16): "giantopt"}
PATCH_BIAS = "vision_model.embeddings.patch_embedding.bias"  # of an EvaCLIPModel, also named clip; CLIPModels have none
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_hugging_face_folder(folder: str | os.PathLike[str]) -> Converted:
    """Read a folder from ``save_pretrained`` of a model and its processor; see :func:`from_hugging_face`."""
    folder = Path(folder)
    config, preprocessor = read_json(folder / "config.json"), None
    if (folder / "preprocessor_config.json").is_file():
        preprocessor = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():  # transformers 5 writes a single file
        preprocessor = read_json(folder / "processor_config.json").get("image_processor")
    shards = next((name for name in WEIGHTS if (folder / f"{name}.index.json").is_file()), None)
    if shards and not (folder / shards).is_file():
        state = _read_shards(folder / f"{shards}.index.json")
    else:
        name = next((name for name in WEIGHTS if (folder / name).is_file()), "")
        require(bool(name), f"{folder}: has no {' or '.join(WEIGHTS)}")
        state = read_tensors(folder / name)
    with naming(folder), reading(folder, "folder of Hugging Face's weights"):
        check_names_nothing([config, preprocessor], "config.json")
        if config.get("model_type") == "clip":
            check_vocabulary(folder)
        return from_hugging_face(config, state, preprocessor, tokenizer=str(folder))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files of an index from its own folder, whatever their names say."""
    names: dict[str, str] = convert(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    files = set(names.values())
    for name in files:
        require(Path(name).name == name, f"{index}: {shortened(name)} is not a file of this folder")
    state: dict[str, Tensor] = {}
    for name in sorted(files):
        part = read_tensors(index.with_name(name))
        absent = [weight for weight, file in names.items() if file == name and weight not in part]
        problem = f"{index.with_name(name)}: lacks {shortened(absent[:1])}, which {index.name} says is in it"
        require(not absent, f"{problem}; copy the whole folder again")
        state |= part
    return state


def from_hugging_face(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    preprocessor: Mapping[str, Any] | None = None,
    tokenizer: str = "",
) -> Converted:
    """Convert ``config.json`` and weights of a model in :data:`FORMS`; the weights keep their types.

    Without its ``preprocessor_config.json`` it is the default of its processor class. The tokenizer of models other
    than a ``CLIPModel`` is at ``tokenizer``, a folder or a name on the hub.
    """
    kind = str(config.get("model_type"))
    if kind not in FORMS:
        raise InputError(f"config.json: model_type is {kind!r}; must be one of {', '.join(map(repr, FORMS))}")
    return FORMS[kind](Folder(config, state, preprocessor, tokenizer))


def _clip(folder: Folder) -> Converted:
    if forms.FG_CLIP in folder.state:
        folder = forms.fg_clip_of_short_texts(folder)
    if PATCH_BIAS in folder.state:
        return forms.eva_clip(folder)
    theirs = complete("CLIPConfig", folder.values)
    text = theirs.text_config
    if text.eos_token_id != ARGMAX:  # CLIPModel pools at this id, ours at the highest
        agree("text_config.eos_token_id", text.eos_token_id, text.vocab_size - 1)
    ours = clip_config(theirs, folder.preprocessor, text_transformer(text))
    return ours, renamed(folder.state, _pairs(ours), inwards=True)


def to_hugging_face(model: CLIP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and weights of a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``."""
    kind = hugging_face_kind(model.config)
    return _values(model.config, kind), renamed(model.state_dict(), _pairs(model.config), inwards=False)


# What each model represents: the values of these settings (:func:`described`), and no others.
_REPRESENTED: dict[str, dict[str, Any]] = {
    "CLIP": {
        "image encoder": "VisionTransformer",
        "image.pool": "class",
        "image.ln_pre": True,
        "text encoder": "TextTransformer",
        "text.causal": True,
        "text.pool": "argmax",
        "text.tokenizer": None,
        "text.projection": True,
        "text.projection_bias": False,
        "logit_bias": False,
    },
    "Siglip": {
        "image.projection": "none",
        "text.pool": "last",
        "text.projection_bias": True,
        "logit_bias": True,
    },
}


def hugging_face_kind(config: CLIPConfig) -> Literal["clip", "siglip", "siglip2"]:
    """Return which of Hugging Face's models can represent our configuration."""
    image, ours = config.image, described(config)
    name = "Siglip" if isinstance(image, TimmConfig) and ours.get("text.causal") is False else "CLIP"
    for key, theirs in _REPRESENTED[name].items():
        value = ours.get(key)
        require(value == theirs, f"a {name}Model has {key} {theirs}, this model {value}")
    if not isinstance(image, TimmConfig):
        return "clip"
    require(not image.on_hub, f"its image encoder is {image.timm}, whose sizes timm alone knows")
    require(image.pool in (None, "map"), f"a SiglipModel has image.pool map, this model {image.pool}")
    patches = config.preprocessing is not None and config.preprocessing.max_patches is not None
    grid = timm_siglip(image.timm, **image.options)["grid"]
    require(patches or not grid, "a SiglipModel reads images, a Siglip2Model patches; set max_patches")
    return "siglip2" if patches else "siglip"


def _pairs(config: CLIPConfig) -> Any:
    text = cast(TextTransformerConfig, config.text)
    if isinstance(config.image, TimmConfig):
        timms = timm_siglip(config.image.timm, **config.image.options)
        return siglip_pairs(timms["depth"], text.layers, naflex=bool(timms["grid"]))
    return clip_pairs(cast(VisionTransformerConfig, config.image).layers, text.layers)


def _siglip(folder: Folder) -> Converted:
    if folder.values["model_type"] == "fgclip2":
        folder = forms.fg_clip_of_short_texts(folder)
    naflex = folder.values["model_type"] == "siglip2"
    theirs = complete("Siglip2Config" if naflex else "SiglipConfig", folder.values)
    image, text = theirs.vision_config, theirs.text_config
    agree("vision_config.layer_norm_eps", image.layer_norm_eps, SIGLIP_EPS)
    agree("vision_config.num_channels", image.num_channels, 3)
    agree("vision_config.vision_use_head", getattr(image, "vision_use_head", True), True)
    patch = square("vision_config.patch_size", image.patch_size)
    if naflex:
        preprocessing = naflex_preprocessing(folder.preprocessor or {}, patch)
        size = cast(int, preprocessing.image_size)
    else:
        size = square("vision_config.image_size", image.image_size)
        unspecified = {"size": {"height": size, "width": size}}
        preprocessing = preprocessing_of(folder.preprocessor or unspecified, size, "SiglipImageProcessor")
    ours = CLIPConfig(
        embed_dim=text.projection_size,
        image=_timm_config(image, size, patch, naflex),
        text=text_transformer(
            text,
            causal=False,
            projection_bias=True,
            tokenizer=HuggingFaceTokenizerConfig(folder.tokenizer, clean="lower" if naflex else "canonicalize"),
        ),
        activation=activation("text_config.hidden_act", text.hidden_act),
        preprocessing=preprocessing,
        logit_bias=True,
    )
    return ours, renamed(folder.state, _pairs(ours), inwards=True)


FORMS: dict[str, Callable[[Folder], Converted]] = {  # by model_type of config.json
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip,
    "fgclip2": _siglip,
    "metaclip_2": forms.metaclip_2,
    "chinese_clip": forms.chinese_clip,
    "altclip": forms.altclip,
    "aimv2": forms.aimv2_or_groupvit,
    "groupvit": forms.aimv2_or_groupvit,
    "align": forms.align,
    "evaclip": forms.eva_clip,
    "tipsv2": forms.tipsv2,
}


def _timm_config(theirs: Any, size: int, patch: int, naflex: bool) -> TimmConfig:
    """Return timm's equivalent of a SiglipModel's image encoder; differences from timm's model become options."""
    import timm

    wanted = {**timm_options(theirs), "grid": math.isqrt(theirs.num_patches) if naflex else None}
    kind = SIGLIP_SIZES.get((wanted["embed_dim"], wanted["depth"], wanted["num_heads"]), "base")
    name = f"naflexvit_{kind}_patch16_siglip" if naflex else f"vit_{kind}_patch{patch}_siglip_{size}"
    if not timm.is_model(name):
        near = timm.list_models(f"vit_{kind}_patch{patch}_siglip_[0-9]*")
        name = "naflexvit_base_patch16_siglip" if naflex else near[0] if near else "vit_base_patch16_siglip_224"
    usual = timm_siglip(name)
    options = {key: value for key, value in wanted.items() if value != usual[key]}
    if grid := options.pop("grid", None):
        options["pos_embed_grid_size"] = [grid, grid]
    return TimmConfig(name, image_size=size, projection="none", options=options)


def timm_siglip(name: str, **options: Any) -> dict[str, Any]:
    """Return the sizes of a timm SigLIP image encoder by timm's argument names, without allocating memory."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0, **options)
    embeds = getattr(model, "embeds", model)  # of NaFlex
    pooled = getattr(model, "attn_pool", None) is not None and getattr(embeds, "cls_token", 0) is None
    require(pooled and model.norm.eps == SIGLIP_EPS, f"timm's {name} is not a SigLIP image encoder")
    block = model.blocks[0]
    activation = f"{type(block.mlp.act).__name__} {getattr(block.mlp.act, 'approximate', '')}".lower()
    require("gelu" in activation, f"timm's {name} has {activation.split()[0]} in its MLPs, not GELU")
    return {
        "patch_size": (model.patch_embed if embeds is model else embeds).patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio(block.mlp.fc1.out_features, model.embed_dim),
        "act_layer": "gelu_tanh" if "tanh" in activation else "quick_gelu" if "quick" in activation else "gelu",
        "grid": None if embeds is model else embeds.pos_embed.shape[1],
    }


def library_name(kind: str) -> str:
    """Return the prefix of transformers' class names for a ``model_type``."""
    return {"clip": "CLIP"}.get(kind, kind.capitalize())


def _values(config: CLIPConfig, kind: Literal["clip", "siglip", "siglip2"]) -> dict[str, Any]:
    text = cast(TextTransformerConfig, config.text)
    if kind == "clip":
        image, projection = cast(VisionTransformerConfig, config.image), {"projection_dim": config.embed_dim}
        image_encoder = _encoder(vars(image), config.activation)
        grid, patch, text_projection = None, image.patch_size, projection
        tokens = {
            "bos_token_id": min(SOT_ID, text.vocab_size - 1),
            "eos_token_id": text.vocab_size - 1 if text.vocab_size <= EOT_ID + 1 else ARGMAX,
            "pad_token_id": min(EOT_ID, text.vocab_size - 1),
        }
    else:
        image, projection = cast(TimmConfig, config.image), {}
        timms = timm_siglip(image.timm, **image.options)
        sizes = {ours: timms[name] for name, ours in forms.TIMM_SIZES.items()} | {"layer_norm_eps": SIGLIP_EPS}
        image_encoder = {"vision_use_head": True, **_encoder(sizes, config.activation)}
        grid, patch, text_projection = timms["grid"], timms["patch_size"], {"projection_size": config.embed_dim}
        tokens = {"bos_token_id": None, "eos_token_id": None}  # never read
    return {
        "model_type": kind,
        "architectures": [f"{library_name(kind)}Model"],
        "dtype": "float32",
        **projection,
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            **({"num_patches": grid**2} if grid else {"image_size": square("image.image_size", image.image_size)}),
            "patch_size": patch,
            "num_channels": 3,
            **projection,
            **image_encoder,
        },
        "text_config": {
            "model_type": f"{kind}_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **text_projection,
            **tokens,
            **_encoder(vars(text), config.activation),
        },
    }


def _encoder(ours: Mapping[str, Any], activation: Activation) -> dict[str, Any]:
    """Convert the sizes of an encoder's blocks; the ``activation`` is the architecture's, if it names no other."""
    names = {name: theirs for theirs, name in ACTIVATIONS.items()}
    return {
        **{theirs: ours[name] for name, theirs in forms.SIZES.items()},
        "intermediate_size": int(ours["width"] * ours["mlp_ratio"]),
        "hidden_act": names[ours["activation"] or activation],
        "attention_dropout": 0.0,
    }
