"""What one rank of the suite callbacks' tests does; started by the ``ranks`` fixture as a process of its own."""

import json
import os
from pathlib import Path

import torch

from callbacks import LinearProbe, ZeroShot
from lit_clip import distributed
from lit_clip.evaluation.prompts import Prompts, text_classifier
from tests.helpers.ranks import serve
from tests.helpers.small_sets import data_for, make_module, make_trainer, numbers


def evaluate(folder: Path, suite: str) -> dict[str, dict[str, float]]:
    """The metrics after two validations of ``fit`` and between two steps, the same on every rank."""
    rank, _ = distributed.rank_and_world()
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
        trainer.fit(module, data_for(module, folder / "captions.csv", 8 // distributed.rank_and_world()[1]))
        results[name] = numbers(trainer, "zero_shot/") | numbers(trainer, "linear_probe/")
        for other in distributed.gather_objects([results[name]]):
            assert other == results[name]
    return results


def classify(folder: Path) -> None:
    """A classifier that all ranks make, find again, and find to be what each of them makes alone."""
    model, prompts = make_module().model.eval(), Prompts(["a", "b", "c"], [["red"], ["green", "blue ball"], ["pink"]])
    alone = text_classifier(model, prompts, ranks=False)
    for batch_size in (1, 4):  # with one batch only the other rank has none
        made = text_classifier(model, prompts, batch_size=batch_size)
        torch.testing.assert_close(made, alone, rtol=0, atol=1e-6)
    cache = folder / f"texts_{distributed.rank_and_world()[0]}"  # those of the first rank count
    made = text_classifier(model, prompts, cache)
    setattr(model, "encode_text", None)  # noqa: B010 # encoding once more would fail
    assert torch.equal(text_classifier(model, prompts, cache), made)


def run(output: str, folder: str, suite: str) -> None:
    """:func:`evaluate`, written by rank 0, after :func:`classify`."""
    classify(Path(folder))
    results = evaluate(Path(folder), suite)
    if distributed.rank_and_world()[0] == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
