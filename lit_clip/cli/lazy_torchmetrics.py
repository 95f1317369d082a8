"""torchmetrics without what nobody asked for.

Lightning uses two of its classes. For some of its others the package imports transformers, torchvision's models and
scipy's signals, which is half of the time that a command takes to start.
"""

import importlib.util
import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "torchmetrics"
HOMES = {"Metric": "metric", "MetricCollection": "collections", "__version__": "__about__"}


class _Deferred(ModuleType):
    """The package, whose own code runs when it is asked for anything but the names of ``HOMES``; then it is as ever."""

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":  # its own modules write to it
            return logging.getLogger(NAME)
        if name in HOMES:
            import_module(f"{NAME}.utilities")  # first, as the package has it: the two import each other
            return getattr(import_module(f"{NAME}.{HOMES[name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # what the import system and inspect ask of any module
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # as importlib.util.LazyLoader does
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_torchmetrics() -> None:
    """Let torchmetrics be imported as far as it is used. To be called before Lightning is imported; else no effect."""
    if NAME in sys.modules:
        return
    spec = importlib.util.find_spec(NAME)
    if spec is not None:
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[NAME] = package
