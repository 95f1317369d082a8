"""The command line: LightningCLI with what must agree linked, and errors in one line."""

import logging
import sys
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from lit_clip.errors import InputError
from lit_clip.module import LitCLIP
from lit_clip.summary import print_next_steps, print_summary
from lit_clip.weights import read_checkpoint

USER_ERROR = 2  # argparse's exit code for a bad command line


class SaveConfig(SaveConfigCallback):
    """Writes ``<subcommand>_config.yaml`` into the run's own folder, and nowhere if it has none."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """``lit-clip fit | validate | test | predict``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Tell the data module what the model wants, so that no YAML file states it twice."""
        for name in ("preprocessing", "tokenize"):
            parser.link_arguments(f"model.{name}", f"data.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Typed options beat the YAML files, those beat what ``--ckpt_path`` holds, and that beats the defaults."""
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        subcommand = next((word for word in words if word in getattr(self, "_subcommand_parsers", ())), None)
        path = _option(words, "--ckpt_path")
        if subcommand and path and path not in ("last", "best", "hpc"):  # words that Lightning itself resolves
            hparams = read_checkpoint(path)["hyper_parameters"]
            self._subcommand_parsers[subcommand].set_defaults({f"model.{key}": hparams[key] for key in hparams})
        for name in {"validate", "test"} & getattr(self, "_subcommand_parsers", {}).keys():
            self._subcommand_parsers[name].set_defaults(verbose=False)  # our table says it, with what guessing reaches
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters override what the user typed; see :meth:`parse_arguments`."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.save_config_kwargs = {"config_filename": f"{self.subcommand}_config.yaml", "overwrite": True}
        settings: Any = self._get(self.config_init, "trainer")
        has_bar = any(isinstance(callback, ProgressBar) for callback in settings.callbacks or [])
        if settings.enable_progress_bar is not False and not has_bar:
            self.trainer_defaults["callbacks"] = [RichProgressBar()]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        self._summarise()
        callback = self.trainer.checkpoint_callback
        last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        log_dir = self.trainer.log_dir  # a broadcast: every rank must ask
        if last and self.trainer.is_global_zero:
            print_next_steps(Path(last), log_dir)

    def after_validate(self) -> None:
        self._summarise()

    def after_test(self) -> None:
        self._summarise()

    def _summarise(self) -> None:
        if self.trainer.is_global_zero:
            print_summary(self.trainer.callback_metrics, self.model.baselines)


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of ``name value`` or ``name=value`` among command line words."""
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and i + 1 < len(words):
            return words[i + 1]
    return None


def one_line(error: BaseException) -> str:
    """What to tell the user of an error: no traceback of a data worker, no list of types a value is none of."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):  # by a data worker, which appends the traceback to the message
        return lines[-1].partition(": ")[2]
    # jsonargparse says of each type of a union why the value is not of it; the class that was named is the one meant.
    start = next(
        (i for i, line in enumerate(lines) if line.lstrip().startswith("- Problem with given class_path")), None
    )
    if start is not None:
        indent = len(lines[start]) - len(lines[start].lstrip())
        inner = takewhile(lambda line: len(line) - len(line.lstrip()) > indent, lines[start + 1 :])
        lines = [lines[0], lines[start].lstrip(" -"), *inner]
    return " ".join(line.strip() for line in lines)


def user_error(error: BaseException) -> BaseException | None:
    """The error that the user can mend, if that is what this is.

    jsonargparse wraps what a constructor raises; ours is then among the causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error if isinstance(error, ArgumentError | MisconfigurationException) else None


def _hush() -> None:
    """Keep Lightning's advertisements, and a warning that only its authors can act on, from the terminal."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r"Precision bf16-mixed is not supported by the model summary.*")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "litlogger" not in record.getMessage().lower())


def run(args: ArgsType = None, run: bool = True) -> CLI:
    """Parse and run a command; what the user can mend is raised as an error."""
    # Without this, absolute keys such as ${model.learning_rate} are looked up above the subcommand.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return CLI(
        LitCLIP,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        # The data modules divide the samples themselves, each exactly once.
        trainer_defaults={"use_distributed_sampler": False},
        parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
        run=run,
    )


def main() -> None:
    """The ``lit-clip`` command: exit code 2 and one line for what the user can mend."""
    _hush()
    try:
        run()
    except Exception as error:
        mendable = user_error(error)
        if mendable is None:
            raise
        sys.stderr.write(f"lit-clip: error: {one_line(mendable)}\n")
        sys.exit(USER_ERROR)
