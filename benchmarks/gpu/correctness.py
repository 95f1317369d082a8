"""Whether the GPU computes the right thing, and what makes the host wait for it."""

import copy
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peers import NANO_VIT, autocast, open_clip_pair
from torch import Tensor
from train_step import Pairs, losses

from callbacks import NonFiniteSteps
from callbacks.compile import compile_blocks
from gpu.fitting import as_batch, fit
from gpu.inputs import named, uint8_pairs
from gpu.setting import NEEDS_CUDA, Row, Setting, attempt, gap
from lit_clip import CLIP, LitCLIP, create_model
from lit_clip.distributed import RankCounts
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss

EXACT, SAME_LOSSES = 1e-4, 1e-3  # largest relative errors
WARM_UP = 2  # steps, before which caches are filled


def rows(setting: Setting) -> Iterator[Row]:
    for form in ("padded", "packed", "compiled"):
        what = f"float32 against the CPU's float64, {form}"
        yield attempt(setting, what, lambda form=form: exact(setting, form))
    yield attempt(setting, "bfloat16 against float64", lambda: half(setting), needs=10)
    yield attempt(setting, "losses of 10 steps against open_clip", lambda: same_losses(setting), needs=10)
    yield attempt(setting, "a step that is not finite", lambda: undone(setting), needs=5)
    yield attempt(setting, "waits of steps that are not logged", lambda: waits(setting), needs=5)


def checked(error: float, limit: float) -> Row:
    """Return the error as a row.

    Raises:
        ArithmeticError: it is above the limit, or not a number.
    """
    if not error <= limit:
        raise ArithmeticError(f"the error is {error:.1e}, allowed is {limit:.0e}")
    return {"error": error}


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.to(exact) - exact).norm() / exact.norm())


def exact(setting: Setting, form: str) -> Row:
    """Compare features and every parameter's gradient."""
    torch.manual_seed(0)
    model = create_model(NANO_VIT).train()
    (pairs,) = uint8_pairs(setting._replace(device="cpu"), model, 32, 1)
    expected = results(copy.deepcopy(model).double(), pairs, packed=True)
    model = model.to(setting.device)
    if form == "compiled":
        compile_blocks(model, "eager" if setting.tiny else "inductor")
    moved = pairs._replace(images=pairs.images.to(setting.device), trimmed=pairs.trimmed.to(setting.device))
    found = results(model, moved, packed=form != "padded")
    errors = {name: relative(found[name].cpu(), value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    return {**checked(errors[worst], EXACT), "worst": worst}


def results(model: CLIP, pairs: Pairs, packed: bool) -> dict[str, Tensor]:
    """Return unit features, and gradients by parameter."""
    image = model.encode_image(model.normalize(pairs.images), normalize=True)
    text = model.encode_text(pairs.trimmed, normalize=True, lengths=pairs.lengths if packed else None)
    layout = PairLayout(RankCounts(0, (len(image),)))
    sharded_contrastive_loss(image, text, model.logit_scale.exp(), layout).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"image features": image.detach(), "text features": text.detach(), **gradients}


@torch.no_grad()
def half(setting: Setting) -> Row:
    """Return the relative errors of both libraries' unit features under autocast to bfloat16."""
    theirs, ours = (model.to(setting.device).eval() for model in open_clip_pair(named(setting, "ViT-B-32")))
    (pairs,) = uint8_pairs(setting, ours, 16, 1)
    images, exact_model = ours.normalize(pairs.images), copy.deepcopy(ours).double()
    exact_features = {
        "image": exact_model.encode_image(images.double(), normalize=True),
        "text": exact_model.encode_text(pairs.trimmed, normalize=True),
    }
    found: Row = {}
    for who, model in (("lit_clip", ours), ("open_clip", theirs)):
        packed: dict[str, Any] = {"lengths": pairs.lengths} if who == "lit_clip" else {}
        with autocast(setting.device, True):
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(pairs.trimmed if packed else pairs.tokens, normalize=True, **packed)
        found[f"{who}_image"] = relative(image, exact_features["image"])
        found[f"{who}_text"] = relative(text, exact_features["text"])
    return found


def same_losses(setting: Setting) -> Row:
    """Train both in float32 from the same weights on the same batches."""
    model, steps, batch = named(setting, "ViT-B-32"), 2 if setting.tiny else 10, 8 if setting.tiny else 64
    found = list(losses(Namespace(model=model, device=setting.device, losses=steps, batch=batch)))
    error = max(abs(ours - theirs) / abs(theirs) for theirs, ours in found)
    return {**checked(error, SAME_LOSSES), "last": found[-1][1]}


class Break(Callback):
    """Put a NaN into a gradient of one step, and remember the weights before and after it."""

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.weights.append(weights)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)


def undone(setting: Setting) -> Row:
    """Train with one step that is not finite: it must change no weight, and the others must."""
    module = LitCLIP(NANO_VIT)
    pairs = uint8_pairs(setting, module.model, 16, 1)
    broken = Break(2)
    fit(setting, module, [as_batch(pairs[0], setting.cuda)], 5, broken, NonFiniteSteps("skip"))
    changed = [not torch.equal(one, other) for one, other in zip(broken.weights, broken.weights[1:], strict=False)]
    if changed != [True, True, False, True] or not broken.weights[-1].isfinite().all():
        raise ArithmeticError(f"steps that changed the weights: {changed}, of which the third was not finite")
    return {"undone": True}


class Waits(Callback):
    """Count what waits for the device in and between steps that are not logged, by the line that does.

    Attributes:
        steps: number of steps in which waits were counted.
        places: how often each line waited.
    """

    def __init__(self) -> None:
        self.steps, self.places = 0, Counter[str]()

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        watched = not logged and trainer.global_step >= WARM_UP
        self.steps += watched
        torch.cuda.set_sync_debug_mode("warn" if watched else "default")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count CUDA's warnings in the body."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._seen
            yield

    def _seen(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.places[_place()] += 1


def _place() -> str:
    """Return file and line of the innermost function of ours or Lightning's that is being called."""
    root = Path(__file__).resolve().parents[2]
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if path.is_relative_to(root) and "site-packages" not in path.parts:
            return f"{path.relative_to(root)}:{frame.lineno}"
        if "lightning" in path.parts:
            return f"{Path(*path.parts[path.parts.index('lightning') :])}:{frame.lineno}"
    return "torch"


def waits(setting: Setting) -> Row:
    module = LitCLIP(NANO_VIT)
    pairs = uint8_pairs(setting, module.model, 16, 2)
    steps, waiting = 3 if setting.tiny else 25, Waits()
    batches = [as_batch(one, setting.cuda) for one in pairs]
    if not setting.cuda:
        fit(setting, module, batches, steps)
        return {"skipped": NEEDS_CUDA}
    with waiting.counting():
        fit(setting, module, batches, steps, waiting)
    per_step = {place: count / waiting.steps for place, count in waiting.places.most_common()}
    total = sum(per_step.values())
    return {"waits_per_step": total, "places": per_step, **gap(1 + total / 100, f"{total:.1f} waits a step")}
