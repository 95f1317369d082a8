"""Train named recipes for the same processor time, with several seeds, and compare what they learned.

    python -m benchmarks.recipes benchmarks/recipes/quickstart.yaml [--seconds 300] [--seeds 3] [--only NAME ...]

The grid names a base config and, for each recipe, what it changes in it. A recipe gets as many steps as fit into the
budget: each is first run for a few steps to measure its cost. Runs use one thread and no data worker, so processor
time is the run's own, whatever else the machine does; start several commands with different ``--only`` for several
cores. Finished runs are in ``OUT/runs.jsonl`` and are not repeated.

Metrics are those that are not trained on: names and groups of unseen drawings, and line drawings. Each is computed
for two halves of the drawings: choose by ``validation``, report ``test``.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from table import print_table

CALIBRATION_STEPS = 60
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML: base, and recipes by name")
    parser.add_argument("--seconds", type=float, default=300, help="processor seconds of training for each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    given = parser.parse_args()
    grid = yaml.safe_load(given.grid.read_text(encoding="utf-8"))
    recipes: dict[str, Any] = grid["recipes"]
    unknown = set(given.only or ()) - set(recipes)
    if unknown:
        parser.error(f"{given.grid}: no recipe {', '.join(sorted(unknown))}; there are {', '.join(recipes)}")
    given.out.mkdir(parents=True, exist_ok=True)
    base = (given.grid.parent / grid["base"]).resolve()
    chosen = given.only or list(recipes)
    for seed in range(given.seeds):  # all recipes once before any is repeated
        for name in chosen:
            run_once(given.out, name, base, recipes[name] or {}, seed, given.seconds)
    keys = {identity(base, recipes[name] or {}, given.seconds) for name in chosen}
    print_table([run for run in finished(given.out) if run["identity"] in keys and run["seed"] < given.seeds], given.part)


def run_once(out: Path, name: str, base: Path, changes: dict[str, Any], seed: int, seconds: float) -> None:
    """Train a recipe with a seed, unless it is done or another process is at it."""
    key = identity(base, changes, seconds)
    if any(run["identity"] == key and run["seed"] == seed for run in finished(out)):
        return
    with claimed(out / f"{key}-{seed}.lock") as free:
        if not free:
            print(f"{name}, seed {seed}: another process is at it")
            return
        cost_file = out / f"{identity(base, changes, 0)}.cost"
        if not cost_file.exists():
            measured = train(base, changes, 0, CALIBRATION_STEPS, evaluate=False)
            cost_file.write_text(str(measured["seconds"] / measured["steps"]), encoding="utf-8")
        steps = max(1, round(seconds / float(cost_file.read_text(encoding="utf-8"))))
        print(f"{name}, seed {seed}: {steps:,} steps ...", flush=True)
        measured = train(base, changes, seed, steps, evaluate=True)
        line = {"recipe": name, "identity": key, "seed": seed, "changes": changes, "budget": seconds, **measured}
        with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def train(base: Path, changes: dict[str, Any], seed: int, steps: int, evaluate: bool) -> dict[str, Any]:
    """Run ``lit-clip fit`` as a user would, and return its steps, processor seconds and metrics."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, result = Path(folder, "recipe.yaml"), Path(folder, "result.json")
        recipe.write_text(yaml.safe_dump(changes), encoding="utf-8")
        measuring = {"class_path": "measuring.Measuring", "init_args": {"path": str(result), "evaluate": evaluate}}
        command = [
            *(sys.executable, "-m", "lit_clip", "fit", "--config", str(base), "--config", str(recipe)),
            *("--seed_everything", str(seed), "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps)),
            *("--trainer.limit_val_batches", "0", "--data.num_workers", "0", "--trainer.logger", "false"),
            f"--trainer.callbacks+={json.dumps(measuring)}",
            *("--trainer.default_root_dir", folder),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), os.getcwd()])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def identity(base: Path, changes: dict[str, Any], seconds: float) -> str:
    """Return a name of what is trained: the same settings and budget have the same one in every run."""
    text = base.read_text(encoding="utf-8") + json.dumps(changes, sort_keys=True) + f"{seconds:g}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock a file for the block, unless another process has locked it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


if __name__ == "__main__":
    main()
