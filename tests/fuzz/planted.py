"""Targets that do what no input may lead to, to see that it is found."""

import copy
import ctypes
import importlib
import json
import os
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from lit_clip.errors import InputError
from tests.fuzz.inputs import CANARY, Input, Target
from tests.fuzz.targets import remote


class _RawError(InputError):
    """A refusal whose message is not made one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.args = (message,)


def _target(act: Callable[[Input], object]) -> Target:
    def run(folder: Path, given: Input) -> Iterator[str]:
        if b"!" in given.data:
            act(given)
        yield "used"

    return Target(
        lambda: st.text("ab!", min_size=30, max_size=30).map(lambda text: Input("a.txt", text.encode())),
        run,
        bytewise=True,
    )


def _raise(error: Exception) -> None:
    raise error


def _segfault() -> None:
    ctypes.string_at(0)


def _flood() -> None:
    for number in range(50):
        warnings.warn(f"warning {number}", stacklevel=1)


def _use_memory() -> None:
    block = bytearray(300_000_000)
    block[::4096] = b"1" * len(block[::4096])


def _open_elsewhere() -> None:
    Path(tempfile.gettempdir()).parent.joinpath("elsewhere").open("w").close()


hang = _target(lambda given: time.sleep(60))
segfault = _target(lambda given: _segfault())
memory = _target(lambda given: _use_memory())
canary = _target(lambda given: importlib.import_module(CANARY))
process = _target(lambda given: subprocess.run(["true"], check=True))
shell = _target(lambda given: os.system("true"))
network = _target(lambda given: socket.create_connection(("127.0.0.1", 9), 1))
elsewhere = _target(lambda given: _open_elsewhere())
bug = _target(lambda given: {}[given.name])
always = bug._replace(inputs=lambda: st.just(Input("a.txt", b"!")))
wrong = _target(lambda given: _raise(AssertionError("a wrong result")))
lines = _target(lambda given: _raise(_RawError(f"{given.name}: two\nlines")))
long = _target(lambda given: _raise(_RawError(f"{given.name}: {'long ' * 200}")))
escape = _target(lambda given: _raise(_RawError(f"{given.name}: \x1b[31mred")))
nameless = _target(lambda given: _raise(InputError("the file is damaged")))
flood = _target(lambda given: _flood())
unmade = always._replace(inputs=lambda: st.just("a").map(lambda name: Input(name, {}[name])))


def _unguarded(folder: Path, given: Input) -> Iterator[str]:
    with patch("lit_clip.tools.hub_client.guard_hub"):
        yield from remote.ask_hub(folder, given)


def _at_any_tag() -> Any:
    tree = copy.deepcopy(remote.hub_trees()["weights"])
    tree["HEAD"]["headers"]["X-Linked-Etag"] = f"{'../' * 7}created"
    return st.just(Input("weights", json.dumps(tree).encode()))


harmless = _target(lambda given: _raise(InputError(f"{given.name}: has a !; remove it")))
hub_tag = Target(_at_any_tag, _unguarded)
