"""Several sources of pairs as one: one after the other, or in stated proportions."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from datamodules.pairs.source import EncodedPair, LeftOut, Pair, PairSource
from lit_clip.errors import InputError, require


def shares_of(weights: Sequence[float], total: int) -> list[int]:
    """``total`` divided in proportion to the weights, in whole numbers that differ from it by less than one."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    most = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]  # the largest remainders
    shares[most] += 1
    return shares.tolist()


class Concatenated(PairSource):
    """Several sources, one after the other.

    Args:
        sources: all of them.
        apart: whether equal keys in two of them are different images; their numbers are then part of the keys.
        groups_apart: likewise of groups.
    """

    def __init__(self, sources: Sequence[PairSource], apart: bool, groups_apart: bool = False) -> None:
        self.sources, self.apart, self.groups_apart = list(sources), apart, groups_apart
        self.stops = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self.stops[-1]

    @property
    def epoch_size(self) -> int:
        return sum(source.epoch_size for source in self.sources)

    @property
    def parts(self) -> list[int]:
        """How many rows of an epoch are of each source."""
        return [source.epoch_size for source in self.sources]

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Each source's rows in its own order, which may keep near what lies near, mixed with the others'."""
        turns = np.repeat(np.arange(len(self.sources), dtype=np.int32), self.parts)
        np.random.default_rng((seed, epoch)).shuffle(turns)
        order = np.empty(len(turns), np.int64)
        for number in range(len(self.sources)):
            own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])  # equal sources differ in order
            start = self.stops[number - 1] if number else 0
            order[turns == number] = start + self._rows(number, epoch, own_seed)
        return order

    def _rows(self, number: int, epoch: int, seed: int) -> np.ndarray:
        """What an epoch takes of a source, int64 ``[parts[number]]``."""
        return self.sources[number].order(epoch, seed).astype(np.int64)

    def _at(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.stops, index)
        return part, index - (self.stops[part - 1] if part else 0)

    def _named(self, part: int, key: str, group: str) -> dict[str, str]:
        """What a pair is called beside those of the other sources."""
        apart = self.groups_apart and group
        return {"key": f"{part}:{key}" if self.apart else key, "group": f"{part}:{group}" if apart else group}

    def load(self, index: int, rng: random.Random | None) -> Pair:
        part, row = self._at(index)
        pair = self.sources[part].load(row, rng)
        return pair._replace(**self._named(part, pair.key, pair.group))

    def read(self, index: int) -> EncodedPair:
        part, row = self._at(index)
        pair = self.sources[part].read(row)
        return pair._replace(**self._named(part, pair.key, pair.group))

    def captions(self, index: int) -> list[str]:
        part, row = self._at(index)
        return self.sources[part].captions(row)

    def prepare(self) -> None:
        for source in self.sources:
            source.prepare()

    def check(self) -> None:
        for source in self.sources:
            source.check()

    @property
    def left_out(self) -> LeftOut:
        total = LeftOut()
        for source in self.sources:
            total.update(source.left_out)
        return total


class Mixture(Concatenated):
    """Pairs of several sources, of each as many an epoch as its weight says, thoroughly mixed.

    A source is read in its own order and goes on in the next epoch where it stopped, so none of its pairs comes again
    before all of it have come; then it begins anew in another order. What comes when is a pure function of the epoch,
    like the order of any source.

    Args:
        sources: of pairs; keys and groups are kept apart by the sources' numbers (``0:cat.jpg``).
        weights: of each source, of any sum.
        epoch_size: pairs of an epoch; None: as many as the sources have together.

    Raises:
        InputError: a weight that is not positive, or so small that its source would never come.
    """

    def __init__(self, sources: Sequence[PairSource], weights: Sequence[float], epoch_size: int | None = None) -> None:
        require(len(sources) >= 1, "mixture: no sources")
        require(len(sources) == len(weights), f"mixture: {len(weights)} weights for {len(sources)} sources")
        for number, weight in enumerate(weights):
            usable = 0 < weight < float("inf")
            require(
                usable, f"mixture: weight {weight} of source {number} must be above 0; leave out what is not wanted"
            )
        super().__init__(sources, apart=True, groups_apart=True)
        self.weights, self._wanted = list(weights), epoch_size
        if epoch_size is not None:
            require(epoch_size >= 1, f"mixture: epoch_size {epoch_size} must be at least 1")
        self.shares = shares_of(self.weights, self.epoch_size)
        if 0 in self.shares:
            number = self.shares.index(0)
            raise InputError(
                f"mixture: in epochs of {self.epoch_size} pairs none would be of source {number}, whose weight is "
                f"{weights[number]}; raise its weight or epoch_size"
            )

    @property
    def epoch_size(self) -> int:
        return self._wanted or len(self)

    @property
    def parts(self) -> list[int]:
        return self.shares

    def _rows(self, number: int, epoch: int, seed: int) -> np.ndarray:
        """The part that an epoch takes of the endless sequence of one source's passes."""
        source, share = self.sources[number], self.shares[number]
        parts, position, end = [], epoch * share, (epoch + 1) * share
        while position < end:
            number_of_pass, done = divmod(position, source.epoch_size)
            rows = source.order(number_of_pass, seed)[done : done + end - position]
            parts.append(rows.astype(np.int64))
            position += len(rows)
        return np.concatenate(parts)

    def divide(self, share: float, seed: int) -> tuple[PairSource, PairSource]:
        """Each source by itself: a mixture to train on, and of what is kept for validation every pair once."""
        train, kept = zip(*(source.divide(share, seed) for source in self.sources), strict=True)
        wanted = self._wanted
        return Mixture(train, self.weights, wanted), Concatenated(kept, apart=True)
