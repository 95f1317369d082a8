"""The formats of ``lit-clip export``, and those of programs with a layout of their own: timm and Immich.

The libraries take seconds to import, so functions import them.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.config import VisionTransformerConfig, height_width
from lit_clip.models.external import TimmImageEncoder
from lit_clip.models.hf_tokenizer import HuggingFaceTokenizer
from lit_clip.weights import export
from lit_clip.weights.export import OUTPUTS, ExportSample, Reading, TracedEncoder, make_readable, run_graphs, save_json
from lit_clip.weights.hugging_face_processor import read_json, save_tokenizer, square

# timm


def write_timm(model: CLIP, folder: Path) -> None:
    """Write the image encoder as timm's model, whose classifier is the projection: ``config.json`` and weights."""
    from timm.models import save_for_hf

    ours, config = model.preprocessing, model.config.image
    require(ours.max_patches is None, "timm: its transform cuts no NaFlex patches; use hugging_face")
    if isinstance(model.visual, TimmImageEncoder):
        encoder = _with_classifier(model.visual)
    else:
        plain = isinstance(config, VisionTransformerConfig) and config.ln_pre and config.pool == "class"
        name = type(config).__name__.removesuffix("Config")
        require(plain, f"timm: has no image encoder of this kind ({name}) and of any size; use open_clip or onnx")
        encoder = _vision_transformer(model, cast(VisionTransformerConfig, config))
    data = {name: getattr(ours, name) for name in ("interpolation", "mean", "std", "crop_pct")}
    data |= {"input_size": (3, *height_width(ours.image_size))}
    data |= {"crop_mode": "squash" if ours.resize_mode == "squash" else "center"}
    save_for_hf(encoder, str(folder), safe_serialization=True, data_config=data)
    make_readable(folder / "model.safetensors")


def _vision_transformer(model: CLIP, config: VisionTransformerConfig) -> nn.Module:
    """Return timm's vision transformer of CLIP with the weights, by timm's own rule for OpenAI's names."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    encoder: Any = timm.create_model(
        "vit_base_patch32_clip_224",
        num_classes=model.config.embed_dim,
        img_size=height_width(config.image_size),
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        act_layer=model.config.activation,
    )
    visual = {f"visual.{name}": tensor.detach().cpu() for name, tensor in model.visual.state_dict().items()}
    encoder.load_state_dict(checkpoint_filter_fn(visual, encoder))
    return encoder


def _with_classifier(visual: TimmImageEncoder) -> nn.Module:
    """Return a copy of the trunk whose classifier is the projection; without a projection it has none."""
    encoder, head = cast(Any, copy.deepcopy(visual.trunk)), cast(Any, visual.head)
    require(not hasattr(head, "mlp"), "timm: its classifiers are one matrix, this projection has two; use onnx")
    if hasattr(head, "proj"):
        encoder.reset_classifier(head.proj.out_features)
        classifier = encoder.get_classifier()
        same = isinstance(classifier, nn.Linear) and classifier.weight.shape == head.proj.weight.shape
        require(same, "timm: the projection does not fit this model's classifier; use open_clip or onnx")
        classifier.weight.data.copy_(head.proj.weight)
        classifier.bias.data.copy_(0 if head.proj.bias is None else head.proj.bias)
    return encoder


@torch.no_grad()
def read_timm(folder: Path, sample: ExportSample) -> Reading:
    """Run timm as a user would: model and transform from the folder."""
    import timm

    encoder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder), is_training=False)
    pixels = torch.stack([transform(image) for image in sample.images])
    return Reading(unit(encoder(sample.pixels)), None, pixels)


# Immich


def write_immich(model: CLIP, folder: Path) -> None:
    """Write ``visual`` and ``textual`` as Immich's machine learning reads a model of open_clip's kind.

    Its graphs read one image or text at a time and give features of unit length.
    """
    export.check_traceable(model, "immich")
    ours, tokenizer, settings = model.preprocessing, model.tokenizer, model.config.text.tokenizer
    require(ours.crop_pct == 1, f"immich: resizes to the image size, and leaves out crop_pct {ours.crop_pct}; use onnx")
    separated = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.stripped_id is not None
    require(not separated, "immich: its tokenizer keeps the separators that this model's leaves out; use onnx")
    sample, size = ExportSample.of(model), square("preprocessing.image_size", ours.image_size)
    for name in ("visual", "textual"):
        (folder / name).mkdir()
    image, text = (TracedEncoder(model, kind, unit_length=True) for kind in ("image", "text"))
    image.write(sample.pixels[:1], folder / "visual" / "model.onnx", "image", OUTPUTS[:1])
    text.write(sample.tokens[:1].int(), folder / "textual" / "model.onnx", "text", OUTPUTS[:1])
    same = {name: getattr(ours, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    save_json({"size": [size, size], "mode": "RGB", **same}, folder / "visual" / "preprocess_cfg.json")
    clean = None if settings is None else settings.clean
    texts = {"context_length": model.context_length, "tokenizer_kwargs": {"clean": clean}}
    save_json({"embed_dim": model.config.embed_dim, "text_cfg": texts}, folder / "config.json")
    save_tokenizer(model, folder / "textual")
    _complete_tokenizer(folder / "textual", tokenizer.pad_id, clean == "lower")


def _complete_tokenizer(folder: Path, pad_id: int, lower: bool) -> None:
    """Name the token that texts are padded with, and let the tokenizer lower-case where Immich does not."""
    from tokenizers import Tokenizer, normalizers

    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer: Any = Tokenizer.from_file(str(file))
    if lower:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        tokenizer.save(str(file))
    save_json(read_json(settings) | {"pad_token": tokenizer.id_to_token(pad_id)}, settings)


def read_immich(folder: Path, sample: ExportSample) -> Reading:
    """Run the graphs on one image or text at a time and the tokenizer by the folder's settings, as Immich does."""
    from tokenizers import Tokenizer

    length = read_json(folder / "config.json")["text_cfg"]["context_length"]
    pad = read_json(folder / "textual" / "tokenizer_config.json")["pad_token"]
    tokenizer: Any = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    tokens = torch.tensor([tokenizer.encode(text).ids for text in sample.texts])
    inputs = {"visual/model.onnx": ("image", sample.pixels), "textual/model.onnx": ("text", tokens.int())}
    (image,), (text,) = run_graphs(folder, inputs, [1] * len(tokens))
    return Reading(image, text, tokens=tokens)


FormatName = Literal["open_clip", "hugging_face", "onnx", "timm", "immich"]


class Format(NamedTuple):
    """How to write and read a format, the largest accepted difference between unit features, and what hubs call it."""

    write: Callable[[CLIP, Path], None]
    read: Callable[[Path, ExportSample], Reading]
    tolerance: float
    library: str


FORMATS: dict[str, Format] = {
    "open_clip": Format(export.write_open_clip, export.read_open_clip, 1e-4, "open_clip"),
    "hugging_face": Format(export.write_hugging_face, export.read_hugging_face, 1e-4, "transformers"),
    "onnx": Format(export.write_onnx, export.read_onnx, 1e-3, "onnx"),
    "timm": Format(write_timm, read_timm, 1e-4, "timm"),
    "immich": Format(write_immich, read_immich, 1e-3, "immich"),
}
