"""Read names of classes and files from the command line and its YAML files, before the parser gets its defaults."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lit_clip.cli.imports import import_modules
from lit_clip.errors import InputError, require
from lit_clip.tools.class_paths import find_object
from lit_clip.tools.messages import imported_class, nested_parameters, options_of, parameters
from lit_clip.tools.packaged import configuration_path
from lit_clip.tools.parts import describe_instance, qualified_name
from lit_clip.tools.text_files import parse_yaml, read_yaml
from lit_clip.tools.untrusted import hints_of, matches_plain_type, shortened
from lit_clip.training.optimizers import PARTS

CONFIG = ("--config", "-c")
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def options(words: Sequence[str], *names: str) -> list[str]:
    """Return the values of ``name value`` and ``name=value`` among command line words."""
    values = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names and (equals or i + 1 < len(words)):
            values.append(value if equals else words[i + 1])
    return values


def with_configuration_paths(words: Sequence[str]) -> list[str]:
    """Return a command line's words with paths in place of the names of packaged configurations.

    ``--rest`` becomes ``--rest+``, as it may be typed several times.
    """
    found = [re.sub(r"^--rest(?=$|=[^\[])", "--rest+", word) for word in words]
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in CONFIG and equals:
            found[i] = f"{name}={configuration_path(value, name)}"
        elif name in CONFIG and i + 1 < len(words):
            found[i + 1] = configuration_path(words[i + 1], name)
    return found


def refuse_data_typed_twice(words: Sequence[str]) -> None:
    """Raise :class:`InputError` for data of which the parser would forget all but the last."""
    for name in ("--data.train", "--data.val", "--data.keep"):
        once = len(options(words, name)) < 2
        require(once, f"{name}: typed more than once, and the last alone would count; type one list, '[a, b]'")


def checkpoint_path(words: Sequence[str], subcommand: str | None) -> str | None:
    """Return ``ckpt_path`` as typed, or from the last YAML file that has one."""
    in_files = (section.get("ckpt_path") for section in sections(words, subcommand))
    paths = options(words, "--ckpt_path") or [str(path) for path in in_files if path is not None][:1]
    return paths[-1] if paths and paths[-1] != "null" else None


def sections(words: Sequence[str], subcommand: str | None) -> Iterator[dict[str, Any]]:
    """Yield the YAML files' settings of a subcommand, the last file first; the packaged ones without a file."""
    defaults = [str(DEFAULTS)] if subcommand else []
    for config in reversed(options(words, *CONFIG) or defaults):
        values = _content(config, os.stat(config).st_mtime_ns if os.path.isfile(config) else None)
        if not isinstance(values, dict):
            raise InputError(f"{config}: not a YAML mapping of options; see --print_config")
        section = values.get(subcommand, values)
        if isinstance(section, dict):
            for name, value in section.items():
                zero = isinstance(value, str) and "\0" in value  # which no path of a file has
                require(not zero, f"{config}: {name}: {shortened(value)} may not hold a zero byte")
            yield section


@lru_cache(maxsize=8)
def _content(config: str, changed: int | None) -> Any:
    """Return the content of a YAML file, read once until it is ``changed``; callers leave it as it is."""
    return read_yaml(config)


def data_options(words: Sequence[str], subcommand: str | None) -> list[str]:
    """Return the options of the named data module; the parser only knows ``--data``."""
    in_files = (_value(section, ("data", "class_path")) for section in sections(words, subcommand))
    named = [*options(words, "--data")[-1:], *(each for each in in_files if isinstance(each, str))]
    return [f"--data.{name}" for name in nested_parameters(named[0])] if named else []


def import_encoders(words: Sequence[str], subcommand: str | None) -> None:
    """Import the modules of encoders that are named by class path."""
    found = [
        (tower, class_path)
        for architecture in _architectures(words, subcommand)
        for tower in ("image", "text")
        if isinstance(class_path := _value(architecture, (tower, "class_path")), str)
    ]
    for tower, class_path in dict.fromkeys(found):
        module = class_path.rpartition(".")[0]
        if module:  # without one, the architecture's own check says what is wrong
            import_modules([module], f"architecture.{tower}: {class_path}")


def _architectures(words: Sequence[str], subcommand: str | None) -> Iterator[Any]:
    """Yield the architectures in YAML files and on the command line, or the part of one that an option sets."""
    for section in sections(words, subcommand):
        yield _value(section, ("model", "architecture"))
    for option in ("--model.architecture", "--model.init_args.architecture"):
        for tower in ("", "image", "text"):
            for text in options(words, f"{option}.{tower}".rstrip(".")):
                with suppress(yaml.YAMLError):  # the parser says so
                    yield {tower: parse_yaml(text)} if tower else parse_yaml(text)


