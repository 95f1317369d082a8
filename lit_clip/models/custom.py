"""Your own encoders, named by class path beside ours and other libraries'.

An **image encoder** is a ``torch.nn.Module`` with

- ``__init__(self, embed_dim, ...)``: further arguments come from ``init_args``,
- ``image_size``: an attribute, the side in pixels or ``(height, width)``,
- ``forward(self, images)``: float ``[B, 3, H, W]``, normalised -> ``[B, embed_dim]``; 3: bands of the preprocessing,
- ``patches(self, images)`` (optional): float ``[B, 3, H, W]`` of any size, normalised -> ``[B, embed_dim, h, w]``,
  features of each place, for :meth:`lit_clip.CLIP.encode_patches`.

A **text encoder** is a ``torch.nn.Module`` with

- ``__init__(self, embed_dim, ...)``,
- ``context_length``: an attribute, the maximum number of tokens,
- ``forward(self, tokens)``: int64 ``[B, context_length]``, padded at the end -> ``[B, embed_dim]``; or
  ``forward(self, tokens, lengths)``: int64 ``[B, L]`` with ``L`` at most ``context_length``, and the number of tokens
  of each text before its padding as a list; padding then must not change the features,
- ``tokenizer`` (optional): a :class:`lit_clip.models.tokenizer.TextTokenizer`, or any callable that turns a list of
  texts into int64 ``[N, context_length]``, padded with its ``pad_id`` (0 if it has none). By default CLIP's.

Optional for both: ``blocks``, a list of modules in order, for ``freeze: {unlock_last: n}``, LoRA, rates of head and
layers, activation checkpointing and FSDP's units.

A class is only ever looked up among the modules that are imported already, so that a checkpoint, which names it, cannot
make us import anything.

Shapes: B batch, L tokens, N texts.
"""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.errors import InputError, require
from lit_clip.models.external_config import CustomImageConfig, CustomTextConfig, find_class, how_to_import
from lit_clip.models.running import evaluation_mode
from lit_clip.models.size import height_width, normalised
from lit_clip.models.tokenizer import CallableTokenizer, CLIPTokenizer, TextTokenizer
from lit_clip.models.transformer import ImageEncoder, is_traced
from lit_clip.tools.parts import script_name

CONTRACT = {
    "image": "an image encoder is a torch.nn.Module with __init__(embed_dim, ...), image_size, and "
    "forward(images [B, 3, H, W]) -> float32 [B, embed_dim]",
    "text": "a text encoder is a torch.nn.Module with __init__(embed_dim, ...), context_length, and "
    "forward(tokens [B, context_length]) -> float32 [B, embed_dim]",
}
TEXTS = ["a", "a photo of a dog"]  # of different lengths in any tokenizer of words, bytes or characters


def create_encoder(config: CustomImageConfig | CustomTextConfig, embed_dim: int) -> nn.Module:
    """Create an encoder in float32 on the CPU, on any default device."""
    kind = "image" if isinstance(config, CustomImageConfig) else "text"
    path = str(config.class_path)
    found, (module, _, name), where = find_class(path), path.rpartition("."), f"architecture.{kind}: {path}"
    if found is None and module in {*sys.modules, script_name()}:
        raise InputError(f"architecture.{kind}: {module} has no class {name}")
    if found is None:
        raise InputError(f"{where} is not imported; {how_to_import(path)}")
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    require(is_module, f"{where} is no torch.nn.Module; {CONTRACT[kind]}")
    require(found.forward is not nn.Module.forward, f"{where} has no forward; {CONTRACT[kind]}")
    own = config.init_args.get("embed_dim", embed_dim)
    advice = "leave it out: an encoder gets the architecture's"
    require(own == embed_dim, f"{where}: init_args.embed_dim {own} is not architecture.embed_dim {embed_dim}; {advice}")
    arguments, signature = {**config.init_args, "embed_dim": embed_dim}, inspect.signature(found)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(f"{where}{signature}: {error}; {CONTRACT[kind]}") from error
    with torch.device("cpu"):
        return found(**arguments)


def size_of(encoder: nn.Module, config: CustomImageConfig | CustomTextConfig) -> Any:
    """Return an encoder's ``image_size`` or ``context_length``, which must be the architecture's if that has one."""
    kind, name = ("image", "image_size") if isinstance(config, CustomImageConfig) else ("text", "context_length")
    size: Any = getattr(encoder, name, None)
    sides = size if kind == "image" and isinstance(size, list | tuple) else [size, size]
    least = 1 if kind == "image" else 3  # start, a word, end
    if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
        wrong = f"architecture.{kind}: {config.class_path} has the {name} {size!r}, at least {least}"
        raise InputError(f"{wrong}; {CONTRACT[kind]}")
    now, there = normalised((sides[0], sides[1])), getattr(config, name)
    same = not there or now == there
    require(same, f"architecture.{kind}: {config.class_path} has the {name} {now} now, and {there} there")
    return now


