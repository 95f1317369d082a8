"""Where a step's time goes: milliseconds by kind of kernel, launches, and how long the device has nothing to do."""

from collections.abc import Callable, Iterator

from peers import open_clip_pair
from profile_step import profiled
from train_step import TINY_RATE, our_step, their_step

from gpu.inputs import named, uint8_pairs
from gpu.setting import Row, Setting, attempt, gap


def rows(setting: Setting) -> Iterator[Row]:
    theirs, ours = (model.to(setting.device) for model in open_clip_pair(named(setting, "ViT-B-32")))
    (pairs,) = uint8_pairs(setting, ours, 8 if setting.tiny else 1024, 1)
    pairs = pairs._replace(images=ours.normalize(pairs.images))
    for name, step in (
        ("open_clip", their_step(theirs, TINY_RATE, True, setting.device)),
        ("lit-clip", our_step(ours, TINY_RATE, True, setting.device)),
    ):
        what = f"step of ViT-B-32, batch 1024: {name}"
        yield attempt(setting, what, lambda name=name, step=step: kinds(setting, name, lambda: step(pairs)), needs=5)


def kinds(setting: Setting, name: str, step: Callable[[], object]) -> Row:
    found = profiled(step, 1 if setting.tiny else 5, setting.device)
    row = {"ms": dict(found.milliseconds.most_common()), "launches": found.launches, "idle_share": found.idle}
    return row | (gap(1 / (1 - found.idle), "idle device in a profiled step") if name == "lit-clip" else {})
