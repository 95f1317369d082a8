"""Error messages for the command line: one line with advice for a user's error, but not for a bug."""

import errno
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from traceback import walk_tb

from lit_clip.errors import InputError
from lit_clip.tools.class_paths import SHORT
from lit_clip.tools.processes import few_files

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
