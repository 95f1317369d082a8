"""Import a package's names when they are first used."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


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
