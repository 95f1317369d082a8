"""Types that the parser misreads without help.

Encoders by class path would be taken for subclasses of the others' settings. ``numbers.Number``, by which torchvision's
transforms annotate angles, would be taken for a class: a number is accepted and then cannot be written to the config.
"""

import dataclasses
from functools import partial
from numbers import Number
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import register_type

from lit_clip.cli.imports import import_modules
from lit_clip.errors import require
from lit_clip.models.custom_config import CustomEncoderConfig, CustomImageConfig, CustomTextConfig


def _read(kind: type[CustomEncoderConfig], value: Any) -> CustomEncoderConfig:
    values = value.as_dict() if isinstance(value, Namespace) else value
    if not isinstance(values, dict) or "class_path" not in values:
        raise ValueError("names no class_path")  # the parser then tries the other kinds
    known = [each.name for each in dataclasses.fields(kind)]
    for name in values:
        require(name in known, f"{values['class_path']} has the entry {name!r}; put it into init_args")
    module = str(values["class_path"]).rpartition(".")[0]
    if module:  # without one, the architecture's own check says what is wrong
        import_modules([module], values["class_path"])
    return kind(**values)


def _written(encoder: CustomEncoderConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(encoder).items() if value}


def _number(value: Any) -> int | float:
    require(isinstance(value, int | float) and not isinstance(value, bool), f"{value!r} is not a number")
    return value


def register_types() -> None:
    """Register the types with the parser; a second call has no effect."""
    register_type(Number, serializer=_number, deserializer=_number, fail_already_registered=False)
    for kind in (CustomImageConfig, CustomTextConfig):
        register_type(kind, serializer=_written, deserializer=partial(_read, kind), fail_already_registered=False)
