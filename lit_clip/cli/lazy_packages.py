"""Import lazily what Lightning and torchvision import without need.

Lightning uses two of torchmetrics' classes; for others that package imports transformers, torchvision's models and
scipy's signal processing: importing ``lit_clip.cli.lightning`` takes 4.7 seconds of processor time with them and 3.1
without (medians of five pairs). torchvision's operators, and a decorator in one of its modules, import torch's
compiler, which takes a second.
"""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

# Packages, and names of theirs that are found in a module without the rest.
HOMES: dict[str, dict[str, str]] = {
    "torchmetrics": {"Metric": "metric", "MetricCollection": "collections", "__version__": "__about__"},
    "torchvision.models": {},
    "torchvision.ops": {},
}


class _Deferred(ModuleType):
    """A package; its code runs on the first access to a name outside ``HOMES``, and it becomes the real module."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__
        if name == "_logger":  # torchmetrics' own modules log to it
            return logging.getLogger(package)
        if name in HOMES[package]:
            import_module(f"{package}.utilities")  # first, as in the package: the two import each other
            return getattr(import_module(f"{package}.{HOMES[package][name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # looked up by the import system and inspect
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # as importlib.util.LazyLoader does
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


class _TensorClasses(SourceFileLoader):
    """Finds and runs ``NAME`` with torch's own lazy form of the decorator ``torch.compiler.disable``."""

    NAME = "torchvision.tv_tensors"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name == cls.NAME else None
        return found and spec_from_file_location(name, found.origin, loader=cls(name, str(found.origin)))

    def exec_module(self, module: ModuleType) -> None:
        import torch

        compiler: Any = torch.compiler
        disable = compiler.disable
        compiler.disable = getattr(torch, "_disable_dynamo", disable)  # private: newer versions may lack it
        try:
            super().exec_module(module)
        finally:
            compiler.disable = disable


def defer_packages() -> None:
    """Make the packages lazy, each without effect after it has been imported."""
    if _TensorClasses not in sys.meta_path:
        sys.meta_path.insert(0, _TensorClasses)
    for name in HOMES:
        parent, _, _ = name.rpartition(".")
        above = PathFinder.find_spec(parent) if parent else None  # found without being imported
        spec = PathFinder.find_spec(name, above.submodule_search_locations if above else None)
        if spec is not None and name not in sys.modules and parent not in sys.modules:
            package = module_from_spec(spec)
            package.__class__ = _Deferred
            sys.modules[name] = package


@contextmanager
def uncollected() -> Iterator[None]:
    """Import within this context: modules stay, so the garbage collector need not search them, then or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
