"""The command line: LightningCLI with what must agree linked, and errors in one line."""

import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from lit_clip import collectives, commands
from lit_clip.checkpoint_io import WholeCheckpointIO, newest_checkpoint
from lit_clip.errors import InputError
from lit_clip.module import LitCLIP
from lit_clip.plan import measure_run, print_plan
from lit_clip.preemption import Preemption, watch_launcher
from lit_clip.summary import print_next_steps, print_summary
from lit_clip.weights import read_checkpoint

NEWEST = ("last", "auto")  # of this configuration's runs; auto: or from the beginning
USER_ERROR = 2  # argparse's exit code for a bad command line
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo puts it


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
        parser.add_argument(
            "--baseline",
            type=bool,
            default=False,
            help="Under fit: validate before the first step and report the change.",
        )
        parser.add_argument(
            "--print_plan",
            action="store_true",
            help="Under fit: print what the run would do, in numbers, and where its settings contradict; do not train.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Typed options beat the YAML files, those beat what ``--ckpt_path`` holds, and that beats the defaults."""
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        subcommand = next((word for word in words if word in getattr(self, "_subcommand_parsers", ())), None)
        _check_encoder_options(words, subcommand)
        path = _checkpoint_path(words, subcommand)
        if subcommand and path and path not in (*NEWEST, "best", "hpc"):  # the last two are Lightning's own
            hparams = read_checkpoint(path)["hyper_parameters"]
            known = inspect.signature(LitCLIP).parameters.keys() & hparams.keys()
            self._subcommand_parsers[subcommand].set_defaults({f"model.{key}": hparams[key] for key in known})
        for name in {"validate", "test"} & getattr(self, "_subcommand_parsers", {}).keys():
            self._subcommand_parsers[name].set_defaults(verbose=False)  # our table says it, with what guessing reaches
        super().parse_arguments(parser, args)
        if subcommand and path in NEWEST:
            found = newest_checkpoint(_run_folders(self.config[subcommand]))
            if found or (path == "auto" and subcommand == "fit"):
                self.parse_arguments(parser, [*words, "--ckpt_path", str(found) if found else "null"])
                return
            folders = ", ".join(map(str, _run_folders(self.config[subcommand])))
            hint = "; auto begins anew in that case" if subcommand == "fit" else ""
            raise InputError(f"--ckpt_path {path}: no whole checkpoint below {folders}{hint}")
        if subcommand and path and not self.config[subcommand]["model"]["lora"]:
            self.config[subcommand]["model"]["pretrained"] = None  # the checkpoint replaces every weight

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters override what the user typed; see :meth:`parse_arguments`."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.save_config_kwargs = {"config_filename": f"{self.subcommand}_config.yaml", "overwrite": True}
        settings: Any = self._get(self.config_init, "trainer")
        callbacks = settings.callbacks or []
        settings.callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if not any(isinstance(callback, Preemption) for callback in settings.callbacks):
            settings.callbacks.insert(0, Preemption())  # first, so that none evaluates what a signal cut short
        plugins = settings.plugins or []
        settings.plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in settings.plugins):
            settings.plugins.append(WholeCheckpointIO())
        has_bar = any(isinstance(callback, ProgressBar) for callback in settings.callbacks)
        if settings.enable_progress_bar is not False and not has_bar:
            self.trainer_defaults["callbacks"] = [RichProgressBar()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise InputError(f"trainer: {error}") from error

    def before_fit(self) -> None:
        """Every metric at step 0; a resumed run has those of its checkpoint."""
        if self._get(self.config, "print_plan"):
            self._print_plan()
            sys.exit(0)
        if self._get(self.config, "baseline") and not self._get(self.config, "ckpt_path"):
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.model.before = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def _print_plan(self) -> None:
        """What :meth:`lit_clip.LitCLIP.setup` prints at the start of a run, without starting other processes."""
        trainer: Any = self.trainer
        data = self.datamodule
        trainer.datamodule, data.trainer = data, trainer  # as fit does
        data.prepare_data()
        data.setup("fit")
        if trainer.is_global_zero:
            print_plan(measure_run(self.model, trainer))

    def after_fit(self) -> None:
        self._summarise(self.model.before)
        callback = self.trainer.checkpoint_callback
        last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        log_dir = self.trainer.log_dir if self.trainer.loggers else None  # a broadcast: every rank must ask
        if last and self.trainer.is_global_zero:
            print_next_steps(Path(last), log_dir)

    def after_validate(self) -> None:
        self._summarise({})  # what was before training was of another run, and maybe of other data

    def after_test(self) -> None:
        self._summarise({})

    def _summarise(self, before: Mapping[str, float]) -> None:
        if self.trainer.is_global_zero:
            print_summary(self.trainer.callback_metrics, self.model.baselines, before)


def _run_folders(config: Any) -> list[Path]:
    """Where the runs of a configuration keep their checkpoints: below their loggers' folders and where it says."""
    trainer = config["trainer"]
    loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
    callbacks = trainer["callbacks"] if isinstance(trainer["callbacks"], list) else [trainer["callbacks"]]
    root = Path(trainer["default_root_dir"] or ".")
    folders = [root / "checkpoints", *root.glob("hpc_ckpt_*.ckpt")]  # without a logger, and of a requeued SLURM job
    for logger in loggers:
        options: Any = (logger or {}).get("init_args", {}) if not isinstance(logger, bool) else {}
        folders.append(Path(options.get("save_dir") or root) / (options.get("name") or "lightning_logs"))
    for callback in callbacks:
        options = (callback or {}).get("init_args", {})
        folders += [Path(options["dirpath"])] if options.get("dirpath") else []
    return folders


def _options(words: Sequence[str], *names: str) -> list[str]:
    """The values of ``name value`` and ``name=value`` among command line words."""
    values = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names and (equals or i + 1 < len(words)):
            values.append(value if equals else words[i + 1])
    return values


def _checkpoint_path(words: Sequence[str], subcommand: str | None) -> str | None:
    """``ckpt_path`` as typed, or as the last YAML file that has one says."""
    paths = _options(words, "--ckpt_path")
    for section in _sections(words, subcommand) if not paths else ():
        if section.get("ckpt_path"):
            paths.append(str(section["ckpt_path"]))
            break
    return paths[-1] if paths and paths[-1] != "null" else None


def _sections(words: Sequence[str], subcommand: str | None) -> Iterator[dict[str, Any]]:
    """What the YAML files say of a subcommand, the last file first."""
    for config in reversed(_options(words, "--config", "-c")):
        try:
            values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{config}: not a readable YAML file ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise InputError(f"{config}: not a YAML mapping of options; see --print_config")
        section = values.get(subcommand, values)
        if isinstance(section, dict):
            yield section


def _check_encoder_options(words: Sequence[str], subcommand: str | None) -> None:
    """An entry typed alone is our own transformer's to jsonargparse, whatever encoder the YAML file names."""
    typed = [word for word in words if word.startswith(("--model.architecture.image.", "--model.architecture.text."))]
    for section in _sections(words, subcommand) if typed else ():
        for word in typed:
            encoder: Any = section
            for key in word[2:].split(".")[:3]:
                encoder = encoder.get(key) if isinstance(encoder, dict) else None
            others = isinstance(encoder, dict) and ({"timm", "hugging_face"} & encoder.keys())
            if others or (isinstance(encoder, dict) and isinstance(encoder.get("layers"), list)):  # a ResNet's stages
                option = word.partition("=")[0]
                raise InputError(f"{option}: no single entry of this encoder can be typed; write it into the YAML file")


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
    # Of what a dataclass raises among the types of a union jsonargparse keeps the text alone.
    lines = [line.strip(" -") for line in str(error).splitlines()] if isinstance(error, ValueError) else []
    ours = next((line for line in lines if line.startswith("architecture")), None)
    if ours:
        return InputError(ours)
    if isinstance(error, OSError) and error.filename:
        return InputError(f"{error.filename}: {error.strerror}")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER):
        return InputError("another process has ended; if it said why, that is above")
    return error if isinstance(error, ArgumentError | MisconfigurationException | OmegaConfBaseException) else None


