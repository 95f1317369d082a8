"""Fixtures of several test files: tiny models, real drawings, and real processes for distribution."""

import contextlib
import csv
import ctypes
import gc
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from lightning.fabric.utilities import registry
from threadpoolctl import threadpool_limits
from torch.utils.data import _utils as torch_workers

from lit_clip import secrets
from lit_clip.cli.overview import CONFIGURED
from lit_clip.models import flops
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers import forks
from tests.helpers.fork_ranks import command_of_ranks

ROOT = Path(__file__).parents[1]
TINY_YAML = (
    "{embed_dim: 16, image: {image_size: 32, patch_size: 16, width: 64, layers: 1, heads: 1}, "
    "text: {context_length: 16, width: 16, layers: 1, heads: 1}}"
)
SMALL = CLIPConfig(  # of ``overfitted``: the smallest that learns its table, since many commands read the checkpoint
    embed_dim=64,
    image=VisionTransformerConfig(image_size=64, patch_size=16, width=128, layers=4, heads=2),
    text=TextTransformerConfig(context_length=32, width=64, layers=2, heads=1),
)


# Tests start processes; more threads than cores would wait for each other and take many times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
threadpool_limits(1)  # numpy has read the variable already
os.fsync = lambda fd: None  # waits for the disk thousands of times, and no test takes the power away
torch_workers.MP_STATUS_CHECK_INTERVAL = 0.2  # not 5 s for each data worker that a test has killed
flops.PEAK_SECONDS = 0.0  # of which each run with Throughput would spend 0.4
registry.entry_points = cache(registry.entry_points)  # each Trainer would read the metadata of all packages
# A quarter of the time of imports and collection would be a search for garbage among what stays until the end.
gc.disable()
# A shell's background jobs ignore Ctrl-C, and the programs that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from now on, and only what the tests leave."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _memory_returned() -> Iterator[None]:
    """Return freed memory to the system, which the C library keeps: 5 GB over a whole run, copied in every fork."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test's seed_everything


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Restore the handler of Ctrl-C, which Lightning replaces after the first one."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Restore the signal handlers: a preempted process keeps its own until it exits, but this one does not exit."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _no_rank() -> Iterator[None]:
    """Remove the rank that a trainer leaves in the environment; the next trainer would start no other ranks."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _no_known_secrets() -> Iterator[None]:
    """Forget what a configuration took from the environment; a process of the command line reads one."""
    yield
    secrets._known.clear()


@pytest.fixture(autouse=True)
def _import_path() -> Iterator[None]:
    """Remove the folder that a command adds; a fuzzed import would look into it, long after its test."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def tiny_config() -> CLIPConfig:
    """A model of 0.9 million parameters, nearly all of them the token embedding."""
    return CLIPConfig(
        embed_dim=16,
        image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=16, width=16, layers=1, heads=1),
    )


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


@pytest.fixture(scope="session")
def drawings_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which OpenMoji is drawn once per test run."""
    return made_once(tmp_path_factory, "drawings", _draw)


def _draw(folder: Path) -> None:
    from datamodules.openmoji import draw

    draw(folder)


@pytest.fixture(scope="session")
def caption_table(tmp_path_factory: pytest.TempPathFactory, drawings_cache: Path) -> Path:
    """A CSV of 64 real drawings and their names, in a folder with the images."""
    make = partial(_write_captions, drawings_cache)
    return made_once(tmp_path_factory, "table", make) / "captions.csv"


def _write_captions(drawings_cache: Path, folder: Path) -> None:
    from datamodules.openmoji import draw, read_table

    drawn = [(emoji.name, path) for emoji, path in zip(read_table(), draw(drawings_cache), strict=True)]
    named = [row for row in drawn if row[0] in ("tiger", "pizza", "bicycle")]
    rows = named + [row for row in drawn[::29] if row not in named][: 64 - len(named)]
    lines = [f'{os.path.relpath(path, folder)},"{name}"' for name, path in rows]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory: pytest.TempPathFactory, caption_table: Path) -> tuple[Path, Path]:
    """Checkpoint of a tiny model, overfitted to 64 real pairs, and their table."""
    folder = made_once(tmp_path_factory, "overfitted", partial(_overfit, caption_table))
    return folder / "last.ckpt", caption_table


