"""The text of ``lit-clip --help``: the first six commands in full and the other names, without importing any."""

import ast
import importlib.util
import textwrap
from pathlib import Path

from lit_clip.cli import subcommands

# LightningCLI's commands, imported when one of them is run.
CONFIGURED = {
    "fit": "Train or fine-tune a model.",
    "validate": "Loss and retrieval on the validation data, and the configuration's evaluation callbacks.",
    "test": "The same metrics on the test data.",
    "predict": "Features of the data's images and captions, for Python callers.",
}
FIRST = ("fit", "evaluate", "classify", "search", "export", "demo")
EXAMPLES = (
    "lit-clip fit --data.train captions.csv",
    "lit-clip evaluate --model last.ckpt --suite mine --output my_evaluation",
    "lit-clip classify photos --model last.ckpt --classes tiger pizza bicycle",
    'lit-clip search photos "a red kite over the beach" --model last.ckpt',
    "lit-clip export last.ckpt --format onnx --output exported",
)
HELP_WIDTH = 80


def help_text() -> str:
    """Return the text of ``lit-clip --help``."""
    others = ", ".join(sorted({*CONFIGURED, *subcommands.COMMANDS}.difference(FIRST)))
    lines = ["usage: lit-clip COMMAND ...", ""]
    for name in FIRST:
        text = f"  {name:10} {CONFIGURED.get(name) or _first_line(subcommands.COMMANDS[name])}"
        lines += [textwrap.fill(text, HELP_WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)]
    lines += ["", "Examples:", *(f"  {example}" for example in EXAMPLES), ""]
    lines += [textwrap.fill(f"More commands: {others}.", HELP_WIDTH, break_on_hyphens=False)]
    lines += ["", "lit-clip COMMAND --help lists a command's options; --version: the version."]
    lines += ["lit-clip --import MODULE COMMAND ... first imports a module, which holds the"]
    lines += ["encoders that a checkpoint names."]
    return "\n".join(lines)


def _first_line(function: str) -> str:
    """Return the first line of a function's docstring without importing its module."""
    module, _, name = function.partition(":")
    *package, file = module.split(".")
    spec = importlib.util.find_spec(".".join(package[:2]))  # imports nothing of the package's
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent.joinpath(*package[2:], f"{file}.py").read_text(encoding="utf-8")
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(next(found)) or "").partition("\n")[0]
