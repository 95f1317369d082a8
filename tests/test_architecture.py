"""docs/architecture.md says the truth about the ways through the code."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

from datamodules import evaluation
from datamodules.open_source import FILES, SUPPORTED
from lit_clip import LitCLIP
from lit_clip.cli.subcommands import COMMANDS
from tests.helpers.package_lines import PAGE as PAGE_OF_LINES
from tests.helpers.package_lines import table
from tests.helpers.small_sets import data_for, make_module, make_trainer, write_table

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MOST_FILES, MOST_LINES, MOST_STOPS = 10, 2_000, 20
MOST_IMPORTED = 120
PLAIN = """
model: {architecture: RN-tiny-64}
data: {class_path: datamodules.Captions}
trainer: {accelerator: cpu, logger: false, max_epochs: 1}
"""
FIT = """
import atexit, sys
ours = ("lit_clip", "callbacks", "datamodules")
atexit.register(lambda: print(*(name for name in sys.modules if name.partition(".")[0] in ours)))
from lit_clip.cli.main import main
main()
"""
# Underscored names of Lightning's objects; its loggers', loops' and connectors' too.
PRIVATE = re.compile(
    r"(?:trainer|strategy|loop|connector|logger|plugin|_trainer|epoch_loop|val_loop)\._[a-z]\w*|"
    r"from lightning[\w.]* import (?:.*, )?_[A-Za-z]\w*"
)
# All that are used, each a place that another version of Lightning may break.
OF_LIGHTNING = {
    "_SignalConnector",
    "_WrappingCheckpointIO",
    "_accelerator_connector",
    "_batches_that_stepped",
    "_broadcast_sigterm_tensor",
    "_checkpoint_connector",
    "_ckpt_path",
    "_combined_loader",
    "_data_fetcher",
    "_ddp_kwargs",
    "_default_hp_metric",
    "_ensure_setup",
    "_error",
    "_evaluation_loop",
    "_executor",
    "_get_next_version",
    "_get_rank",
    "_has_run",
    "_launcher",
    "_layer_sync",
    "_loaded_checkpoint",
    "_logger_connector",
    "_parse_ckpt_path",
    "_set_num_threads_if_needed",
    "_should_check_val_fx",
    "_signal_connector",
    "_tracking_uri",
    "_version",
}

PACKAGES = ("lit_clip", "callbacks", "datamodules")
OTHERS = ("jsonargparse", "omegaconf", "argparse")
MODULES = {"jsonargparse._typehints"}  # in which two of the names below are replaced
PRIVATE_NAMES = {
    "jsonargparse._common.parser_context",
    "jsonargparse._util.import_object",
    "jsonargparse._typehints.resolve_class_path_by_name",
}
# Underscored names of a parser and its actions.
OF_PARSERS = {"_actions", "_action_groups", "_group_actions", "_option_string_actions", "_typehint", "_apply_actions"}


def way(heading: str) -> list[Path]:
    """Return the files of a way through the code, from the block of code below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    return [ROOT / "lit_clip" / name for line in lines for name in line.split()]


