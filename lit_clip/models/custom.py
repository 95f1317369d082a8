"""Encoders of your own, named by class path beside ours and those of other libraries.

An **image encoder** is a ``torch.nn.Module`` with

- ``__init__(self, embed_dim, ...)``: further arguments come from ``init_args``,
- ``image_size``: an attribute, the side in pixels or ``(height, width)``,
- ``forward(self, images)``: float ``[B, 3, H, W]``, normalised -> ``[B, embed_dim]``.

A **text encoder** is a ``torch.nn.Module`` with

- ``__init__(self, embed_dim, ...)``,
- ``context_length``: an attribute, the maximum number of tokens,
- ``forward(self, tokens)``: int64 ``[B, context_length]``, padded at the end -> ``[B, embed_dim]``; or
  ``forward(self, tokens, lengths)``: int64 ``[B, L]`` with ``L`` at most ``context_length``, and the number of tokens
  of each text before its padding as a list; padding then must not change the features,
- ``tokenizer`` (optional): a :class:`lit_clip.models.tokenizer.TextTokenizer`, or any callable that turns a list of
  texts into int64 ``[N, context_length]``, padded with its ``pad_id`` (0 if it has none). By default CLIP's.

Optional for both: ``blocks``, a list of modules in order, for ``freeze: {unlock_last: n}``, ``layer_decay``, LoRA,
activation checkpointing and FSDP's units.

A class is only ever looked up among the modules that are imported already, so that a checkpoint, which names it, cannot
make us import anything.

Shapes: B batch, L tokens, N texts.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clip.errors import InputError, require
from lit_clip.models.config import CLIPConfig
from lit_clip.models.custom_config import CustomEncoderConfig, CustomImageConfig, CustomTextConfig, how_to_import
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.models.size import Size, height_width, normalised
from lit_clip.models.tokenizer import CLIPTokenizer, TextTokenizer
from lit_clip.models.transformer import check_images, is_traced
from lit_clip.tools.parts import script_name

CONTRACT = {
    "image": "an image encoder is a torch.nn.Module with __init__(embed_dim, ...), image_size, and "
    "forward(images [B, 3, H, W]) -> float32 [B, embed_dim]",
    "text": "a text encoder is a torch.nn.Module with __init__(embed_dim, ...), context_length, and "
    "forward(tokens [B, context_length]) -> float32 [B, embed_dim]",
}
TEXTS = ["a", "a photo of a dog"]  # of different lengths in any tokenizer of words, bytes or characters


def custom_encoders(config: CLIPConfig) -> list[tuple[Literal["image", "text"], str]]:
    """Return the towers that are named by class path, with that path."""
    towers: list[tuple[Literal["image", "text"], Any]] = [("image", config.image), ("text", config.text)]
    return [(name, str(tower.class_path)) for name, tower in towers if isinstance(tower, CustomEncoderConfig)]


def find_class(class_path: str) -> type[nn.Module] | None:
    """Return a class of a module that is imported already, or of the script that runs; None if it is not there.

    Imports nothing.
    """
    module, _, name = class_path.rpartition(".")
    if module not in sys.modules and module == script_name():
        module = "__main__"
    # Not getattr: a package may import a submodule when asked for a name.
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


def create_encoder(config: CustomImageConfig | CustomTextConfig, embed_dim: int) -> nn.Module:
    """Create an encoder in float32 on the CPU, whatever the default device is."""
    kind = "image" if isinstance(config, CustomImageConfig) else "text"
    path = str(config.class_path)
    found = find_class(path)
    if found is None and path.rpartition(".")[0] in {*sys.modules, script_name()}:
        raise InputError(f"architecture.{kind}: {path.rpartition('.')[0]} has no class {path.rpartition('.')[2]}")
    if found is None:
        raise InputError(f"architecture.{kind}: {path} is not imported; {how_to_import(path)}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)) or found.forward is nn.Module.forward:
        problem = (
            "has no forward" if isinstance(found, type) and issubclass(found, nn.Module) else "is no torch.nn.Module"
        )
        raise InputError(f"architecture.{kind}: {path} {problem}; {CONTRACT[kind]}")
    _check_arguments(found, config.init_args, f"architecture.{kind}: {path}", kind)
    with torch.device("cpu"):
        return found(embed_dim=embed_dim, **config.init_args)


def _check_arguments(found: type, init_args: dict[str, Any], where: str, kind: str) -> None:
    parameters = inspect.signature(found).parameters
    require("embed_dim" in parameters, f"{where} has no argument embed_dim; {CONTRACT[kind]}")
    require("embed_dim" not in init_args, f"{where}: embed_dim is architecture.embed_dim; leave it out of init_args")
    known = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    any_name = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for name in () if any_name else init_args:
        if name not in known:
            others = ", ".join(each for each in known if each != "embed_dim") or "none"
            raise InputError(f"{where} has no argument {name!r}; init_args can be: {others}")
    needed = [name for name in known if parameters[name].default is inspect.Parameter.empty and name != "embed_dim"]
    for name in needed:
        require(name in init_args, f"{where} needs the argument {name!r}; set it in init_args")


def encoder_image_size(config: CustomImageConfig, embed_dim: int) -> Size:
    """Return an encoder's ``image_size``."""
    return _image_size(create_encoder(config, embed_dim), config)


