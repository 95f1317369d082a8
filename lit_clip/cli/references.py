"""References in settings: resolved for the run, within bounds, and kept in what is saved and printed.

jsonargparse replaces ``${...}`` before it creates anything, so that a configuration saved after that would hold the
passwords of the environment. Here each setting that an environment variable has a part in is noted with its reference,
which is written in place of the value: into ``fit_config.yaml`` and by ``--print_config``.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import yaml
from jsonargparse import _core, _loaders_dumpers, set_dumper, set_loader
from jsonargparse._common import parser_context
from jsonargparse._loaders_dumpers import yaml_dump, yaml_load
from jsonargparse._optionals import get_omegaconf_loader
from omegaconf import OmegaConf
from omegaconf.base import Container
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from lit_clip import secrets
from lit_clip.errors import InputError, require
from lit_clip.tools.text_files import check_yaml

MOST_RESOLVED = 5_000  # values that references may stand for, directly and through others
LONGEST = 20_000  # characters of a text with references
MODE = "omegaconf+"  # of the parser
_noted: dict[tuple[Any, ...], tuple[str, bool]] = {}  # a setting's place -> its text, and whether its value was null
_reads: list[tuple[str, str]] = []  # variables of the environment that were read, with their values
_writing: ContextVar[int] = ContextVar("_writing", default=0)  # contexts of `dumping`, each within the one before


def use_references() -> None:
    """Have jsonargparse read YAML within bounds, and resolve references by :func:`_resolve`; once is enough."""
    forget_references()
    OmegaConf.register_resolver("oc.env", _read_environment, replace=True, annotation_validation="off")
    setattr(_core, "omegaconf_apply", _resolve)  # noqa: B010  # its only caller imports it by name
    setattr(_loaders_dumpers, "yaml_load", _load)  # noqa: B010  # for texts where any value may be
    for mode, load in (("yaml", _load), (MODE, get_omegaconf_loader(MODE))):
        set_loader(mode, load, (yaml.YAMLError,))
    set_dumper("yaml", _dump)


def forget_references() -> None:
    """Forget the settings of the command line before."""
    _noted.clear()
    _reads.clear()


def _items(settings: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(settings, Mapping):
        yield from settings.items()
    elif isinstance(settings, list | tuple):
        yield from enumerate(settings)


def check_settings_are_whole(settings: Any, place: tuple[Any, ...] = ()) -> None:
    """Refuse a saved configuration's address whose password was not saved."""
    if isinstance(settings, str):
        option = ".".join(str(key) for key in place if key != "init_args")
        require(
            not secrets.is_hidden(settings),
            f"{option}: *** stands for a secret that was not saved; type --{option} with it, or with "
            f"{secrets.reference('NAME')} in its place",
        )
    for key, value in _items(settings):
        check_settings_are_whole(value, (*place, key))


def with_environment(text: Any) -> Any:
    """Return a text of a saved configuration with the values of the variables that it refers to."""
    if not isinstance(text, str):
        return text
    return re.sub(r"\$\{oc\.env:([^},]+)[^}]*\}", lambda found: os.environ.get(found[1], found[0]), text)


@contextmanager
def dumping() -> Iterator[None]:
    """Within this context a parser writes references, and no passwords; within two values as they are."""
    token = _writing.set(_writing.get() + 1)
    try:
        yield
    finally:
        _writing.reset(token)


def _dump(data: Any) -> str:
    return yaml_dump(_with_references(data, ()) if _writing.get() == 1 else data)


