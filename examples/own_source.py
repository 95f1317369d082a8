"""Train on pairs from a source of your own, here a table whose captions are extended by prompts.

    python own_source.py captions.csv
    lit-clip fit --data.train '{class_path: own_source.Prompted, init_args: {table: captions.csv}}'

Each row has three captions, of which training draws one in each epoch. Order, resume and ranks work as for a table.
"""

import csv
import sys
from pathlib import Path

from lightning.pytorch import Trainer

from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions, CustomPairs


class Prompted(CustomPairs):
    def __init__(self, table: str):
        self.folder = Path(table).parent
        with open(table, encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def __len__(self):
        return len(self.rows)

    def image(self, index):  # a PIL image, or the path or the bytes of an image file
        return self.folder / self.rows[index]["image"]

    def captions(self, index):  # at least one; training draws one each time, validation takes the first
        name = self.rows[index]["caption"]
        return [name, f"a drawing of a {name}", f"an icon: {name}"]


if __name__ == "__main__":
    trainer = Trainer(callbacks=callbacks.defaults(), max_epochs=2, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.fit(LitCLIP("ViT-tiny-16-64"), Captions(Prompted(sys.argv[1]), batch_size=32))
