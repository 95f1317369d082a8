"""Epochs of a data module as each rank reads them, and runs that are interrupted and resumed."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback

from datamodules import Captions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing
from tests.helpers.frozen_runs import Recorder, Run, fit


def written(path: Path, rows: Sequence[Sequence[Any]], names: Sequence[str] = ("image", "caption")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def tabulated(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write columns as the table that the path's suffix names."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(columns)), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        written(path, [list(row.values()) for row in rows], list(columns))
    return path


def opened(train: Any, **options: Any) -> Captions:
    """Open data of small images, four pairs a step, without augmentation."""
    train = str(train) if isinstance(train, Path) else train
    data = Captions(train, **{"batch_size": 4, "num_workers": 0, "augmentation": [], **options})
    data.preprocessing = Preprocessing(image_size=8)
    data.setup("fit")
    return data


def batches_of(data: Captions, epoch: int = 0, rank: int = 0, world: int = 1) -> list[CaptionBatch]:
    data._rank_and_world = lambda: (rank, world)  # pyright: ignore[reportAttributeAccessIssue]
    loader: Any = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def epoch_of(data: Captions, epoch: int = 0, rank: int = 0, world: int = 1) -> list[list[tuple[str, str]]]:
    """Return the keys and captions of each batch of an epoch on a rank."""
    return [list(zip(batch.keys, batch.captions, strict=True)) for batch in batches_of(data, epoch, rank, world)]


def shared_by(ranks: Sequence[Captions], epoch: int) -> list[list[tuple[str, str]]]:
    """Return the sorted pairs of each step of an epoch, of all ranks together."""
    found = [epoch_of(data, epoch, rank, len(ranks)) for rank, data in enumerate(ranks)]
    return [sorted(pair for batch in batches for pair in batch) for batches in zip(*found, strict=True)]


def assert_resumes(run: Run, stop_at: int, other: dict[str, Any], message: str, *callbacks: Callback) -> Recorder:
    """Check that a run stopped within an epoch continues bit for bit, and only with its own data."""
    whole, module = fit(run, *callbacks)
    stopped = run._replace(folder=f"{run.folder}/stopped", stop_at=stop_at)
    Path(stopped.folder).mkdir(parents=True)
    first, _ = fit(stopped)
    second, resumed = fit(stopped._replace(stop_at=None, resume=True))
    assert first.samples + second.samples == whole.samples
    assert first.losses + second.losses == whole.losses
    weights = resumed.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(weights[name], value), name
    with pytest.raises(InputError, match=message):
        fit(stopped._replace(stop_at=None, resume=True, data=other))
    return whole
