"""Several sources of pairs as one: concatenated, or mixed in given proportions."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa

from lit_clip.errors import InputError, require
from .source import IMAGES_OF, Derived, Found, PairSource, arrow_image_names, compute


def proportional_counts(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` in proportion to the weights by largest remainders: each count is off by less than one."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest_remainders] += 1
    return counts.tolist()


class Concatenated(Derived):
    """Several sources, one after the other.

    Keys are prefixed with the source's number where equal keys in two sources are different images; so are groups.
    """

    def __init__(self, sources: Sequence[PairSource], distinct_keys: bool, distinct_groups: bool = False) -> None:
        super().__init__(sources)
        self.distinct_keys, self.distinct_groups = distinct_keys, distinct_groups
        self.rows_per_epoch = [source.pairs_per_epoch for source in self.sources]  # that an epoch takes from each
        self.stops = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self.stops[-1]

    @property
    def pairs_per_epoch(self) -> int:
        return sum(self.rows_per_epoch)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Interleave the sources at random; each keeps its own order, so neighbouring rows may stay together."""
        source_of = np.repeat(np.arange(len(self.sources), dtype=np.int32), self.rows_per_epoch)
        np.random.default_rng((seed, epoch)).shuffle(source_of)
        order = np.empty(len(source_of), np.int64)
        for number in range(len(self.sources)):
            own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])  # equal sources differ in order
            start = self.stops[number - 1] if number else 0
            order[source_of == number] = start + self._rows(number, epoch, own_seed)
        return order

    def _rows(self, number: int, epoch: int, seed: int) -> np.ndarray:
        """Return the rows that an epoch takes from a source, int64 ``[rows_per_epoch[number]]``."""
        return self.sources[number].order(epoch, seed).astype(np.int64)

    def locate(self, index: int) -> tuple[PairSource, int]:
        number = self._number(index)
        return self.sources[number], index - (self.stops[number - 1] if number else 0)

    def _number(self, index: int) -> int:
        return bisect_right(self.stops, index)

    def renamed(self, index: int, key: str) -> str:
        return f"{self._number(index)}:{key}" if self.distinct_keys else key

    def changed(self, index: int, found: Found) -> Found:
        own = self.distinct_groups or (self.distinct_keys and found.group.startswith(IMAGES_OF))
        group = f"{self._number(index)}:{found.group}" if own and found.group else found.group
        return found._replace(key=self.renamed(index, found.key), group=group)

    def image_names(self) -> pa.ChunkedArray:
        """Return the names of all images, in order: an image in two sources is held out of both."""
        every = []
        for number, source in enumerate(self.sources):
            prefix, names = f"{number}:" if self.distinct_keys else ":", arrow_image_names(source)
            if names is None:
                prefix, names = f"{number}#", _numbers(source)
            elif not pa.types.is_binary(names.type):
                names = compute.utf8_trim_whitespace(names)
            every += _prefixed(prefix, names.cast(pa.large_binary())).chunks
        return pa.chunked_array(every)

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        every, parts = [], [source.things(rows) for source in self.sources]
        for number, (source, names) in enumerate(zip(self.sources, parts, strict=True)):
            here = (_numbers(source) if names is None else names).cast(pa.large_string())
            found = of_row = _prefixed(f"\0{number}:", here)
            if names is not None and not rows:
                own = True if self.distinct_groups else self.distinct_keys and compute.starts_with(here, IMAGES_OF)
                group = compute.if_else(own, _prefixed(f"{number}:", here), here)
                found = compute.if_else(compute.starts_with(here, "\0"), of_row, group)
            every += found.chunks
        return None if all(part is None for part in parts) else pa.chunked_array(every)


def _numbers(source: PairSource) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(np.arange(len(source)))]).cast(pa.string())


def _prefixed(prefix: str, names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names with a prefix; they stay in Arrow, because millions of Python texts would fill the memory."""
    before, between = (pa.scalar(text, names.type) for text in (prefix, ""))
    return compute.binary_join_element_wise(before, names, between)


class Mixture(Concatenated):
    """Several sources, shuffled together; weights set the number of pairs of each in an epoch.

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
        """Return the epoch's slice of the endless sequence of passes over one source."""
        source, count = self.sources[number], self.rows_per_epoch[number]
        slices, position, end = [], epoch * count, (epoch + 1) * count
        while position < end:
            pass_number, done = divmod(position, source.pairs_per_epoch)
            rows = source.order(pass_number, seed)[done : done + end - position]
            slices.append(rows.astype(np.int64))
            position += len(rows)
        return np.concatenate(slices)

    def divide(self, share: float, seed: int, groups: bool = False) -> tuple[PairSource, PairSource]:
        """Divide each source into a mixture for training and held-out pairs, each once, for validation."""
        train, held_out = zip(*(source.divide(share, seed, groups) for source in self.sources), strict=True)
        return Mixture(train, self.weights), Concatenated(held_out, distinct_keys=True)


def in_each_part(source: PairSource, change: Callable[[PairSource], PairSource]) -> PairSource:
    """Change a source, or each part of a mixture."""
    if isinstance(source, Mixture):
        return Mixture([in_each_part(part, change) for part in source.sources], source.weights)
    return change(source)
