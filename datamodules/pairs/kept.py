"""The pairs of a source that a file of scores keeps."""

import random
from functools import cached_property
from pathlib import Path

import numpy as np

from lit_clip.embedding.pair_scores import pair_hash
from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import naming
from .mixture import Concatenated
from .score_files import ScoreFile
from .source import EncodedPair, Pair, PairSource, PairText, Rows

CHECKED = 100  # pairs that are compared with the source before it is used


def kept_pairs(source: PairSource, path: str | Path, option: str = "") -> "FilteredPairs":
    """Return the pairs of a source that a file of ``lit-clip score`` keeps; ``option`` gave it, for messages."""
    with naming(option):
        file = ScoreFile(Path(path).expanduser())
        other = "it is of other data, or they have changed since; score them again"
        require(
            file.rows == len(source),
            f"{path}: has scores of {file.rows:,} rows, and the data have {len(source):,}; {other}",
        )
        for name, version in source.versions.items():
            known = file.versions.get(name, version)
            require(known == version, f"{path}: is of version {known} of {name}, not {version}; {other}")
        kept = FilteredPairs(source, *file.kept(), str(path))
        for index in range(min(CHECKED, len(kept))):  # the first, not spread: that would fetch every shard of a store
            kept.check_captions(index)
        return kept


def digest_of_kept(source: PairSource) -> str:
    """Return a hash that changes with the pairs that scores keep of a source or its parts; empty without scores."""
    if isinstance(source, FilteredPairs):
        return source.digest
    parts = [digest_of_kept(part) for part in source.sources] if isinstance(source, Concatenated) else []
    return hex_digest(parts) if any(parts) else ""


class FilteredPairs(Rows):
    """Some pairs of a source: rows with some of their captions.

    Each pair is compared with the one that was scored when it is loaded, so that none is used with another's score.

    ``rows`` ascend, int ``[K]``; ``pairs`` are the :func:`lit_clip.embedding.pair_scores.pair_hash` of each.
    """

    def __init__(self, source: PairSource, rows: np.ndarray, pairs: np.ndarray, name: str) -> None:
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # place of each row's first pair
        super().__init__(source, rows[first])
        self.pairs, self.name = pairs, name
        self._starts = None if len(first) == len(rows) else np.append(first, len(rows))  # None: a caption for each row

    @cached_property
    def digest(self) -> str:
        """A hash that changes with the pairs."""
        return hex_digest([self.rows.tobytes(), self.pairs.tobytes()])

    def _is_kept(self, index: int, key: str, caption: str) -> bool:
        first, stop = (index, index + 1) if self._starts is None else self._starts[index : index + 2]
        return bool((self.pairs[first:stop] == pair_hash(key, caption)).any())

    def _kept(self, index: int, key: str, captions: list[str]) -> list[str]:
        kept = [caption for caption in captions if self._is_kept(index, key, caption)]
        other = f"row {self.rows[index]} of the data was scored with other captions than {key} has now"
        require(bool(kept), f"{self.name}: {other}; score them again")
        return kept

    def _drawn(self, index: int, key: str, caption: str, rng: random.Random | None) -> dict[str, str]:
        """Draw again where the source drew a caption that is not kept: all kept ones stay equally likely."""
        if self._is_kept(index, key, caption):
            return {}
        captions = self.captions(index)
        return {"caption": captions[0] if rng is None or len(captions) == 1 else rng.choice(captions)}

    def check_captions(self, index: int) -> None:
        """Raise :class:`InputError` if a row's kept captions were changed."""
        try:
            self.captions(index)
        except BadSample as error:  # it could be read when it was scored
            raise InputError(f"{self.name}: is of other data: {error}") from error

    def load(self, index: int, rng: random.Random | None) -> Pair:
        pair = super().load(index, rng)
        return pair._replace(**self._drawn(index, pair.key, pair.caption, rng))

    def text(self, index: int, rng: random.Random | None) -> PairText:
        text = super().text(index, rng)
        return text._replace(**self._drawn(index, text.key, text.caption, rng))

    def read(self, index: int) -> EncodedPair:
        pair = super().read(index)
        return pair._replace(captions=self._kept(index, pair.key, pair.captions))

    def captions(self, index: int) -> list[str]:
        return self._kept(index, self.key(index), super().captions(index))

    def check(self) -> None:
        """Load the first pair: scoring has read them all, but perhaps from another root."""
        self.load(0, None)

    def divide(self, share: float, seed: int) -> tuple[PairSource, PairSource]:
        """Divide the source, so that an image is on the same side with any pairs kept."""
        train, held_out = (self._within(part) for part in self.source.divide(share, seed))
        return train, held_out

    def _within(self, part: PairSource) -> "FilteredPairs":
        usable = isinstance(part, Rows) and part.source is self.source
        require(usable, f"{self.name}: {type(self.source).__name__} cannot be divided; set data.val")
        assert isinstance(part, Rows)
        of_pair = self.rows if self._starts is None else np.repeat(self.rows, np.diff(self._starts))
        chosen = np.isin(of_pair, part.rows)
        require(
            bool(chosen.any()),
            f"{self.name}: keeps no pair for training, or none for validation; keep more, or set data.val",
        )
        return FilteredPairs(self.source, of_pair[chosen], self.pairs[chosen], self.name)
