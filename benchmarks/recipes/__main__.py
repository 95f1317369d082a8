"""Train named recipes for the same processor time, with several seeds, and compare what they learned.

    python benchmarks/recipes benchmarks/recipes/quickstart.yaml [--seconds 200] [--seeds 3] [--only NAME ...]
        [--drawings FOLDER] [--part test] [--out runs/recipes]

A grid is a YAML file with ``base``, a config of ``lit-clip fit``, and ``recipes``: names, and what each changes in it;
a recipe's ``alphas`` are no change, but interpolations between the weights before and after (WiSE-FT) to measure too.
A recipe gets as many steps as fit into the budget; a first short run measures what one costs. Runs have one thread and
no data worker, so processor time is the run's own, whatever else the machine does; on several cores, start several
commands with different ``--only``. Finished runs are in ``OUT/runs.jsonl`` and are not repeated.

Measured are the sets of the config's ``ZeroShot``, each in two halves: choose by ``validation``, report ``test``.
``--drawings`` adds another artist's drawings of OpenMoji's objects, such as Twemoji's: those of
``npm pack emoji-datasource-twitter``, named like OpenMoji's.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from table import print_table

CALIBRATION_STEPS = 40
VARIABLE = re.compile(r"\$\{oc\.env:(\w+)")  # of the environment, in a config
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A named change of a config, and the interpolations to measure."""

    name: str
    base: Path
    changes: dict[str, Any]
    alphas: tuple[float, ...] = ()

    def identity(self, seconds: float) -> str:
        """Return a key of what is trained: equal for the same settings, variables and budget, whatever the name."""
        text = self.base.read_text(encoding="utf-8") + json.dumps(self.changes, sort_keys=True) + f"{seconds:g}"
        text += json.dumps(self.alphas) if self.alphas else ""
        text += "".join(os.environ.get(name, "") for name in VARIABLE.findall(text))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML: base, and recipes by name")
    parser.add_argument("--seconds", type=float, default=200, help="processor seconds of training for each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of recipes")
    parser.add_argument("--drawings", type=Path, help="folder of another artist's drawings, named HEXCODE.png")
    parser.add_argument("--part", choices=("validation", "test"), default="validation", help="half to print")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the results")
    given = parser.parse_args()
    recipes = {recipe.name: recipe for recipe in read_grid(given.grid)}
    if unknown := set(given.only or ()) - set(recipes):
        parser.error(f"{given.grid}: no recipe {', '.join(sorted(unknown))}; there are {', '.join(recipes)}")
    chosen = [recipes[name] for name in given.only or recipes]
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):  # every recipe once before any is repeated
        for recipe in chosen:
            run_once(given.out, recipe, seed, given.seconds, given.drawings)
    names = {recipe.identity(given.seconds): recipe.name for recipe in chosen}
    runs = [run for run in finished(given.out) if run["identity"] in names and run["seed"] < given.seeds]
    print_table([{**run, "recipe": names[run["identity"]]} for run in runs], given.part)


def read_grid(path: Path) -> list[Recipe]:
    """Return the recipes of a grid."""
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = (path.parent / grid["base"]).resolve()
    recipes = {name: dict(changes or {}) for name, changes in grid["recipes"].items()}
    return [Recipe(name, base, changes, tuple(changes.pop("alphas", ()))) for name, changes in recipes.items()]


def run_once(out: Path, recipe: Recipe, seed: int, seconds: float, drawings: Path | None) -> None:
    """Train a recipe with a seed, unless that is done or another process is doing it."""
    key = recipe.identity(seconds)
    with claimed(out / f"{key}-{seed}.lock") as free:
        if not free:
            print(f"{recipe.name}, seed {seed}: another process trains it")
            return
        if any(run["identity"] == key and run["seed"] == seed for run in finished(out)):
            return
        steps = max(1, round(seconds / step_cost(out, recipe)))
        print(f"{recipe.name}, seed {seed}: {steps:,} steps ...", flush=True)
        options = {"drawings": str(drawings.resolve()) if drawings else None, "alphas": list(recipe.alphas)}
        measured = train(recipe, seed, steps, options)
        line = {"recipe": recipe.name, "identity": key, "seed": seed, "changes": recipe.changes, **measured}
        with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def step_cost(out: Path, recipe: Recipe) -> float:
    """Return the processor seconds of a step, measured once for each recipe: seeds get equal numbers of steps."""
    kept = out / f"{recipe.identity(0)}.cost"
    if not kept.exists():
        measured = train(recipe, 0, CALIBRATION_STEPS, {"evaluate": False})
        kept.write_text(str(measured["seconds"] / measured["steps"]), encoding="utf-8")
    return float(kept.read_text(encoding="utf-8"))


def train(recipe: Recipe, seed: int, steps: int, measuring: dict[str, Any]) -> dict[str, Any]:
    """Run ``lit-clip fit`` as a user would, and return its steps, processor seconds and metrics."""
    with tempfile.TemporaryDirectory() as folder:
        changes, result = Path(folder, "recipe.yaml"), Path(folder, "result.json")
        changes.write_text(yaml.safe_dump(recipe.changes), encoding="utf-8")
        callback = {"class_path": "measuring.Measuring", "init_args": {"path": str(result), **measuring}}
        command = [
            *(sys.executable, "-m", "lit_clip", "fit", "--config", str(recipe.base), "--config", str(changes)),
            *("--seed_everything", str(seed), "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps)),
            *("--trainer.limit_val_batches", "0", "--data.num_workers", "0", "--trainer.logger", "false"),
            *("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder),
            f"--trainer.callbacks+={json.dumps(callback)}",
        ]
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{recipe.name}: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def finished(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock a file for the block, and yield whether no other process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


if __name__ == "__main__":
    main()
