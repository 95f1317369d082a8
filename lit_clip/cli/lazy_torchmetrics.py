"""Import torchmetrics lazily.

Lightning uses two of its classes. For others the package imports transformers, torchvision's models and scipy's signal
processing. Importing `lit_clip.cli.lightning` takes 4.7 seconds of processor time with them and 3.1 without (medians of
five pairs).
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
    """The package; its code runs on the first access to a name outside ``HOMES``, and it becomes the real module."""

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":  # its own modules log to it
            return logging.getLogger(NAME)
        if name in HOMES:
            import_module(f"{NAME}.utilities")  # first, as in the package: the two import each other
            return getattr(import_module(f"{NAME}.{HOMES[name]}"), name)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # looked up by the import system and inspect
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # as importlib.util.LazyLoader does
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_torchmetrics() -> None:
    """Make torchmetrics lazy; without effect after Lightning has been imported."""
    if NAME in sys.modules:
        return
    spec = importlib.util.find_spec(NAME)
    if spec is not None:
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[NAME] = package
