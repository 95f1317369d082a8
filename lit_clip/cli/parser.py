"""The parser of commands with ``--config``: Lightning's parser, with packaged configurations and our messages."""

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from numbers import Number
from typing import Any

import lightning
import yaml
from jsonargparse import ActionConfigFile, Namespace  # pyright: ignore[reportPrivateImportUsage]  # it is documented

# jsonargparse 4.53: the only way to read what is given before it is complete. Lightning reads it above the defaults at
# once, so that a checkpoint's settings could only come before both or after both.
from jsonargparse._common import parser_context
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from lit_clip import secrets
from lit_clip.cli.plain_help import PlainHelp, short_help
from lit_clip.errors import InputError, require
from lit_clip.models.external_config import CustomEncoderConfig, CustomImageConfig, CustomTextConfig
from lit_clip.tools.class_paths import find_object, import_listed, import_modules
from lit_clip.tools.messages import OptionParser, nested_parameters
from lit_clip.tools.own_files import configuration_path
from lit_clip.tools.parts import qualified_name
from lit_clip.tools.reading import read_yaml
from lit_clip.tools.untrusted import shortened

CONFIG = ("-c", "--config")
DATA = "datamodules.Captions"  # whose options are suggested
REFERENCE = "${"  # OmegaConf's
ENCODER_KIND = re.compile(r"--model\.(init_args\.)?architecture\.(image|text)\.(timm|hugging_face|class_path)")


class ConfigFile(ActionConfigFile):
    """``--config FILE``, or the name of a packaged configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = configuration_path(values, option_string or CONFIG[1])
        # The parser names no file in its errors, and takes the second of two equal keys.
        settings = read_yaml(path)
        if not isinstance(settings, dict):
            raise InputError(f"{path}: not a YAML mapping of options; see --print_config")
        for name, kinds in {"model": dict | str | None, "trainer": dict}.items():  # options would replace other values
            if not isinstance(value := settings.get(name, {}), kinds):
                raise InputError(f"{path}: {name}: {shortened(value)} must be a mapping of settings")
        _check_encoder_options(parser.args, settings)
        self.apply_config(parser, cfg, self.dest, path)


def _check_encoder_options(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse single settings of a file's encoder that is not our transformer: jsonargparse would take it for ours."""
    model: Any = settings.get("model")
    model = model.get("init_args") or model if isinstance(model, Mapping) else {}
    architecture = model.get("architecture")
    for word in words if isinstance(architecture, Mapping) else ():
        if option := re.match(r"--model\.(?:init_args\.)?architecture\.(image|text)\.[^=]*", word):
            encoder = architecture.get(option[1]) or {}  # with a list of layers: a ResNet's stages
            if {"timm", "hugging_face", "class_path"} & encoder.keys() or isinstance(encoder.get("layers"), list):
                raise InputError(f"{option[0]}: single settings of this encoder are set in the YAML file")


