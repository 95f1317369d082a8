"""Evaluation sets that are generated on access, and tiny runs to evaluate them in."""

import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from datamodules import Captions
from lit_clip import LitCLIP, distributed, zero_shot_classifier
from lit_clip.errors import InputError
from lit_clip.evaluation.data import LabelledImages, Truth
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

NAMES = ["red", "green", "blue", "cyan", "pink", "grey", "white"]
SHADES = np.array([[9, 1, 1], [1, 9, 1], [1, 1, 9], [1, 9, 9], [9, 6, 6], [4, 4, 4], [9, 9, 9]]) * 25


class Shades(LabelledImages):
    """Noisy patches of 7 colours; ``shift`` moves every label to another colour, like another fold."""

    def __init__(
        self, root: str, split: str = "test", size: int = 40, broken: int = -1, shift: int = 0, names: int = 7
    ) -> None:
        self.class_names, self.split, self.size, self.broken, self.shift = NAMES[:names], split, size, broken, shift

    def __len__(self) -> int:
        return self.size

    def labels(self) -> list[int]:
        return [(row * row + self.shift) % 7 if row % 3 else row % 7 for row in range(self.size)]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.broken:
            raise InputError(f"{index}.png: not an image")
        label = self.labels()[index]
        noise = np.random.default_rng([index, len(self.split)]).normal(0, 40, (40, 36, 3))
        return Image.fromarray((SHADES[label] + noise).clip(0, 255).astype(np.uint8)), label

    def stamp(self) -> str:
        return f"{self.split} {self.size} {self.shift}"


class ManyShades(Shades):
    """Like :class:`Shades`, but grey images are also white."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        relevance = torch.nn.functional.one_hot(torch.tensor(super().labels()), 7).to(torch.int8)
        relevance[:, 6] |= relevance[:, 5]
        self.truth = Truth(relevance=relevance)

    def labels(self) -> list[int]:
        return [-1] * self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Shades("", self.split, self.size)[index]


def entry(name: str = "Shades", **values: Any) -> dict[str, Any]:
    data = {
        "class_path": f"tests.helpers.small_sets.{name}",
        "init_args": {"root": "shades", **values.pop("init_args", {})},
    }
    splits = values.pop("splits", {"train": {"split": "train", "size": 60}, "test": {}})
    return {"data": data, "splits": splits, "templates": ["a {} patch.", "{}"], **values}


def captions_entry(path: str = "captions.csv", **values: Any) -> dict[str, Any]:
    """The table of :func:`write_table` as a retrieval set."""
    data = {"class_path": "datamodules.evaluation.CaptionedPairs", "init_args": {"path": path}}
    return {"data": data, "metric": "recall@1", **values}


def write_suite(folder: Path, **sets: dict[str, Any]) -> str:
    """Write a suite file into a folder that is also its data root."""
    (folder / "shades").mkdir(exist_ok=True)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"sets": sets}), encoding="utf-8")
    return str(path)


def write_table(folder: Path, rows: int = 8) -> Path:
    shades = Shades("", "captions", rows)
    lines = ["image,caption"]
    for row in range(rows):
        image, label = shades[row]
        image.save(folder / f"{row}.png")
        lines.append(f"{row}.png,{NAMES[label]} number {row}")
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "captions.csv"


def make_module(text_width: int = 16, **options: Any) -> LitCLIP:
    """Make a module with fixed weights, scaled up because fresh ones give all texts nearly the same features."""
    torch.manual_seed(0)
    config = CLIPConfig(
        embed_dim=16,
        image=VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=16, width=text_width, layers=1, heads=1),
    )
    settings = {
        "optimizer": partial(PaperAdamW, lr=1e-2),
        "lr_scheduler": partial(WarmupCosine, warmup_steps=0),
        **options,
    }
    module = LitCLIP(config, **settings)
    with torch.no_grad():
        module.model.token_embedding.weight.mul_(30)
        cast(Any, module.model.visual).conv1.weight.mul_(5)
    return module


# Options of a trainer that writes nothing.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def make_trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    rank, world = distributed.rank_and_world()
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank)  # keeps Lightning from starting processes; it removes the variable
    return Trainer(
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{
            "accelerator": "cpu",
            "devices": world,
            "strategy": "ddp" if world > 1 else "auto",
            "logger": False,
            "num_sanity_val_steps": 0,
            **options,
        },
    )


def data_for(module: LitCLIP, table: Path, batch_size: int = 4) -> Captions:
    data = Captions(str(table), str(table), batch_size=batch_size, num_workers=0)
    data.preprocessing, data.tokenize = module.preprocessing, module.tokenize  # for use without a trainer
    return data


def cosines(module: LitCLIP, images: Shades) -> Tensor:
    """Cosine similarities ``[N, C]`` of a set in a suite's :func:`entry`, all images at once."""
    model = module.model.eval()
    with torch.no_grad():
        photos = torch.stack([model.preprocess(images.images(row)[0]) for row in range(len(images))])
        classifier = zero_shot_classifier(model, NAMES, ["a {} patch.", "{}"])
        return model.encode_image(photos, normalize=True) @ classifier


def trained_on(data: Captions, rank: int = 0, world: int = 1, epoch: int = 0) -> list[tuple[str, str]]:
    """Return key and caption of every pair that a rank trains on in an epoch."""
    data._rank_and_world = lambda: (rank, world)  # pyright: ignore[reportAttributeAccessIssue]
    data.preprocessing = Preprocessing(image_size=8)
    data.setup("fit")
    loader: Any = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return [pair for batch in loader for pair in zip(batch.keys, batch.captions, strict=True)]


def numbers(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the logged metrics whose names start with ``prefix``."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
