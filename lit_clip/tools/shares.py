"""Shares of work for several jobs that do not communicate."""

import re
from typing import NamedTuple

from lit_clip.errors import InputError


class Share(NamedTuple):
    """Every ``of``-th item, starting at item ``number``; by default all items."""

    number: int = 0  # counted from 0
    of: int = 1

    @classmethod
    def typed(cls, text: str | None) -> "Share":
        """Return the share of ``--share i/n``, counted from 1; all items without it."""
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--share {text}: must be i/n with i from 1 to n, such as 3/16 for the third job of 16")
        return cls(int(found[1]) - 1, int(found[2]))

    def has(self, item: int) -> bool:
        """Return whether the share contains an item."""
        return item % self.of == self.number

    @property
    def suffix(self) -> str:
        """Suffix for names of files that only this job writes; empty for all items."""
        return f"-{self.number + 1}-of-{self.of}" if self.of > 1 else ""

    def finished(self, output: object) -> str:
        """Return the last line that a job prints."""
        return (
            f"{output}: share {self.number + 1}/{self.of} is finished; when all are, the same command without --share "
            "joins them"
        )
