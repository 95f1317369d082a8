"""Import a package's names when they are first used, and a clone's folders by their short names; and the release.

``callbacks`` and ``datamodules`` are modules of ``lit_clip``, as in the wheel. Python also finds the folders
themselves, where a clone is searched: ``datamodules.captions`` then is ``lit_clip.datamodules.captions``, and no class
exists twice.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"  # here, at the bottom of the import order, so that results and model cards can name it


def lazy_names(package: str, file: str) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` for the names that its ``if TYPE_CHECKING:`` block imports."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    blocks = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    lines = (line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom))
    homes = {alias.name: "." * line.level + str(line.module) for line in lines for alias in line.names}

    def __getattr__(name: str) -> Any:  # noqa: N807  # PEP 562; errors leave frames of this name out
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return __getattr__


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
