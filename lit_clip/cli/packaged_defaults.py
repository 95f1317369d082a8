"""Defaults of LightningCLI's commands without ``--config``: those of ``fit.yaml`` beside this file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.tools.messages import options_of
from lit_clip.tools.text_files import read_yaml

DEFAULTS = Path(__file__).with_name("fit.yaml")


def use_packaged_defaults(parser: Any, words: Sequence[str]) -> dict[str, Any]:
    """Make the settings of :data:`DEFAULTS` a parser's defaults, except the model's, which are returned.

    With ``--model.pretrained`` there are none of the model: they are for training from scratch.
    """
    settings = read_yaml(DEFAULTS)
    if any(word.partition("=")[0] == "--model.pretrained" for word in words):
        settings["model"] = {}
    model: dict[str, Any] = settings.pop("model")
    known = [option.removeprefix("--") for option in options_of(parser)]
    parser.set_defaults(dict(_options(settings, known)))
    return model


def _options(values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options that a mapping sets; a mapping is split up if the parser has options for its entries."""
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in known):
            yield from _options(value, known, f"{name}.")
        else:
            yield name, value