class Parser(OptionParser, LightningArgumentParser):
    """Lightning's parser, with plain help and one-line errors; it writes settings as they were typed."""

    typed: Mapping[str, Any] = {}  # with their references, such as ``${oc.env:NAME}``

    def __init__(self, **options: Any) -> None:
        ours = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False, "print_config": None}
        super().__init__(**{"formatter_class": PlainHelp, **ours, **options})

    @classmethod
    def of_command(cls, command: str) -> "Parser":
        """Return the parser of a whole command line."""
        parser = cls(dump_header=[f"lightning.pytorch=={lightning.__version__}"])
        parser.command = command
        parser.add_argument(*CONFIG, action=ConfigFile, help="YAML file, or the name of a packaged one.")
        what = "Print the configuration after applying all other arguments, and exit."
        parser.add_argument(
            "--print_config", nargs="?", const="", default=argparse.SUPPRESS, metavar="FLAGS", help=what
        )
        return parser

    def format_help(self, *args: Any, **options: Any) -> str:
        if not self.command or ("--help", "all") in pairwise(self.args):
            import_listed()
            return super().format_help(*args, **options)
        return short_help(self.command)

    def options(self) -> list[str]:
        known = [name for name in super().options() if name != "--trainer.min_epochs"]  # --epochs is the other
        return [*known, *(f"--data.{name}" for name in nested_parameters(DATA))]

    def given(self, words: Sequence[str], before: Namespace | None = None) -> Namespace:
        """Return only the typed settings, over the files of ``--config``, over ``before``."""
        with parser_context(lenient_check=True):
            return self.parse_args(_in_order(words), namespace=before, defaults=False)

    def complete(self, given: Namespace) -> Namespace:
        """Return checked settings: the given ones over the defaults, with references resolved."""
        self.typed = self.plain(given)
        _check_whole(self.typed)
        return self.parse_object(given.clone())  # into which it would write the defaults of classes

    def plain(self, settings: Namespace, **options: Any) -> dict[str, Any]:
        """Return settings as plain values."""
        how = {"skip_validation": True, "skip_unset": False, **options}
        return json.loads(self.dump(settings, format="json", **how))

    def as_typed(self, settings: Namespace, **options: Any) -> dict[str, Any]:
        """Return plain settings for a configuration that repeats a run: references as typed, without passwords."""
        return _as_typed(self.plain(settings, **options), self.typed)

    def written(self, settings: Namespace, **options: Any) -> str:
        """Return the text of :meth:`as_typed`."""
        header = "".join(f"# {line}\n" for line in self.dump_header or ())
        return header + yaml.safe_dump(self.as_typed(settings, **options), sort_keys=False, allow_unicode=True)


def _in_order(words: Sequence[str]) -> list[str]:
    """Put ``--config`` first, because typed words win, and words that name an encoder's kind last.

    Of two values the parser takes the last. It takes an encoder for the first class that has the options so far, so
    that ``image_size`` behind ``timm`` would make it our transformer without a word.
    """
    files, typed, kinds, rest = [], [], [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        chosen = files if name in CONFIG else kinds if ENCODER_KIND.fullmatch(name) else typed
        chosen += [word] if equals or chosen is typed else [word, *islice(rest, 1)]
    return [*files, *typed, *kinds]


def _as_typed(value: Any, typed: Any) -> Any:
    if isinstance(value, dict):
        others = typed if isinstance(typed, dict) else {}
        return {key: _as_typed(each, others.get(key)) for key, each in value.items()}
    if isinstance(typed, str) and REFERENCE in typed:
        return secrets.without_secrets(typed)
    if isinstance(value, list):
        others = typed if isinstance(typed, list) and len(typed) == len(value) else [None] * len(value)
        return [_as_typed(each, other) for each, other in zip(value, others, strict=True)]
    return secrets.without_secrets(value) if isinstance(value, str) else value


def _check_whole(settings: Any, option: str = "") -> None:
    """Refuse an address from a saved configuration if its password was not saved."""
    if isinstance(settings, str) and secrets.is_hidden(settings):
        raise InputError(
            f"{option}: *** stands for a secret that was not saved; type --{option} with it, or with "
            "${oc.env:NAME} in its place"
        )
    lists = enumerate(settings) if isinstance(settings, list) else ()
    for key, value in settings.items() if isinstance(settings, dict) else lists:
        _check_whole(value, option if key == "init_args" else f"{option}.{key}".lstrip("."))


def named_model(words: Sequence[str], base: type) -> str | None:
    """Return the subclass typed for ``--model`` or named in the last file, before the parser is made: it changes it."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--model")
    look.add_argument(*CONFIG, action="append", default=[])
    try:
        typed, _ = look.parse_known_args(words)
    except argparse.ArgumentError:  # the parser itself says so
        return None
    files = [read_yaml(configuration_path(name, CONFIG[1])) for name in reversed(typed.config)]
    models = [typed.model, *(file.get("model") for file in files if isinstance(file, Mapping))]
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
    """Register types that parsers misread without help; a second call has no effect.

    Encoders by class path would be taken for subclasses of the others' settings. ``numbers.Number``, by which
    torchvision's transforms annotate angles, would be taken for a class: a number is accepted and then cannot be
    written to the config.
    """
    register_type(Number, serializer=_number, deserializer=_number, fail_already_registered=False)
    for kind in (CustomImageConfig, CustomTextConfig):
        register_type(kind, serializer=_written, deserializer=partial(_read, kind), fail_already_registered=False)
