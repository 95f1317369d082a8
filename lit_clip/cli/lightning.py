"""LightningCLI's commands: ``fit``, ``validate``, ``test`` and ``predict``."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, dict_to_namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichModelSummary
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_clip.cli.callback_options import give_rest, take_options, with_options
from lit_clip.cli.configurations import Configuration, configuration, evaluated, newest_of_configuration, run_folders
from lit_clip.cli.parser import CONFIG, Parser, named_model, register_types
from lit_clip.cli.plain_help import print_section_help
from lit_clip.cli.save_config import SaveConfig, log_no_secrets
from lit_clip.errors import InputError, require
from lit_clip.models.external_config import how_to_import
from lit_clip.module import LitCLIP
from lit_clip.tools.class_paths import find_object, short_names
from lit_clip.tools.hardware import computes_in_bfloat16, keep_freed_memory
from lit_clip.tools.parts import describe_instance, qualified_name
from lit_clip.tools.untrusted import class_paths_within
from lit_clip.tools.weight_files import read_mapped
from lit_clip.training.checkpoint_contents import adopt_tokenizer
from lit_clip.training.lightning.checkpoint_io import checkpoint_step, newest_checkpoint, write_whole_files
from lit_clip.training.lightning.command_line import PlainCLI
from lit_clip.training.lightning.resume_checks import evaluate_as_given
from lit_clip.training.lightning.run_folder import name_folders
from lit_clip.training.lightning.strategies import gets_weights, watch_started_ranks
from lit_clip.training.optimizers import PARTS
from lit_clip.training.plan import print_plan_of, print_summary, resume_command
from lit_clip.weights.checkpoints import checked
from lit_clip.weights.load import check_fits, weights_come_later

DEFAULT_CALLBACKS = "lit_clip.callbacks"  # whose defaults() every run gets; no other module imports the package
# The newest checkpoint of this configuration's runs or of its requeued SLURM job; auto starts over if there is none.
NEWEST = ("last", "auto", "hpc")
# Modules that can be removed with their entry here: ``add_option``, and ``chosen_options`` for what is not given.
CHOOSERS = ["lit_clip.cli.recipes"]
DEFAULTS = Path(__file__).with_name("fit.yaml")  # without --config


class CLI(PlainCLI):
    """``lit-clip fit | validate | test | predict``."""

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
        parser.add_argument(
            "--rest", type=list[str], default=[], help="fit only: class folders or tables that should be no worse."
        )
        for name in CHOOSERS:
            import_module(name).add_option(parser)
        if not self.subclass_mode_model:  # options such as --model.optimizer.lr belong to a class, which must be named
            parser.set_defaults({f"model.{name}": value for name, value in _parts().items()})

    def init_parser(self, **kwargs: Any) -> Parser:
        return Parser.of_command("lit-clip fit")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse words over YAML files (without any, ``fit.yaml``), over a recipe, over a model, over defaults.

        The model's settings are those of ``--ckpt_path``, or ``fit.yaml``'s.
        """
        command, *words = args if args and args[0] in self.parsers else ["", *args]
        words = [re.sub(r"^--rest(?=$|=[^\[])", "--rest+", word) for word in words]  # it may be typed several times
        known: Parser = self.parsers.get(command, parser)
        print_section_help(known, words)
        for name in ("--data.train", "--data.val", "--data.keep"):  # the parser would forget all but the last
            once = [word.partition("=")[0] for word in words].count(name) < 2
            require(once, f"{name}: typed more than once, and the last alone would count; type one list, '[a, b]'")
        if command in ("validate", "test"):
            known.set_defaults(verbose=False)  # our table shows it, with the baselines
        self.uses_packaged_defaults = bool(command) and not any(word.partition("=")[0] in CONFIG for word in words)
        before = known.given(["--config", str(DEFAULTS)]) if self.uses_packaged_defaults else Namespace()
        before.pop("config", None)
        packaged = _model_of({"model": before.pop("model", {})})  # which a checkpoint's comes before
        if self.subclass_mode_model:  # its options may be typed before it, and those of its default objects
            objects = {name: part for name, part in _parts().items() if "init_args" in part}
            before["model"] = dict_to_namespace({"class_path": named_model(words, LitCLIP), "init_args": objects})
        given = self._given(known, words, before)
        flags = given.pop("print_config", None)  # which opens no data, so a recipe has chosen nothing yet
        config = self._complete(known, given, packaged)
        if flags is not None:
            sys.stdout.write(known.written(config, **{flag: True for flag in flags.split(",") if flag}))
            sys.exit(0)
        for name in CHOOSERS if command == "fit" else ():
            chosen = import_module(name).chosen_options(known, config, known.plain(given), _parts())
            given = self._given(known, chosen, given) if chosen else given  # none of the chosen was given
            config = self._complete(known, given, packaged) if chosen else config
        if config.get("ckpt_path") in NEWEST:
            ours, folders = self._configuration(known, config, given), run_folders(config.as_dict())
            found = newest_of_configuration(ours, folders, config.ckpt_path, may_begin=command == "fit")
            given["ckpt_path"] = str(found) if found else None
            config = self._complete(known, given, packaged)
        if config.get("ckpt_path") and not _model_of(config).get("lora"):
            _model_of(config)["pretrained"] = None  # the checkpoint replaces every weight
        self.config = Namespace({"subcommand": command, command: config}) if command else config

    def _given(self, known: Parser, words: Sequence[str], before: Namespace) -> Namespace:
        words, of_callbacks = take_options(words)
        given = known.given(words, before)
        if of_callbacks:
            others = _callbacks().defaults() + ([_callbacks().Proof()] if given.get("recipe") else [])
            given["trainer.callbacks"] = with_options(given.get("trainer.callbacks"), of_callbacks, others)
        return given

    def _complete(self, known: Parser, given: Namespace, packaged: Mapping[str, Any]) -> Namespace:
        """Return the given settings, over a checkpoint's or the model's packaged ones, over the defaults.

        A part whose class is named keeps no setting of the default class; the parser itself would keep them. The parts
        (optimiser, schedule, decay, loss) never come from a checkpoint.
        """
        path, model = given.get("ckpt_path"), _model_of(given)
        require(path not in ("", "best"), f"--ckpt_path {path}: give a checkpoint's path, or last for the newest")
        base = {} if "pretrained" in model else dict(packaged)
        named = given.get("model", {}).get("class_path") if self.subclass_mode_model else None
        if path and path not in NEWEST:
            base |= _settings_of(path, find_object(named) if named else LitCLIP)
        parts = _parts()
        for name, default in parts.items():
            if (named_class := getattr(model.get(name), "class_path", default["class_path"])) != default["class_path"]:
                parts[name] = {"class_path": named_class}
        defaults = {"model": {"class_path": named, "init_args": {**base, **parts}}}
        if not named:
            defaults = {f"model.{name}": value for name, value in {**base, **parts}.items()}
        known.set_defaults(defaults)
        return known.complete(given)

    def _configuration(self, known: Parser, config: Namespace, given: Namespace) -> Configuration:
        ours = configuration(known.as_typed(config))
        if known is not self.parsers["fit"]:
            ours = {} if self.uses_packaged_defaults else evaluated(ours)
        if self.uses_packaged_defaults and "architecture" not in _model_of(given):
            ours.pop("model.architecture", None)  # the checkpoint's comes before the packaged one
        return ours

    def before_instantiate_classes(self) -> None:
        if self.uses_packaged_defaults:
            shows = f"(lit-clip {self.subcommand} --print_config shows them)"
            rank_zero_info(f"{self.subcommand}: no --config; the packaged defaults {shows}")

    def instantiate_classes(self) -> None:
        fits = self.subcommand == "fit" and not self.setting("validate_first")
        later = fits and gets_weights(self.setting("trainer").strategy)  # under FSDP, a rank but the first
        with weights_come_later() if later else nullcontext():
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
            self.trainer_defaults["callbacks"] = [_callbacks().progress.ShortBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        # The last two: two callbacks with one name for their states, and a package that an option needs.
        except (ValueError, TypeError, OverflowError, RuntimeError, ModuleNotFoundError) as error:
            raise InputError(f"trainer: {error}") from error
        log_no_secrets(trainer.loggers)
        evaluate_as_given(trainer)
        if not self.setting("print_plan"):  # which starts no other ranks
            watch_started_ranks(trainer)
        keep_freed_memory(trainer.strategy.root_device)
        if self.subcommand and self.subcommand != "fit":  # the newest version_N is the newest run's
            name_folders(trainer, self.subcommand)
        return trainer

    def _choose_precision(self, settings: Any) -> None:
        """Choose a precision for ``fit`` if none is set; other subcommands then compute in float32."""
        if any(isinstance(plugin, Precision) for plugin in settings.plugins):
            return
        if computes_in_bfloat16(settings.accelerator):
            # Set in both: one creates the trainer, the other is saved with the run.
            settings.precision = self.setting("trainer").precision = "bf16-mixed"
            rank_zero_info("trainer.precision: bf16-mixed, which this machine supports; set 32-true for float32")

    def how_to_resume(self) -> str:
        """Return instructions for resuming an interrupted run; only on the first rank, and without a collective."""
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
        """Print only the plan, or validate before the first step; a resumed run has these metrics in its checkpoint."""
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
    """Return the arguments of the model's class."""
    model = settings.get("model") or {}
    return model.get("init_args", model)


def _parts() -> dict[str, Any]:
    found = {name: inspect.signature(LitCLIP).parameters[name].default for name in PARTS}
    return {
        name: {"class_path": qualified_name(each)} if inspect.isclass(each) else describe_instance(each)
        for name, each in found.items()
    }


def _settings_of(path: str, kind: type) -> dict[str, Any]:
    """Return the settings in a checkpoint; none of them may make the parser import anything.

    Those of :class:`LitCLIP` have been checked; of those that a class of the user's adds, only numbers are taken.
    """
    checkpoint = checked(read_mapped(Path(path)), path)
    hparams = checkpoint["hyper_parameters"]
    for name in class_paths_within(hparams["architecture"]):
        if name.rpartition(".")[0] not in sys.modules:  # the parser would import it
            raise InputError(f"{path}: its architecture names {name}, which is not imported; {how_to_import(name)}")
    check_fits(checkpoint, path)
    ours = inspect.signature(LitCLIP).parameters.keys() - set(PARTS)
    numbers = {name for name, value in hparams.items() if type(value) in (bool, int, float)}
    taken = hparams.keys() & (ours | (numbers & inspect.signature(kind).parameters.keys()))
    return {name: hparams[name] for name in taken}


def _callbacks() -> Any:
    return import_module(DEFAULT_CALLBACKS)


@short_names()
def run(args: Sequence[str], execute: bool = True) -> CLI:
    """Parse and run a command, the first of the words; raise errors that the user can fix."""
    register_types()
    # Without this, absolute keys such as ${model.optimizer.lr} are looked up above the subcommand.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    words = [*args]
    return CLI(
        LitCLIP,
        LightningDataModule,
        command=next(iter(words), None),
        subclass_mode_model=named_model(words, LitCLIP) is not None,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        # Data modules divide the samples among ranks themselves, each exactly once. The plan replaces the summary.
        trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=words,
        run=execute,
    )


def run_until_signal(words: Sequence[str]) -> int:
    """Run the command line and return its exit code; after a signal, :class:`callbacks.Preemption` sets it."""
    try:
        run(words)
    except SIGTERMException as stop:
        code: Any = stop.code
        return code
    return 0