def encoder_context_length(config: CustomTextConfig, embed_dim: int) -> int:
    """Return an encoder's ``context_length``."""
    return _context_length(create_encoder(config, embed_dim), config)


def _image_size(encoder: nn.Module, config: CustomImageConfig) -> Size:
    size: Any = getattr(encoder, "image_size", None)
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise InputError(f"architecture.image: {config.class_path} has the image_size {size!r}; {CONTRACT['image']}")
    return normalised((sides[0], sides[1]))


def _context_length(encoder: nn.Module, config: CustomTextConfig) -> int:
    length: Any = getattr(encoder, "context_length", None)
    if type(length) is not int or length < 3:  # start, a word, end
        raise InputError(
            f"architecture.text: {config.class_path} has the context_length {length!r}, at least 3; {CONTRACT['text']}"
        )
    return length


class CustomImageEncoder(nn.Module):
    """An image encoder of your own (``encoder``), checked with one small batch when it is created."""

    def __init__(self, config: CustomImageConfig, embed_dim: int) -> None:
        super().__init__()
        assert config.image_size is not None  # with_external_settings has filled it in
        self.encoder = create_encoder(config, embed_dim)
        self.image_size = config.image_size
        where, now = f"architecture.image: {config.class_path}", _image_size(self.encoder, config)
        require(now == config.image_size, f"{where} has the image_size {now} now, and {config.image_size} there")
        with evaluation_mode(self), torch.no_grad():
            features = self(torch.zeros(2, 3, *height_width(self.image_size)))
        _check_features(features, 2, embed_dim, f"{where}; {CONTRACT['image']}")

    def features(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``; a projection, if any, is the encoder's secret."""
        return self(images)

    def project(self, features: Tensor) -> Tensor:
        """``[B, D]`` -> ``[B, D]``, unchanged."""
        return features

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float, normalised -> ``[B, D]``."""
        check_images(images, self.image_size)
        return self.encoder(images)


class CustomTextEncoder(nn.Module):
    """A text encoder of your own (``encoder``), checked with one small batch when it is created.

    Attributes:
        tokenizer: the encoder's, or CLIP's.
        reads_lengths: whether the encoder is told the texts' lengths, and reads batches without common padding.
    """

    def __init__(self, config: CustomTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.encoder = create_encoder(config, embed_dim)
        self.context_length = config.context_length
        where, now = f"architecture.text: {config.class_path}", _context_length(self.encoder, config)
        require(
            now == self.context_length, f"{where} has the context_length {now} now, and {self.context_length} there"
        )
        self.tokenizer = _tokenizer(self.encoder, self.context_length, where)
        self.reads_lengths = "lengths" in inspect.signature(self.encoder.forward).parameters
        tokens = self.tokenizer(TEXTS)
        _check_tokens(tokens, self.context_length, where)
        with evaluation_mode(self), torch.no_grad():
            features = self(tokens)
            _check_features(features, 2, embed_dim, f"{where}; {CONTRACT['text']}")
            alone = self(self.tokenizer.trim(tokens[:1]))
        if not torch.allclose(alone, features[:1], rtol=1e-3, atol=1e-4 * float(features.abs().max())):
            raise InputError(
                f"{where}: padding changes the features; mask it with lengths, or leave lengths out of forward to read "
                "texts of full length only"
            )

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """int64 ``[B, L]`` -> ``[B, D]``; padding never changes the features."""
        if not self.reads_lengths:
            return self.encoder(self._padded(tokens, self.context_length))
        require(not is_traced(), "the text encoder reads its texts' lengths, which a traced graph cannot")
        lengths = list(lengths) if lengths else self.tokenizer.lengths(tokens).tolist()
        return self.encoder(tokens, lengths=lengths)

    def _padded(self, tokens: Tensor, length: int) -> Tensor:
        return F.pad(tokens, (0, length - tokens.shape[1]), value=self.tokenizer.pad_id)


def custom_blocks(encoder: CustomImageEncoder | CustomTextEncoder) -> list[nn.Module]:
    """Return an encoder's ``blocks``; empty if it has none."""
    blocks: Any = getattr(encoder.encoder, "blocks", None)
    blocks = list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential | list | tuple) else []
    inside = {id(module) for module in encoder.encoder.modules()}
    if not all(id(block) in inside for block in blocks):
        raise InputError(f"architecture: `blocks` of {type(encoder.encoder).__name__} holds more than modules of it")
    return blocks


