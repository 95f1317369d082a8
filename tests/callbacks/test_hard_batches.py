"""Hard batches by the model itself: neighbours of a plain loop, the same on two ranks and after a resume."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from callbacks import FrozenFeatures, HardBatches
from datamodules import BatchOptions
from lit_clip.errors import InputError
from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.frozen_runs import Run, fit

HALF = {"batches": BatchOptions(hard=0.5), "batch_size": 4}
IMAGES = 12


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two rows for each of twelve images."""
    with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((f"{row % IMAGES}.png", f"caption {row}") for row in range(2 * IMAGES))
    rng = np.random.default_rng(0)
    for image in range(IMAGES):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image}.png")
    return tmp_path / "captions.csv"


class ByLoop(Callback):
    """Note the model's nearest other images, one at a time, before each epoch; and those that the batches use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: list[dict[str, list[str]]] = []
        self.used: list[dict[str, list[str]]] = []

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, model, names = trainer.datamodule, pl_module.model.eval(), [f"{i}.png" for i in range(IMAGES)]  # pyright: ignore
        opened = [model.preprocess(Image.open(self.folder / name))[None] for name in names]
        features = torch.cat([model.encode_image(image, normalize=True) for image in opened]).double()
        pl_module.train()
        near = (features @ features.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :-1].tolist()
        self.expected.append({name: [names[other] for other in near[row]] for row, name in enumerate(names)})
        source, found = data.batch_order.source, data.batch_order.near.near(np.arange(2 * IMAGES), np.ones(2 * IMAGES))
        rows = [list(dict.fromkeys(map(source.key, each))) for each in found]
        self.used.append({source.key(row): each for row, each in enumerate(rows)})


def test_neighbours_are_the_models_own_and_are_found_anew(table: Path, tmp_path: Path) -> None:
    noted = ByLoop(tmp_path)
    recorder, _ = fit(Run(str(tmp_path), str(table), freeze="nothing", epochs=3, data=HALF), HardBatches(2), noted)
    assert noted.used == [noted.expected[epoch] for epoch in (0, 0, 2)]
    assert noted.expected[0] != noted.expected[2]
    first = recorder.samples[0][0]
    assert len(set(first)) == 4
    assert any(other in noted.used[0][key][:2] for key in first for other in first)


def test_a_resumed_run_uses_the_neighbours_it_was_interrupted_with(table: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "whole"), str(table), freeze="nothing", data=HALF)
    whole, module = fit(run, HardBatches(2))
    stopped = run._replace(folder=str(tmp_path), stop_at=8)  # of 12, within the second epoch
    first, _ = fit(stopped, HardBatches(2))
    second, resumed = fit(stopped._replace(stop_at=None, resume=True), HardBatches(2))
    assert first.samples + second.samples == whole.samples
    weights = resumed.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_two_ranks_train_on_the_batches_of_one(table: Path, tmp_path: Path) -> None:
    script = str(ROOT / "tests/helpers/frozen_runs.py")
    for world in (1, 2):
        run_lightning_ranks(world, tmp_path, script, "hard_batches", str(tmp_path), str(world), str(table))
    ranks = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")}
    shared = [sorted(one[1] + other[1]) for one, other in zip(ranks["2-0"], ranks["2-1"], strict=True)]
    assert shared == [sorted(step[1]) for step in ranks["1-0"]]
    assert {len(step) for step in shared} == {4}
    assert len(shared) == 12  # two epochs; twelve images, each twice, fill six batches of four without duplicates


def test_settings_that_do_not_go_together_are_refused(table: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path), str(table))
    for callbacks, data, message in [
        ([HardBatches()], {}, r"^HardBatches: set data\.batches\.hard to a share such as 0\.5, and leave data"),
        ([HardBatches(), FrozenFeatures(str(tmp_path))], HALF, "^HardBatches: not together with FrozenFeatures; set"),
    ]:
        with pytest.raises(InputError, match=message):
            fit(run._replace(data=data), *callbacks)
    with pytest.raises(InputError, match=r"^HardBatches\.every_n_epochs: 0 must be at least 1"):
        HardBatches(0)
