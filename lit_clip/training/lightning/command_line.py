"""LightningCLI without its changes to the user's settings, seeds and interrupts."""

import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_clip.errors import InputError
from lit_clip.tools.messages import LOST_RANK, one_line


class PlainCLI(LightningCLI):
    """Fill only the parser of one ``command``, leave a checkpoint's settings to the caller, and pass interrupts on."""

    def __init__(self, *arguments: Any, command: str | None = None, **others: Any) -> None:
        self._command = command if command in self.subcommands() else None
        super().__init__(*arguments, **others)

    def setting(self, name: str) -> Any:
        """Return a parsed setting of the command; None if it has none of that name."""
        return self._get(self.config, name)

    def settings_to_create(self, name: str) -> Any:
        """Return the settings from which objects are created; changes of these are not saved with the run."""
        return self._get(self.config_init, name)

    @property
    def parsers(self) -> dict[str, Any]:
        """The parser of each command; empty before they are made."""
        return getattr(self, "_subcommand_parsers", {})

    def how_to_resume(self) -> str:
        """Return a text for messages about what an interrupted run has saved."""
        return ""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._command not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser: Any = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.command = f"lit-clip {subcommand}"
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyper-parameters override typed options."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand; Ctrl-C stays a KeyboardInterrupt, where Lightning would exit."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt(self.how_to_resume() if subcommand == "fit" else "") from None
        except RuntimeError as error:
            if subcommand != "fit" or not re.search(LOST_RANK, str(error)) or not (how := self.how_to_resume()):
                raise
            raise InputError(f"{one_line(error)}; {how}") from error
