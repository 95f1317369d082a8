"""One rank of the evaluation tests; the ``ranks`` fixture starts it in its own process."""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks import EmbeddingProjector, SimilarityMatrix, ZeroShot, ZeroShotSet
from datamodules import Captions, OpenMojiClasses
from lit_clip import distributed
from lit_clip.losses.contrastive import unit
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import Evaluation, RetrievalSet, token_hashes
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import serve
from tests.helpers.small_sets import make_trainer

TEXT = TextTransformerConfig(context_length=16, width=16, layers=1, heads=1)
VIT = VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1)


def random_rows(rows: int, dim: int = 12) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Return image and text features ``[N, D]``, keys and tokens ``[N, 2]``; images share captions and have several."""
    generator = torch.Generator().manual_seed(rows)
    images, texts = max(1, rows // 4), max(1, 2 * rows // 3)
    text_of = torch.randint(texts, (rows,), generator=generator)
    strays = torch.rand(rows, generator=generator) < 0.3
    image_of = torch.where(strays, torch.randint(images, (rows,), generator=generator), text_of % images)
    image = unit(torch.randn(images, dim, generator=generator))
    text = unit(image[torch.arange(texts) % images] + 0.2 * torch.randn(texts, dim, generator=generator))
    tokens = torch.stack([text_of, torch.full_like(text_of, 7)], dim=1)
    return image[image_of], text[text_of], [f"{i}.jpg" for i in image_of.tolist()], tokens


def evaluate_rows(rows: int, batch_size: int, bias: float | None) -> Evaluation:
    """Evaluate :func:`random_rows`; each of the W ranks has every W-th row."""
    rank, world = distributed.rank_and_world()
    image, text, keys, tokens = random_rows(rows)
    pairs = RetrievalSet()
    for start in range(rank, rows, batch_size * world):
        part = slice(start, start + batch_size * world, world)
        pairs.add(image[part], text[part], keys[part], token_hashes(tokens[part], 16, 0))
    return pairs.evaluate(torch.zeros(0, 12), torch.tensor(20.0), None if bias is None else torch.tensor(bias))


def check_what_is_alike() -> None:
    """Assert what of three rows with equal or other features is alike; on four ranks one has none."""
    rank, world = distributed.rank_and_world()
    same, other = unit(torch.ones(3, 12)) + 1e-7 * torch.arange(3)[:, None], torch.eye(12)[:3]
    mine = slice(rank, None, world)
    for image, text, alike in ((same, other, "images"), (other, same, "captions"), (same, same, "images and captions")):
        pairs = RetrievalSet()
        pairs.add(image[mine], text[mine], ["a", "b", "c"][mine], np.arange(3)[mine])
        assert pairs.evaluate(torch.zeros(0, 12), torch.tensor(20.0), None).alike == alike
    pairs.add(other[mine], other[mine], ["a", "b", "c"][mine], np.arange(3)[mine])
    assert pairs.evaluate(torch.zeros(0, 12), torch.tensor(20.0), None).alike == ""


CASES = [(rows, bias) for rows in (1, 21, 1000) for bias in (None, -3.0)]


def evaluate_cases() -> list[dict[str, float]]:
    """Return metrics and baselines of sets of several sizes, with both losses."""
    check_what_is_alike()
    results = [evaluate_rows(rows, 7, bias) for rows, bias in CASES]
    return [{**each.metrics, **{f"baseline {name}": x for name, x in each.baselines.items()}} for each in results]


def make_module(image: VisionTransformerConfig | ResNetConfig = VIT) -> LitCLIP:
    """Return a module with enlarged weights, equal on all ranks; initial ones give all texts almost equal features."""
    torch.manual_seed(0)
    module = LitCLIP(
        CLIPConfig(embed_dim=16, image=image, text=TEXT), lr_scheduler=partial(WarmupCosine, warmup_steps=0)
    )
    with torch.no_grad():
        for parameter in (module.model.token_embedding.weight, module.model.positional_embedding):
            parameter.mul_(30)
        cast(Any, module.model.visual).conv1.weight.mul_(30)
    return module


def data_for(train: str, val: str, batch_size: int) -> Captions:
    return Captions(train, val, batch_size=batch_size, num_workers=0)


def zero_shot(drawings: str, every: int = 1) -> ZeroShot:
    """Return ZeroShot on every n-th held-out drawing, on a single image and on two classes."""

    def images(count: int | None, classes: int | None = None) -> OpenMojiClasses:
        held_out = OpenMojiClasses("held_out", classes="group", cache_dir=drawings)
        files = [file for file in held_out.files if classes is None or file[1] < classes]
        held_out.files = files[::every][:count]
        held_out.class_names = held_out.class_names[:classes]
        return held_out

    sets = {"all": images(None), "one_image": images(1), "two_classes": images(None, 2)}
    templates = ["a drawing of {}.", "{}"]
    zero_shot_sets = {name: ZeroShotSet(labelled, templates) for name, labelled in sets.items()}
    return ZeroShot(zero_shot_sets, batch_size=50, examples=3)


def _numbers(trainer: Trainer) -> dict[str, float]:
    """Return the logged metrics, after checking that they are the same on every rank."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for others in distributed.gather_objects([metrics]):
        assert others == metrics
    return metrics


def validate_tables(drawings: str, tables: list[str]) -> list[dict[str, float]]:
    """Return the metrics that ``Trainer.validate`` logs for each table."""
    results = []
    for table in tables:
        module = make_module()
        trainer = make_trainer(Path(), [zero_shot(drawings), SimilarityMatrix(), EmbeddingProjector()])
        trainer.validate(module, data_for(table, table, 30), verbose=False)
        results.append(_numbers(trainer))
    return results


def _write(output: str, results: Any) -> None:
    if distributed.rank_and_world()[0] == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")


def evaluate(output: str, drawings: str, *tables: str) -> None:
    """Write the results of :func:`evaluate_cases` and :func:`validate_tables`, on rank 0."""
    _write(output, {"cases": evaluate_cases(), "tables": validate_tables(drawings, list(tables))})


class SameStatistics(Callback):
    """Assert that all ranks have the same batch-norm statistics after validation."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums = [float(buffer.double().sum()) for buffer in pl_module.buffers()]
        assert any(sums)
        assert all(others == sums for others in distributed.gather_objects([sums]))


def fit(output: str, drawings: str, train: str, val: str) -> None:
    """Train a network with batch normalisation, validating after each epoch."""
    module = make_module(ResNetConfig(layers=(1, 1, 1, 1), width=16, image_size=32))
    callbacks = [zero_shot(drawings, 10), SameStatistics()]
    trainer = make_trainer(Path(), callbacks, max_epochs=2, num_sanity_val_steps=1, enable_checkpointing=False)
    trainer.fit(module, data_for(train, val, 8))
    assert trainer.global_step > 1
    _write(output, _numbers(trainer))


if __name__ == "__main__":
    serve(globals())
