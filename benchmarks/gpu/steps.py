"""Training steps of both libraries, eager and compiled, with the same weights and batches, alternating."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, cycle
from typing import Any, NamedTuple

import torch
from device_speed import matmul_peak
from lightning.fabric.utilities.throughput import get_available_flops
from peers import open_clip_pair
from train_step import TINY_RATE, Pairs, our_step, their_step

from callbacks.compile import compile_blocks
from gpu.fitting import Timed, as_batch, fit
from gpu.inputs import named, uint8_pairs
from gpu.setting import Row, Setting, attempt, gap, seconds_per_call
from lit_clip import CLIP, LitCLIP
from lit_clip.models.flops import training_flops

Step = Callable[[Pairs], Any]


class Case(NamedTuple):
    """A measurement of several variants side by side.

    Attributes:
        model: a name of :func:`lit_clip.list_models`.
        batch: pairs.
        long: whether captions fill the context.
        compiled: whether to measure compiled variants too.
        micro: pairs of a micro-batch; open_clip then recomputes activations.
    """

    model: str
    batch: int
    long: bool = False
    compiled: bool = False
    micro: int | None = None

    @property
    def steps(self) -> int:
        """Steps between waits: about two seconds."""
        return {"ViT-B-32": 20}.get(self.model, 10) if self.micro is None else 5

    def __str__(self) -> str:
        texts = "77" if self.long else "14"
        return f"{self.model}, batch {self.batch}, {texts} tokens" + (f", parts of {self.micro}" if self.micro else "")


# Most important first: the last ones are skipped if time runs out.
CASES = (
    Case("ViT-B-32", 1024, compiled=True),
    Case("ViT-B-16", 512, compiled=True),
    Case("ViT-L-14", 128, compiled=True),
    Case("ViT-B-32", 4096, micro=1024),
    Case("ViT-B-32", 1024, long=True),
    Case("ViT-B-32", 256),
    Case("ViT-B-16", 512, long=True),
    Case("ViT-L-14", 128, long=True),
    Case("ViT-B-32", 256, compiled=True),
)
SECONDS = {False: 8.0, True: 45.0}  # that a variant takes at least, by whether it is compiled


def rows(setting: Setting) -> Iterator[Row]:
    one_of_each_kind = (CASES[0], CASES[3], CASES[4])
    for case in one_of_each_kind if setting.tiny else CASES:
        yield from measured(setting, case)


class Material(NamedTuple):
    """What all variants of a case share.

    Attributes:
        theirs: open_clip's model, on the CPU.
        ours: lit-clip's with the same weights, on the CPU.
        batches: on the device.
        flops: of the model for a batch, without padding and recomputation.
    """

    theirs: Any
    ours: CLIP
    batches: list[Pairs]
    flops: float


class Variant:
    """One of the sides of a case.

    Attributes:
        name: the library, and whether it is compiled.
        row: its figures.
        seconds: of a step, by round.
    """

    def __init__(self, name: str, step: Step, setting: Setting, batches: list[Pairs]) -> None:
        self.name, self.setting, self.batches = name, setting, cycle(batches)
        self.row: Row = {"what": name}
        self.seconds: list[float] = []
        self._step = step

    def step(self) -> None:
        self._step(next(self.batches))

    def warm_up(self, held: int) -> None:
        """Run the first steps, which compile, and note their time and the memory above the bytes ``held`` before."""
        if self.setting.cuda:
            torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        for _ in range(2 if self.setting.tiny else 4):
            self.step()
        if self.setting.cuda:
            torch.cuda.synchronize()
            self.row["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
        self.row["first_steps_seconds"] = time.perf_counter() - since

    def time(self, steps: int) -> Row:
        self.seconds.append(seconds_per_call(self.step, steps, self.setting))
        return {}


def measured(setting: Setting, case: Case) -> Iterator[Row]:
    """Yield one row per variant of a case, and the comparisons."""
    if not setting.tiny and setting.left() < 2 * SECONDS[False]:
        yield {"what": str(case), "skipped": f"{setting.left():.0f} s left"}
        return
    torch._dynamo.reset()
    material, speeds = material_of(setting, case), {}
    for row in chain(side_by_side(setting, case, material), in_trainer(setting, case, material)):
        if "samples_per_second" in row:
            speeds[row["what"]] = row["samples_per_second"]
            row |= {"model": case.model, "side": row["what"]}
        yield {**row, "what": f"{case}: {row['what']}"}
    yield from compared(case, speeds)


def material_of(setting: Setting, case: Case) -> Material:
    theirs, ours = open_clip_pair(named(setting, case.model))
    batches = uint8_pairs(setting, ours, 8 if setting.tiny else case.batch, 2, case.long)
    lengths = [length for pairs in batches for length in pairs.lengths]
    flops = training_flops(ours)
    assert flops is not None
    return Material(theirs, ours, batches, flops.total(len(lengths), sum(lengths), sum(n * n for n in lengths)) / 2)


def side_by_side(setting: Setting, case: Case, material: Material) -> Iterator[Row]:
    """Prepare all variants, then time each of them in every round; they stay on the device meanwhile."""
    names = ["open_clip"] + ["lit-clip"] * (case.micro is None)
    if case.compiled:
        names += ["lit-clip compiled", "open_clip compiled"]
    variants: list[Variant] = []
    for name in names:
        build = partial(prepared, setting, case, name, material)
        row = attempt(setting, name, lambda build=build: {"variant": build()}, SECONDS["compiled" in name])
        if "variant" in row:
            variants.append(row["variant"])
        else:
            yield row
    steps = 1 if setting.tiny else case.steps
    for _ in range(1 if setting.tiny else 2):
        for variant in variants:
            variant.row |= attempt(setting, variant.name, partial(variant.time, steps))
    for variant in variants:
        if variant.seconds:
            yield variant.row | rates(setting, material, statistics.median(variant.seconds))
        else:
            yield variant.row


def prepared(setting: Setting, case: Case, name: str, material: Material) -> Variant:
    """Copy a model to the device, compile it if asked for, and run its first steps."""
    backend, is_ours = "eager" if setting.tiny else "inductor", name.startswith("lit-clip")
    held = setting.memory()
    model: Any = copy.deepcopy(material.ours if is_ours else material.theirs).to(setting.device)
    if case.micro and not is_ours:
        model.set_grad_checkpointing(True)
    if "compiled" in name:
        compile_blocks(model, backend) if is_ours else compile_their_blocks(model, backend)
    make = our_step if is_ours else their_step
    step = _normalised(make(model, TINY_RATE, True, setting.device), material.ours)
    variant = Variant(name, step, setting, material.batches)
    variant.warm_up(held)
    return variant


def compile_their_blocks(model: Any, backend: str) -> None:
    """Compile open_clip's blocks as ours, so that equal blocks share their graphs: whole encoders take minutes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.compile(backend=backend)