def _with_references(value: Any, place: tuple[Any, ...]) -> Any:
    text, was_null = _noted.get(place, ("", False))
    if text and (value is not None or was_null):
        return secrets.without_passwords(text)
    if isinstance(value, Mapping):
        return {key: _with_references(item, (*place, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_references(item, (*place, number)) for number, item in enumerate(value)]
    return secrets.without_secrets(value) if isinstance(value, str) else value


def _load(text: str) -> Any:
    check_yaml(text)
    return yaml_load(text)


def _read_environment(*arguments: Any) -> Any:
    """OmegaConf's ``oc.env``, noted; the value is hidden in messages if it is a secret."""
    value, name = oc.env(*arguments), str(arguments[0])
    _reads.append((name, os.environ.get(name, "")))
    _remember_secrets(_reads[-1:], "", "")
    return value


def _remember_secrets(reads: list[tuple[str, str]], setting: str, text: Any) -> None:
    """Hide values of variables in messages that are secrets by themselves, by their setting or in its address."""
    for name, value in reads:
        in_address = isinstance(text, str) and bool(value) and secrets.is_secret_in_address(value, text)
        if in_address or secrets.is_secret(name, value) or secrets.is_secret(setting, ""):
            secrets.remember(value, secrets.reference(name))


def _resolve(parser: Any, settings: Any) -> Any:
    """Return settings without references, and note those with a part from the environment; see `omegaconf_apply`."""
    if "${" not in str(settings):
        return settings
    with parser_context(path_dump_preserve_relative=True), dumping():
        text = parser.dump(settings, skip_validation=True, skip_unset=False, skip_link_targets=False)
    return parser._apply_actions(_Resolution().run(text))


class _Resolution:
    """Resolves a tree of settings, and counts: a chain of ``${a}${a}`` doubles with each link, as aliases do."""

    def __init__(self) -> None:
        self._resolved, self._largest = 0, 0
        self._place: tuple[Any, ...] = ()

    def run(self, text: str) -> Any:
        """Return the plain values of a YAML document."""
        look_up, evaluate = Container._resolve_node_interpolation, Container.resolve_parse_tree

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(container: Any, *arguments: Any, **options: Any) -> Any:
                result = method(container, *arguments, **options)
                self._count(result)
                return result

            return call

        setattr(Container, "_resolve_node_interpolation", counted(look_up))  # noqa: B010
        setattr(Container, "resolve_parse_tree", counted(evaluate))  # noqa: B010
        try:
            tree: Any = OmegaConf.create(text)
            return self._plain(tree, OmegaConf.to_container(tree), ())
        except (RecursionError, InputError, OmegaConfBaseException) as error:
            place = ".".join(str(key) for key in self._place)
            if self._resolved > MOST_RESOLVED or self._largest > LONGEST:
                raise InputError(
                    f"{place}: its references (${{...}}) stand for more than {MOST_RESOLVED:,} values, or for a text "
                    f"of more than {LONGEST:,} characters"
                ) from error
            if isinstance(error, RecursionError) or RecursionError.__name__ in str(error):
                raise InputError(
                    f"{place}: its references (${{...}}) stand for each other, or are too many in a row"
                ) from error
            raise
        finally:
            setattr(Container, "_resolve_node_interpolation", look_up)  # noqa: B010
            setattr(Container, "resolve_parse_tree", evaluate)  # noqa: B010

    def _plain(self, tree: Any, texts: Any, place: tuple[Any, ...]) -> Any:
        values = {}
        for key, text in _items(texts):
            reads, self._place = len(_reads), (*place, key)
            value = text if OmegaConf.is_missing(tree, key) else tree[key]
            if isinstance(text, dict | list):
                value = self._plain(value, text, self._place)
            elif OmegaConf.is_config(value):
                value = self._expanded(value)
            if len(_reads) > reads and isinstance(text, str):
                _noted[self._place] = text, value is None
                names = [each for each in self._place if isinstance(each, str)]
                _remember_secrets(_reads[reads:], names[-1] if names else "", value)
            values[key] = value
        return values if isinstance(texts, dict) else list(values.values())

    def _expanded(self, tree: Any) -> Any:
        """Return the plain values of lists or mappings that a reference stands for."""
        keys = tree if OmegaConf.is_dict(tree) else range(len(tree))
        values = {}
        for key in keys:
            self._count(key)
            value = tree[key]
            values[key] = self._expanded(value) if OmegaConf.is_config(value) else value
        return values if OmegaConf.is_dict(tree) else list(values.values())

    def _count(self, value: Any) -> None:
        self._resolved += 1
        self._largest = max(self._largest, len(value) if isinstance(value, str) else 0)
        if self._resolved > MOST_RESOLVED or self._largest > LONGEST:
            raise InputError("too many references")  # OmegaConf adds to it; run() says which