def _hush() -> None:
    """Keep Lightning's advertisements, and a warning that only its authors can act on, from the terminal."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r"Precision bf16-mixed is not supported by the model summary.*")
    # What we log at the end of an epoch has been summed over the ranks already.
    warnings.filterwarnings("ignore", message=r".*recommended to use `self\.log\(.*sync_dist=True\)`.*")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode.*")  # what is frozen should be
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())


def run(args: ArgsType = None, execute: bool = True) -> CLI:
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
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "exit_on_error": False,
            "allow_abbrev": False,
            "epilog": commands.HELP,
        },
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
        run=execute,
    )


def _check_command(words: Sequence[str]) -> None:
    """Jsonargparse knows LightningCLI's commands only, and would not name the others."""
    known = sorted({*CLI.subcommands(), *commands.COMMANDS})
    if not words:
        raise InputError(f"no command given; there are {', '.join(known)}")
    if words[0] not in known and not words[0].startswith("-"):
        near = get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"no command is called {words[0]!r}; {hint}")


def main() -> None:
    """The ``lit-clip`` command: exit code 2 and one line for what the user can mend."""
    _hush()
    watch_launcher()
    code: Any = 0
    try:
        _check_command(sys.argv[1:])
        if sys.argv[1:2] and sys.argv[1] in commands.COMMANDS:
            commands.run_command(sys.argv[1:])
        else:
            run()
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"lit-clip: interrupted{f': {stop}' if str(stop) else ''}\n")
        code = INTERRUPTED
    except SIGTERMException as stop:  # see lit_clip.preemption
        sys.stderr.write(f"lit-clip: {stop}\n" if str(stop) else "")
        code = stop.code
    except Exception as error:
        mendable = user_error(error)
        if mendable is None:
            raise
        sys.stderr.write(f"lit-clip: error: {one_line(mendable)}\n")
        code = USER_ERROR
    collectives.leave(code)
    if code:
        sys.exit(code)
