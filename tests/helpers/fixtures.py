"""Settings and fixtures of tests: tiny models and real drawings; :mod:`tests.conftest` names it where tests run."""

import csv
import ctypes
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from lightning.fabric.utilities import registry
from torch.utils.data import _utils as torch_workers

from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import made_once, without_packaged_defaults
from tests.helpers import charts as leaving_out
from tests.helpers import counted

SMALL = CLIPConfig(  # of ``overfitted``: the smallest that learns its table, since many commands read the checkpoint
    embed_dim=64,
    image=VisionTransformerConfig(image_size=64, patch_size=16, width=128, layers=4, heads=2),
    text=TextTransformerConfig(context_length=32, width=64, layers=2, heads=1),
)


torch.set_num_threads(1)
leaving_out.leave_out()
counted.count_once()
os.fsync = lambda fd: None  # waits for the disk thousands of times, and no test takes the power away
torch_workers.MP_STATUS_CHECK_INTERVAL = 0.2  # not 5 s for each data worker that a test has killed
registry.entry_points = cache(registry.entry_points)  # each Trainer would read the metadata of all packages
# A quarter of the time of imports and collection would be a search for garbage among what stays until the end.
gc.disable()
# Without CUDA torch would write down the stack three times, for devices that may be there later: half of an empty test.
SEED = torch.manual_seed if torch.version.cuda else torch.default_generator.manual_seed
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
    SEED(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test's seed_everything


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Restore the signal handlers: a preempted process keeps its own until it exits, but this one does not exit.

    Lightning replaces the one of Ctrl-C after the first.
    """
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in {**before, signal.SIGINT: signal.default_int_handler}.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _no_rank() -> Iterator[None]:
    """Remove the rank that a trainer leaves in the environment; the next trainer would start no other ranks."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


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


def forget_modules_of(folder: Path) -> None:
    """Remove the modules that were imported from a folder or those within it."""
    files = {name: str(getattr(module, "__file__", None)) for name, module in sys.modules.items()}
    for name in [name for name, file in files.items() if file.startswith(f"{folder}/")]:  # paths take 0.2 s
        del sys.modules[name]


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedProcess[str]]:
    """Like ``cli``, in this process, for commands that end before training: a fork takes several times as long."""
    from lit_clip.cli.main import main

    def run_main(
        *command: str, environment: dict[str, str] | None = None, folder: Path = tmp_path
    ) -> CompletedProcess[str]:
        monkeypatch.chdir(folder)
        for name, value in ({"COLUMNS": "200"} | (environment or {})).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["lit-clip", *(without_packaged_defaults(command) if command else [])])
        code = 0
        forget_modules_of(folder.parent)  # another test's folder may have one of the same name
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        forget_modules_of(folder)
        output = capsys.readouterr()
        return CompletedProcess(command, code, output.out, output.err)

    return run_main


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
def charts() -> Iterator[None]:
    """Draw the charts of pages and TensorBoard, which other tests leave out."""
    leaving_out.draw()
    yield
    leaving_out.leave_out()


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
