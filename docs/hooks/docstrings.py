"""Docstrings for the site: Sphinx's roles, which editors show as they are, become links."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")


class Roles(Extension):
    """Turn ``:class:`lit_clip.CLIP``` into a link, or into code where the site has no such entry."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f'<autoref optional identifier="{name}"><code>{name.rpartition(".")[2]}</code></autoref>'
