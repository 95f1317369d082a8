"""Build the wheel, and install it beside the dependencies that a plain install has."""

import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.forks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build_wheel(folder: Path) -> Path:
    """Build the wheel as ``pip wheel`` does."""
    pytest.importorskip("hatchling", reason="of the dev extra: make install")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def write_strangers(folder: Path) -> None:
    """Write packages of another distribution that have the short names of ours, and in each a class of ours."""
    for package, name in (("callbacks", "EMA"), ("datamodules", "Captions")):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f"class {name}: ...\n\n\nclass Strange: ...\n")
        (folder / package / "captions.py").write_text("")


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
    """Return the programs of a new environment: the wheel, links to the dependencies of a plain install, strangers."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for installed in closure(PROJECT["dependencies"]).values():
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(installed.locate_file(top)))
    python = str(folder / "bin/python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    write_strangers(packages)
    return folder / "bin"


def runner(programs: Path, here: Path, cache: Path) -> Callable[..., str]:
    """Return a function that runs one of the programs in a folder and returns its output, without this clone."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "XDG_CACHE_HOME": str(cache)}

    def run(program: str, *words: str) -> str:
        command = [str(programs / program), *words]
        done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout + done.stderr}"
        return done.stdout

    return run
