"""Error messages for the command line: one line with advice for a user's error, but not for a bug.

Of an option: its name as typed, what is wrong with it, and the nearest name. jsonargparse (4.53) has one exception for
all errors, whose text lists what each type of an option says. A parser within another one, of a class's arguments, uses
:class:`OptionParser` too, so that each has to read one level of such a text.
"""

import dataclasses
import errno
import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from lit_clip.errors import InputError
from lit_clip.tools.class_paths import SHORT, find_object
from lit_clip.tools.processes import few_files

UNKNOWN = "no such option"
TYPES = {"int", "float", "str", "bool", "list", "dict", "null"}  # no values
# Other libraries' names of Lightning's precisions, which are too far from them to be suggested by spelling.
ALIASES = {"fp16": "16-mixed", "float16": "16-mixed", "fp32": "32-true", "float32": "32-true", "bfloat16": "bf16-mixed"}
UNION = "Does not validate against any of the Union subtypes"
# Lines of jsonargparse's own in the list of a union's problems; any other is the message of a constructor.
NO_REASON = ("Not a valid subclass", "Expected a", "a class path", "a dict ", "Type ", "Problem with", UNION)
LOST_WORKER = re.compile(r"DataLoader worker \(pid.*\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)")
SECONDS_FOR_CORE = 10  # to wait for a worker that has closed its connection and is not yet gone
# The system's error, and torch's where a descriptor that a data worker sends does not arrive.
MANY_FILES = re.compile(rf"{os.strerror(errno.EMFILE)}|received \d+ items of ancdata")
# Other libraries' errors whose messages are for the user; a module that is not imported cannot have raised one.
FOREIGN = {
    "jsonargparse": "ArgumentError",
    "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    "omegaconf.errors": "OmegaConfBaseException",
    "wandb.errors": "Error",
    "mlflow.exceptions": "MlflowException",
}
LOST_RANK = "Connection closed by peer|Connection reset by peer|Broken pipe"
# RuntimeErrors of EarlyStopping, of the rendezvous and of gloo, and what they mean.
MEANINGS = {
    r"^Early stopping conditioned on metric `(.*?)` which is not available\..*following: (.*)": "trainer.callbacks: "
    r"EarlyStopping.monitor: no metric is called \1; there are \2",
    "Timed out (?:waiting|after) ": "another process did not answer within the process group's time limit (timeout of "
    "--trainer.strategy, by default 30 minutes); it may be stopped, or wait for a disk or store",
    LOST_RANK: "another process has ended; its error, if it printed one, is above",
}
# What to do about those of their errors that do not say it.
HINTS = {
    r"restored a checkpoint with current_epoch=": "raise --trainer.max_epochs, or give --model.pretrained FILE "
    "instead of --ckpt_path to start a new run from its weights",
    r"^No supported gpu backend found": "the settings ask for one; add --trainer.accelerator cpu, also to see the plan",
    r"strategy `fsdp|invalid strategy name": "for FSDP add --config fsdp; it shows how to name a class",
    r"^data: must be given": "the --config files name no data module; add --data datamodules.Captions",
    r"^model: Unable to load config": "a model's name is the value of --model.architecture",
    r"^unrecognized arguments: [^-\s]\S*\.(csv|tsv|txt|jsonl?|parquet)": "a path of data is the value of --data.train",
    r"^data: (wants LightningDataModule|.*No module named)": "a path of data is the value of --data.train",
    r"model\.loss\.\w+: Loss has no such option": "name the loss before it, such as --model.loss Contrastive",
    r"^data\.\w+: LightningDataModule has no such option": "the --config files name no data module; put --data "
    "datamodules.Captions before it",
    r"model\.loss: wants Loss or null": "name a subclass of lit_clip.losses.Loss, as file.Class",
    r"^(?!data:)[\w.]+: No module named": "a class of your own is named file.Class, and its file lies in the "
    "folder in which the command is typed",
    r"Expected a dot import path": "name a class by its path, such as torch.optim.AdamW, or a file that holds settings",
    r"lr_scheduler.total_steps: must be given": "give total_steps the default None; the run passes its own",
}
WORKER = (
    "a data worker was killed or crashed{}: set num_workers or batch_size lower if memory ran out, raise --shm-size of "
    "the container if shared memory (/dev/shm) is full, or set num_workers to 0 to see at which file it crashes"
)


