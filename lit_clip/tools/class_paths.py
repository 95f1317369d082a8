"""Class paths in settings: ``callbacks.EMA`` is short for ``lit_clip.callbacks.EMA``, ``datamodules`` likewise."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import _actions, _typehints
from jsonargparse._util import import_object

from lit_clip.errors import InputError

SHORT = ("callbacks", "datamodules")


def find_object(path: str, check_path: bool = True) -> Any:
    """Import the class or function that a class path names.

    ``callbacks.X`` and ``datamodules.X`` are lit-clip's X; without one, X of a module of that name that the user has.
    """
    package = path.partition(".")[0]
    if package in SHORT:
        try:
            return import_object(f"lit_clip.{path}", check_path)
        except (AttributeError, ModuleNotFoundError):
            found, ours = find_spec(package), sys.modules[f"lit_clip.{package}"].__file__
            if found and found.origin == ours and Path(f"{package}.py").exists():
                raise InputError(f"{path}: {ours}, of a clone, hides {package}.py; rename that file") from None
            if not found or found.origin == ours:
                raise
    return import_object(path, check_path)


@contextmanager
def short_names() -> Iterator[None]:
    """Within this context a parser imports by :func:`find_object`; the user's own parsers keep Python's rules."""
    before = vars(_typehints)["import_object"]
    try:
        for module in (_actions, _typehints):  # which import it by name
            setattr(module, "import_object", find_object)  # noqa: B010
        yield
    finally:
        for module in (_actions, _typehints):
            setattr(module, "import_object", before)  # noqa: B010
