"""What several test files run: commands, and real processes for distribution; the fixtures are in tests/helpers."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

from lit_clip.cli.subcommands import CONFIGURED
from tests.helpers import forks

ROOT = Path(__file__).parents[1]
TINY_YAML = (
    "{embed_dim: 16, image: {image_size: 32, patch_size: 16, width: 64, layers: 1, heads: 1}, "
    "text: {context_length: 16, width: 16, layers: 1, heads: 1}}"
)

# Tests start processes; more threads than cores would wait for each other and take many times as long.
os.environ["OMP_NUM_THREADS"] = "1"


# They wait for ranks and for programs that start: begun last, they would leave the other processors idle at the end.
LONG_FILES = (
    "test_stopped_runs.py",
    "test_resume.py",
    "test_distributed.py",
    "test_surroundings.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, which pytest-xdist cannot know."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_configure(config: pytest.Config) -> None:
    """Import what tests need, seconds in which pytest-xdist's first process would let the others wait."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.helpers.fixtures")
    else:
        forks.share_server()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first test worker creates and fills with ``make``; the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared_{name}"
    whole = folder.with_suffix(".whole")
    with FileLock(folder.with_suffix(".lock")):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def openai_code() -> ModuleType:
    """Import OpenAI's ``clip/model.py``; the package's ``__init__`` needs an old setuptools."""
    package = importlib.util.find_spec("clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("clip-anytorch is not installed")
    spec = importlib.util.spec_from_file_location("openai_clip", f"{package.submodule_search_locations[0]}/model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_packaged_defaults(words: Sequence[str]) -> list[str]:
    """Add an empty ``--config`` to a command that names its data module and has none."""
    named = any(word.partition("=")[0] == "--data" for word in words)
    if words[0] in CONFIGURED and named and not any(word.partition("=")[0] == "--config" for word in words):
        return [words[0], "--config", str(ROOT / "tests/helpers/no_settings.yaml"), *words[1:]]
    return [*words]


def lit_clip_command(
    folder: Path,
    *words: str,
    environment: dict[str, str] | None = None,
    timeout: int = 120,
    function: Callable[[], None] = forks.command,
    new: bool = False,
    forked_ranks: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run ``lit-clip`` in a folder, as a user would.

    Args:
        folder: the working folder.
        words: command line arguments; see :func:`without_packaged_defaults`.
        environment: additional variables.
        timeout: in seconds.
        function: of :mod:`tests.helpers.forks`, that runs the command.
        new: run it in a new interpreter, which reads variables such as ``PYTHONPATH``, instead of a fork.
        forked_ranks: on several devices, let the other ranks be forks too instead of programs that Lightning starts.
    """
    command = [str(Path(sys.executable).parent / "lit-clip"), *without_packaged_defaults(words)]
    variables = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **(environment or {})}
    if not new:
        ranks = devices_of(command) if forked_ranks and function is forks.command else 1
        program = partial(_command_of_ranks, ranks) if ranks > 1 else function
        return forks.run([forks.Program(program, command, folder, variables)], timeout)[0]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


def _command_of_ranks(count: int) -> None:
    from tests.helpers.fork_ranks import command_of_ranks

    command_of_ranks(count)


def devices_of(command: Sequence[str]) -> int:
    """Return the number of devices that a command line names; 1 if it names none."""
    values = [value for word, value in pairwise(command) if word in ("--trainer.devices", "--devices")]
    return int(values[-1]) if values and values[-1].isdecimal() else 1


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``lit_clip_command`` in this test's folder."""
    return partial(lit_clip_command, tmp_path)


def torchrun(folder: Path, world: int, *words: str, timeout: int = 120) -> str:
    """Return the output of ``torchrun --nproc_per_node W ...``, which must exit with 0; no process is left behind."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    process = subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have their own sessions
    assert process.returncode == 0, output
    return output


def run_ranks(world: int, program: forks.Program, timeout: int) -> list[subprocess.CompletedProcess[str]]:
    """Run a program on each of W ranks; all must exit with 0 within the time limit."""
    places = [{"RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world)]
    programs = [program._replace(environment=program.environment | place) for place in places]
    results = forks.run(programs, timeout)
    for done in results:
        assert done.returncode == 0, done.stdout + done.stderr
    return results


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Any]:
    """Run a function of ``tests/helpers/ranks.py`` in W gloo processes; return what it returns on the first one."""

    def run(function: str, world: int, *arguments: object, timeout: int = 120, script: str = "ranks.py") -> Any:
        rendezvous, result = tmp_path / f"rendezvous_{function}_{world}", tmp_path / f"result_{function}_{world}"
        rendezvous.unlink(missing_ok=True)
        environment = {**os.environ, "RENDEZVOUS": f"file://{rendezvous}", "RESULT": str(result)}
        words = [str(ROOT / "tests/helpers" / script), function, *map(str, arguments)]
        run_ranks(world, forks.Program(forks.script, words, tmp_path, environment), timeout)
        return json.loads(result.read_text(encoding="utf-8"))

    return run


def run_lightning_ranks(world: int, folder: Path, *words: str, timeout: int = 120) -> str:
    """Return what ``torchrun --nproc_per_node W ...`` would write, without torchrun and new interpreters.

    Args:
        world: number of ranks.
        folder: the working folder.
        words: ``lit-clip`` and its options, or a file of ``tests/`` and its arguments.
        timeout: in seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place = {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    environment = {**os.environ, "COLUMNS": "200", **address, **place}
    function = forks.script
    if words[0] == "lit-clip":
        function, words = forks.command, ("lit-clip", *without_packaged_defaults(words[1:]))
    results = run_ranks(world, forks.Program(function, words, folder, environment), timeout)
    return "".join(done.stdout + done.stderr for done in results)
