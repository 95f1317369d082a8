"""Open the training data of a command."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_clip.errors import BadSample, require
from lit_clip.tools.console import stderr
from lit_clip.tools.images import OnError
from ..open_source import open_source, stamp_of_data
from ..pairs.findings import DataOptions
from ..pairs.kept import digest_of_kept, kept_pairs
from ..pairs.source import Classes, PairSource, Row


class Opened(NamedTuple):
    """Training data before and after applying tables of decisions."""

    options: tuple[DataOptions, Classes]
    every: PairSource
    pairs: PairSource  # without what a table of ``--keep`` drops

    def stamp(self, *outputs: Path) -> str:
        """Return a cache key of the pairs; it does not change with the command's own outputs."""
        files = stamp_of_data(self.options[0].data, outputs)
        return repr((self.options, len(self.every), self.every.versions, files, digest_of_kept(self.pairs)))


def open_data(
    options: DataOptions,
    on_error: OnError = "skip",
    classes: Classes = Classes(),  # noqa: B008  # immutable
    keep: str | Sequence[str] | None = None,
    default_split: str | None = None,
) -> Opened:
    """Open and prepare training data, and report the pairs left out."""
    require(bool(options.data), "no data: name a table, a folder or shards before the options")
    fields = {"columns": options.columns, "split": options.split, "classes": classes, "on_error": on_error}
    every = open_source(options.data, **fields, default_split=default_split, option_prefix="--")
    require(len(every) > 0, f"{', '.join(options.data)}: has no pairs")
    every.prepare()
    if every.left_out.counts:
        stderr().print(f"{every.left_out} left out")
    return Opened((options, classes), every, every if keep is None else kept_pairs(every, keep, "--keep"))


def readable_rows(source: PairSource, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """Yield the number of each row with readable texts, and the row without its image.

    For the others raise an error, or name them and leave them out.
    """
    for number in range(len(source)):
        try:
            row = source.row(number)._replace(image=None)
        except BadSample as error:
            if on_error == "error":
                raise
            stderr().print(f"skipped: {error}")
        else:
            yield number, row
