"""LightningCLI's commands: ``fit``, ``validate``, ``test`` and ``predict``."""

import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichModelSummary, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_clip.cli import argv, references
from lit_clip.cli.argument_types import register_types
from lit_clip.cli.argv import use_packaged_defaults
from lit_clip.cli.callback_options import (
    Typed,
    as_typed,
    callbacks_of,
    callbacks_option,
    give_rest,
    plain_settings,
    take_options,
)
from lit_clip.cli.configurations import Configuration, configuration, evaluated, newest_of_configuration, run_folders
from lit_clip.cli.imports import check_not_imported_by, command_words
from lit_clip.cli.loggers import check_loggers, log_no_secrets, logger_errors
from lit_clip.cli.plain_help import PlainHelp, print_section_help, short_help
from lit_clip.cli.recipes import chosen_options, given_settings
from lit_clip.cli.save_config import SaveConfig
from lit_clip.errors import InputError, require
from lit_clip.module import LitCLIP
from lit_clip.recipes import Recipe
from lit_clip.tools.class_paths import short_names
from lit_clip.tools.hardware import computes_in_bfloat16
from lit_clip.tools.messages import hinting, options_of
from lit_clip.tools.untrusted import shortened
from lit_clip.tools.weight_files import read_mapped
from lit_clip.training.checkpoint_contents import adopt_tokenizer
from lit_clip.training.kept_memory import keep_freed_memory
from lit_clip.training.lightning.checkpoint_io import checkpoint_step, newest_checkpoint, write_whole_files
from lit_clip.training.lightning.command_line import PlainCLI
from lit_clip.training.lightning.folder_locks import name_folders
from lit_clip.training.lightning.fsdp import gets_weights
from lit_clip.training.lightning.rank_watchdog import watch_started_ranks
from lit_clip.training.lightning.resume_checks import evaluate_as_given
from lit_clip.training.plan import print_plan_of
from lit_clip.training.summary import print_summary, resume_command
from lit_clip.weights.checkpoints import checked
from lit_clip.weights.load import check_fits, weights_come_later

DEFAULT_CALLBACKS = "lit_clip.callbacks"  # whose defaults() every run gets; no other module imports the package
# The newest checkpoint of this configuration's runs or of its requeued SLURM job; auto starts over if there is none.
NEWEST = ("last", "auto", "hpc")


class Parser(LightningArgumentParser):
    """Lightning's, whose help, also of single classes (``--data.help``), is plain text; a command's is short.

    It saves references, such as ``${oc.env:NAME}``, and not their values.
    """

    command: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": PlainHelp, **options})

    def format_help(self, *args: Any, **options: Any) -> str:
        if not self.command:
            return super().format_help(*args, **options)
        return short_help(self, self.command, ("--help", "all") in pairwise(sys.argv))

    def dump(self, *args: Any, **options: Any) -> str:
        with references.dumping():
            return super().dump(*args, **options)


