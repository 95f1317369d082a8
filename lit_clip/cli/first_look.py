"""Read what is needed from a command line before its parser is made, from its words and files."""

import inspect
import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from lit_clip.cli.parser import CONFIG
from lit_clip.errors import InputError
from lit_clip.tools.class_paths import find_object
from lit_clip.tools.packaged import configuration_path
from lit_clip.tools.parts import qualified_name
from lit_clip.tools.text_files import read_yaml


def named_model(words: Sequence[str], base: type) -> str | None:
    """Return the subclass typed for ``--model`` or named in the last file; it changes the parser."""
    typed, files = _look(words)
    models = [typed, *(file.get("model") for file in files)]
    paths = [each.get("class_path") if isinstance(each, Mapping) else each for each in models]
    named = next((each for each in paths if isinstance(each, str) and "." in each.strip(".")), None)
    if named is not None:
        try:
            found = find_object(named)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"model: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise InputError(f"model: {named} is no subclass of {qualified_name(base)}")
    return named


def check_encoder_options(words: Sequence[str]) -> None:
    """Refuse single settings of an encoder that is not our transformer: jsonargparse would take it for ours."""
    found = [re.match(r"--model\.(?:init_args\.)?architecture\.(image|text)\.", word) for word in words]
    typed = [each for each in found if each]
    for file in _look(words)[1] if typed else ():
        model: Any = file.get("model")
        settings: Any = (model.get("init_args") or model) if isinstance(model, Mapping) else {}
        architecture = settings.get("architecture")
        for option in typed if isinstance(architecture, Mapping) else ():
            encoder = architecture.get(option[1]) or {}
            if {"timm", "hugging_face", "class_path"} & encoder.keys() or isinstance(encoder.get("layers"), list):
                name = option.string.partition("=")[0]  # a list of layers: a ResNet's stages
                raise InputError(f"{name}: single settings of this encoder are set in the YAML file")


def _look(words: Sequence[str]) -> tuple[str | None, list[Mapping[str, Any]]]:
    """Return the typed ``--model``, and the settings in files, the last file first."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    parser.add_argument(*CONFIG, action="append", default=[])
    try:
        found, _ = parser.parse_known_args(words)
    except ArgumentError:  # the parser itself says so
        return None, []
    files = [read_yaml(configuration_path(name, CONFIG[1])) for name in reversed(found.config)]
    return found.model, [each for each in files if isinstance(each, Mapping)]
