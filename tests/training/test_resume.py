"""A run killed anywhere resumes with the samples, random numbers and weights of an uninterrupted run."""

import csv
import io
import math
import random
import shutil
import socket
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import callbacks
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.forks import CONTEXT
from tests.helpers.resume_runs import Run, train
from tests.helpers.small_sets import write_table
from tests.test_module import trainer

TIME_LIMIT = 120
Runs = Callable[[int, int, bool], Run]  # world size, workers, tars -> an uninterrupted run
STEPS = 5  # per epoch: 21 pairs, 4 per step


def start(run: Run) -> list[int]:
    """Run all ranks to their end and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=train, args=(run, rank, port)) for rank in range(run.world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIME_LIMIT)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{run}: {len(alive)} ranks hang"
    return [process.exitcode or 0 for process in ranks]


def samples(run: Run) -> list[list[str]]:
    """Return the samples that each rank was trained on, one line per step."""
    return [Path(run.folder, f"{run.name}_{rank}.txt").read_text().splitlines() for rank in range(run.world)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, caption_table: Path) -> Path:
    """A table of 21 pairs; an epoch drops one of them."""
    folder = tmp_path_factory.mktemp("pairs")
    with caption_table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:21]
    lines = [f'{(caption_table.parent / row["image"]).resolve()},"{row["caption"]}"' for row in rows]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """The same pairs in seven tars of 1 to 5."""
    folder = tmp_path_factory.mktemp("shards")
    with pairs.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, size in enumerate((1, 5, 2, 4, 3, 1, 5)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for _ in range(size):
                row = rows.pop()
                caption = tarfile.TarInfo(f"{len(rows):04d}.txt")
                caption.size = len(row["caption"].encode())
                tar.addfile(caption, io.BytesIO(row["caption"].encode()))
                tar.add(row["image"], f"{len(rows):04d}.png")
    assert not rows
    return folder / "{00000..00006}.tar"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pairs: Path, shards: Path) -> Runs:
    """Return an uninterrupted run for a number of ranks and workers, on a table or tars; each is run once."""
    runs: dict[tuple[int, int, bool], Run] = {}

    def get(world: int, workers: int, tars: bool = False) -> Run:
        if (world, workers, tars) not in runs:
            folder = tmp_path_factory.mktemp(f"uninterrupted_{world}_{workers}")
            run = Run(str(folder), str(shards if tars else pairs), world, workers, 4 // world)
            assert start(run) == [0] * world
            runs[world, workers, tars] = run
        return runs[world, workers, tars]

    return get


def check_resumed(expected: Run, folder: Path, kill: int, every: int) -> None:
    """Kill a run like ``expected`` at a step, resume it, and compare samples, state and curves."""
    killed = expected._replace(folder=str(folder), kill=kill, every=every, name="killed")
    codes = start(killed)
    assert -9 in codes
    assert 0 not in codes
    resumed = killed._replace(kill=None, resume=True, name="resumed")
    assert start(resumed) == [0] * resumed.world
    done = kill // every * every
    for steps, before, after in zip(samples(expected), samples(killed), samples(resumed), strict=True):
        assert before[:kill] == steps[:kill]
        assert after == steps[done:]
    ours, theirs = (torch.load(f"{run.folder}/{run.name}.pt", weights_only=True) for run in (resumed, expected))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), f"{name} is not bit-identical"
    check_curves(curves(resumed), curves(expected), done)


def curves(run: Run) -> dict[str, dict[int, float]]:
    """Return the value of each logged metric at each step."""
    with Path(run.folder, run.name, "version_0", "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = ("train/samples_per_second", "train/expected_hours")
    names = [name for name in rows[0] if name not in ("step", "epoch", *timed)]
    metrics = {}
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert len(points) == len({step for step, _ in points}), f"{name} has a step twice"
        assert points == sorted(points), f"{name} steps back"
        metrics[name] = dict(points)
    return metrics


def check_curves(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]], done: int) -> None:
    """Check that the resumed run's curves continue the uninterrupted ones, learning rate and samples seen included.

    A validation due right after the saved step may not have finished, so it is repeated.
    """
    assert {"train/loss", "train/samples_seen", "train/learning_rate"} <= ours.keys()
    for name, points in theirs.items():
        first = done - 1 if name.startswith("val/") else done
        rest = {step: value for step, value in points.items() if step >= first}
        assert ours.get(name, {}) == rest, name


# That an epoch ends where a run is killed, on one rank or two, is among the cases of test_stopped_runs.py.
CASES = [
    pytest.param(1, 0, False, 3, 1, id="one rank in the middle of an epoch"),
    pytest.param(1, 2, True, 5, 1, id="tars, with workers exactly at the end of an epoch", marks=pytest.mark.slow),
    pytest.param(2, 0, False, 10, 1, id="two ranks at the end of an epoch with a validation", marks=pytest.mark.slow),
    pytest.param(2, 2, True, 8, 3, id="tars, two ranks with workers, some steps after the checkpoint"),
]


@pytest.mark.parametrize(("world", "workers", "tars", "kill", "every"), CASES)
def test_killed_run_resumes_bit_for_bit(
    world: int, workers: int, tars: bool, kill: int, every: int, uninterrupted: Runs, tmp_path: Path
) -> None:
    check_resumed(uninterrupted(world, workers, tars), tmp_path, kill, every)


def test_resume_inside_an_epoch_with_another_global_batch_is_refused(uninterrupted: Runs, tmp_path: Path) -> None:
    killed = uninterrupted(1, 0, False)._replace(folder=str(tmp_path), kill=3, name="killed")
    assert start(killed) == [-9]
    other = killed._replace(kill=None, resume=True, name="other", batch_size=5)
    assert start(other) == [1]
    error = Path(tmp_path, "other.error").read_text(encoding="utf-8")
    assert "saved after 3 batches of an epoch" in error
    assert "pairs per step (all ranks) 4 there and 5 here" in error
    two = killed._replace(kill=None, resume=True, name="two", batch_size=2, world=2)  # still 4 pairs per step
    assert start(two) == [0, 0]
    expected, (first_rank, second_rank) = samples(uninterrupted(1, 0, False))[0], samples(two)
    for line, *lines in zip(expected[3:], first_rank, second_rank, strict=True):
        assert sorted(line.split()[3:]) == sorted(key for own in lines for key in own.split()[3:])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tars", [False, True])
def test_run_killed_at_random_steps_resumes_bit_for_bit(
    world: int, workers: int, tars: bool, uninterrupted: Runs, tmp_path: Path
) -> None:
    rng = random.Random(f"{world} {workers} {tars}")
    for kill in [STEPS, *rng.sample(range(1, 3 * STEPS), 3)]:  # 32 kills in all, one per case at the end of an epoch
        every = rng.choice([every for every in (1, 2, 5) if every <= kill])
        check_resumed(uninterrupted(world, workers, tars), tmp_path, kill, every)
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# Ranks that would resume from different checkpoints say so together.


SCRIPT = str(ROOT / "tests/helpers/ranks_scale.py")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_table(tmp_path_factory.mktemp("table"), 8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, table: str) -> Path:
    """A run's checkpoint after its only step."""
    folder = tmp_path_factory.mktemp("one")
    run_lightning_ranks(1, folder, SCRIPT, "shard", "one", table, "auto", "8")
    return folder / "one.ckpt"