def _normalised(step: Step, model: CLIP) -> Step:
    """Normalise the uint8 images on the device, as part of the step of either library."""
    return lambda pairs: step(pairs._replace(images=model.normalize(pairs.images)))


def in_trainer(setting: Setting, case: Case, material: Material) -> Iterator[Row]:
    """Time our steps in ``Trainer.fit``, with the copies of batches from pinned memory and all callbacks."""
    if case.compiled or case.micro:
        name = "lit-clip compiled, Trainer" if case.compiled else "lit-clip, Trainer"
        yield attempt(setting, name, lambda: fitted(setting, case, material), needs=12)


def fitted(setting: Setting, case: Case, material: Material) -> Row:
    module = LitCLIP(material.ours.config, micro_batch_size=4 if setting.tiny else case.micro)
    module.model.load_state_dict(material.ours.state_dict())
    if case.compiled:
        compile_blocks(module.model, "eager" if setting.tiny else "inductor")
    block = 1 if setting.tiny else 5 if case.micro else 10
    timed, data = Timed(block), [as_batch(pairs, setting.cuda) for pairs in material.batches]
    fit(setting, module, data, 3 * block, timed, log_every_n_steps=block)
    return rates(setting, material, timed.seconds())


def rates(setting: Setting, material: Material, seconds: float) -> Row:
    """Return samples per second, and which shares of the measured and of the listed peak the model's FLOPs are."""
    device, flops = torch.device(setting.device), material.flops
    listed = get_available_flops(device, torch.bfloat16) if setting.cuda else None
    return {
        "ms": seconds * 1000,
        "samples_per_second": len(material.batches[0].images) / seconds,
        "share_of_measured_peak": flops / seconds / _peak(setting.device, 0.05 if setting.tiny else 0.4),
        "share_of_listed_peak": listed and flops / seconds / listed,
    }


@cache
def _peak(device: str, seconds: float) -> float:
    return matmul_peak(torch.device(device), torch.bfloat16, seconds)


def compared(case: Case, speeds: dict[str, float]) -> Iterator[Row]:
    """Yield how many times as fast the better of ours could be, beside the better of open_clip's and the Trainer."""
    mine = {name: speed for name, speed in speeds.items() if name.startswith("lit-clip")}
    peers = {name: speed for name, speed in speeds.items() if name.startswith("open_clip")}
    if not mine or not peers:
        return
    best, peer = max(mine, key=lambda name: mine[name]), max(peers, key=lambda name: peers[name])
    yield {
        "what": f"{case}: comparison",
        "times_as_fast": mine[best] / peers[peer],
        **gap(peers[peer] / mine[best], f"{case}: {peer} against {best}"),
    }
    for name in mine:
        bare = name.removesuffix(", Trainer")
        if bare != name and bare in mine:
            yield {"what": f"{case}: what the Trainer costs", **gap(mine[bare] / mine[name], f"{case}: Trainer")}