class OptionParser(ArgumentParser):
    """A parser with one-line errors; a ``command``'s parser tells users what to type."""

    command = ""
    bare: Collection[str] = ()  # names of values that are typed without an option

    def options(self) -> list[str]:
        """Return the options that can be typed, for suggestions."""
        names = self.get_defaults(skip_validation=True).keys()
        return [f"--{name.replace('.init_args.', '.')}" for name in names if name not in self.bare]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.command:
            raise ArgumentError(None, in_one_line(message)) from ex
        text = in_one_line(message).removeprefix(".")
        ours: BaseException | None = ex
        while ours is not None and not isinstance(ours, InputError):
            ours = ours.__cause__ or ours.__context__
        if ours is not None and str(ours) not in text:  # one of several problems
            text = f"{text.partition(': ')[0]}: {ours}"
        raise InputError(f"{text}{self._advice(text)}") from ex

    def _advice(self, text: str) -> str:
        see = f"; see {self.command} --help"
        if unknown := re.match(r"unrecognized arguments: .*?(--[^\s=]+)|([\w.]+): no such option$", text):
            return nearest(unknown[1] or f"--{unknown[2]}", self.options()) or see
        if without := re.match(r"argument (--\S+): expected one argument", text):
            bare = (word for word, after in pairwise([*self.args, "--"]) if after.startswith("--") and "=" not in word)
            return next((f"; type a value after {word}" for word in bare if word.startswith(without[1])), "")
        if missing := re.match(r"(?!data:)([\w.]+): must be given", text):
            return f"; type --{missing[1]}{see}" if f"--{missing[1]}" in self.options() else see
        return ""


def in_one_line(message: str) -> str:
    """Return a parser's message in one line; it begins with "." and a name for an option within another."""
    message = re.sub(r"\s*- Expected a path but .*\n", "", message)  # every class path could name a file with settings
    found = re.match(r'\s*Parser key "([^"]+)"[^:\n]*:[\s-]*(.*)', message, re.DOTALL)
    if found is None:
        return _problem(message)
    option, problem = found[1], _problem(found[2])
    if option == "trainer.callbacks" and (named := re.search(r"class_path '[\w.]*?(\w+)':\s+\.", found[2])):
        option += f".{named[1]}"  # as it is typed
    return f".{option}{problem}" if problem.startswith(".") else f".{option}: {problem}"


def _problem(text: str) -> str:
    """Return what is wrong with a value; if an option has several types, by the type that was meant."""
    if unknown := re.match(r"[\"']?(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", text):
        return f".{'.'.join(filter(None, unknown.groups()))}: {UNKNOWN}"
    if missing := re.match(r"the following arguments are required: ([\w.]+)", text):
        return f".{missing[1]}: must be given"
    if ours := re.search(r"Not of type Custom\w+: (?!names no class_path)(.*)", text):
        return ours[1]
    if classes := re.findall(r"Problem with given class_path '([^']+)':\s+([^\n]*)", text):
        given = text.rpartition("Given value: ")[2]
        return _of_class(*max(classes, key=lambda one: _settings_in(given, parameters(one[0]))))
    if factory := re.search(r"expects a function or a callable class: (.*?)(?:\. Got value: .*)?$", text, re.MULTILINE):
        named = re.search(r"class_path='([\w.]+)'", text)
        return _of_class(named[1] if named else "", factory[1])
    if union := re.search(r"Subtypes: [\[(](.*?),?[\])]\s+Errors:.*\s+Given value: (.*)", text, re.DOTALL):
        return _wanted(union[1], union[2])
    if one := re.search(r"Expected a (.+)\. Got value: (.*)", text):
        return _wanted(one[1], one[2])
    if one := re.match(r"Not a valid subclass of (\w+)\. Got value: (.*)", text):
        return _wanted(f"<class '{one[1]}'>", one[2])
    if unread := re.match(r"Unable to load config [^\n]*", text):
        return unread[0]
    return " ".join(text.split())