def _check_features(features: Any, count: int, embed_dim: int, contract: str) -> None:
    where, _, contract = contract.partition("; ")
    if not isinstance(features, Tensor):
        raise InputError(f"{where}: forward returns a {type(features).__name__}; {contract}")
    if features.shape != (count, embed_dim) or features.dtype != torch.float32:
        raise InputError(
            f"{where}: forward returns {str(features.dtype).removeprefix('torch.')} {list(features.shape)} for a batch "
            f"of {count} and embed_dim {embed_dim}; {contract}"
        )


# Tokenizers


class CallableTokenizer(TextTokenizer):
    """A tokenizer of your own: any callable that turns a list of texts into int64 ``[N, context_length]``.

    Args:
        function: the callable; picklable, as data workers receive it. If it has ``pad_id`` or ``decode`` they are used.
        context_length: tokens per text.
    """

    def __init__(self, function: Callable[[list[str]], Tensor], context_length: int) -> None:
        self.function, self.context_length = function, context_length
        self.pad_id = int(getattr(function, "pad_id", 0))

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}, not a string: {text!r}")
        return self.function(texts) if texts else torch.zeros(0, self.context_length, dtype=torch.long)

    def count(self, text: str) -> int:
        """Count the tokens after truncation: what was cut off is unknown."""
        return int(self.lengths(self([text]))[0])

    def lengths(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return ((tokens != self.pad_id) * positions).amax(dim=1).clamp(min=1)

    def with_context(self, context_length: int) -> TextTokenizer:
        if context_length == self.context_length:
            return self
        raise InputError(
            f"context_length: this tokenizer's is {self.context_length}; set it in the encoder's init_args"
        )

    def decode(self, tokens: Sequence[int]) -> str:
        ids = [token for token in tokens if token != self.pad_id]
        decode: Any = getattr(self.function, "decode", None)
        return str(decode(ids)) if decode else " ".join(map(str, ids))


def _tokenizer(encoder: nn.Module, context_length: int, where: str) -> TextTokenizer:
    own: Any = getattr(encoder, "tokenizer", None)
    if own is None:
        return CLIPTokenizer(context_length)
    if isinstance(own, TextTokenizer):
        require(
            own.context_length == context_length,
            f"{where}: its tokenizer has the context_length {own.context_length}, the encoder {context_length}",
        )
        return own
    require(callable(own), f"{where}: its tokenizer is a {type(own).__name__}, which cannot be called with texts")
    if isinstance(getattr(own, "__self__", None), nn.Module) or isinstance(own, nn.Module):
        raise InputError(
            f"{where}: its tokenizer is a method of the encoder, whose weights every data worker would copy; use a "
            "function or an object of a class"
        )
    return CallableTokenizer(own, context_length)


def _check_tokens(tokens: Any, context_length: int, where: str) -> None:
    if not isinstance(tokens, Tensor):
        raise InputError(f"{where}: its tokenizer returns a {type(tokens).__name__}, not int64 [N, {context_length}]")
    if tokens.shape != (len(TEXTS), context_length) or tokens.dtype != torch.long:
        raise InputError(
            f"{where}: its tokenizer returns {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)} for "
            f"{len(TEXTS)} texts; it must be int64 [N, context_length], here {context_length}"
        )
