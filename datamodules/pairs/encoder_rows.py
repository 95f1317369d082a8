"""Pairs as rows that encoders read."""

from collections.abc import Sequence

from PIL import Image

from .source import PairSource


class SourcePairs:
    """Rows of a source, by default all, as :class:`lit_clip.embedding.pair_scores.PairRows`."""

    def __init__(self, source: PairSource, rows: Sequence[int] | None = None) -> None:
        self.source, self.rows = source, range(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        pair = self.source.load(self.rows[row], None)
        return pair.key, [pair.image]

    def captions(self, row: int) -> list[str]:
        return list(dict.fromkeys(self.source.captions(self.rows[row])))
