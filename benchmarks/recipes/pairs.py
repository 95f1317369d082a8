"""Fine-tune a model on the first N of some images with each setting of a grid; what it learns, and what it forgets.

    python benchmarks/recipes/pairs.py grid.jsonl --model groceries.ckpt --train clothes.csv --test clothes_test.csv
        --held_out groceries_test.csv [--blocks 4 2] [--out runs/recipes/pairs.jsonl]

A line of the grid is a mapping such as ``{"pairs": 115, "rate": 3e-4, "batch": 32, "steps": 150}``; it may have
``seed`` (which also chooses the images), ``warmup`` and ``ema`` (the half-life), shares of the steps, and
``duplicates``. Frozen layers encode each image once, in four augmented versions, so a run takes seconds. Measured are
the images of two tables whose own caption comes first among all the table's captions, in %. Finished runs are not
repeated. ``pairs.jsonl`` is the grid of docs/evidence/recipe_sizes.md.
"""

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor

from callbacks import EMA
from datamodules.loading.augmentation import Augmentation, TrainingTransform
from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.models.frozen_prefix import frozen_activations, image_features_from, use_frozen_prefix
from lit_clip.module import LitCLIP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

VERSIONS = 4  # augmented, of each training image
AT_ONCE = 64


class Encoded(NamedTuple):
    """Activations of the frozen image layers ``[versions, N, ...]``, captions, and the images' paths."""

    images: Tensor
    captions: list[str]
    keys: list[str]

    def rows(self, rows: Sequence[int]) -> "Encoded":
        """Return some of the pairs."""
        return Encoded(self.images[:, rows], [self.captions[row] for row in rows], [self.keys[row] for row in rows])


class Batches(LightningDataModule):
    """Batches of encoded pairs, each epoch in another order and with other versions of the images."""

    def __init__(self, pairs: Encoded, batch: int, model: CLIP, seed: int) -> None:
        super().__init__()
        self.pairs, self.train_batch_size, self.tokenizer, self.seed = pairs, batch, model.tokenizer, seed
        self.steps_per_epoch, self.epoch = len(pairs.keys) // batch, 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[CaptionBatch]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        self.epoch += 1
        images, captions, keys = self.pairs
        order = torch.randperm(len(keys), generator=generator)
        version = torch.randint(0, len(images), (len(keys),), generator=generator)
        for rows in order.split(self.train_batch_size)[: self.steps_per_epoch]:
            texts = [captions[row] for row in rows.tolist()]
            tokens = self.tokenizer.trim(self.tokenizer(texts))
            lengths = self.tokenizer.lengths(tokens).tolist()
            kept = [keys[row] for row in rows.tolist()]
            yield CaptionBatch(images[version[rows], rows], tokens, kept, texts, lengths=lengths)

    def train_dataloader(self) -> Any:
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="JSON lines")
    for name in ("train", "test", "held_out"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="table of images and captions")
    parser.add_argument("--model", required=True, help="checkpoint to start from")
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=(4, 2), help="trainable blocks of image and text encoder"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/pairs.jsonl"), help="results, one a line")
    given = parser.parse_args()
    image, text = map(UnlockLast, given.blocks)
    freeze = Freeze(image, text, batch_norm=True)
    start = partial(LitCLIP, None, given.model, freeze=freeze)
    model = start().model.eval()
    use_frozen_prefix(model, "image")
    tables = {name: encode(model, getattr(given, name), name == "train") for name in ("train", "test", "held_out")}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    for line in given.grid.read_text(encoding="utf-8").splitlines():
        setting = {**json.loads(line), "model": given.model, "blocks": list(given.blocks)}
        if any(setting.items() <= run.items() for run in done):
            continue
        result = setting | train(start, model.frozen_prefixes, tables, **json.loads(line))
        print(json.dumps(result), flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def encode(model: CLIP, path: Path, augmented: bool) -> Encoded:
    """Encode a table's images through the frozen layers."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(path.parent / row["image"], row["caption"]) for row in csv.DictReader(file)]
    transform = TrainingTransform(Augmentation(crop_scale=(0.7, 1.0)) if augmented else [], model.preprocessing)
    torch.manual_seed(0)
    parts = []
    for _ in range(VERSIONS if augmented else 1):
        for first in range(0, len(rows), AT_ONCE):
            images = torch.stack([transform(Image.open(image)) for image, _ in rows[first : first + AT_ONCE]])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                parts.append(frozen_activations(model, model.frozen_prefixes["image"], images).to(torch.bfloat16))
    encoded = torch.cat(parts).unflatten(0, (-1, len(rows)))
    return Encoded(encoded, [caption for _, caption in rows], [str(image) for image, _ in rows])


def train(
    start: Any,
    prefixes: Any,
    tables: dict[str, Encoded],
    *,
    pairs: int,
    rate: float,
    batch: int,
    steps: int,
    seed: int = 0,
    warmup: float = 0.1,
    ema: float = 0.0,
    duplicates: Any = "positives",
) -> dict[str, float]:
    """Train on some pairs, and return accuracies in % and processor seconds."""
    seed_everything(seed)
    keys = tables["train"].keys
    mine = tables["train"].rows(random.Random(seed).sample(range(len(keys)), len(keys))[:pairs])
    schedule = partial(WarmupCosine, warmup_steps=round(warmup * steps))
    optimizer = partial(PaperAdamW, lr=rate, weight_decay=0.1)
    module = start(loss=Contrastive(duplicates=duplicates), optimizer=optimizer, lr_scheduler=schedule)
    module.model.frozen_prefixes.update(prefixes)
    begin = time.process_time()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[EMA(2 ** (-1 / (ema * steps)))] if ema else [],
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(mine, min(batch, pairs), module.model, seed))
    seconds = round(time.process_time() - begin, 1)
    model = module.model.eval()
    return {"seconds": seconds, **{name: accuracy(model, tables[name]) for name in ("test", "held_out")}}


@torch.no_grad()
def accuracy(model: CLIP, pairs: Encoded) -> float:
    """Return the share of the images whose caption comes first among the distinct ones, in %."""
    names = sorted(set(pairs.captions))
    with torch.autocast("cpu", torch.bfloat16):
        images = unit(torch.cat([image_features_from(model, part) for part in pairs.images[0].split(AT_ONCE)]))
        texts = model.encode_text(model.tokenizer(names), normalize=True)
    label = torch.tensor([names.index(caption) for caption in pairs.captions])
    return round(100 * float(((images.float() @ texts.float().T).argmax(dim=1) == label).float().mean()), 1)


if __name__ == "__main__":
    main()
