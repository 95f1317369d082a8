"""Error messages for the command line: jsonargparse's made shorter, with a suggestion for what is misspelt."""

import dataclasses
import errno
import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import pairwise, takewhile
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGTERM, strsignal
from traceback import walk_tb
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lit_clip.errors import InputError
from lit_clip.tools.class_paths import SHORT, find_object
from lit_clip.tools.processes import few_files

NO_FILE = "Expected a path but "  # every class path could name a file with settings
UNION = "Does not validate against any of the Union subtypes"
TYPES = {"int", "float", "str", "bool", "list", "dict", "null"}  # no values
IN_UNION = re.compile(r"\s*- Type .* expects a function or a callable class: (.*)")
# Lines of jsonargparse's own in the list of a union's problems; any other is the message of a constructor.
NO_REASON = ("Not a valid subclass", "Expected a", "a class path", "a dict ", "Type ", "Problem with", UNION)
# Other libraries' names of Lightning's precisions, which are too far from them to be suggested by spelling.
ALIASES = {"fp16": "16-mixed", "float16": "16-mixed", "fp32": "32-true", "float32": "32-true", "bfloat16": "bf16-mixed"}


def shorter(lines: Sequence[str]) -> list[str]:
    """Shorten the part of a message in which jsonargparse says for each type of a union why the value does not fit.

    If the value names a class, only that class's problem stays; of several classes it is the one with most of the given
    arguments. Otherwise the accepted values are listed.
    """
    lines = _of_callable(lines)
    starts = [i for i, line in enumerate(lines) if line.strip(" -").startswith("Problem with given class_path")]
    if starts and starts[0]:
        given = lines[-1].partition("Given value: ")[2]
        beside = [i for i in starts if _indent(lines[i]) == _indent(lines[starts[0]])]
        start = max(beside, key=lambda i: sum(f"'{name}'" in given for name in parameters(lines[i].split("'")[1])))
        inner = takewhile(lambda line: _indent(line) > _indent(lines[start]), lines[start + 1 :])
        return [lines[0], lines[start].strip(" -"), *shorter(list(inner))]
    union = next((i for i, line in enumerate(lines) if line.strip(" -") == UNION), None)
    callables = [i for i, line in enumerate(lines) if IN_UNION.match(line)]
    if callables:
        return [*lines[: callables[0] if union is None else union], *_in_union(lines[callables[0] :])]
    if union is None:
        return [
            re.sub(r"Expected a (.+)\. Got value: (.*)", lambda found: _wanted(*found.groups()), line) for line in lines
        ]
    value = re.sub(r"NestedArg\(.*val='(.*)'\)", r"\1", lines[-1].partition("Given value: ")[2])
    return [*lines[:union], _wanted(lines[union + 1].partition("[")[2].removesuffix("]"), value)]


CALLABLE = re.compile(
    r"""Parser\ key\ "([\w.]+)":\s+Type\ .*?\ expects\ a\ function\ or\ a\ callable\ class:\s(.*)
    \.\ Got\ value:\ (?:Namespace\(class_path='([\w.]+)'.*|.*)""",
    re.DOTALL | re.VERBOSE,
)


def _of_callable(lines: Sequence[str]) -> Sequence[str]:
    """Shorten the message about an option whose value is a class to be called later, such as an optimiser's."""
    found = CALLABLE.fullmatch("\n".join(lines))
    if found is None:
        return lines
    option, problem, class_path = found.groups()
    if inner := re.match(r'Parser key "([\w.]+)":\s*(.*)', problem, re.DOTALL):
        return [f'Parser key "{option}.{inner[1]}":', *inner[2].splitlines()]
    of_class = class_path and problem.startswith("Option ")
    given = [f"Problem with given class_path '{class_path}':", f"  {problem}"] if of_class else [problem]
    return [f'Parser key "{option}":', *given]


