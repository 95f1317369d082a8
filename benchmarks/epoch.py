"""Time whole epochs of ``lit-clip fit`` and ``open_clip_train`` on the same PNG files, captions and model.

    python benchmarks/epoch.py [--model ViT-tiny-8-64] [--bf16] [--epochs 2] [--batch 128] [--source files]

Both programs are started as their users start them, with one worker, TensorBoard, validation after every epoch, and no
checkpoint before the end. They take turns: while one runs an epoch the other is stopped (SIGSTOP), so that each pair of
epochs runs under the same conditions. The first epoch of each is not counted. Two times are measured: from the start of
an epoch to its last step, and to the start of the next epoch, which includes validation. The share of the machine's
peak (see ``train_step.py``) covers training only; the peak is measured between epochs.

The data are OpenMoji's 1,750 training drawings, 164 validation drawings, and their names. With ``--source openmoji``
lit-clip reads them through ``datamodules.OpenMoji``, like ``configs/quickstart.yaml``: decoded once, with varied names.
open_clip_train needs pandas and webdataset.
"""

import csv
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from results import Result, compared, need, parser, save, shares
from running import Program

BENCHMARKS = Path(__file__).parent
SIDES = ("peers", "our")
MODELS = ("ViT-tiny-8-64", "RN-tiny-64", "ViT-tiny-16-64")
CROP = 0.9  # smallest fraction of an image in a training crop, open_clip's default


@dataclass(frozen=True)
class Run:
    """Settings of both programs. ``folder`` holds the files that :func:`write_run` wrote for them.

    ``table`` has images and captions to train on instead of OpenMoji's, the last batch of them for validation.
    """

    model: str
    bf16: bool
    epochs: int
    batch: int = 128
    source: str = "files"
    folder: Path = Path()
    table: Path | None = None
    seed: int = 0


def write_run(folder: Path, run: Run) -> Run:
    """Write tables of images and names, the model config for open_clip, and the config for lit-clip."""
    from peers import architecture, write_model_config

    from lit_clip import create_model

    model = create_model(architecture(run.model))
    write_model_config(folder / f"{run.model}.json", model)
    write_tables(folder, split_openmoji() if run.table is None else split_table(run.table, run.batch))
    config = json.dumps(lit_clip_config(folder, run, model.config.to_dict()))  # JSON is YAML
    (folder / "fit.yaml").write_text(config, encoding="utf-8")
    return Run(**{**vars(run), "folder": folder})


def split_openmoji() -> dict[str, list[tuple[Path, str]]]:
    """Return the images and names of ``train`` and ``val``, with the split of ``datamodules.OpenMoji``."""
    from datamodules.openmoji import draw, held_out, read_table

    emoji = read_table()
    rows = list(zip(draw(), emoji, held_out(emoji), strict=True))
    parts = (("train", False), ("val", True))
    return {name: [(path, one.name) for path, one, held in rows if held == out] for name, out in parts}


def split_table(table: Path, batch: int) -> dict[str, list[tuple[Path, str]]]:
    """Return the images and captions of ``train`` and ``val``, the last batch of a table's rows.

    Raises:
        SystemExit: the rows are fewer than two batches, so that there would be no step.
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = [(table.resolve().parent / row["image"], row["caption"]) for row in csv.DictReader(file)]
    if len(rows) < 2 * batch:
        sys.exit(
            f"{table}: {len(rows)} pairs are fewer than two batches of {batch}, one for training and one for validation"
        )
    return {"train": rows[:-batch], "val": rows[-batch:]}


def write_tables(folder: Path, split: dict[str, list[tuple[Path, str]]]) -> None:
    """Write ``train.tsv`` and ``val.tsv``."""
    for name, rows in split.items():
        with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *rows])


def lit_clip_config(folder: Path, run: Run, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the config for ``lit-clip fit``."""
    reading: dict[str, Any] = {"batch_size": run.batch, "num_workers": 1, "seed": run.seed}
    reading["augmentation"] = {"crop_scale": [CROP, 1.0]}
    if run.source == "files":
        reading |= {"train": str(folder / "train.tsv"), "val": str(folder / "val.tsv")}
    logger = "lightning.pytorch.loggers.TensorBoardLogger"
    return {
        "seed_everything": run.seed,
        "model": {"architecture": sizes, "optimizer": {"lr": 1e-3}, "lr_scheduler": {"warmup_steps": 50}},
        "data": {
            "class_path": "datamodules.Captions" if run.source == "files" else "datamodules.OpenMoji",
            "init_args": reading,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": run.epochs,
            "precision": "bf16-mixed" if run.bf16 else "32-true",
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "logger": {"class_path": logger, "init_args": {"save_dir": str(folder / "runs")}},
            "callbacks": [{"class_path": "marks.Marks"}],
        },
    }


def lit_clip_command(*words: str) -> list[str]:
    """Return the ``lit-clip`` command that is installed beside this Python."""
    return [str(Path(sys.executable).parent / "lit-clip"), *words]


