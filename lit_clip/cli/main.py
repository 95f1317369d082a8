"""The ``lit-clip`` command: which of its parts is meant, errors in one line, and how a process ends.

Nothing heavy is imported before it is known to be needed: ``lit-clip --help`` answers at once.
"""

import ast
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lit_clip.cli import subcommands
from lit_clip.cli.lazy_torchmetrics import defer_torchmetrics
from lit_clip.errors import InputError
from lit_clip.tools.messages import one_line, user_error
from lit_clip.tools.processes import let_launcher_end, watch_launcher

# LightningCLI's, which are imported when one of them is asked for.
CONFIGURED = {
    "fit": "Train or fine-tune a model.",
    "validate": "Loss, retrieval and zero-shot accuracy on the validation data.",
    "test": "The same on the test data.",
    "predict": "Features of the data's images and captions, for Python callers.",
}
USER_ERROR = 2  # argparse's exit code for a bad command line
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
PATIENCE = 3.0  # seconds; the first rank may be waiting for this one, and learns from its end that it will not come


def _hush() -> None:
    """Keep Lightning's advertisements, and a warning that only its authors can act on, from the terminal."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r"Precision bf16-mixed is not supported by the model summary.*")
    # What we log at the end of an epoch has been summed over the ranks already.
    warnings.filterwarnings("ignore", message=r".*recommended to use `self\.log\(.*sync_dist=True\)`.*")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode.*")  # what is frozen should be
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())


def help_text() -> str:
    """What ``lit-clip --help`` prints."""
    others = {name: _first_line(function) for name, function in sorted(subcommands.COMMANDS.items())}
    lines = ["usage: lit-clip COMMAND ...", "", "With a configuration (configs/ has some):"]
    lines += [f"  {name:10} {line}" for name, line in CONFIGURED.items()]
    lines += ["", "Without one:"]
    lines += [f"  {name:10} {line}" for name, line in others.items()]
    return "\n".join([*lines, "", "lit-clip COMMAND --help says more of each."])


def _first_line(function: str) -> str:
    """Of the docstring of ``package.module:function``, read without importing what the module needs."""
    module, _, name = function.partition(":")
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent.joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(next(found)) or "").partition("\n")[0]


def _check_command(words: Sequence[str]) -> None:
    """Jsonargparse knows LightningCLI's commands only, and would not name the others."""
    known = sorted({*CONFIGURED, *subcommands.COMMANDS})
    if not words:
        raise InputError(f"no command given; there are {', '.join(known)}")
    if words[0] not in known and not words[0].startswith("-"):
        near = get_close_matches(words[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"no command is called {words[0]!r}; {hint}")


def _run(words: list[str]) -> int:
    """Exit code."""
    _check_command(words)
    if words[0] in ("-h", "--help"):
        sys.stdout.write(f"{help_text()}\n")
    elif words[0] in subcommands.COMMANDS:
        subcommands.run_command(words)
    else:
        from lit_clip.cli.lightning import run_until_signal

        return run_until_signal()
    return 0


def main() -> None:
    """The ``lit-clip`` command: exit code 2 and one line for what the user can fix."""
    _hush()
    watch_launcher()
    defer_torchmetrics()
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"lit-clip: interrupted{f': {stop}' if str(stop) else ''}\n")
        code = INTERRUPTED
    except Exception as error:
        fixable = user_error(error)
        if fixable is None:
            raise
        sys.stderr.write(f"lit-clip: error: {one_line(fixable)}\n")
        code = USER_ERROR
    if code:
        let_launcher_end(PATIENCE)
    if "torch" in sys.modules:
        from lit_clip import distributed

        distributed.leave(code)
    if code:
        sys.exit(code)