class _Wrapping(nn.Module):
    """Holds an encoder of your own as ``encoder``."""

    def ordered_blocks(self) -> list[nn.Module]:
        """Return the encoder's ``blocks``; empty if it has none."""
        encoder: Any = self.encoder
        blocks = getattr(encoder, "blocks", None)
        blocks = list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential | list | tuple) else []
        inside = {id(module) for module in encoder.modules()}
        whole = all(id(block) in inside for block in blocks)
        require(whole, f"architecture: `blocks` of {type(encoder).__name__} holds more than modules of it")
        return blocks


class CustomImageEncoder(_Wrapping, ImageEncoder):
    """Your own image encoder (``encoder``), checked with one small batch when it is created."""

    def __init__(self, config: CustomImageConfig, embed_dim: int, bands: int = 3) -> None:
        super().__init__()
        self.bands = bands
        self.encoder, self.embed_dim = create_encoder(config, embed_dim), embed_dim
        self.image_size = size_of(self.encoder, config)
        with evaluation_mode(self), torch.no_grad():
            features = self(torch.zeros(2, bands, *height_width(self.image_size)))
        _check_features(features, embed_dim, f"architecture.image: {config.class_path}: forward", "image")

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``; the encoder hides its own projection, if any."""
        self.check(images)
        return self.encoder(images)


class CustomTextEncoder(_Wrapping):
    """Your own text encoder (``encoder``), checked with one small batch when it is created.

    Its ``tokenizer`` is the encoder's, or CLIP's. With ``reads_lengths`` it is told the texts' lengths, and reads
    batches without common padding.
    """

    def __init__(self, config: CustomTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.encoder = create_encoder(config, embed_dim)
        self.context_length = there = size_of(self.encoder, config)
        where = f"architecture.text: {config.class_path}"
        self.tokenizer = _tokenizer(self.encoder, self.context_length, where)
        self.reads_lengths = "lengths" in inspect.signature(self.encoder.forward).parameters
        tokens, wanted = self.tokenizer(TEXTS), f"it must be int64 [N, context_length], here {there}"
        _check_output(tokens, (2, there), torch.long, f"{where}: its tokenizer returns", "2 texts", wanted)
        with evaluation_mode(self), torch.no_grad():
            features = self(tokens)
            _check_features(features, embed_dim, f"{where}: forward", "text")
            alone = self(self.tokenizer.trim(tokens[:1]))
        same = torch.allclose(alone, features[:1], rtol=1e-3, atol=1e-4 * float(features.abs().max()))
        advice = "mask it with lengths, or leave lengths out of forward to read texts of full length only"
        require(same, f"{where}: padding changes the features; {advice}")

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """int64 ``[B, L]`` -> ``[B, D]``; padding never changes the features."""
        if not self.reads_lengths:
            missing = self.context_length - tokens.shape[1]
            return self.encoder(F.pad(tokens, (0, missing), value=self.tokenizer.pad_id))
        require(not is_traced(), "the text encoder reads its texts' lengths, which a traced graph cannot")
        lengths = list(lengths) if lengths else self.tokenizer.lengths(tokens).tolist()
        return self.encoder(tokens, lengths=lengths)


def _check_output(values: Any, shape: tuple[int, int], dtype: torch.dtype, returns: str, given: str, want: str) -> None:
    """Raise :class:`InputError` unless an encoder or tokenizer returned a tensor of this shape and type."""
    if not isinstance(values, Tensor):
        raise InputError(f"{returns} a {type(values).__name__}; {want}")
    if values.shape != shape or values.dtype != dtype:
        found = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise InputError(f"{returns} {found} for {given}; {want}")


def _check_features(features: Any, embed_dim: int, where: str, kind: str) -> None:
    given = f"a batch of 2 and embed_dim {embed_dim}"
    _check_output(features, (2, embed_dim), torch.float32, f"{where} returns", given, CONTRACT[kind])


def _tokenizer(encoder: nn.Module, context_length: int, where: str) -> TextTokenizer:
    own: Any = getattr(encoder, "tokenizer", None)
    if own is None:
        return CLIPTokenizer(context_length)
    if isinstance(own, TextTokenizer):
        theirs = own.context_length
        same = theirs == context_length
        require(same, f"{where}: its tokenizer has the context_length {theirs}, the encoder {context_length}")
        return own
    require(callable(own), f"{where}: its tokenizer is a {type(own).__name__}, which cannot be called with texts")
    light = not isinstance(getattr(own, "__self__", own), nn.Module)
    problem = "is a method of the encoder, whose weights every data worker would copy"
    require(light, f"{where}: its tokenizer {problem}; use a function or an object of a class")
    return CallableTokenizer(own, context_length)
