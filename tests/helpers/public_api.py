"""Public names, options and forms of files; ``make house`` writes them into docs/evidence/public_api.txt."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from datamodules.pairs.score_files import SCORES
from datamodules.shards.index import COLUMNS
from datamodules.shards.index import FORMAT as INDEX_FORMAT
from lit_clip.cli import lightning, subcommands
from lit_clip.cli.plain_help import COMMON
from lit_clip.embedding.feature_files import write_features
from lit_clip.heads.head import FORMAT as HEAD_FORMAT
from lit_clip.tools.messages import parameters
from lit_clip.tools.sharded_files import VERSION
from lit_clip.weights.checkpoints import _OURS, RESUMED

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/evidence/public_api.txt"
PACKAGES = {"lit_clip": "lit_clip", "lit_clip.losses": "lit_clip/losses"}
PACKAGES |= {"lit_clip.callbacks": "callbacks", "lit_clip.datamodules": "datamodules"}
DATA = ("Captions", "ParallelSentences")
HEAD = """What is public; docs/public_api.md says what that promises.
`make house` writes this file, and a test compares it with the code.
"""


def text(scratch: Path) -> str:
    """Return the content of the file; LightningCLI must not instantiate anything meanwhile."""
    lines = [HEAD]
    for package, folder in PACKAGES.items():
        lines += [f"# Python: {package}", "", *_names(ROOT / folder), ""]
    lines += ["# Options of fit, validate, test and predict, but the Trainer's", "", *_fit_options(), ""]
    for name, place in sorted(subcommands.COMMANDS.items()):
        module, _, function = place.partition(":")
        parser = subcommands.command_parser(name, getattr(importlib.import_module(module), function))
        actions = [action for action in parser._actions if action.dest not in ("help", "h")]
        lines += [
            f"# lit-clip {name}",
            "",
            *(" ".join(each.option_strings[:1]) or each.dest.upper() for each in actions),
            "",
        ]
    return "\n".join([*lines, "# Files", "", *_files(scratch)]) + "\n"


def _fit_options() -> list[str]:
    fit: Any = lightning.run(args=["--config", "table"], execute=False)
    names = {name for name in fit.parser.options() if not name.startswith(("--trainer.", "--data."))}
    names |= {*COMMON["start"]}  # --ckpt_path is an option of each command, not of the parser
    return sorted(names | {f"--data.{name} ({data})" for data in DATA for name in parameters(f"datamodules.{data}")})


def _files(scratch: Path) -> Iterator[str]:
    import numpy as np

    write_features(scratch / "a.parquet", ["a"], np.ones((1, 2), np.float32), {}, ["a"], ["a"])
    columns = {
        "features": pq.read_schema(scratch / "a.parquet").names,
        "scores": SCORES.names,
        "shard index": COLUMNS.names,
    }
    yield f"checkpoint: {', '.join(sorted({*_OURS.__annotations__, *RESUMED.__annotations__}))}"
    yield f"checkpoint in shards: version {VERSION}"
    yield f"head: {HEAD_FORMAT}"
    yield f"shard index: format {INDEX_FORMAT}"
    for name, found in columns.items():
        yield f"{name}: {', '.join(found)}"


def _names(folder: Path) -> Iterator[str]:
    """Yield a package's public names with their signatures, read from the source: no library's version changes them."""
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.name: (line.module or "", line.level)
        for line in ast.walk(tree)
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    public = next(
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    for name in sorted(ast.literal_eval(public.value)):
        module, level = homes.get(name, ("__init__", 1))  # of this file
        path = (folder if level else ROOT) / f"{module.replace('.', '/')}.py"
        yield from _signature(name, path) if name != "__version__" else [name]


def _signature(name: str, path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.FunctionDef):
        yield _function(found)
    if not isinstance(found, ast.ClassDef):  # a name of an alias has no signature
        yield from [name] * (found is None)
        return
    yield f"class {name}({', '.join(map(ast.unparse, found.bases))})"
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith(("_", "on_"))):
            yield f"    {_function(node)}"
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield f"    {ast.unparse(node)}"


def _function(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    kind = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list if ast.unparse(each) == "property")
    return f"{kind}{node.name}({ast.unparse(node.args)}){returns}"


if __name__ == "__main__":
    import tempfile

    lightning.CLI.instantiate_classes = lambda self: None  # pyright: ignore[reportAttributeAccessIssue]  # only parsed
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(text(Path(folder)), encoding="utf-8")
