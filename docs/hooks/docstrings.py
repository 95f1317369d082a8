"""Docstrings for the site: Sphinx's roles become links, and comments beside the fields of a class its attributes."""

import re
from itertools import takewhile
from typing import Any

from griffe import Attribute, Class, Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")


class Roles(Extension):
    """Turn ``:class:`lit_clip.CLIP``` into a link, or into code where the site has no such entry."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        """Add what comments say of a class's fields to its docstring."""
        found = {name: _comment(each) for name, each in cls.attributes.items() if not name.startswith("_")}
        told = [f"    {name}: {text}." for name, text in found.items() if text]
        if cls.docstring and told and "Attributes:" not in cls.docstring.value:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(told)


def _comment(field: Attribute) -> str:
    """Return the comment behind a field, or else the ones right above it; empty without."""
    if field.is_alias or field.annotation is None or not field.lineno or not isinstance(field.parent, Class):
        return ""
    lines = field.lines_collection[field.filepath]  # type: ignore[index]
    behind = re.search(r"  # (?!noqa|pyright|type:)(.*)$", lines[field.endlineno - 1])  # type: ignore[operator]
    if behind:
        return behind[1].partition("  # ")[0].rstrip(".")
    above = takewhile(lambda line: line.strip().startswith("# "), reversed(lines[: field.lineno - 1]))
    return " ".join(line.strip().removeprefix("# ") for line in reversed(list(above))).rstrip(".")


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f'<autoref optional identifier="{name}"><code>{name.rpartition(".")[2]}</code></autoref>'
