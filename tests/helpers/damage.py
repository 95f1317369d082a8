"""Damage to a file of any kind."""

import os
import random
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]


def scattered(seed: int) -> Damage:
    """Overwrite one to twenty bytes anywhere."""

    def damage(path: Path) -> None:
        rng, content = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(bytes(content))

    return damage


def pipe(path: Path) -> None:
    """Put a pipe in its place, which a reader would wait for."""
    path.unlink()
    os.mkfifo(path)