class CLI(PlainCLI):
    """``lit-clip fit | validate | test | predict``."""

    given: Mapping[str, Any] = {}  # settings as the user has typed and written them

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=False,
            help="fit only: validate before the first step and report the change.",
        )
        parser.add_argument(
            "--print_plan",
            action="store_true",
            help="fit only: print the plan of the run and contradictions in its settings, and do not train.",
        )
        parser.add_subclass_arguments(
            Recipe, "recipe", default=None, required=False, help="fit only: chooses settings that are not given."
        )
        parser.add_argument(
            "--rest", type=list[str], default=[], help="fit only: class folders or tables that should be no worse."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with this priority: typed options, YAML files, the settings in ``--ckpt_path``, defaults."""
        assert args is not None  # `run` passes the command line
        words, of_callbacks = take_options(args if isinstance(args, list) else [])
        if isinstance(args, list):  # a configuration is printed with all options
            args = [word for word in words if not of_callbacks or not word.startswith("--print_config")]
        subcommand = next((word for word in words if word in self.parsers), None)
        argv.import_encoders(words, subcommand)
        argv.check_encoder_options(words, subcommand)
        argv.refuse_data_typed_twice(words)
        path, saved, packaged = argv.checkpoint_path(words, subcommand), {}, {}
        require(path not in ("", "best"), f"--ckpt_path {path}: give a checkpoint's path, or last for the newest")
        if subcommand and path and path not in NEWEST:
            saved = _settings_of(path)
        known = self.parsers.get(subcommand or "", parser)
        self.uses_packaged_defaults = subcommand is not None and not argv.options(words, *argv.CONFIG)
        if self.uses_packaged_defaults:
            packaged = use_packaged_defaults(known, words)
        defaults = argv.model_defaults(LitCLIP, words, subcommand, packaged, saved)
        if self.subclass_mode_model:
            named = argv.named_class(words, subcommand, "model")
            known.set_defaults({"model": {"class_path": named, "init_args": defaults}})
        else:
            known.set_defaults({f"model.{name}": value for name, value in defaults.items()})
        print_section_help(known, words)
        if subcommand in ("validate", "test"):
            known.set_defaults(verbose=False)  # our table shows it, with the baselines
        references.forget_references()
        try:
            with hinting(
                words,
                lambda: [
                    *(each for each in options_of(known) if each != "--trainer.min_epochs"),  # --epochs is the other
                    *argv.data_options(words, subcommand),
                    *argv.part_options(LitCLIP, words, subcommand),
                ],
                f"lit-clip {subcommand or 'fit'} --help",
            ):
                self.config = (
                    self.parsed_alone(subcommand, args) if isinstance(args, list) else parser.parse_object(args)
                )
        except ArgumentError as error:
            if "'lightning.LightningDataModule'" not in str(error):  # the type of --data while no class is named
                raise
            option = next((word.partition("=")[0] for word in words if word.startswith("--data.")), "--data")
            problem = "the --config files name no data module; put --data datamodules.Captions before it"
            raise InputError(f"{option}: {problem}") from error
        if subcommand:
            self._complete_settings(parser, words, subcommand, of_callbacks)

    def _complete_settings(
        self, parser: LightningArgumentParser, words: list[str], subcommand: str, of_callbacks: Sequence[Typed]
    ) -> None:
        """Parse again with the named options of callbacks, or the newest checkpoint; leave out what that replaces."""
        known, path = self.parsers[subcommand], argv.checkpoint_path(words, subcommand)
        recipe = self.config[subcommand].get("recipe")
        references.check_settings_are_whole(self.config[subcommand].as_dict())
        if of_callbacks:
            saved = callbacks_of(known, self.config[subcommand])
            with references.dumping():
                callbacks = as_typed(callbacks_of(known, self.config[subcommand]), saved)
            others = _callbacks().defaults() + ([_callbacks().Proof()] if recipe else [])
            self.parse_arguments(parser, [*words, callbacks_option(callbacks, of_callbacks, lambda: others)])
            return
        self.given = self.given or given_settings(words, subcommand)
        if recipe and subcommand == "fit":
            self.parse_arguments(parser, [*words, *chosen_options(known, self.config[subcommand], self.given)])
            return
        if path in NEWEST:
            ours = self._configuration(known, words, subcommand)
            folders = run_folders(self.config[subcommand].as_dict())
            found = newest_of_configuration(ours, folders, path, may_begin=subcommand == "fit")
            self.parse_arguments(parser, [*words, "--ckpt_path", str(found) if found else "null"])
            return
        model = _model_of(self.config[subcommand])
        if path and not model.get("lora"):
            model["pretrained"] = None  # the checkpoint replaces every weight

    def _configuration(self, parser: LightningArgumentParser, words: Sequence[str], subcommand: str) -> Configuration:
        """Return what a checkpoint's run must have in common with this one."""
        ours = configuration(plain_settings(parser, self.config[subcommand]))
        if subcommand != "fit":
            ours = {} if self.uses_packaged_defaults else evaluated(ours)
        if self.uses_packaged_defaults and not any(word.startswith("--model.architecture") for word in words):
            ours.pop("model.architecture", None)  # the checkpoint's comes before the packaged one
        return ours

    def before_instantiate_classes(self) -> None:
        if self.uses_packaged_defaults:
            rank_zero_info(
                f"{self.subcommand}: no --config; the packaged defaults (lit-clip {self.subcommand} --print_config "
                "shows them)"
            )
        check_loggers(self.setting("trainer").logger)

    def dumping(self) -> AbstractContextManager[None]:
        """Keep the settings that modules get as hyper-parameters, and may use: no references."""
        return references.dumping()

    def instantiate_classes(self) -> None:
        fits = self.subcommand == "fit" and not self.setting("validate_first")
        later = fits and gets_weights(self.setting("trainer").strategy)
        with logger_errors(), weights_come_later() if later else nullcontext():
            super().instantiate_classes()
        if self.subcommand and (path := self.setting("ckpt_path")):
            adopt_tokenizer(self.model.model, path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.save_config_kwargs = {"config_filename": f"{self.subcommand}_config.yaml"}
        settings: Any = self.settings_to_create("trainer")
        callbacks = settings.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        give_rest(callbacks, self.setting("rest"))
        settings.callbacks = _callbacks().defaults(*callbacks)
        if settings.enable_model_summary:  # typed; Lightning adds none beside the plan
            settings.callbacks.append(RichModelSummary())
        plugins = settings.plugins or []
        settings.plugins = plugins if isinstance(plugins, list) else [plugins]
        write_whole_files(settings.plugins)
        if self.subcommand == "fit" and settings.precision is None:
            self._choose_precision(settings)
        elif str(settings.precision).startswith("bf16") and computes_in_bfloat16(settings.accelerator) is False:
            rank_zero_warn(
                f"trainer.precision: {settings.precision} is emulated on this processor, which has no bfloat16 "
                "instructions, and many times slower than --trainer.precision 32-true"
            )
        has_bar = any(isinstance(callback, ProgressBar) for callback in settings.callbacks)
        if settings.enable_progress_bar is not False and not has_bar:
            self.trainer_defaults["callbacks"] = [RichProgressBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        # The last two: two callbacks with one name for their states, and a package that an option needs.
        except (ValueError, TypeError, OverflowError, RuntimeError, ModuleNotFoundError) as error:
            raise InputError(f"trainer: {error}") from error
        log_no_secrets(trainer.loggers)
        evaluate_as_given(trainer)
        if not self.setting("print_plan"):  # which starts no other ranks
            watch_started_ranks(trainer, self.how_to_resume if self.subcommand == "fit" else str)
        keep_freed_memory(trainer.strategy.root_device)
        if self.subcommand and self.subcommand != "fit":  # the newest version_N is the newest run's
            name_folders(trainer, self.subcommand)
        return trainer

    def _choose_precision(self, settings: Any) -> None:
        """Choose ``fit``'s precision where none is set; other subcommands compute in float32 then."""
        if any(isinstance(plugin, Precision) for plugin in settings.plugins):
            return
        if computes_in_bfloat16(settings.accelerator):
            # Set in both: one creates the trainer, the other is saved with the run.
            settings.precision = self.setting("trainer").precision = "bf16-mixed"
            rank_zero_info("trainer.precision: bf16-mixed, which this machine supports; set 32-true for float32")

    def how_to_resume(self) -> str:
        """Return how to resume an interrupted run, on the first rank and without a collective."""
        folders = [
            Path(folder) for one in self.trainer.checkpoint_callbacks if (folder := getattr(one, "dirpath", None))
        ]
        if not self.trainer.is_global_zero:
            return ""
        found = newest_checkpoint(folders)
        if found is None and (begun := self.setting("ckpt_path")):
            return f"nothing new is saved; resume with: {resume_command(Path(begun), Path(begun).parent.parent)}"
        if found is None:
            return "no checkpoint yet; SIGTERM saves one, Ctrl-C does not"
        step = checkpoint_step(found)
        return f"step {step} is saved; resume with: {resume_command(found, found.parent.parent)}"

    def before_validate(self) -> None:
        if not self.model.starts_trained and not self.setting("ckpt_path"):
            rank_zero_warn(
                f"{self.subcommand}: evaluates random weights; set trained ones with --ckpt_path or --model.pretrained"
            )

    before_test = before_validate

    def before_fit(self) -> None:
        """Print the plan only, or validate before the first step; a resumed run has those metrics in its checkpoint."""
        if self.setting("print_plan"):
            print_plan_of(self.trainer, self.model, self.datamodule, self.setting("ckpt_path"))
            sys.exit(0)
        if self.setting("validate_first") and not self.setting("ckpt_path"):
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.model.before = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            # Without metrics before training, which belong to another run and maybe to other data.
            print_summary(self.trainer.callback_metrics, self.model.baselines, alike=self.model.alike)

    after_test = after_validate


def _model_of(settings: Any) -> Any:
    """Return the model's settings; raise :class:`InputError` unless they and the trainer's are mappings."""
    for name in ("model", "trainer"):
        value = settings.get(name, {})
        require(hasattr(value, "get"), f"{name}: {shortened(value)} must be a mapping of settings")
    model = settings.get("model", {})
    return model.get("init_args", model)


def _settings_of(path: str) -> dict[str, Any]:
    """Return the settings that a checkpoint holds, none of which may have the parser import anything."""
    checkpoint = checked(read_mapped(Path(path)), path)
    hparams = checkpoint["hyper_parameters"]
    check_not_imported_by(hparams["architecture"], path)
    check_fits(checkpoint, path)
    return hparams


def _callbacks() -> Any:
    return import_module(DEFAULT_CALLBACKS)


@short_names()
def run(args: ArgsType = None, execute: bool = True) -> CLI:
    """Parse and run a command; errors that the user can fix are raised."""
    # Without this, absolute keys such as ${model.optimizer.lr} are looked up above the subcommand.
    register_types()
    references.use_references()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    args = command_words(sys.argv[1:])[1] if args is None else args
    if isinstance(args, list):
        args = argv.with_configuration_paths(args)
    words = args if isinstance(args, list) else []
    model = argv.named_class(words, next(iter(words), None), "model")
    if model is not None:
        argv.check_class(model, LitCLIP, "model")
    return CLI(
        LitCLIP,
        LightningDataModule,
        command=next(iter(words), None),
        subclass_mode_model=model is not None,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        # Data modules divide the samples among ranks themselves, each exactly once. The plan replaces the summary.
        trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
        parser_kwargs={"parser_mode": references.MODE, "exit_on_error": False, "allow_abbrev": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=Parser,
        args=args,
        run=execute,
    )


def run_until_signal() -> int:
    """Run the command line and return the exit code, after a signal the one of :class:`callbacks.Preemption`."""
    try:
        run()
    except SIGTERMException as stop:
        code: Any = stop.code
        return code
    return 0