def _settings_in(given: str, names: list[str]) -> int:
    return sum(f"{name}=" in given or f"'{name}': " in given for name in names)


def _of_class(path: str, problem: str) -> str:
    name = problem.removesuffix(f": {UNKNOWN}")
    if name == problem:
        return problem
    known = nested_parameters(path)
    hint = nearest(name[1:], known) or f"; there are {', '.join(parameters(path)) or 'none'}"
    return f"{name}: {path.rpartition('.')[2]} has {UNKNOWN}{hint}"


def nearest(option: str, known: Iterable[str], at_least: float = 0.75) -> str:
    """Return a hint at the nearest known option: by whole name, by last part, or by two parts exchanged."""
    forms: dict[str, str] = {}
    for each in known:
        *above, last = each.lstrip("-").split(".")
        turned = f"{last}_{above[-1].removesuffix('s')}" if above else last  # image_column was meant as columns.image
        forms = {last: each, turned: each, each.lstrip("-"): each} | forms
    typed = option.lstrip("-")
    names = [typed, typed.rpartition(".")[2]]
    near = [forms[name] for name in names if name in forms]
    near += [forms[name] for name in get_close_matches(names[0], forms, n=1, cutoff=at_least)]
    near += [forms[name] for name in get_close_matches(names[1], forms, n=1, cutoff=at_least)]
    return f"; did you mean {near[0]}?" if near else ""


def _wanted(types: str, value: str) -> str:
    value = re.sub(r"NestedArg\(.*val='(.*)'\)", r"\1", value.strip())
    *kinds, last = _kinds(types)
    near = [ALIASES[value]] if ALIASES.get(value) in kinds else get_close_matches(value, {*kinds, last} - TYPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    shown = (value or "an empty text") if len(value) <= 200 else f"{value[:200]} ..."
    return f"wants {', '.join(kinds)}{' or ' if kinds else ''}{last}, not {shown}{hint}"


def _kinds(types: str) -> list[str]:
    """Return readable types, each once: ``<class 'int'>, typing.Literal['a', 'b']`` -> ``int``, ``a``, ``b``."""
    types = re.sub(r"list\[collections\.abc\.Callable\[.*?\]\]", "a list of class paths", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), types)
    types = re.sub(r"<class '(.*?)'>", lambda found: _kind(found[1]), types.replace("<class 'NoneType'>", "null"))
    return list(dict.fromkeys(types.split(", ")))


def _kind(class_path: str) -> str:
    """Return a class's name; for a dataclass, an example of the mapping to type."""
    found = imported_class(class_path)
    if not dataclasses.is_dataclass(found):
        return class_path.rpartition(".")[2]
    first, hint = dataclasses.fields(found)[0], next(iter(get_type_hints(found).values()))
    literals = [get_args(kind)[0] for kind in get_args(hint) if get_origin(kind) is Literal]
    example = literals[0] if literals else "..." if first.default in (None, dataclasses.MISSING) else first.default
    return f'"{{{first.name}: {example}}}"'


def imported_class(class_path: str) -> Any:
    """Import a class; return None if it does not exist."""
    try:
        return find_object(class_path)
    except (ImportError, AttributeError, ValueError):
        return None


def parameters(class_path: str) -> list[str]:
    """Return the names of a class's constructor arguments."""
    found = imported_class(class_path)
    if found is None:
        return []
    known = inspect.signature(found).parameters.values()
    return [each.name for each in known if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def nested_parameters(class_path: str) -> list[str]:
    """Return a class's arguments, and the settings within them (``columns``, ``columns.root``)."""
    hints: dict[str, Any] = {}
    with suppress(Exception):  # a name that only type checkers import
        hints = get_type_hints(getattr(imported_class(class_path), "__init__", None))
    kinds = [(name, kind) for name, hint in hints.items() for kind in (hint, *get_args(hint))]
    nested = [(name, dataclasses.fields(kind)) for name, kind in kinds if dataclasses.is_dataclass(kind)]
    return [*parameters(class_path), *(f"{name}.{field.name}" for name, fields in nested for field in fields)]


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without a data worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):  # by a data worker, which appends the traceback to the message
        return lines[-1].partition(": ")[2]
    if unset := re.search(r"Environment variable '(\w+)' not found", str(error)):
        command = f"{unset[1]}=... lit-clip {' '.join(sys.argv[1:2])} ..."
        return f"the config needs the environment variable {unset[1]}; type {command}"
    text = " ".join(lines).removeprefix(".")  # of an option within another
    hints = [hint for words, hint in HINTS.items() if re.search(words, text)]
    hints += [f"did you mean {near}?" for near in _similar_names(text)]
    return "; ".join([text, *(hint for hint in hints if hint not in text)])


