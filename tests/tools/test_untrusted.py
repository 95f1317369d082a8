"""Values from files are checked before they are used."""

import gc
from typing import NoReturn

import pytest

from lit_clip.errors import InputError
from lit_clip.models.config import Preprocessing
from lit_clip.tools.untrusted import convert


class _Large(dict[str, object]):
    """A mapping that takes long to write out, such as an optimiser's moments."""

    def __repr__(self) -> NoReturn:
        raise AssertionError("written out")


def test_only_a_wrong_entry_is_written_out() -> None:
    convert(_Large(state=_Large()), dict[str, dict[str, object]])
    with pytest.raises(InputError, match=r"^x.*: must be a mapping, not a whole number"):
        convert(_Large(state=3), dict[str, dict[str, object]], "x")


def test_sizes_keep_their_ranges_and_leave_the_interpreter_whole() -> None:
    """A number with a range beside a tuple of fixed length crashed msgspec in the next garbage collection."""
    for _ in range(50):
        assert Preprocessing([32, 48]).image_size == (32, 48)  # pyright: ignore[reportArgumentType]  # as JSON gives it
        for size in (0, [0, 2], [32, 16385], [32], [32, 32, 32], True, "32", None):
            with pytest.raises(InputError, match="preprocessing.image_size"):
                Preprocessing(size)  # pyright: ignore[reportArgumentType]
        gc.collect()