def other_weights(path: Path, folder: Path) -> Path:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["visual.proj"][0, 0] += 1
    torch.save(checkpoint, folder / "other.ckpt")
    return folder / "other.ckpt"


@pytest.mark.parametrize("case", ["none", "missing", "other"])
def test_ranks_with_different_checkpoints_all_end_with_the_same_line(
    case: str, checkpoint: Path, table: str, tmp_path: Path
) -> None:
    second = {"none": "none", "missing": str(tmp_path / "gone.ckpt")}.get(case) or other_weights(checkpoint, tmp_path)
    run_lightning_ranks(2, tmp_path, SCRIPT, "resume", table, str(checkpoint), str(second), timeout=60)
    lines = [(tmp_path / f"{rank}.error").read_text(encoding="utf-8") for rank in range(2)]
    assert lines[0] == lines[1]
    what = {"none": "from the beginning", "missing": "no such file", "other": "step 1"}[case]
    assert lines[0] == (
        f"--ckpt_path: ranks would resume from different checkpoints: {checkpoint} (step 1) on rank 0 and {second} "
        f"({what}) on rank 1; put the same file on every machine, or on a disk that all of them share"
    )


def test_ranks_may_have_copies_of_a_checkpoint_on_their_own_disks(checkpoint: Path, table: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    run_lightning_ranks(2, tmp_path, SCRIPT, "resume", table, str(checkpoint), str(copy), timeout=60)
    assert not list(tmp_path.glob("*.error"))


# A checkpoint of a run that max_steps ends resumes at its next batch, whoever saved it.


class Seen(Callback):
    """Keeps the epoch, the batch's number and its keys of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, list[str]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((trainer.current_epoch, batch_idx, list(batch.keys)))


def test_a_run_that_max_steps_ended_goes_on_at_its_next_batch(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    def fit(steps: int, resumed: Path | None = None, *savers: Callback) -> tuple[Trainer, list[Any]]:
        seen = Seen()
        data = Captions(str(caption_table), batch_size=12, num_workers=0)
        fitting = trainer(tmp_path, max_steps=steps, callbacks=[*callbacks.defaults(), seen, *savers])
        fitting.fit(LitCLIP(tiny_config), data, ckpt_path=resumed)
        return fitting, seen.steps

    whole = fit(10)[1]
    assert whole[3][:2] == (0, 3)
    assert whole[4][:2] == (1, 0)
    for steps in (2, 4):  # within an epoch, and at its end
        fit(steps)[0].save_checkpoint(tmp_path / "by_hand.ckpt")
        assert fit(10, tmp_path / "by_hand.ckpt")[1] == whole[steps:]
        fit(steps, None, ModelCheckpoint(tmp_path, f"saved_{steps}", save_on_train_epoch_end=True))
        assert fit(10, tmp_path / f"saved_{steps}.ckpt")[1] == whole[steps:]


def test_a_run_resumed_with_another_batch_ends_when_its_rate_does(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path
) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def fit(
        batch_size: int, resumed: Path | None = None, savers: Sequence[Callback] = (), **limits: int
    ) -> tuple[Trainer, list[float]]:
        rates = Rates()
        fitting = trainer(tmp_path, callbacks=[*callbacks.defaults(), rates, *savers], **limits)
        module = LitCLIP(tiny_config, lr_scheduler=partial(WarmupCosine, warmup_steps=0))
        fitting.fit(module, Captions(str(caption_table), batch_size=batch_size, num_workers=0), ckpt_path=resumed)
        return fitting, rates.seen

    file = tmp_path / "saved.ckpt"
    fit(12, None, [ModelCheckpoint(tmp_path, "validated")], max_epochs=1)[0].save_checkpoint(file)
    steps = 4 + 2 * 9  # 58 pairs in batches of 12 and of 6
    expected = [5e-4 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(4, steps)]
    assert fit(6, file, max_epochs=3)[1] == pytest.approx(expected)
    assert fit(6, tmp_path / "validated.ckpt", max_epochs=3)[1] == pytest.approx(expected)
    fit(6, file, max_epochs=3, max_steps=7)[0].save_checkpoint(file)  # within an epoch of smaller batches
    assert fit(6, file, max_epochs=3)[1] == pytest.approx(expected[3:])
