"""A recipe of one's own: settings of ``fit`` that follow from the number of pairs; what it chooses for a table.

python own_recipe.py captions.csv

On the command line: lit-clip fit --data.train captions.csv --recipe own_recipe.SeenPairs --recipe.pairs_seen 2000
"""

import sys

from lit_clip.datamodules import Captions
from lit_clip.recipes import Choice, Recipe, Run


class SeenPairs(Recipe):
    """See so many pairs in all, however many there are."""

    def __init__(self, pairs_seen: int = 20_000) -> None:
        self.pairs_seen = pairs_seen

    def choose(self, run: Run) -> list[Choice]:
        facts = run.facts  # pairs, images, captions, validation; run.data and run.module are there too
        epochs = max(1, self.pairs_seen // facts.pairs)
        batch = min(256, max(2, facts.pairs // 4))
        return [
            Choice("data.global_batch_size", batch, f"{facts.pairs:,} pairs", unless=("data.batch_size",)),
            Choice("trainer.max_epochs", epochs, f"{self.pairs_seen:,} pairs seen"),
            Choice("model.lr_scheduler.warmup_steps", epochs * facts.pairs // batch // 10, "a tenth of the steps"),
            Choice("trainer.callbacks.NonFiniteSteps.policy", "skip", "a long run"),
        ]


if __name__ == "__main__":
    data = Captions(sys.argv[1])
    data.train_source, data.val_source = data.sources(fit=True)
    for choice in SeenPairs().choices(Run({}, lambda: data, lambda: None)):
        print(choice.option, choice.value, choice.why)