def _overfit(caption_table: Path, folder: Path) -> None:
    from lightning.pytorch import Trainer

    from datamodules import Captions
    from lit_clip import LitCLIP

    torch.manual_seed(0)
    module = LitCLIP(
        SMALL,
        optimizer=partial(PaperAdamW, lr=2e-3, weight_decay=0.0),
        lr_scheduler=partial(WarmupCosine, warmup_steps=10),
    )
    data = Captions(
        str(caption_table),
        str(caption_table),
        batch_size=64,
        num_workers=0,
        augmentation=[],  # with it the same takes twice as many steps
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=45, limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory, overfitted: tuple[Path, Path]) -> tuple[Path, Path, list[str]]:
    """The overfitted checkpoint, a folder with its drawings named after their captions, and the captions."""
    checkpoint, table = overfitted
    folder = tmp_path_factory.mktemp("drawings_by_name") / "photos"
    folder.mkdir()
    names = []
    with table.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            (folder / f"{row['caption'].replace('/', '_')}.png").write_bytes((table.parent / row["image"]).read_bytes())
            names.append(row["caption"])
    return checkpoint, folder, names


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and tokenizer of each kind of text encoder, as published ones are stored on a disk."""
    from tests.helpers.towers import FAMILIES, save_family

    def make(folder: Path) -> None:
        for family in FAMILIES:
            save_family(family, folder / family)

    folder = made_once(tmp_path_factory, "families", make)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the ONNX files that :func:`tests.helpers.exports.traced_once` keeps."""
    return made_once(tmp_path_factory, "traces", lambda folder: None)


@pytest.fixture(scope="module")
def quiet_open_clip() -> Iterator[None]:
    """Silence open_clip's warning of random weights, which are intended here."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate without the page's charts and TensorBoard: half of the time of an evaluation of a few images."""
    monkeypatch.setattr("lit_clip.evaluation.report.page.figures", lambda *_: {})
    monkeypatch.setattr("lit_clip.commands.evaluate.write_tensorboard", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the original of ``tiny_checkpoint``."""
    return tmp_path_factory.mktemp("tiny_original")


@pytest.fixture
def tiny_checkpoint(tiny_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, tiny_config: CLIPConfig) -> Path:
    """Checkpoint with a tiny model's random weights, as training writes it."""
    original, path = tiny_checkpoints / "tiny.ckpt", tmp_path_factory.mktemp("tiny") / "tiny.ckpt"
    if not original.exists():
        from lightning.pytorch import Trainer

        from lit_clip import LitCLIP

        torch.manual_seed(0)
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(LitCLIP(tiny_config))
        trainer.save_checkpoint(original, weights_only=True)
    torch.manual_seed(1)  # another model of the test gets other weights
    shutil.copyfile(original, path)
    return path


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
        program = partial(command_of_ranks, ranks) if ranks > 1 else function
        return forks.run([forks.Program(program, command, folder, variables)], timeout)[0]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


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
def ranks(tmp_path: Path) -> Callable[..., None]:
    """Run a function of ``tests/helpers/ranks.py`` in W gloo processes."""

    def run(function: str, world: int, *arguments: str, timeout: int = 120, script: str = "ranks.py") -> None:
        rendezvous = tmp_path / f"rendezvous_{function}_{world}"
        rendezvous.unlink(missing_ok=True)
        environment = {**os.environ, "RENDEZVOUS": f"file://{rendezvous}"}
        words = [str(ROOT / "tests/helpers" / script), function, *arguments]
        run_ranks(world, forks.Program(forks.script, words, tmp_path, environment), timeout)

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
