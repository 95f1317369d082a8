"""Values from files are checked before they are used."""

from typing import NoReturn

import pytest

from lit_clip.errors import InputError
from lit_clip.tools.untrusted import check_entries


class _Large(dict[str, object]):
    """A mapping that takes long to write out, such as an optimiser's moments."""

    def __repr__(self) -> NoReturn:
        raise AssertionError("written out")


def test_only_a_wrong_entry_is_written_out() -> None:
    check_entries(_Large(state=_Large()), {"state": dict[str, object]})
    with pytest.raises(InputError, match=r"x\.state: 3 must be"):
        check_entries(_Large(state=3), {"state": dict[str, object]}, "x")
