"""Evaluate zero-shot classification after every epoch on a set of your own, here a table whose captions are classes.

    python own_zero_shot_set.py captions.csv

Expect `zero_shot/mine/top1` and `top5`, and a sheet of images with their nearest names in the run's folder.
"""

import csv
import sys
from pathlib import Path

from lightning.pytorch import Trainer
from PIL import Image

from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.evaluation.data import LabelledImages


class NamedImages(LabelledImages):
    def __init__(self, table: str):
        self.folder = Path(table).parent
        self.rows = list(csv.DictReader(Path(table).read_text(encoding="utf-8").splitlines()))
        self.class_names = sorted({row["caption"] for row in self.rows})

    def __len__(self):
        return len(self.rows)

    def labels(self):  # of all images, without opening any
        return [self.class_names.index(row["caption"]) for row in self.rows]

    def __getitem__(self, index):
        return Image.open(self.folder / self.rows[index]["image"]), self.labels()[index]


if __name__ == "__main__":
    zero_shot = callbacks.ZeroShot({"mine": callbacks.ZeroShotSet(NamedImages(sys.argv[1]), ["a drawing of a {}"])})
    trainer = Trainer(callbacks=callbacks.defaults(zero_shot), max_epochs=2, use_distributed_sampler=False)
    trainer.fit(LitCLIP("ViT-tiny-16-64"), Captions(sys.argv[1], batch_size=32))
