"""Option of ``evaluate``, ``export`` and ``demo`` for the file of a head."""

from dataclasses import dataclass

from lit_clip.commands.class_sources import ClassOptions
from lit_clip.heads import Head, load_head


@dataclass(frozen=True)
class HeadFile(ClassOptions):
    """A head from a file.

    Args:
        head: a file that classify --save_head wrote with this model; its classes are used too.
    """

    head: str | None = None

    @property
    def path(self) -> str:
        return self.head or ""

    def opened(self) -> Head | None:
        return load_head(self.path) if self.head is not None else None