def part_options(model: type, words: Sequence[str], subcommand: str | None) -> list[str]:
    """Return the options of the model's parts; the parser only knows the parts."""
    found = []
    for part in PARTS:
        named = named_class(words, subcommand, "model", part) or _default(model, part)["class_path"]
        found += [f"--model.{part}.{name}" for name in parameters(named)]
    return found


def _default(model: type, part: str) -> dict[str, Any]:
    default = inspect.signature(model).parameters[part].default
    return {"class_path": qualified_name(default)} if inspect.isclass(default) else describe_instance(default)


def check_encoder_options(words: Sequence[str], subcommand: str | None) -> None:
    """Refuse single encoder settings on the command line where jsonargparse would take them for our transformer's."""
    typed = [word for word in words if word.startswith(("--model.architecture.image.", "--model.architecture.text."))]
    for section in sections(words, subcommand) if typed else ():
        for word in typed:
            encoder: Any = section
            for key in word[2:].split(".")[:3]:
                encoder = encoder.get(key) if isinstance(encoder, dict) else None
            encoder = encoder if isinstance(encoder, dict) else {}
            others = {"timm", "hugging_face", "class_path"} & encoder.keys()
            require(
                not others and not isinstance(encoder.get("layers"), list),  # a ResNet's stages
                f"{word.partition('=')[0]}: single settings of this encoder cannot be set on the command line; set "
                "them in the YAML file",
            )


def named_class(words: Sequence[str], subcommand: str | None, *keys: str) -> str | None:
    """Return the class named for ``--model``, or for one of its parts; a typed one, or the last YAML file's."""
    typed = [parse_yaml(value) for value in options(words, f"--{'.'.join(keys)}")]
    in_files = (_value(section, keys) for section in sections(words, subcommand))
    for value in (*reversed(typed), *in_files):
        named = value.get("class_path") if isinstance(value, Mapping) else value
        if isinstance(named, str) and (len(keys) > 1 or CLASS_PATH.fullmatch(named)):
            return named
    return None


def check_class(named: str, base: type, option: str) -> None:
    """Check that a class can be imported and is of a kind."""
    try:
        found = find_object(named)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{option}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise InputError(f"{option}: {named} is no subclass of {qualified_name(base)}")


def _value(section: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        section = section.get("init_args", section) if isinstance(section, Mapping) and key not in section else section
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


def model_defaults(
    model: type, words: Sequence[str], subcommand: str | None, packaged: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the defaults of the model's arguments: packaged ones, a checkpoint's, and each part's class.

    A part whose class is named keeps nothing of another class's settings.
    """
    named = named_class(words, subcommand, "model")
    hints = hints_of(model) | (hints_of(imported) if named and (imported := imported_class(named)) else {})
    kept = {name: saved[name] for name in hints.keys() & saved.keys()}
    for name in kept.keys() - {"architecture"}:  # which has a rule of its own
        require(
            matches_plain_type(kept[name], hints[name]),
            f"--ckpt_path: its setting {name}, {shortened(kept[name])}, is not of the kind that a checkpoint holds",
        )
    defaults = {**packaged, **kept}
    for part in PARTS:
        named, default = named_class(words, subcommand, "model", part), _default(model, part)
        if named and _other_settings(words, subcommand, part, named):
            named = None  # those of the default class, which a later file or option then replaces
        if part in packaged and (named is None or _same_class(named, default["class_path"])):
            default = {**default, "init_args": packaged[part]}
        defaults[part] = {"class_path": named} if named and not _same_class(named, default["class_path"]) else default
    return defaults


def _other_settings(words: Sequence[str], subcommand: str | None, part: str, named: str) -> bool:
    """Return whether a file sets, without a class, what the class that is named elsewhere does not have."""
    known = parameters(named)
    values = (_value(section, ("model", part)) for section in sections(words, subcommand))
    return any(
        isinstance(value, Mapping) and "class_path" not in value and value.get("init_args", value).keys() - known
        for value in values
    )


def _same_class(named: str, saved: str) -> bool:
    """Return whether two import paths may be of one class: packages offer it under a shorter path."""
    same_package = "." not in named or saved.startswith(named.partition(".")[0])
    return named.rpartition(".")[2] == saved.rpartition(".")[2] and same_package


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
