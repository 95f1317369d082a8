"""Outputs of chosen blocks of an image encoder, under the names of open_clip's ``forward_intermediates``.

Shapes: B batch, L tokens, W width, D embedding dimension, C channels, h x w places.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.models.external import TimmImageEncoder
from lit_clip.models.packing import Layout
from lit_clip.models.resnet import ModifiedResNet
from lit_clip.models.transformer import VisionTransformer


class Options(NamedTuple):
    """Options of :func:`forward_intermediates`.

    Attributes:
        image_indices: numbers of blocks (of a ResNet: stem and four stages), from the end if negative; the last n if
            an int, all if None.
        stop_early: compute no block behind the last one wanted; needs ``intermediates_only``.
        normalize: return unit features.
        normalize_intermediates: apply the encoder's last norm, if it lies before the pooling, to the outputs.
        intermediates_only: leave the features out.
        image_output_fmt: ``NCHW``: maps ``[B, C, h, w]``; ``NLC``: tokens ``[B, hw, W]``, of transformers.
        image_output_extra_tokens: return class tokens and registers too.
    """

    image_indices: int | Sequence[int] | None = None
    stop_early: bool = False
    normalize: bool = True
    normalize_intermediates: bool = False
    intermediates_only: bool = False
    image_output_fmt: Literal["NCHW", "NLC"] = "NCHW"
    image_output_extra_tokens: bool = False

    def blocks(self, number: int) -> set[int]:
        """Return the numbers of the blocks with wanted outputs."""
        indices = self.image_indices
        if isinstance(indices, int):
            require(1 <= indices <= number, f"image_indices: {indices} must be between 1 and {number}")
            return set(range(number - indices, number))
        wrong = [i for i in indices or () if not -number <= i < number]
        require(not wrong, f"image_indices: {wrong} are not among the {number} blocks")
        return set(range(number)) if indices is None else {i % number for i in indices}


def forward_intermediates(
    model: Any, image: Tensor | None = None, text: Tensor | None = None, **options: Any
) -> dict[str, Any]:
    """Return outputs of a CLIP's image blocks, besides its features, as open_clip's models do.

    Texts are packed without padding within our encoder, so there are no intermediate features of texts.

    Args:
        model: a :class:`lit_clip.CLIP`.
        image: float ``[B, 3, H, W]``, normalised, of the model's image size.
        text: int64 ``[B, L]``.
        options: see :class:`Options`.

    Returns:
        ``image_intermediates``, a list in the order of the blocks; ``image_intermediates_prefix``, a list of
        ``[B, l, W]``; ``image_features`` and ``text_features``, ``[B, D]``.
    """
    where, wanted = "forward_intermediates", Options(**options)
    require(
        wanted.intermediates_only or not wanted.stop_early, f"{where}: features need all blocks; set intermediates_only"
    )
    found: dict[str, Any] = {}
    if image is not None:
        kinds = {VisionTransformer: _transformer, ModifiedResNet: _resnet, TimmImageEncoder: _timm}
        function: Any = next((kinds[kind] for kind in kinds if isinstance(model.visual, kind)), None)
        if function is None:
            raise InputError(f"{where}: the blocks of {type(model.visual.encoder).__name__} are unknown")
        found = function(model.visual, image, wanted)
    if text is not None and not wanted.intermediates_only:
        found["text_features"] = model.encode_text(text)
    if wanted.normalize:
        found |= {name: unit(found[name]) for name in ("image_features", "text_features") if name in found}
    return found


def _transformer(vit: VisionTransformer, images: Tensor, wanted: Options) -> dict[str, Any]:
    vit.check(images)
    blocks, x = list(vit.transformer.resblocks), vit.embed_grid(images, vit.grid)
    B, L, _ = x.shape
    layout, numbers, outputs = Layout(((B, L),), causal=False), wanted.blocks(len(blocks)), []
    behind_pool = vit.attn_pool is not None
    require(
        not (wanted.normalize_intermediates and behind_pool),
        "normalize_intermediates: this model's last norm follows its pooling",
    )
    x = x.flatten(0, 1)
    for i, block in enumerate(blocks[: max(numbers) + 1] if wanted.stop_early else blocks):
        x = block(x, layout)
        if i in numbers:
            outputs.append((vit.ln_post(x) if wanted.normalize_intermediates else x).unflatten(0, (B, L)))
    maps = [each[:, 1:] for each in outputs]
    if wanted.image_output_fmt == "NCHW":
        maps = [each.transpose(1, 2).unflatten(2, vit.grid) for each in maps]
    found: dict[str, Any] = {"image_intermediates": maps}
    if wanted.image_output_extra_tokens:
        found["image_intermediates_prefix"] = [each[:, :1] for each in outputs]
    if not wanted.intermediates_only:
        x = x.unflatten(0, (B, L))
        pooled = x[:, 0] if vit.pool == "class" else x[:, 1:].mean(dim=1) if vit.pool == "mean" else x
        found["image_features"] = vit.project(vit.features_behind(pooled))
    return found


def _resnet(resnet: ModifiedResNet, images: Tensor, wanted: Options) -> dict[str, Any]:
    resnet.check(images)
    require(wanted.image_output_fmt == "NCHW", "image_output_fmt: a ResNet has maps; choose NCHW")
    stages = (resnet.stem, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
    numbers, x, maps = wanted.blocks(len(stages)), images, []
    for i, stage in enumerate(stages[: max(numbers) + 1] if wanted.stop_early else stages):
        x = stage(x)
        if i in numbers:
            maps.append(x)
    return {"image_intermediates": maps} | ({} if wanted.intermediates_only else {"image_features": resnet.attnpool(x)})


def _timm(encoder: TimmImageEncoder, images: Tensor, wanted: Options) -> dict[str, Any]:
    encoder.check(images)
    trunk: Any = encoder.trunk
    options: dict[str, Any] = {
        "indices": wanted.image_indices,
        "norm": wanted.normalize_intermediates,
        "stop_early": wanted.stop_early,
    }
    options |= {"intermediates_only": wanted.intermediates_only, "output_fmt": wanted.image_output_fmt}
    if wanted.image_output_extra_tokens:
        options["return_prefix_tokens"] = True
    try:
        output = trunk.forward_intermediates(images, **options)
    except (AssertionError, TypeError) as error:  # what a network lacks: tokens, its own format
        raise InputError(f"forward_intermediates: timm's {type(trunk).__name__}: {error}") from error
    maps = output if wanted.intermediates_only else output[1]
    found: dict[str, Any] = {"image_intermediates": maps}
    if wanted.image_output_extra_tokens:
        found = {"image_intermediates": [x for x, _ in maps], "image_intermediates_prefix": [x for _, x in maps]}
    if not wanted.intermediates_only:
        found["image_features"] = encoder.project(encoder.pooled(output[0]))
    return found
