"""Help texts without the marks that docstrings have for the documentation."""

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter

MARKED = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")


class PlainHelp(DefaultHelpFormatter):
    """Show the names in docstrings without back quotes and roles."""

    def _expand_help(self, action: Action) -> str:
        return MARKED.sub(r"\1", super()._expand_help(action))

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and MARKED.sub(r"\1", heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and MARKED.sub(r"\1", text))
