"""What a recipe may look at, and which of its choices count."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lit_clip.recipes import Choice, FineTuning, Recipe, Run
from tests.helpers.small_sets import data_for, make_module, write_table


class Two(Recipe):
    """Chooses a rate, and a batch by the data."""

    def choose(self, run: Run) -> list[Choice]:
        return [
            Choice("model.optimizer.lr", 1e-3),
            Choice("data.global_batch_size", run.facts.pairs, unless=("data.batch_size",)),
        ]


def run_of(folder: Path, **given: Any) -> Run:
    module = make_module()
    data = data_for(module, write_table(folder))
    data.train_source, data.val_source = data.sources(True)
    return Run({name.replace("__", "."): value for name, value in given.items()}, lambda: data, lambda: module)


def test_facts_count_distinct_images_and_captions(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=6)
    rows = table.read_text(encoding="utf-8").splitlines()
    again = f"{rows[1].partition(',')[0]},another caption of the first image"
    table.write_text("\n".join([*rows, again, rows[1]]), encoding="utf-8")
    module = make_module()
    data = data_for(module, table)
    data.train_source, data.val_source = data.sources(True)
    facts = Run({}, lambda: data, lambda: module).facts
    assert (facts.pairs, facts.images, facts.captions, facts.validation) == (8, 6, 7, 8)
    data.captions = dataclasses.replace(data.captions, per_image="one")
    data.train_source, data.val_source = data.opened_sources(True)
    facts = Run({}, lambda: data, lambda: module).facts
    assert (facts.pairs, facts.images) == (6, 6)


def test_images_whose_captions_come_together_are_counted_and_their_captions_are_positives(tmp_path: Path) -> None:
    table = tmp_path / "captions.jsonl"
    write_table(tmp_path, rows=6)
    rows = [{"image": f"{row}.png", "captions": [f"one {row}", f"another {row}"]} for row in range(6)]
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    module = make_module()
    data = data_for(module, table)
    data.captions = dataclasses.replace(data.captions, per_image="together")
    data.train_source, data.val_source = data.opened_sources(True)
    run = Run({"data.captions.per_image": "together"}, lambda: data, lambda: module)
    assert run.facts[:3] == (6, 6, 12)
    chosen = {each.option: each.value for each in FineTuning().choices(run)}
    assert chosen["model.loss"]["init_args"] == {"duplicates": "positives"}


def test_the_digest_of_the_facts_is_that_of_the_pairs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run, same = run_of(tmp_path / "a"), run_of(tmp_path / "a")
    assert run.facts.digest == same.facts.digest
    table = tmp_path / "a/captions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("number 0", "number zero"), encoding="utf-8")
    other = data_for(make_module(), table)
    other.train_source, other.val_source = other.sources(True)
    assert Run({}, lambda: other, make_module).facts.digest != run.facts.digest


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, ["model.optimizer.lr", "data.global_batch_size"]),
        ({"model__optimizer__lr": 1}, ["data.global_batch_size"]),
        ({"model__optimizer": "torch.optim.SGD"}, ["data.global_batch_size"]),
        (
            {"model__optimizer__weight_decay": 1, "model__optimizer__lr_decay": 1},
            ["model.optimizer.lr", "data.global_batch_size"],
        ),
        ({"data__batch_size": 4}, ["model.optimizer.lr"]),
        ({"data__batch_size_of_another": 4}, ["model.optimizer.lr", "data.global_batch_size"]),
    ],
)
def test_what_is_given_is_not_chosen(given: dict[str, Any], chosen: list[str], tmp_path: Path) -> None:
    assert [each.option for each in Two().choices(run_of(tmp_path, **given))] == chosen
