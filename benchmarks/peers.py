"""What the benchmarks share: the peer with our weights, real captions, and a fair clock."""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import open_clip
import torch

from datamodules.openmoji import read_table
from lit_clip import CLIP, create_model


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=5, help="measured pairs; the median is printed")
    return options


def open_clip_pair(name: str) -> tuple[Any, CLIP]:
    """open_clip's model with random weights and ours with the same ones."""
    logging.disable(logging.WARNING)  # that the weights are random is meant
    torch.manual_seed(0)
    theirs, ours = open_clip.create_model(name), create_model(name)
    state = theirs.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    return theirs, ours


def captions(count: int) -> list[str]:
    """Real names in a sentence, short and long ones mixed."""
    emoji = read_table()
    return [f"a drawing of a {emoji[i * len(emoji) // count].name}." for i in range(count)]


def compare(title: str, theirs: Callable[[], object], ours: Callable[[], object], pairs: int) -> None:
    """Alternate the two and print the median seconds of each and the median, least and greatest ratio of a pair."""
    times = []
    for warm_up in (theirs, ours):
        warm_up()
    for _ in range(pairs):
        start = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        ours()
        times.append((middle - start, time.perf_counter() - middle))
    ratios = sorted(a / b for a, b in times)
    peer, us = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{title}: open_clip {version('open-clip-torch')} {peer:.2f} s, lit-clip {us:.2f} s, "
        f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads)"
    )
