"""Several sources of pairs as one: concatenated, or mixed in given proportions."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from lit_clip.errors import InputError, require
from .source import EncodedPair, Pair, PairSource, PairText, SkippedRows


def proportional_counts(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` in proportion to the weights, by largest remainders: each count is off by less than one."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest_remainders] += 1
    return counts.tolist()


class Concatenated(PairSource):
    """Several sources, one after the other.

    Keys are prefixed with the source's number where equal keys in two sources are different images; so are groups.
    """

    def __init__(self, sources: Sequence[PairSource], distinct_keys: bool, distinct_groups: bool = False) -> None:
        self.sources, self.distinct_keys, self.distinct_groups = list(sources), distinct_keys, distinct_groups
        self.rows_per_epoch = [source.pairs_per_epoch for source in self.sources]  # that an epoch takes from each
        self.stops = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self.stops[-1]

    @property
    def pairs_per_epoch(self) -> int:
        return sum(self.rows_per_epoch)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Interleave the sources at random; each keeps its own order, which may keep neighbouring rows together."""
        source_of = np.repeat(np.arange(len(self.sources), dtype=np.int32), self.rows_per_epoch)
        np.random.default_rng((seed, epoch)).shuffle(source_of)
        order = np.empty(len(source_of), np.int64)
        for number in range(len(self.sources)):
            own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])  # equal sources differ in order
            start = self.stops[number - 1] if number else 0
            order[source_of == number] = start + self._rows(number, epoch, own_seed)
        return order

    def _rows(self, number: int, epoch: int, seed: int) -> np.ndarray:
        """Rows that an epoch takes from a source, int64 ``[rows_per_epoch[number]]``."""
        return self.sources[number].order(epoch, seed).astype(np.int64)

    def _locate(self, index: int) -> tuple[int, int]:
        number = bisect_right(self.stops, index)
        return number, index - (self.stops[number - 1] if number else 0)

    def _distinct(self, number: int, key: str, group: str, more: Sequence[PairText] | None = None) -> dict[str, Any]:
        return {
            "key": f"{number}:{key}" if self.distinct_keys else key,
            "group": f"{number}:{group}" if self.distinct_groups and group else group,
            **({} if more is None else {"more": [x._replace(**self._distinct(number, x.key, x.group)) for x in more]}),
        }

    def load(self, index: int, rng: random.Random | None) -> Pair:
        number, row = self._locate(index)
        pair = self.sources[number].load(row, rng)
        return pair._replace(**self._distinct(number, pair.key, pair.group, pair.more))

    def read(self, index: int) -> EncodedPair:
        number, row = self._locate(index)
        pair = self.sources[number].read(row)
        return pair._replace(**self._distinct(number, pair.key, pair.group))

    def captions(self, index: int) -> list[str]:
        number, row = self._locate(index)
        return self.sources[number].captions(row)

    def key(self, index: int) -> str:
        number, row = self._locate(index)
        return self._distinct(number, self.sources[number].key(row), "")["key"]

    def text(self, index: int, rng: random.Random | None) -> PairText:
        number, row = self._locate(index)
        text = self.sources[number].text(row, rng)
        return text._replace(**self._distinct(number, text.key, text.group, text.more))

    def image_identity(self, index: int) -> object:
        number, row = self._locate(index)
        return self.sources[number].image_identity(row)

    def image_names(self) -> list[str]:
        """Names of all images, in order: an image that two sources share is held out of both."""
        every = []
        for number, source in enumerate(self.sources):
            prefix, names = f"{number}:" if self.distinct_keys else ":", source.image_names()
            rows = (f"{number}#{row}" for row in range(len(source)))
            every += rows if names is None else (f"{prefix}{str(name).strip()}" for name in names)
        return every

    def prepare(self) -> None:
        for source in self.sources:
            source.prepare()

    def check(self) -> None:
        for source in self.sources:
            source.check()

    @property
    def left_out(self) -> SkippedRows:
        total = SkippedRows()
        for source in self.sources:
            total.update(source.left_out)
        return total

    @property
    def versions(self) -> dict[str, str]:
        return {name: version for source in self.sources for name, version in source.versions.items()}


class Mixture(Concatenated):
    """Several sources, shuffled together; weights decide how many pairs of each an epoch holds.

    An epoch has as many pairs as epochs of the sources together. Each source is read in its own order and continues in
    the next epoch where it stopped: none of its pairs repeats before all of them were used, and then it starts over in
    another order. The order of an epoch is a pure function of epoch and seed, as for any source.
    Keys and groups are prefixed with the source's number (``0:cat.jpg``). The weights need not sum to 1.
    """

    def __init__(self, sources: Sequence[PairSource], weights: Sequence[float]) -> None:
        require(len(sources) >= 1, "mixture: no sources")
        require(len(sources) == len(weights), f"mixture: {len(weights)} weights for {len(sources)} sources")
        for number, weight in enumerate(weights):
            usable = 0 < weight < float("inf")
            require(usable, f"mixture: weight {weight} of source {number} must be above 0 and finite; or leave it out")
        super().__init__(sources, distinct_keys=True, distinct_groups=True)
        self.weights, self.rows_per_epoch = list(weights), proportional_counts(weights, self.pairs_per_epoch)
        if 0 in self.rows_per_epoch:
            number, pairs = self.rows_per_epoch.index(0), sum(self.rows_per_epoch)
            raise InputError(
                f"mixture: an epoch of {pairs} pairs would have none of source {number}, whose weight is "
                f"{weights[number]}; raise its weight"
            )

    def _rows(self, number: int, epoch: int, seed: int) -> np.ndarray:
        """The epoch's slice of the endless sequence of passes over one source."""
        source, count = self.sources[number], self.rows_per_epoch[number]
        slices, position, end = [], epoch * count, (epoch + 1) * count
        while position < end:
            pass_number, done = divmod(position, source.pairs_per_epoch)
            rows = source.order(pass_number, seed)[done : done + end - position]
            slices.append(rows.astype(np.int64))
            position += len(rows)
        return np.concatenate(slices)

    def divide(self, share: float, seed: int) -> tuple[PairSource, PairSource]:
        """Divide each source: a mixture for training, and every held-out pair once for validation."""
        train, held_out = zip(*(source.divide(share, seed) for source in self.sources), strict=True)
        return Mixture(train, self.weights), Concatenated(held_out, distinct_keys=True)
