"""What one rank of the suite callbacks' tests does; started by the ``ranks`` fixture as a process of its own."""

import json
import os
from pathlib import Path

from callbacks import LinearProbe, ZeroShot
from lit_clip import collectives
from tests.ranks import serve
from tests.small_sets import data_for, make_module, make_trainer, numbers


def evaluate(folder: Path, suite: str) -> dict[str, dict[str, float]]:
    """The metrics after two validations of ``fit`` and between two steps, the same on every rank."""
    rank, _ = collectives.rank_and_world()
    results = {}
    for name, steps in (("epochs", None), ("steps", 1)):
        os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no processes of its own; it forgets it afterwards
        module = make_module()
        made = [
            ZeroShot(suite=suite, data_root=str(folder), batch_size=7, examples=0, every_n_steps=steps),
            LinearProbe(suite, str(folder), ["shades"], l2=1.0, batch_size=7, every_n_steps=steps),
        ]
        # One step of all pairs, so that what is evaluated does not depend on how many ranks share them.
        trainer = make_trainer(folder, made, max_steps=1, enable_checkpointing=False)
        trainer.fit(module, data_for(module, folder / "captions.csv", 8 // collectives.rank_and_world()[1]))
        results[name] = numbers(trainer, "zero_shot/") | numbers(trainer, "linear_probe/")
        for other in collectives.gather_objects([results[name]]):
            assert other == results[name]
    return results


def run(output: str, folder: str, suite: str) -> None:
    """:func:`evaluate`, written by rank 0."""
    results = evaluate(Path(folder), suite)
    if collectives.rank_and_world()[0] == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