def _in_union(lines: Sequence[str]) -> list[str]:
    """Shorten the problem of a class that creates a function, and name the class."""
    inner = takewhile(lambda line: _indent(line) > _indent(lines[0]), lines[1:])
    text, _, value = "\n".join([IN_UNION.sub(r"\1", lines[0]), *inner]).rpartition(". Got value: ")
    class_path = re.match(r"(?:Namespace\(class_path=')?([\w.]+)", value)
    return [f"Problem with given class_path '{class_path[1] if class_path else value}':", *shorter(text.splitlines())]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wanted(types: str, value: str) -> str:
    *kinds, last = _kinds(types)
    near = [ALIASES[value]] if ALIASES.get(value) in kinds else get_close_matches(value, {*kinds, last} - TYPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    shown = (value or "an empty text") if len(value) <= 200 else f"{value[:200]} ..."
    return f"wants {', '.join(kinds)}{' or ' if kinds else ''}{last}, not {shown}{hint}"


def _kinds(types: str) -> list[str]:
    """``<class 'int'>, typing.Literal['a', 'b']`` -> ``int``, ``a``, ``b``, each once."""
    types = re.sub(r"list\[collections\.abc\.Callable\[.*?\]\]", "a list of class paths", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), types)
    types = re.sub(r"<class '(.*?)'>", lambda found: _kind(found[1]), types.replace("<class 'NoneType'>", "null"))
    return list(dict.fromkeys(types.split(", ")))


def _kind(class_path: str) -> str:
    """Return a class's name, or for a dataclass an example of the mapping to type."""
    found = imported_class(class_path)
    if not dataclasses.is_dataclass(found):
        return class_path.rpartition(".")[2]
    first, hint = dataclasses.fields(found)[0], next(iter(get_type_hints(found).values()))
    literals = [get_args(kind)[0] for kind in get_args(hint) if get_origin(kind) is Literal]
    example = literals[0] if literals else "..." if first.default in (None, dataclasses.MISSING) else first.default
    return f'"{{{first.name}: {example}}}"'


def imported_class(class_path: str) -> Any:
    """Import a class; None if there is no such class."""
    try:
        return find_object(class_path)
    except (ImportError, AttributeError, ValueError):
        return None


def parameters(class_path: str) -> list[str]:
    """Return the names of a class's constructor arguments."""
    found = imported_class(class_path)
    return [] if found is None else [name for name in inspect.signature(found).parameters if name != "self"]


def nested_parameters(class_path: str) -> list[str]:
    """Return a class's arguments, and for one with settings of its own (``columns``) also these (``columns.root``)."""
    hints: dict[str, Any] = {}
    with suppress(Exception):  # a name that only type checkers import
        hints = get_type_hints(getattr(imported_class(class_path), "__init__", None))
    kinds = [(name, kind) for name, hint in hints.items() for kind in (hint, *get_args(hint))]
    nested = [(name, dataclasses.fields(kind)) for name, kind in kinds if dataclasses.is_dataclass(kind)]
    return [*parameters(class_path), *(f"{name}.{field.name}" for name, fields in nested for field in fields)]


def options_of(parser: Any) -> list[str]:
    """Return a parser's options, without options of the class that another option names."""
    names = (name for action in parser._actions for name in action.option_strings)
    return [name for name in names if name.startswith("--") and not name.endswith(".help")]


@contextmanager
def hinting(words: Sequence[str], options: Callable[[], Iterable[str]], see: str) -> Iterator[None]:
    """Add a suggestion, as a note, to a parser's error about an unknown option; ``see`` names a list of them."""
    try:
        yield
    except ArgumentError as error:
        if hint := _hint("\n".join(shorter(str(error).splitlines())), words, options, see):
            error.add_note(hint)
        raise


