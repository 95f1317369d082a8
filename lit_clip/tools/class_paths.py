"""Class paths in settings: ``callbacks.EMA`` is short for ``lit_clip.callbacks.EMA``, ``datamodules`` likewise."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import _actions, _typehints
from jsonargparse._typehints import resolve_class_path_by_name
from jsonargparse._util import import_object

from lit_clip.errors import require

SHORT = ("callbacks", "datamodules")


def full_name(path: str) -> str:
    """Return the import path that a class path stands for.

    ``callbacks.X`` and ``datamodules.X`` are lit-clip's X; without one, X of a module of that name that the user has.
    """
    package, dot, _ = path.partition(".")
    if package not in SHORT or not dot:
        return path
    try:
        import_object(f"lit_clip.{path}")
    except (AttributeError, ModuleNotFoundError):
        if (found := find_spec(package)) is None:
            raise
    else:
        return f"lit_clip.{path}"
    try:
        import_object(path)
    except (AttributeError, ModuleNotFoundError):
        own = Path(f"{package}.py").absolute()
        require(
            not own.exists() or str(own) == found.origin, f"{path}: {found.origin} hides {own.name}; rename that file"
        )
        raise
    return path


def find_object(path: str, check_path: bool = True) -> Any:
    """Import the class or function that a class path names."""
    return import_object(full_name(path), check_path)


def _resolve(kind: Any, name: str) -> str:
    return full_name(resolve_class_path_by_name(kind, name))


# Functions of jsonargparse, in the modules that look them up.
_REPLACED = (
    (_actions, "import_object", find_object),
    (_typehints, "import_object", find_object),
    (_typehints, "resolve_class_path_by_name", _resolve),
)


@contextmanager
def short_names() -> Iterator[None]:
    """Within this context parsers know the short names, and keep the full ones; the user's own have Python's rules."""
    before = [(module, name, getattr(module, name)) for module, name, _ in _REPLACED]
    try:
        for module, name, function in _REPLACED:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
