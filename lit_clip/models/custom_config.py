"""Architectures of your own encoders, named by class path; :mod:`lit_clip.models.custom` creates them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from lit_clip.errors import InputError, require
from lit_clip.models.size import Size, normalised
from lit_clip.tools.parts import is_plain, qualified_name
from lit_clip.tools.untrusted import check_fields


@dataclass
class CustomEncoderConfig:
    """Your own encoder; :mod:`lit_clip.models.custom` says what its class must offer.

    Attributes:
        class_path: the class, as ``module.Class``; in Python also the class itself.
        init_args: its arguments beside ``embed_dim``; plain values, as a checkpoint holds them.
    """

    class_path: str | type
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.class_path
        self.class_path = path = qualified_name(path) if isinstance(path, type) else path
        for name, value in self.init_args.items() if isinstance(self.init_args, Mapping) else ():
            if not is_plain(value):
                can = "a checkpoint can only hold numbers, strings, lists and mappings"
                raise InputError(f"architecture: init_args.{name} of {path} is a {type(value).__name__}; {can}")
        check_fields(self, "architecture", "class_path")
        parts = path.split(".") if isinstance(path, str) else []
        named = len(parts) >= 2 and all(part.isidentifier() for part in parts)
        require(named, f"architecture: class_path {path!r} must be a module and a class of it: my_encoder.MyEncoder")


@dataclass
class CustomImageConfig(CustomEncoderConfig):
    """Your own image encoder; its size is read from it when the model is created."""

    image_size: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = None if self.image_size is None else normalised(self.image_size)


@dataclass
class CustomTextConfig(CustomEncoderConfig):
    """Your own text encoder; its context length is read when the model is created, and 0 until then."""

    context_length: Annotated[int, Meta(ge=0, le=65536)] = 0

    @property
    def tokenizer(self) -> None:
        """None: the encoder's class has its own tokenizer."""


def how_to_import(class_path: str) -> str:
    """Return instructions for importing a missing class."""
    module = class_path.rpartition(".")[0]
    return f"import {module} first (in Python), or name it: lit-clip --import {module} COMMAND ..."
