"""Import what the user names: modules, and short class paths in settings.

``callbacks.EMA`` is ``lit_clip.callbacks.EMA``; the same for ``datamodules``. A module that only a checkpoint names is
never imported.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb
from typing import Any

import jsonargparse

# jsonargparse 4.53 has no hook for names of classes: these two functions read them in all settings.
from jsonargparse import _typehints
from jsonargparse._typehints import resolve_class_path_by_name
from jsonargparse._util import import_object

from lit_clip.errors import InputError

SHORT = ("callbacks", "datamodules")
NAMED = (*SHORT, "losses", "recipes")  # whose classes need no package's name, imported or not
# Files of an import, whose frames are no module's own code.
MACHINERY = (__file__, str(Path(jsonargparse.__file__).parent), importlib.__file__, "<frozen ")


def full_name(path: str) -> str:
    """Return the full import path of a class path.

    ``callbacks.X`` and ``datamodules.X`` are lit-clip's X; without one, X of a module of that name that the user has.
    """
    package, dot, _ = path.partition(".")
    if package not in SHORT or not dot:
        return path
    try:
        import_object(f"lit_clip.{path}")
    except (AttributeError, ModuleNotFoundError):
        if find_spec(package) is None:
            raise
        _imported(path)
        return path
    return f"lit_clip.{path}"


def find_object(path: str, check_path: bool = True) -> Any:
    """Import the class or function that a class path names."""
    return _imported(full_name(path), check_path)


def _imported(path: str, check_path: bool = True) -> Any:
    """Import an object; an error in its module's own code becomes an ``ImportError``, which parsers pass on."""
    try:
        return import_object(path, check_path)
    except Exception as error:
        ran = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(MACHINERY)]
        ran = [frame for frame in ran if frame.name != "__getattr__"]
        if not ran and not isinstance(error, SyntaxError):
            raise  # the path is wrong
        where = f"{ran[0].filename}, line {ran[0].lineno}, raises " if ran else ""  # a syntax error says it itself
        raise ImportError(f"{where}{type(error).__name__}: {error}") from error


def _resolve(kind: Any, name: str) -> str:
    path = resolve_class_path_by_name(kind, name)  # knows a bare name if its class is imported; ours may not be yet
    homes = () if "." in path else (f"lit_clip.{package}" for package in NAMED)
    home = next((each for each in homes if path in importlib.import_module(each).__all__), None)
    return full_name(f"{home}.{path}" if home else path)


def import_listed() -> None:
    """Import the classes that our packages list: help lists only imported classes."""
    for package in (importlib.import_module(f"lit_clip.{name}") for name in NAMED):
        for name in package.__all__:
            getattr(package, name)


_REPLACED = {"import_object": find_object, "resolve_class_path_by_name": _resolve}


@contextmanager
def short_names() -> Iterator[None]:
    """Inside this block, parsers accept short names and store full ones; the user's names follow Python's rules."""
    before = {name: getattr(_typehints, name) for name in _REPLACED}
    try:
        _typehints.__dict__.update(_REPLACED)
        yield
    finally:
        _typehints.__dict__.update(before)


def import_modules(modules: Iterable[str], why: str) -> None:
    """Import modules; errors of their own code are passed on."""
    for module in modules:
        parts = module.split(".")
        if not all(part.isidentifier() for part in parts):
            raise InputError(
                f"{why}: {module!r} is no module's name; my_encoder.py in the working folder is my_encoder"
            )
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in {".".join(parts[: i + 1]) for i in range(len(parts))}:
                raise  # the module is there, and lacks one itself
            raise InputError(
                f"{why}: there is no module {module}; {parts[0]}.py must be in the working folder, {Path.cwd()}, or be "
                "installed"
            ) from error


def find_working_folder() -> None:
    """Add the working folder to the end of the import path, so that its modules shadow no others."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def find_stubs_without_a_program() -> None:
    """Give the search path to the parser's search for type stubs; it would start another Python for it.

    That one starts in the working folder and imports what it finds there first: a ``json.py`` among somebody's images.
    """
    if find_spec("typeshed_client") is None:  # the parser does without
        return
    import typeshed_client

    path = [Path(folder) for folder in sys.path if folder]
    ask: Any = typeshed_client.get_search_context
    if not isinstance(ask, partial):
        setattr(typeshed_client, "get_search_context", partial(ask, search_path=path))  # noqa: B010  # its type is fixed
