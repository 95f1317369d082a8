"""What can be fuzzed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.inputs import Input, Inputs


class Target(NamedTuple):
    """Code that reads somebody's file, and hostile files for it.

    Attributes:
        inputs: makes the strategy.
        run: reads an input in an empty working folder, and yields ``used`` or ``skipped`` for each of its samples. It
            raises :class:`lit_clip.errors.InputError` to refuse the input, and ``AssertionError`` for a wrong result.
        named: whether a refusal must name the file or the folder.
        own: whether the file is the user's own, who may start processes and name modules.
        bytewise: whether to minimise a finding by leaving out bytes, rather than by hypothesis.
    """

    inputs: Callable[[], Inputs]
    run: Callable[[Path, Input], Iterable[str]]
    named: bool = True
    own: bool = False
    bytewise: bool = False