def _similar_names(text: str) -> list[str]:
    """Suggest a class of the same module for a misspelt one, or a file of the working folder for a missing module."""
    if missing := re.search(r"No module named '(\w+)'", text):
        return get_close_matches(missing[1], [file.stem for file in Path().glob("*.py")], n=1)
    found = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text)
    of_loss = re.search(r"model\.loss: wants Loss or null, not (\w+)", text)
    module, name = found.groups() if found else ("lit_clip.losses", of_loss[1]) if of_loss else ("", "")
    short = module.removeprefix("lit_clip.")
    module = short if short in SHORT else module
    homes = [sys.modules[home] for home in (module, f"lit_clip.{module}") if home in sys.modules]
    names = [each for home in homes for each in getattr(home, "__all__", None) or vars(home)]
    return [f"{module}.{near}" for near in get_close_matches(name, names, n=1)]


def user_error(error: BaseException) -> BaseException | None:
    """Return the error to show to the user; None for a bug.

    jsonargparse wraps an error that a constructor raises; ours is then among the causes.
    """
    try:
        return _user_error(error)
    except RuntimeError as late:  # torch's handler of SIGCHLD raises one wherever it is called, so here, too
        if not LOST_WORKER.search(str(late)):
            raise
        return user_error(late)


def _user_error(error: BaseException) -> BaseException | None:
    chain, text = [error], str(error)
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if any(MANY_FILES.search(str(each)) for each in chain):
        return few_files()
    if ours := next((each for each in chain if isinstance(each, InputError)), None):
        return ours
    # Of an error that a constructor raises jsonargparse keeps only the text if the class is in a union.
    if isinstance(error, ValueError) and text.startswith(UNION):
        named = re.search(r"class_path='([\w.]+)'", text)
        reasons = [line for line in re.findall(r"^ *- (.*)", text, re.MULTILINE) if not line.startswith(NO_REASON)]
        reasons += [str(each) for each in chain if isinstance(each, ModuleNotFoundError)]  # of an optional package
        if reasons:
            return InputError(f"{named[1]}: {reasons[0]}" if named else reasons[0])
    if known := _of_machine(error):
        return known
    foreign = tuple(getattr(sys.modules[module], name) for module, name in FOREIGN.items() if module in sys.modules)
    return error if isinstance(error, foreign) else None


def _of_machine(error: BaseException) -> InputError | None:
    if isinstance(error, OSError) and error.filename:
        return InputError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(f"{error.strerror}: a disk or shared memory (/dev/shm) is full; make room there")
    if isinstance(error, OSError | EOFError):  # a worker that dies while it sends a batch closes its connection
        receiving = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "_try_get_data"]
        for frame in receiving:
            _await_end(getattr(frame.f_locals.get("self"), "_workers", ()))
        return InputError(WORKER.format("")) if receiving else None
    for words, meaning in MEANINGS.items() if isinstance(error, RuntimeError) else ():
        if found := re.search(words, str(error)):
            return InputError(found.expand(meaning).replace("`", ""))
    lost = LOST_WORKER.search(str(error))
    return InputError(WORKER.format(f" ({lost[1]})" if lost[1] else "")) if lost else None


def _await_end(workers: Sequence[BaseProcess]) -> None:
    """Wait until a worker that has closed its connection is gone: torch's handler would raise its error anywhere later.

    In between the system may write a core file.
    """
    ended = wait([each.sentinel for each in workers], timeout=SECONDS_FOR_CORE)
    for each in workers:
        if each.sentinel in ended:
            each.join(SECONDS_FOR_CORE)  # its files are closed before its exit code can be read
