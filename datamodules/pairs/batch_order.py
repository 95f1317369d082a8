"""Order an epoch so that batches have no duplicates, or have hard negatives from nearest neighbours.

A batch is the global one of a step. An order is a pure function of epoch, seed, batch size and data, so that batches
are the same on any number of ranks and after a resume, as those of the source's own order are.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_clip.errors import require
from lit_clip.tools.hashing import hex_digest
from ..loading.sampling import draw_numbers
from .source import PairSource

if TYPE_CHECKING:
    from .related_rows import Neighbours, Shared

MOST_LEFT, MOST_EARLIER, MOST_TRIES = 128, 256, 8  # rows, and batches, that are tried to fill another batch
MOST_IDLE = 8  # earlier batches one after the other that give no row


@dataclass(frozen=True)
class BatchOptions:
    """Which pairs share a batch (of all ranks together).

    Attributes:
        duplicates: ``allowed``, or ``avoided``: no two pairs of a batch have a caption, an image or a group in common.
            Copies that the table of ``keep`` names are the same image.
        hard: share of each batch that is chosen as nearest neighbours of the rest, so that negatives are hard; below 1.
            Duplicates are then avoided, too.
        features: a file of ``lit-clip embed`` with features of the training images, or of their captions, in which
            neighbours are found; None: those that :class:`callbacks.HardBatches` computes.
    """

    duplicates: Literal["allowed", "avoided"] = "allowed"
    hard: float = 0.0
    features: str | None = None

    def __post_init__(self) -> None:
        known = self.duplicates in ("allowed", "avoided")
        require(known, f"data.batches.duplicates: {self.duplicates!r} must be 'allowed' or 'avoided'")
        require(0 <= self.hard < 1, f"data.batches.hard: {self.hard} must be a share from 0 to below 1")
        unused = "data.batches.features: nothing reads them without data.batches.hard; set it to a share, such as 0.5"
        require(self.features is None or self.hard > 0, unused)

    @property
    def reorder(self) -> bool:
        return self.duplicates == "avoided" or self.hard > 0


class _Walk:
    """One pass over the rows of an epoch that fills one batch after another.

    A row goes into the first batch that has no duplicate of it. What conflicts with a batch waits for the next one;
    rows of which more wait than there are batches to come are dropped. ``hard`` places of a batch are filled with
    neighbours of the others. The rows that are left at the end are often duplicates of each other: they then take
    places in earlier batches, whose rows fill the last ones.
    """

    def __init__(
        self, order: np.ndarray, size: int, shared: "Shared", near: "Neighbours | None" = None, hard: int = 0
    ) -> None:
        self.order = order
        self.size = size
        self.shared = shared
        self.near = near
        self.hard = hard
        rows = len(shared.starts) - 1
        self.draws = np.bincount(order, minlength=rows).astype(np.int32)  # of each row, that are still to come
        self.repeats = draw_numbers(order) is not None  # a row is its own duplicate
        self.constrained = (np.diff(shared.starts) > 0) | (self.draws > 1)
        self.place, self.to_come = 0, len(order) // size
        self.waiting: list[int] = []
        self.waiting_names: Counter[int] = Counter()
        self.neighbours = 0  # places that they have filled
        self.present: set[int] = set()  # names in the batch that is being filled

    def rows(self) -> np.ndarray:
        """Return the rows of full batches, int ``[batches * size]``."""
        found, tries = list(self._in_order()), MOST_TRIES
        while self.to_come and tries:
            batch = self._exchanged(found[-MOST_EARLIER:])
            if len(batch) == self.size:
                found.append(batch)
                self.to_come -= 1
                tries = MOST_TRIES
            else:  # other rows are left than before
                np.add.at(self.draws, batch, 1)
                tries -= 1
        return np.array(found, dtype=self.order.dtype).reshape(-1)

    def _in_order(self) -> Iterator[list[int]]:
        while self.to_come:
            self.present = set()
            batch = self._from_waiting(self.size - self.hard)
            self._from_order(batch, self.size - self.hard)
            if self.near:
                self._add_neighbours(batch)
                batch += self._from_waiting(self.size - len(batch))
                self._from_order(batch, self.size)
            if len(batch) < self.size:
                np.add.at(self.draws, batch, 1)
                return
            yield batch
            self.to_come -= 1

    def _exchanged(self, earlier: list[list[int]]) -> list[int]:
        """Return a batch of remaining rows and rows from earlier batches; other remaining rows replace the latter."""
        self.present, batch = set(), []
        left = np.flatnonzero(self.draws)
        left = left[:: len(left) // MOST_LEFT + 1].tolist()
        for row in left:
            if len(batch) < self.size and self._taken(row):
                batch.append(row)
        idle = 0
        for other in reversed(earlier):
            before = len(batch)
            while len(batch) < self.size and (given := self._exchange(other, left)) is not None:
                batch.append(given)
            idle = 0 if len(batch) > before else idle + 1
            if len(batch) == self.size or idle == MOST_IDLE:  # what is left is in nearly every batch
                break
        return batch

    def _exchange(self, other: list[int], left: list[int]) -> int | None:
        """Replace a row of a full batch by a remaining row; return the replaced row if it fits the present batch."""
        owners = {name: place for place, row in enumerate(other) for name in self._names(row)}
        for row in left:
            conflicts = {owners[name] for name in self._names(row) if name in owners}
            if not self.draws[row] or len(conflicts) > 1:
                continue
            for place in conflicts or range(self.size):
                names = self._names(other[place])
                if self.present.isdisjoint(names):
                    self.present.update(names)
                    self.draws[row] -= 1
                    given, other[place] = other[place], row
                    return given
        return None

    def _names(self, row: int) -> list[int]:
        names = self.shared.of(row)
        return [*names, -1 - row] if self.repeats else names

    def _taken(self, row: int) -> bool:
        """Take a draw of a row and return True, unless a duplicate of the row is in the batch."""
        names = self._names(row)
        if not self.draws[row] or not self.present.isdisjoint(names):
            return False
        self.draws[row] -= 1
        self.present.update(names)
        return True

    def _wait(self, row: int) -> None:
        names = self._names(row)
        if self.draws[row] and all(self.waiting_names[name] < self.to_come for name in names):
            self.waiting.append(row)
            self.waiting_names.update(names)

    def _from_waiting(self, most: int) -> list[int]:
        """Take the first waiting rows that fit."""
        taken, queue = [], self.waiting
        self.waiting = []
        for number, row in enumerate(queue):
            if len(taken) == most:
                self.waiting += queue[number:]
                break
            if self._taken(row):
                taken.append(row)
            elif self.draws[row]:
                self.waiting.append(row)
                continue
            self.waiting_names.subtract(self._names(row))
        return taken

    def _from_order(self, batch: list[int], size: int) -> None:
        """Add the next fitting rows of the order until a batch has ``size`` rows."""
        while len(batch) < size and self.place < len(self.order):
            rows = self.order[self.place : self.place + size - len(batch)]
            self.place += len(rows)
            free = self.draws[rows] > 0
            for place in np.flatnonzero(free & self.constrained[rows]).tolist():
                row = int(rows[place])
                free[place] = self._taken(row)
                if not free[place]:
                    self._wait(row)
            self.draws[rows[free & ~self.constrained[rows]]] = 0
            batch += rows[free].tolist()

    def _add_neighbours(self, batch: list[int]) -> None:
        """Add the nearest fitting rows, one for each row of the batch in turn, until the batch is full."""
        assert self.near
        queues = [iter(rows) for rows in self.near.near(np.array(batch, dtype=np.int64), self.draws)]
        while queues and len(batch) < self.size:
            rest = []
            for queue in queues:
                row = next((row for row in queue if self._taken(row)), None)
                if row is not None:
                    batch.append(row)
                    rest.append(queue)
                    self.neighbours += 1
                    if len(batch) == self.size:
                        return
            queues = rest


class BatchOrder:
    """Orders of a source's epochs; all have as many batches as the first fills without duplicates or neighbours.

    Rows that fit into no batch are left out of the epoch. An epoch that fills fewer batches repeats its first ones, as
    other draws of their rows; a run says so once.
    """

    def __init__(
        self, source: PairSource, options: BatchOptions, seed: int, shared: "Shared", near: "Neighbours | None" = None
    ) -> None:
        self.source = source
        self.options = options
        self.seed = seed
        self.shared = shared
        self.near = near
        self._batches: dict[int, int] = {}  # in an epoch, by their size
        self._latest = (-1, 0, np.zeros(0, np.int64))  # epoch, batch size and order
        self._told = False  # that an epoch repeats batches

    def use(self, near: "Neighbours") -> None:
        """Fill the hard places of the next orders with other neighbours."""
        self.near, self._latest = near, (-1, 0, np.zeros(0, np.int64))
        self.__dict__.pop("digest", None)

    @cached_property
    def digest(self) -> str:
        """A hash that changes with everything that the orders depend on, except the source's own order."""
        near = self.near[:2] if self.near else ()
        return hex_digest(
            [self.options.hard, *(np.ascontiguousarray(each).tobytes() for each in (*self.shared, *near))]
        )

    def batches(self, size: int) -> int:
        """Return the number of batches of ``size`` pairs in each epoch."""
        if size not in self._batches:
            order = self.source.order(0, self.seed)
            rows = _Walk(order, size, self.shared).rows()
            self._batches[size] = len(rows) // size
            require(
                len(rows) > 0 or len(order) < size,  # which the sampler refuses
                f"data.batches: no {size} of {len(order):,} pairs are without duplicates of each other; set "
                "data.batch_size or data.global_batch_size to less",
            )
            several = int(np.count_nonzero(np.diff(self.shared.starts)))
            left_out = len(order) // size * size - len(rows)
            note = f"; {left_out:,} pairs of an epoch fit into no batch" if left_out else ""
            rank_zero_info(f"data.batches: {several:,} of {len(self.source):,} pairs have duplicates{note}")
        return self._batches[size]

    def order(self, epoch: int, size: int) -> np.ndarray:
        """Return the rows of an epoch, int ``[batches * size]``."""
        if self._latest[:2] != (epoch, size):
            share = round(self.options.hard * size)
            hard = min(max(1, share), size - 1) if self.options.hard else 0  # the rest is what has neighbours
            require(
                not hard or self.near is not None,
                "data.batches.hard: nothing says which pairs are near; set data.batches.features, or add HardBatches",
            )
            walk = _Walk(self.source.order(epoch, self.seed), size, self.shared, self.near if hard else None, hard)
            rows = walk.rows()
            require(len(rows) > 0, f"data.batches: epoch {epoch} fills no batch of {size} pairs; make batches smaller")
            if hard:
                rank_zero_info(
                    f"data.batches: {walk.neighbours / len(rows):.0%} of epoch {epoch} are neighbours of the rest"
                )
            wanted = self.batches(size) * size
            if len(rows) < wanted and not self._told:
                self._told = True
                rank_zero_warn(
                    f"data.batches: epoch {epoch} fills {len(rows) // size:,} of {wanted // size:,} batches and "
                    f"repeats its first ones; {wanted - len(rows):,} more pairs are left out; other epochs may differ"
                )
            self._latest = epoch, size, np.resize(rows, wanted)
        return self._latest[2]