def open_clip_command(run: Run, log_every: int = 10) -> list[str]:
    """Return the ``open_clip_train`` command with the settings of :func:`lit_clip_config`."""
    folder = run.folder
    options: dict[str, Any] = {
        "model": run.model,
        "train-data": folder / "train.tsv",
        "val-data": folder / "val.tsv",
        "dataset-type": "csv",
        "batch-size": run.batch,
        "workers": 1,
        "epochs": run.epochs,
        "seed": run.seed,
        "precision": "amp_bf16" if run.bf16 else "fp32",
        "device": "cpu",
        "lr": 1e-3,
        "wd": 0.2,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": 50,
        "logs": folder / "logs",
        "report-to": "tensorboard",
        "log-every-n-steps": log_every,
        "save-frequency": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    train = [sys.executable, str(BENCHMARKS / "open_clip_train_with.py"), str(folder / f"{run.model}.json")]
    return [*train, *words]


@dataclass
class Side:
    """One of the two programs, and the output lines that mark its epochs."""

    program: Program
    start: str
    trained: str

    def until(self, epoch: int) -> float:
        """Wait until an epoch begins, stop the program there, and return the time."""
        moment = self.program.wait_for(self.start.format(epoch=epoch))
        self.program.pause()
        return moment

    def next(self, epoch: int, last: int) -> tuple[float, float]:
        """Run an epoch; return the seconds of its training, and until the next one began, where it is stopped."""
        began = self.program.resume()
        trained = self.program.wait_for(self.trained.format(epoch=epoch, last=last)) - began
        return trained, self.until(epoch + 1) - began


class Measured(NamedTuple):
    """Seconds of each counted epoch (open_clip's, ours), and FLOP/s of the fastest matrix product between them."""

    training: list[tuple[float, float]]
    whole: list[tuple[float, float]]
    peak: float


def training_captions(run: Run) -> list[str]:
    with (run.folder / "train.tsv").open(encoding="utf-8", newline="") as file:
        return [row["title"] for row in csv.DictReader(file, delimiter="\t")]


def steps_of(run: Run) -> int:
    """Return the steps per epoch; both programs drop the incomplete last batch."""
    return len(training_captions(run)) // run.batch


def flops_of(run: Run) -> list[int]:
    """Return the FLOPs of an epoch's steps, open_clip's and ours, from a batch of captions spread over the table."""
    import torch
    from peers import counted, open_clip_pair
    from train_step import TINY_RATE, our_step, pairs_of, their_step

    theirs, ours = open_clip_pair(run.model)
    captions = training_captions(run)
    some = [captions[i * len(captions) // run.batch] for i in range(run.batch)]
    pairs, how = pairs_of(ours, some, torch.Generator().manual_seed(0), "cpu"), (TINY_RATE, run.bf16, "cpu")
    steps = (their_step(theirs, *how), our_step(ours, *how))
    return [counted(partial(step, pairs)) * steps_of(run) for step in steps]


def alternate(
    run: Run, log_every: int = 10, between: Callable[[], None] = lambda: None
) -> tuple[list[tuple[tuple[float, float], tuple[float, float]]], list[str], list[str]]:
    """Run both programs in turn, an epoch each, without counting the first and the last one.

    Returns:
        for each epoch :meth:`Side.next` of open_clip's and of ours; the lines that each has printed.
    """
    last, both = steps_of(run) * run.batch, []
    ours = lit_clip_command("fit", "--config", str(run.folder / "fit.yaml"))
    with Program(open_clip_command(run, log_every)) as their_program:
        them = Side(their_program, r"Start epoch {epoch}$", r"Train Epoch: {epoch} \[ *{last}/")
        them.until(1)
        with Program(ours, BENCHMARKS) as our_program:
            us = Side(our_program, "^mark epoch {epoch}$", "^mark trained {epoch}$")
            us.until(1)
            for epoch in range(1, run.epochs - 1):
                between()
                both.append((them.next(epoch, last), us.next(epoch, last)))
            return both, their_program.said, our_program.said


def measure(run: Run) -> Measured:
    """Time the epochs of both programs."""
    import torch
    from device_speed import matmul_peak

    dtype, peaks = torch.bfloat16 if run.bf16 else torch.float32, []
    both, *_ = alternate(run, between=lambda: peaks.append(matmul_peak(torch.device("cpu"), dtype)))
    training, whole = ([(theirs[i], ours[i]) for theirs, ours in both] for i in (0, 1))
    return Measured(training, whole, max(peaks))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=MODELS, default="ViT-tiny-8-64")
    arguments.add_argument("--bf16", action="store_true", help="autocast on both sides")
    arguments.add_argument("--epochs", type=int, default=2, help="counted epochs of each; medians are printed")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--source", choices=["files", "openmoji"], default="files", help="of lit-clip")
    options = arguments.parse_args()
    from peers import end_if_emulated

    end_if_emulated(options.bf16, "cpu")
    need("pandas", "webdataset")
    with tempfile.TemporaryDirectory() as folder:
        planned = Run(options.model, options.bf16, options.epochs + 2, options.batch, options.source)
        run = write_run(Path(folder), planned)
        measured, flops = measure(run), flops_of(run)
    precision = "bf16" if options.bf16 else "fp32"
    what = f"{options.model}, batch {options.batch}, one worker, {precision}"
    found: list[Result] = []
    for kind, title, times in (
        ("training", "epoch without validation", measured.training),
        ("whole", "epoch with validation", measured.whole),
    ):
        one = compared(f"epoch/{options.model}/{precision}/{kind}", f"{title}, {what}", times)
        print(f"{one.title}: {one.peer} {one.peers:.1f} s, lit-clip {one.ours:.1f} s, times as fast: {one.ratio}")
        found.append(one)
    found[0].figures.update(shares(found[0], flops, measured.peak))
    print("of the peak: " + ", ".join(f"{found[0].figures[f'{side}_share_of_peak']:.1%} ({side})" for side in SIDES))
    save(options.json, *found)


if __name__ == "__main__":
    main()