def _hint(error: str, words: Sequence[str], options: Callable[[], Iterable[str]], see: str) -> str:
    """Return the suggestion; empty for other errors."""
    if of_class := re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", error):
        class_path, name = of_class.groups()
        if class_path == "lit_clip.losses.Loss":  # of no loss in particular
            return "name the loss before it, such as --model.loss Contrastive"
        typed = (word.partition("=")[0] for word in words if word.startswith("--"))
        option = next((word for word in typed if word.endswith(f".{name}")), name)  # by default in a file
        known = [option.removesuffix(name) + parameter for parameter in nested_parameters(class_path)]
        return _did_you_mean(option, known) or f"there are {', '.join(parameters(class_path)) or 'none'}"
    if without := re.search(r"^argument (--\S+): expected one argument", error):
        bare = (word for word, after in pairwise([*words, "--"]) if after.startswith("--") and "=" not in word)
        return next((f"type a value after {word}" for word in bare if word.startswith(without[1])), "")
    if missing := re.search(r"^the following arguments are required: (?!data$)(\w+)", error):
        return f"type --{missing[1]}; see {see}" if f"--{missing[1]}" in options() else ""
    if error.startswith("unrecognized arguments"):
        wrong = next((word for word in error.split() if word.startswith("--")), "")
        return _did_you_mean(wrong.partition("=")[0], options()) or f"see {see}"
    if in_file := re.search(r"[Oo]ption '([\w.]+)'", error):
        return _did_you_mean(in_file[1], [option.removeprefix("--") for option in options()]) or f"see {see}"
    return ""


def _did_you_mean(option: str, options: Iterable[str]) -> str:
    """Suggest an option with the same or a similar last part (a common prefix is no similarity), first a sibling."""

    def last(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-")

    known = list(options)
    siblings = [each for each in known if each.rpartition(".")[0] == option.rpartition(".")[0]]
    near = [each for each in known if last(each) == last(option)][:1]
    nested = (each.split(".")[-2:] for each in known if "." in each)  # image_column was meant as columns.image
    near += [f".{above}.{name}" for above, name in nested if f"{name}_{above}" == f"{last(option)}s"][:1]
    near = [each for part in near for each in known if each.endswith(part)]
    for candidates in (siblings, known):
        by_name = {last(each): each for each in reversed(candidates)}
        alike = 0.6 if "." in option else 0.75  # another tool's option may mean something else
        near += [by_name[name] for name in get_close_matches(last(option), by_name, n=1, cutoff=alike)]
    return f"did you mean {near[0]}?" if near else ""


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
    r"^[a-z ]+ are required: data$": "the --config files name no data module; add --data datamodules.Captions",
    r"^model: Unable to load config": "a model's name is the value of --model.architecture",
    r"^unrecognized arguments: [^-\s]\S*\.(csv|tsv|jsonl?|parquet)": "a path of data is the value of --data.train",
    r"^data: (wants LightningDataModule|.*No module named)": "a path of data is the value of --data.train",
    r"model\.loss: wants Loss or null": "name a subclass of lit_clip.losses.Loss, as file.Class",
    r"given class_path '\S+': No module named": "a class of your own is named file.Class, and its file lies in the "
    "folder in which the command is typed",
    r"Expected a dot import path": "name a class by its path, such as torch.optim.AdamW, or a file that holds settings",
    r"lr_scheduler: .*arguments are required: total_steps": "give total_steps the default None; the run passes its own",
}
# How a data worker was lost, by the start of the signal's name.
LOST = {
    "Killed": "was killed, probably because memory ran out; set num_workers or batch_size lower, or give the machine "
    "or container more memory",
    "Bus error": "ended with a bus error: shared memory (/dev/shm) is full, or a file that it was reading was cut off; "
    "raise --shm-size of the container or set num_workers to 0",
}


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without a data worker's traceback and the types of a union."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.lstrip(" -").startswith(NO_FILE)]
    if lines and lines[0].startswith("Caught "):  # by a data worker, which appends the traceback to the message
        return lines[-1].partition(": ")[2]
    if unset := re.search(r"Environment variable '(\w+)' not found", str(error)):
        command = f"{unset[1]}=... lit-clip {' '.join(sys.argv[1:2])} ..."
        return f"the config needs the environment variable {unset[1]}; type {command}"
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(line.strip() for line in shorter(lines)))
    text = re.sub(r"Problem with given class_path '([^']+)': Option ", r"\1: option ", text)
    hints = [hint for words, hint in HINTS.items() if re.search(words, text)]
    hints += [f"did you mean {near}?" for near in _similar_names(text)]
    return "; ".join([text, *getattr(error, "__notes__", ()), *hints])


