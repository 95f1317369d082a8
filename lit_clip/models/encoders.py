"""Create an architecture's encoders and tokenizer: the paper's, other libraries', or your own."""

import sys
from typing import Any

import torch
from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceImageConfig,
    HuggingFaceTextConfig,
    Preprocessing,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.external_config import CustomImageConfig, CustomTextConfig
from lit_clip.models.resnet import ModifiedResNet
from lit_clip.models.tokenizer import EOT_ID, CLIPTokenizer, TextTokenizer
from lit_clip.models.transformer import ImageEncoder, TextTransformer, VisionTransformer


def image_encoder(config: CLIPConfig) -> ImageEncoder:
    """Create an architecture's image encoder, for the bands of its preprocessing."""
    assert config.preprocessing is not None  # with_external_settings has filled it in
    bands = config.preprocessing.bands
    if bands != 3 and not isinstance(config.image, TimmConfig | CustomImageConfig):
        raise InputError(f"architecture: preprocessing.mean has {bands} bands, this encoder reads 3; use timm's")
    if isinstance(config.image, VisionTransformerConfig):
        return VisionTransformer(config.image, config.embed_dim, config.activation)
    if isinstance(config.image, ResNetConfig):
        return ModifiedResNet(config.image, config.embed_dim)
    if isinstance(config.image, CustomImageConfig):
        from lit_clip.models.custom import CustomImageEncoder

        with torch.device("cpu"):  # not on the meta device: its code may read values
            return CustomImageEncoder(config.image, config.embed_dim, bands)
    from lit_clip.models.external import HuggingFaceImageEncoder, TimmImageEncoder

    if isinstance(config.image, HuggingFaceImageConfig):
        return HuggingFaceImageEncoder(config.image, config.embed_dim)
    return TimmImageEncoder(config.image, config.embed_dim, bands)


def input_dtype(visual: nn.Module, device: torch.device, fallback: torch.dtype) -> torch.dtype:
    """Return the dtype of an image encoder's input.

    The weights', or under autocast the first product's if the encoder is one of ours.
    """
    # An encoder of one's own may have no weights.
    dtype = next((parameter.dtype for parameter in visual.parameters()), fallback)
    ours = isinstance(visual, VisionTransformer | ModifiedResNet)
    if ours and dtype == torch.float32 and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def check_patches(visual: Any, preprocessing: Preprocessing) -> None:
    """Raise :class:`InputError` if images become patches (NaFlex) but the image encoder cannot read them."""
    if preprocessing.max_patches is None:
        return
    where = f"architecture: preprocessing.max_patches {preprocessing.max_patches}"
    reads = getattr(visual, "reads_patches", False)
    require(reads, f"{where}: {type(visual).__name__} reads images of one size; use a naflexvit model of timm")
    patch, theirs = preprocessing.patch_size, tuple(visual.trunk.embeds.patch_size)
    require(theirs == (patch, patch), f"{where}: patch_size {patch} is not the model's {theirs[0]}")


def text_encoder(config: CLIPConfig) -> nn.Module:
    """Create an architecture's text encoder, if it is a separate module."""
    if isinstance(config.text, HuggingFaceTextConfig):
        from lit_clip.models.external import HuggingFaceTextEncoder

        return HuggingFaceTextEncoder(config.text, config.embed_dim)
    if isinstance(config.text, CustomTextConfig):
        from lit_clip.models.custom import CustomTextEncoder

        with torch.device("cpu"):
            return CustomTextEncoder(config.text, config.embed_dim)
    return TextTransformer(config.text, config.embed_dim, config.activation)


def create_tokenizer(text: TextTransformerConfig | HuggingFaceTextConfig) -> TextTokenizer:
    """Create the tokenizer of a text encoder: CLIP's, or the one of the encoder's source."""
    padding_read, vocab_size = 0, sys.maxsize
    if isinstance(text, TextTransformerConfig):
        padding_read, vocab_size = text.padding_read, text.vocab_size
    elif text.model and text.model.get("vocab_size"):
        vocab_size = text.model["vocab_size"]
    if text.tokenizer is not None:
        from lit_clip.models.hf_tokenizer import from_source

        return from_source(text.tokenizer, text.context_length, padding_read > 0, vocab_size)
    least = f"must be at least {EOT_ID + 1} for CLIP's tokenizer"
    require(vocab_size > EOT_ID, f"architecture.text: vocab_size {vocab_size} {least}")
    return CLIPTokenizer(text.context_length, padding_read=padding_read)
