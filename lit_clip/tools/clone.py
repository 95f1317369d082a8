"""Import a clone's folders ``callbacks`` and ``datamodules`` by their short names.

They are modules of ``lit_clip``, as in the wheel. Python also finds the folders themselves, where a clone is searched:
``datamodules.captions`` then is the module ``lit_clip.datamodules.captions``, and no class exists twice.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any


class _SharedModules(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = fullname.startswith(f"{self.package}.") and find_spec(f"lit_clip.{fullname}")
        return spec_from_loader(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"lit_clip.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state if module.__spec__ else None  # the import has replaced it


def share_modules(package: str) -> None:
    """Make a package imported by its short name, and its modules, the same objects as in ``lit_clip``."""
    sys.meta_path.insert(0, _SharedModules(package))
    sys.modules[package] = import_module(f"lit_clip.{package}")
