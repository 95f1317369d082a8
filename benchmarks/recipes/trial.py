"""Parts that recipes try out."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks import PatchDropout
from datamodules.openmoji import Emoji, EmojiPairs, OpenMoji
from datamodules.pairs.source import Pair, PairSource


class Tagged(EmojiPairs):
    def __init__(self, emoji: Sequence[Emoji], paths: Sequence[Path], shares: Sequence[float]) -> None:
        super().__init__(emoji, paths)
        self.shares = shares

    def load(self, index: int, rng: random.Random | None) -> Pair:
        emoji = self.emoji[index]
        return Pair(self.images[index], emoji.name if rng is None else self.caption(emoji, rng), emoji.hexcode)

    def caption(self, emoji: Emoji, rng: random.Random) -> str:
        name, with_tags, only_tags = self.shares
        kind = rng.random()
        if kind < name:
            return emoji.name
        tags = [tag for tag in emoji.tags if tag != emoji.name] or [emoji.name]
        if kind < name + with_tags:
            return ", ".join([emoji.name, *rng.sample(tags, min(len(tags), rng.randint(1, 3)))])
        if kind < name + with_tags + only_tags:
            return ", ".join(rng.sample(tags, min(len(tags), rng.randint(1, 3))))
        return emoji.group if rng.random() < 0.5 else f"{emoji.group}, {emoji.subgroup}"


class TaggedOpenMoji(OpenMoji):
    def __init__(self, shares: list[float], batch_size: int = 64, num_workers: int = 2, augmentation: list[Any] | None = None) -> None:
        super().__init__(batch_size, num_workers, augmentation=augmentation)
        self.shares = shares

    def sources(self, fit: bool) -> tuple[PairSource | None, PairSource]:
        train, val = super().sources(fit)
        if isinstance(train, EmojiPairs):
            tagged = Tagged([], [], self.shares)
            tagged.emoji, tagged.images = train.emoji, train.images
            train = tagged
        return train, val


class PatchDropoutUntil(PatchDropout):
    """Whole images in the last steps."""

    def __init__(self, share: float = 0.5, until: float = 0.9) -> None:
        super().__init__(share)
        self.until = until

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        whole = trainer.global_step >= self.until * trainer.estimated_stepping_batches
        pl_module.model.visual.patch_dropout = 0.0 if whole else self.share
