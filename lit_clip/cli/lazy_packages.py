"""Import lazily the packages that Lightning, torch's optimisers and torchvision import without need.

Lightning uses two of torchmetrics' classes; for others that package imports transformers, torchvision's models and
scipy's signal processing: importing ``lit_clip.cli.lightning`` takes 4.7 seconds of processor time with them and 3.1
without (medians of five pairs). torch's compiler, which Lightning, torch's optimisers and torchvision import, takes
1.3 seconds more.
"""

import gc
import logging
import sys
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import FunctionType, ModuleType
from typing import Any, ClassVar

COMPILER = "torch._dynamo"
# Packages, and names of theirs that are found in a module without the rest.
HOMES: dict[str, dict[str, str]] = {
    "torchmetrics": {"Metric": "metric", "MetricCollection": "collections", "__version__": "__about__"},
    COMPILER: {},
    "torchvision.models": {},
    "torchvision.ops": {},
}


class _Deferred(ModuleType):
    """A package that runs its code on first access to a name outside ``HOMES``, and then is the real module."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__
        if name == "_logger":  # torchmetrics' own modules log to it
            return logging.getLogger(package)
        if name in HOMES[package]:
            import_module(f"{package}.utilities")  # first, as in the package: the two import each other
            return getattr(import_module(f"{package}.{HOMES[package][name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # looked up by the import system and inspect
        self._load()
        return getattr(self, name)

    def _load(self) -> None:
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # as importlib.util.LazyLoader does
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)


class _Compiler(_Deferred):
    """torch's compiler, loaded only for compiled code; for other code its functions do nothing."""

    _functions: ClassVar[list[Any]] = []  # that torch has asked not to compile

    class OptimizedModule(ABC):  # noqa: B024  # the compiler's class is registered with it
        """A compiled module; none exists before the compiler is loaded."""

    def graph_break(self, msg: str = "") -> None:
        """Break the graph of compiled code."""

    def disable(self, fn: Any = None, recursive: bool = True, *, wrapping: bool = True, **options: Any) -> Any:
        """Return a function that is not compiled."""
        lazily = getattr(sys.modules["torch"], "_disable_dynamo", None)  # private: newer versions may lack it
        if not isinstance(fn, FunctionType) or not lazily:
            self._load()
            return self.disable(fn, recursive, wrapping=wrapping, **options)
        if wrapping:
            return lazily(fn, recursive)  # on its first call asks for the function without wrapping
        self._functions.append(fn)
        return fn

    def _load(self) -> None:
        functions, compiled = self._functions, self.OptimizedModule
        super()._load()
        compiled.register(self.OptimizedModule)
        for function in functions:
            vars(function).pop("__dynamo_disable", None)  # torch asks again


class _CompilersModules(Loader):
    """Load the whole compiler before one of its modules, as if it were not deferred."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = sys.modules.get(COMPILER)
        if not name.startswith(f"{COMPILER}.") or not isinstance(package, _Compiler):
            return None
        package._load()
        found = sys.modules.get(name)
        if found:  # the import system takes its own specification, and would run it a second time
            found.__spec__ = ModuleSpec(name, cls(), loader_state=found.__spec__)
        return found and found.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def defer_packages() -> None:
    """Make the packages lazy; a package that is already imported stays as it is."""
    if _CompilersModules not in sys.meta_path:
        sys.meta_path.insert(0, _CompilersModules)
    for name in HOMES:
        parent, _, _ = name.rpartition(".")
        above = PathFinder.find_spec(parent) if parent else None  # found without being imported
        spec = PathFinder.find_spec(name, above.submodule_search_locations if above else None)
        if spec is not None and name not in sys.modules and parent not in sys.modules:
            package = module_from_spec(spec)
            package.__class__ = _Compiler if name == COMPILER else _Deferred
            sys.modules[name] = package


@contextmanager
def uncollected() -> Iterator[None]:
    """Import modules inside this block; the garbage collector never searches them, because modules stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
