"""The ``lit-clip`` command: dispatch to a command, print user errors in one line, end the process.

Heavy modules are imported only when they are needed, so that ``lit-clip --help`` answers at once.
"""

import shlex
import sys
import threading
from collections.abc import Sequence
from difflib import get_close_matches

from lit_clip.cli import subcommands
from lit_clip.cli.lazy_packages import defer_packages, uncollected
from lit_clip.cli.plain_help import short_help
from lit_clip.cli.subcommands import CONFIGURED, help_text
from lit_clip.errors import InputError, printable
from lit_clip.tools.class_paths import find_stubs_without_a_program, find_working_folder, import_modules
from lit_clip.tools.guarded_output import guard_messages, open_closed_streams, silence
from lit_clip.tools.imports import __version__
from lit_clip.tools.messages import one_line, user_error
from lit_clip.tools.processes import check_open_files, let_launcher_end, watch_launcher

# Other tools' names of commands, which are spelt too differently to be suggested.
ELSEWHERE = {"train": "fit", "finetune": "fit", "fine-tune": "fit", "zero-shot": "evaluate", "benchmark": "evaluate"}
BEFORE_COMMAND = ("-h", "--help", "-c", "--config", "--print_config")  # options that a command may follow
WITHOUT_WORKERS = ("configs", "export", "models")  # commands that need no more open files than any program
USER_ERROR = 2  # argparse's exit code for a bad command line
IMPORT = "--import"  # of a module, before the command
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as in shells
PATIENCE = 3.0  # seconds; the first rank may be waiting for this one, and learns from its end that it failed


def _thread_error(thread: threading.ExceptHookArgs) -> None:
    """Print a thread's error as the command prints its own, such as a full disk in TensorBoard's writer."""
    fixable = user_error(thread.exc_value) if thread.exc_value else None
    if fixable is None:
        threading.__excepthook__(thread)
    else:
        sys.stderr.write(f"lit-clip: {printable(one_line(fixable))}\n")


def _check_command(words: Sequence[str]) -> None:
    known = sorted({*CONFIGURED, *subcommands.COMMANDS})
    if words[0] not in known and not words[0].startswith("-"):
        instead = ELSEWHERE.get(words[0].replace("_", "-"))
        near = [instead] if instead else get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise InputError(f"unknown command {words[0]!r}; {hint}")
    if words[0].startswith("-") and words[0].partition("=")[0] not in BEFORE_COMMAND:
        named = next((i for i, word in enumerate(words) if word in known), None)
        if named is None:
            raise InputError(f"{words[0]}: no command given; type one of {', '.join(known)} before the options")
        ordered = shlex.join(["lit-clip", words[named], *words[:named], *words[named + 1 :]])
        raise InputError(f"{words[0]}: options come after the command; type {ordered}")


def command_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the modules to import, and the command with its options."""
    modules, rest = [], list(words)
    while rest and rest[0].partition("=")[0] == IMPORT:
        _, equals, module = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("-"):
            module = rest.pop(0)
        if not module:
            raise InputError(f"{IMPORT}: no module is named; lit-clip {IMPORT} my_encoder COMMAND ...")
        modules.append(module)
    return modules, rest


def _run(words: list[str]) -> int:
    find_working_folder()
    modules, words = command_words(words)
    if not words:
        sys.stderr.write(f"{help_text()}\n")
        return USER_ERROR
    if words[:1] in (["-h"], ["--help"], ["--version"]):
        sys.stdout.write(f"lit-clip {__version__}\n" if words[0] == "--version" else f"{help_text()}\n")
        return 0
    _check_command(words)
    import_modules(modules, IMPORT)
    find_stubs_without_a_program()
    if not {"-h", "--help"}.intersection(words) and words[0] not in WITHOUT_WORKERS:
        check_open_files()
    if words[0] in subcommands.COMMANDS:
        subcommands.run_command(words)
        return 0
    if words[0] in CONFIGURED and words[1:] in (["-h"], ["--help"]):
        sys.stdout.write(short_help(f"lit-clip {words[0]}"))
        return 0
    with uncollected():
        from lit_clip.cli.lightning import run_until_signal
    return run_until_signal(words)


def main() -> None:
    """Run the ``lit-clip`` command; an error that the user can fix is one line, with exit code 2."""
    closed = open_closed_streams()
    silence()
    guard_messages()
    if threading.excepthook is threading.__excepthook__:  # not where this command runs in a program that has its own
        threading.excepthook = _thread_error
    watch_launcher()
    messages = sys.stdout if "stderr" in closed else sys.stderr
    defer_packages()
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt as stop:
        messages.write(printable(f"lit-clip: interrupted{f': {stop}' if str(stop) else ''}\n"))
        code = INTERRUPTED
    except Exception as error:
        fixable = user_error(error)
        if fixable is None:
            raise
        messages.write(f"lit-clip: error: {printable(one_line(fixable))}\n")
        code = USER_ERROR
    if code:
        let_launcher_end(PATIENCE)
    if "torch" in sys.modules:
        from lit_clip import distributed

        distributed.exit_process(code)
    if code:
        sys.exit(code)