def _similar_names(text: str) -> list[str]:
    """Suggest a class for a misspelt one, or a file of the working folder for a module that is not found.

    A class is one of the same module, or a loss: ours, or one of a file in the working folder, which is not imported.
    """
    if missing := re.search(r"No module named '(\w+)'", text):
        return get_close_matches(missing[1], [file.stem for file in Path().glob("*.py")], n=1)
    found = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text)
    of_loss = re.search(r"model\.loss: wants Loss or null, not (\w+)", text)
    module, name = found.groups() if found else ("lit_clip.losses", of_loss[1]) if of_loss else ("", "")
    short = module.removeprefix("lit_clip.")
    module = short if short in SHORT else module
    homes = [sys.modules[home] for home in (module, f"lit_clip.{module}") if home in sys.modules]
    known = {each: f"{module}.{each}" for home in homes for each in _public(home)}
    for file in sorted(Path().glob("*.py")) if of_loss else ():
        with suppress(OSError):
            classes = re.findall(r"^class (\w+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            known |= {each: f"{file.stem}.{each}" for each in classes}
    return [known[near] for near in get_close_matches(name, known, n=1)]


def _public(module: ModuleType) -> list[str]:
    """Return the names of a module that are no modules."""
    return [name for name, value in vars(module).items() if name[0] != "_" and not isinstance(value, ModuleType)]


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
    own = re.findall(r"Not of type \w+: (architecture: .*)", text)
    # Of an error that a constructor raises jsonargparse keeps only the text if the class is in a union.
    if isinstance(error, ValueError) and text.startswith(UNION):
        own += [line for line in re.findall(r"^ *- (.*)", text, re.MULTILINE) if not line.startswith(NO_REASON)]
    if known := InputError(own[0]) if own else _of_machine(error):
        return known
    foreign = tuple(getattr(sys.modules[module], name) for module, name in FOREIGN.items() if module in sys.modules)
    return error if isinstance(error, foreign) else None


def _of_machine(error: BaseException) -> InputError | None:
    """Return the error for a disk, a process or a data worker that failed; None if it was something else."""
    if isinstance(error, OSError) and error.filename:
        return InputError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(f"{error.strerror}: a disk or shared memory (/dev/shm) is full; make room there")
    signal = None
    if isinstance(error, OSError | EOFError):  # a worker that dies while it sends a batch closes its connection
        signal = _signal_of_worker(error)
    elif isinstance(error, RuntimeError):
        for words, meaning in MEANINGS.items():
            if found := re.search(words, str(error)):
                return InputError(found.expand(meaning).replace("`", ""))
        if lost := LOST_WORKER.search(str(error)):
            named = LOST_WORKER.search(str(error.__cause__)) or lost  # torch's first error may name the signal
            signal = named[1] or _signal_of_worker(error) or "Killed"
    if signal is None:
        return None
    crashed = f"crashed ({signal}); set num_workers to 0 to see at which image or file"
    return InputError(f"a data worker {next((LOST[name] for name in LOST if signal.startswith(name)), crashed)}")


def _signal_of_worker(error: BaseException) -> str | None:
    """Return the name of the signal that ended a data worker, by the workers of the loader that raised the error.

    torch's own message names it only where the signal arrives before the worker's connection closes, so not where the
    system writes a core file in between. It is waited for up to twice ``SECONDS_FOR_CORE``.
    """
    frames = (frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "_try_get_data")
    if (frame := next(frames, None)) is None:
        return None
    workers = getattr(frame.f_locals.get("self"), "_workers", ())
    ended = wait([each.sentinel for each in workers], timeout=SECONDS_FOR_CORE)
    for each in workers:
        if each.sentinel in ended:
            each.join(SECONDS_FOR_CORE)  # its files are closed before its exit code can be read
    by_signal = (-code for each in workers if (code := each.exitcode) and code < 0)
    return next((strsignal(code) for code in by_signal if code != SIGTERM), None)  # SIGTERM is the loader's
