"""Distillation from tables of features, of any program and any width, equals a plain loop; no table is trusted."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Pairs
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.training.teacher import Distillation

KEYS = ["b.png", "a.png", "b.png", "c.png"]
CAPTIONS = ["two dogs", "a kite", "a dog", "two dogs"]


def write(path: Path, column: str, names: list[str], features: Any, **metadata: str) -> str:
    """Write a table as other programs do: lists of any length, rows in any order."""
    table = pa.table({column: names, "feature": features})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


@pytest.fixture
def tables(tmp_path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return files of images and captions in 5 channels of double precision, and the vectors by name."""
    generator, found, paths = np.random.default_rng(0), {}, []
    for column, names in (("key", ["c.png", "other.png", "a.png", "b.png"]), ("caption", sorted({*CAPTIONS, "more"}))):
        vectors = generator.normal(size=(len(names), 5)) * 3
        paths.append(write(tmp_path / f"{column}s.parquet", column, names, vectors.tolist(), logit_scale="20.0"))
        found |= dict(zip(names, torch.from_numpy(vectors), strict=True))
    return paths, found


def pairs_of(dim: int) -> tuple[Pairs, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    leaves = [unit(torch.randn(4, dim, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    batch = CaptionBatch(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.long), KEYS, CAPTIONS)
    scale = torch.tensor(14.0, dtype=torch.float64)
    return Pairs(*leaves, scale, None, RankCounts(0, (4,)), batch, [batch], 0), leaves


def check(distillation: Distillation, student: CLIP, dim: int, loop: Any) -> None:
    distillation.prepare(student)
    pairs, leaves = pairs_of(dim)
    found, expected = distillation(pairs), loop(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_probabilities_and_their_gradients_equal_a_loop_in_double_precision(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig
) -> None:
    """The tables' vectors have any length and another width than the model's, and name their temperature."""
    paths, vectors = tables

    def loop(image: Tensor, text: Tensor) -> Tensor:
        theirs = [vectors[name] / vectors[name].norm() for name in (*KEYS, *CAPTIONS)]
        total = torch.zeros((), dtype=torch.float64)
        for student, teacher, others, known in (
            (image, theirs[:4], text, theirs[4:]),
            (text, theirs[4:], image, theirs[:4]),
        ):
            for row in range(4):
                wanted = torch.stack([20 * teacher[row] @ other for other in known]).softmax(0)
                logits = torch.stack([14 * student[row] @ other for other in others])
                total = total - (wanted * logits.log_softmax(0)).sum() / 8
        return total

    check(Distillation(paths), CLIP(tiny_config), 16, loop)


@pytest.mark.parametrize("which", [("key",), ("caption",), ("caption", "key")])
def test_the_distance_of_one_or_both_encoders_equals_a_loop(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig, tmp_path: Path, which: tuple[str, ...]
) -> None:
    """The model's 16 channels are mapped to the tables' 5, by their first rows before training."""
    paths, vectors = [str(tmp_path / f"{column}s.parquet") for column in which], tables[1]

    def loop(image: Tensor, text: Tensor) -> Tensor:
        total = 0 * (image.sum() + text.sum())
        for column, student, names in (("key", image, KEYS), ("caption", text, CAPTIONS)):
            for row, name in enumerate(names) if column in which else ():
                ours, theirs = student[row, :5], vectors[name]
                total = total + (2 - 2 * (ours @ theirs) / (ours.norm() * theirs.norm())) / 4
        return total

    teacher: Any = paths if len(paths) > 1 else paths[0]
    distillation = Distillation(teacher, "features")
    distillation.prepare(CLIP(tiny_config))
    distillation.double()
    pairs, leaves = pairs_of(16)
    found, expected = distillation(pairs), loop(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(found, leaves, allow_unused=True)
    for our, theirs in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if our is None else our, theirs, rtol=1e-5, atol=1e-8)


def test_probabilities_need_a_table_of_images_and_one_of_captions(
    tables: tuple[list[str], dict[str, Tensor]], tiny_config: CLIPConfig, tmp_path: Path
) -> None:
    (images, captions), student = tables[0], CLIP(tiny_config)
    wider = write(tmp_path / "wider.parquet", "caption", ["a"], [[1.0] * 6])
    for teacher, message in (
        (images, "5 channels of images and 0 of captions"),
        ([images, wider], "5 channels of images and 6 of captions"),
        ([images, images], "one table of images and one of captions"),
    ):
        with pytest.raises(InputError, match=message):
            Distillation(teacher).prepare(student)
    distillation = Distillation([captions, images])
    distillation.prepare(student)
    assert copy.deepcopy(distillation).loaded is distillation.loaded  # large
    pairs, _ = pairs_of(16)
    with pytest.raises(InputError, match="batches with captions"):
        distillation(dataclasses.replace(pairs, batch=pairs.batch._replace(captions=())))


def test_a_damaged_or_foreign_table_is_one_line_that_names_it(tiny_config: CLIPConfig, tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    tables = {
        "different numbers": pa.table({"key": ["a", "b"], "feature": [[1.0, 2.0], [1.0]]}),
        "null": pa.table({"key": ["a", "b"], "feature": [[1.0], None]}),
        "row \\[1\\]": pa.table({"key": ["a", "b"], "feature": [[1.0], [float("nan")]]}),
        "row \\[0\\]": pa.table({"key": ["a", "b"], "feature": [[0.0], [1.0]]}),
        "feature": pa.table({"key": ["a"], "vector": [[1.0]]}),
        "value_lengths": pa.table({"key": ["a"], "feature": ["text"]}),
        "claims 1000000 rows": pa.table(
            {"key": pa.array(["a"] * 1_000_000).dictionary_encode(), "feature": [[1.0]] * 1_000_000}
        ),
    }
    for message, table in tables.items():
        pq.write_table(table, path)
        with pytest.raises(InputError, match=f"features.parquet.*({'different' if message == 'null' else message})"):
            Distillation(str(path), "features").prepare(CLIP(tiny_config))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="features.parquet: not a readable table"):
        Distillation(str(path), "features").prepare(CLIP(tiny_config))