def imported(file: Path) -> set[Path]:
    """Return the files of lit_clip that a file imports, at its top or within."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return found


@pytest.mark.parametrize("heading", ["From a table row to the loss", "From a checkpoint to a model"])
def test_each_file_of_a_way_is_imported_by_one_before_it(heading: str) -> None:
    first, *others = way(heading)
    assert first.is_file()
    assert others
    known = {first}
    for file in others:
        assert any(file in imported(each) for each in known), file
        known.add(file)
    assert len(known) <= MOST_FILES
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in known) <= MOST_LINES


def test_the_module_is_small() -> None:
    text = (ROOT / "lit_clip/module.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(text.splitlines()) <= 200
    assert sum(len(node.names) for node in imports) <= 35


def test_one_room_touches_lightnings_private_parts_and_these_alone() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = [(file, match[0]) for file in files for match in PRIVATE.finditer(file.read_text(encoding="utf-8"))]
    assert [each for each in found if "lightning" not in each[0].parent.parts] == []
    assert {re.split(r"[. ]", text)[-1] for _, text in found} == OF_LIGHTNING


def test_lines_are_those_of_the_table() -> None:
    assert PAGE_OF_LINES.read_text(encoding="utf-8") == table(), "run make house"


def test_the_drawing_is_that_of_the_imports(tmp_path: Path) -> None:
    # In a process of its own: here the three packages share modules (lit_clip/tools/imports.py).
    subprocess.run([sys.executable, "docs/images/house.py", tmp_path / "house.svg"], cwd=ROOT, check=True)
    drawn = (ROOT / "docs/images/house.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "house.svg").read_text(encoding="utf-8"), "run make house"


def test_fit_imports_no_room_that_its_settings_do_not_name(tmp_path: Path) -> None:
    write_table(tmp_path)
    (tmp_path / "plain.yaml").write_text(PLAIN, encoding="utf-8")
    words = ["-c", FIT, "fit", "--config", "plain.yaml", "--data.train", "captions.csv", "--print_plan"]
    words += ["--trainer.callbacks", "EMA", "--trainer.callbacks.decay", "0.9"]  # a name that is not imported yet
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    names = done.stdout.splitlines()[-1].split()
    assert {"lit_clip.module", "lit_clip.callbacks.ema"} <= set(names)
    rooms = {name.split(".")[1] for name in names if "." in name}
    assert rooms.isdisjoint({"approximate", "commands", "evaluation", "heads", "locating"})
    assert "lit_clip.datamodules.evaluation" not in names
    assert len(names) <= MOST_IMPORTED


def test_private_names_of_other_packages_are_counted() -> None:
    """Each is a place that another version of the package may break; Lightning's are in one room, see above."""
    found = set()
    for file in (each for package in PACKAGES for each in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OTHERS:
                names = [f"{node.module}.{each.name}" for each in node.names]
                found |= {name for name in names if "._" in name and name not in MODULES}
            elif isinstance(node, ast.Attribute) and node.attr in OF_PARSERS:
                found.add(f"{file.name}: {node.attr}")
    assert found == PRIVATE_NAMES


def test_a_checkpoint_makes_few_stops_on_its_way_into_the_same_run(tmp_path: Path) -> None:
    """Count the functions of ours that get a checkpoint, or a value in it, while its run resumes."""
    table, saved = write_table(tmp_path), tmp_path / "saved.ckpt"
    module = make_module()
    trainer = make_trainer(tmp_path, [], max_steps=1)
    trainer.fit(module, data_for(module, table))
    trainer.save_checkpoint(saved)
    values: dict[int, Any] = {}
    stops, way_in = set(), []

    def note(value: Any) -> None:
        values[id(value)] = value
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(each, dict | list | Tensor):
                note(each)

    def follow(frame: FrameType, event: str, _: Any) -> None:
        code, arguments = frame.f_code, frame.f_locals
        if code.co_name == "on_load_checkpoint" and isinstance(arguments.get("self"), LitCLIP):
            if event == "call":
                note(arguments["checkpoint"])
            way_in[:] = ["under way"] if event == "call" else []
        if event != "call" or not way_in or not code.co_filename.startswith(str(ROOT / "lit_clip")):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not code.co_name.startswith("<") and any(id(arguments.get(name)) in values for name in names):
            stops.add((code.co_filename, code.co_name))

    module = make_module()
    trainer = make_trainer(tmp_path, [], max_steps=2)
    sys.setprofile(follow)
    try:
        trainer.fit(module, data_for(module, table), ckpt_path=saved)
    finally:
        sys.setprofile(None)
    assert trainer.global_step == 2
    assert 10 <= len(stops) <= MOST_STOPS


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_tests_and_a_page(name: str) -> None:
    pages = [file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md")]
    assert any(f"lit-clip {name}" in page for page in pages), "describe its use in docs/"
    module, _, function = COMMANDS[name].partition(":")
    module = module.replace("lit_clip.datamodules", "datamodules")
    tests = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    used = re.compile(rf"from {module} import .*\b{function}\b|[\"']{name}[\"']")
    assert any(used.search(text) for text in tests), "test it in tests/"


def test_the_list_of_formats_names_each_suffix_that_opens() -> None:
    assert [suffix for suffix in FILES if suffix not in SUPPORTED] == []


def test_each_evaluation_set_of_a_suite_is_a_name_of_its_package() -> None:
    for file in (ROOT / "configs/evaluation").rglob("*.yaml"):
        for name in re.findall(r"class_path: datamodules\.evaluation\.([\w.]+)", file.read_text(encoding="utf-8")):
            assert hasattr(evaluation, name.partition(".")[0]), f"{file}: {name}"
