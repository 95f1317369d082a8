"""Hard negatives by a plain loop in float64, with every option; and planted ones."""

from typing import Any

import numpy as np
import pytest

from datamodules.pairs.mining import MiningWindow, hard_negatives
from lit_clip.errors import InputError

N, M, D = 300, 500, 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_loop(images: Any, texts: Any, own: Any, other: Any, window: MiningWindow) -> list[list[int]]:
    """One image and caption at a time, in the order of the definition."""
    found = []
    for image in range(len(images)):
        cosines = [float(np.dot(images[image].astype(np.float64), text)) for text in texts.astype(np.float64)]
        true = own[image] | other[image]
        candidates = [number for number in np.argsort([-cosine for cosine in cosines]).tolist() if number not in true]
        candidates = candidates[: window.among]
        if window.margin is not None:
            least = min(cosines[number] for number in own[image])
            candidates = [number for number in candidates if cosines[number] + window.margin <= least]
        if window.most_similar is not None:
            candidates = [number for number in candidates if cosines[number] <= window.most_similar]
        found.append(candidates[window.skip :][: window.num_negatives])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_negatives": 7, "skip": 4, "among": 11},
        {"num_negatives": 5, "among": 499, "margin": 0.2},
        {"skip": 2, "among": 40, "margin": 0.0, "most_similar": 0.45},
        {"num_negatives": 1000, "among": 2000, "most_similar": -0.3},
    ],
)
def test_negatives_are_those_of_a_plain_loop(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    images, texts = unit(rng.normal(size=(N, D))), unit(rng.normal(size=(M, D)))
    own = [set(rng.choice(M, 1 + image % 3, replace=False).tolist()) for image in range(N)]
    other = [set(rng.choice(M, 20, replace=False).tolist()) if image % 5 == 0 else set() for image in range(N)]
    window = MiningWindow(**options)
    found = [[number for number, _ in each] for each in hard_negatives(images, texts, own, other, window)]
    assert found == by_loop(images, texts, own, other, window)
    assert any(found)


def test_planted_negatives_are_found_and_planted_true_captions_are_not() -> None:
    """Of each image: its caption at a cosine of 0.8, another that is as true at 0.81, and a hard negative at 0.7."""
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(N, 256)))

    def at(cosine: float) -> np.ndarray:
        noise = rng.normal(size=images.shape)
        noise -= (noise * images).sum(axis=1, keepdims=True) * images
        return unit(cosine * images + np.sqrt(1 - cosine**2) * unit(noise))

    texts = np.concatenate([at(0.8), at(0.81), at(0.7)])
    own: list[set[int]] = [{image} for image in range(N)]
    none: list[set[int]] = [set() for _ in range(N)]

    def found(**options: Any) -> list[int]:
        window = MiningWindow(num_negatives=1, **options)
        return [each[0][0] for each in hard_negatives(images, texts, own, none, window)]

    true, planted = [N + image for image in range(N)], [2 * N + image for image in range(N)]
    assert found() == true  # what the options are for
    for options in ({"margin": 0.05}, {"most_similar": 0.75}, {"skip": 1}):
        assert found(**options) == planted, options


def test_options_that_leave_nothing_are_refused() -> None:
    for options, message in [
        ({"num_negatives": 0}, "^--num_negatives 0: must be at least 1"),
        ({"skip": -1}, "^--skip -1: must be at least 0"),
        ({"skip": 8, "among": 10}, "^--among 10: must be at least --skip and --num_negatives together"),
        ({"margin": -0.1}, "^--margin -0.1: must be at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            MiningWindow(**options)
