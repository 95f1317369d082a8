"""Import modules that the user names with ``--import``, or as an encoder's class in YAML or on the command line.

A module that only a checkpoint names is never imported.
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_clip.errors import InputError
from lit_clip.models.custom_config import how_to_import

OPTION = "--import"


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


def command_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the modules to import, and the command with its options."""
    modules, rest = [], list(words)
    while rest and rest[0].partition("=")[0] == OPTION:
        _, equals, module = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("-"):
            module = rest.pop(0)
        if not module:
            raise InputError(f"{OPTION}: no module is named; lit-clip {OPTION} my_encoder COMMAND ...")
        modules.append(module)
    return modules, rest


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


def check_not_imported_by(architecture: Any, path: str) -> None:
    """Refuse a checkpoint's architecture that names an unimported module: the parser would import it."""
    from lit_clip.tools.untrusted import class_paths_within  # imports torch

    for name in class_paths_within(architecture):
        if name.rpartition(".")[0] not in sys.modules:
            raise InputError(f"{path}: its architecture names {name}, which is not imported; {how_to_import(name)}")
