"""Every loss on one rank of a distributed test, and the same losses as plain loops over all pairs."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lit_clip import distributed, load_model
from lit_clip.batch import CaptionBatch
from lit_clip.commands.wise_ft import save
from lit_clip.distributed import gather_rows
from lit_clip.losses import (
    Alignment,
    Contrastive,
    Loss,
    LossValue,
    Matryoshka,
    Pairs,
    Sigmoid,
    Sum,
    WeightedContrastive,
    WholeBatch,
    tiled,
    weighted,
)
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import evaluate_loss
from lit_clip.losses.tiled import HardNegatives, PairLayout, sharded_contrastive_loss, sharded_sigmoid_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.layers import TOWERS
from lit_clip.module import LitCLIP
from lit_clip.tools.hardware import to_device
from lit_clip.training import preservation
from lit_clip.training.losses import OtherImageContrastive, PlaceContrastive, WithTitle
from lit_clip.training.micro_batches import encode_pairs
from lit_clip.training.preservation import Preservation
from lit_clip.training.teacher import Distillation, Teacher
from tests.helpers.ranks import CONFIG, DUPLICATES, PAIRS, _Step, make_batch, make_module, serve
from tests.helpers.towers import shaken

CONFIG_WITH_BIAS = dataclasses.replace(CONFIG, logit_bias=True)
COUNTS = {1: [(8,)], 2: [(5, 3), (8, 0)], 3: [(5, 0, 3), (3, 4, 1)]}  # pairs of each rank
WITH_NEGATIVE = (0, 2, 3, 6)


class WeightedMargin(Loss):
    """A user's loss: knows nothing of ranks, and has parameters of its own."""

    uses_negatives = True

    def __init__(self, margin: float = 0.1, channels: int = 16) -> None:
        super().__init__()
        self.margin, self.weight = margin, nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def whole_batch(self, pairs: WholeBatch) -> LossValue:
        texts = pairs.text if pairs.negative is None else torch.cat([pairs.text, pairs.negative])
        scores = (pairs.image * self.weight) @ texts.T
        own = scores.diagonal()[:, None]
        wrong = torch.ones_like(scores, dtype=torch.bool)
        wrong[:, : len(own)] = ~pairs.same
        long = to_device(torch.tensor([1.0 + ("b" in caption) for caption in pairs.captions]), scores.device)
        cost = F.softplus(pairs.scale * (scores - own + self.margin)) * wrong
        return LossValue((cost.sum(dim=1) * long * pairs.extra("importance")).mean(), {"wrong": wrong.sum().float()})


class Inputs(NamedTuple):
    """What the loops read: all pairs, in float64."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    negative: Tensor | None
    same: Tensor
    captions: list[str]

    def cut(self, dim: int) -> "Inputs":
        features = (self.image, self.text, self.negative)
        image, text, negative = (None if x is None else x[:, :dim] / x[:, :dim].norm(dim=1)[:, None] for x in features)
        assert image is not None
        assert text is not None
        return self._replace(image=image, text=text, negative=negative)


Loop = Callable[[Inputs, Loss, Teacher], Tensor]


def contrastive_loop(duplicates: str, smoothing: float = 0.0) -> Loop:
    """Return cross-entropies in both directions, one query and one candidate at a time."""

    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        total, pairs = torch.zeros((), dtype=torch.float64), range(len(x.image))
        for queries, candidates, more in ((x.image, x.text, x.negative), (x.text, x.image, None)):
            for i in pairs:
                logits = [x.scale * (queries[i] @ candidates[j]) for j in pairs]
                others = [j for j in pairs if j != i and not (duplicates == "ignored" and x.same[i, j])]
                positives = [j for j in pairs if j == i or (duplicates == "positives" and x.same[i, j])]
                terms = [logits[j].exp() for j in (i, *others)]
                terms += [(x.scale * (queries[i] @ row)).exp() for row in (() if more is None else more)]
                target = torch.stack([logits[j] for j in positives]).mean() * (1 - smoothing)
                target = target + smoothing * torch.stack(logits).mean()
                total = total + torch.stack(terms).sum().log() - target
        return total / (2 * len(pairs))

    return loop


def weighted_loop(duplicates: str) -> Loop:
    """Return weighted cross-entropies in both directions, one query and one candidate at a time."""

    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        total, pairs = torch.zeros((), dtype=torch.float64), range(len(x.image))
        weight = whole_batch().extra["weight"].tolist()
        for queries, candidates in ((x.image, x.text), (x.text, x.image)):
            for i in pairs:
                logits = [x.scale * (queries[i] @ candidates[j]) for j in pairs]
                seen = [j for j in pairs if j == i or duplicates != "ignored" or not x.same[i, j]]
                right = [j for j in pairs if j == i or (duplicates == "positives" and x.same[i, j])]
                whole = sum(weight[j] for j in right) or 1
                target = torch.stack([weight[j] / whole * logits[j] for j in right]).sum()
                total = total + weight[i] * (torch.stack([logits[j].exp() for j in seen]).sum().log() - target)
        return total / (2 * sum(weight))

    return loop


def other_images_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return cross-entropies between images and other images, and if set between these and captions."""
    (term,) = (part for part in loss.modules() if isinstance(part, OtherImageContrastive))
    assert term.model is not None
    (model,), inner = term.model, contrastive_loop("ignored")
    others = [model.encode_image(model.normalize(image[None]))[0] for image in whole_batch().extra["other_image"]]
    other = torch.stack([each[: x.text.shape[1]] / each[: x.text.shape[1]].norm() for each in others])
    total = inner(x._replace(text=other), loss, teacher)
    return total + inner(x._replace(image=other), loss, teacher) if term.texts else total


def titles_loop(inner: Loop) -> Loop:
    """Return another loop with the mixture of each image and its title in the image's place."""

    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        (term,) = (part for part in loss.modules() if isinstance(part, WithTitle))
        assert term.model is not None
        weight, mixed = 1 / (1 + (-10 * term.logit).exp()), []
        for image, tokens in zip(x.image, whole_batch().extra["title"], strict=True):
            title = term.model[0].encode_text(tokens[None])[0, : len(image)]
            both = (1 - weight) * image + weight * title / title.norm()
            mixed.append(both / both.norm())
        return inner(x._replace(image=torch.stack(mixed)), loss, teacher)

    return loop


def sigmoid_loop(duplicates: str, pretraining_batch: int | None = None) -> Loop:
    """Return the binary cross-entropies, one pair of image and text at a time."""

    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        total, pairs = torch.zeros((), dtype=torch.float64), range(len(x.image))
        for i in pairs:
            for j in pairs:
                if i != j and x.same[i, j] and duplicates == "ignored":
                    continue
                positive = i == j or (bool(x.same[i, j]) and duplicates == "positives")
                logit = x.scale * (x.image[i] @ x.text[j]) + x.bias
                if pretraining_batch:  # odds of a right pair: 1 in 8 texts here, 1 in pretraining_batch there
                    logit = logit + math.log(pretraining_batch) - math.log(len(x.image))
                total = total - torch.sigmoid(logit if positive else -logit).log()
        return total / len(pairs)

    return loop


def distillation_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return the cross-entropy with the teacher's probabilities, one query at a time."""
    theirs = [teacher.features(whole_batch(), tower) for tower in TOWERS]
    total = torch.zeros((), dtype=torch.float64)
    for ours, candidates, target, targets in (
        (x.image, x.text, theirs[0], theirs[1]),
        (x.text, x.image, theirs[1], theirs[0]),
    ):
        for i in range(len(ours)):
            probabilities = (teacher.model.logit_scale.exp() * targets @ target[i]).softmax(dim=0)
            logits = x.scale * candidates @ ours[i]
            total = total - (probabilities * (logits - logits.exp().sum().log())).sum()
    return total / (2 * len(x.image))


def feature_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return the squared distance of the mapped features to a teacher's with more channels, one pair at a time."""
    (term,) = (part for part in loss.modules() if isinstance(part, Distillation))
    total = torch.zeros((), dtype=torch.float64)
    for tower, ours in (("image", x.image), ("text", x.text)):
        weight, bias = term.maps[tower].weight, term.maps[tower].bias
        for row, target in zip(ours, teacher.features(whole_batch(), tower), strict=True):
            mapped = weight[:, : len(row)] @ row + bias
            total = total + ((mapped / mapped.norm() - target) ** 2).sum()
    return total / len(x.image)


def alignment_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return the mean squared distance of pairs."""
    return torch.stack([((a - b) ** 2).sum() for a, b in zip(x.image, x.text, strict=True)]).mean()


def place_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return cross-entropies of soft maxima over places, one place and text at a time."""
    (kept,) = (part.model for part in loss.modules() if isinstance(part, PlaceContrastive))
    assert kept is not None
    (model,) = kept
    images = whole_batch().images
    maps = torch.cat([model.encode_patches(model.normalize(image[None])) for image in images]).flatten(2)
    pairs = range(len(images))
    logits: list[list[Tensor]] = []
    for i in pairs:
        places = [place / place.norm() for place in maps[i, : x.text.shape[1]].T]
        sums = [torch.stack([(20 * (place @ text)).exp() for place in places]).mean() for text in x.text]
        logits.append([x.scale * each.log() / 20 for each in sums])
    total = torch.zeros((), dtype=torch.float64)
    for i in pairs:
        others = [j for j in pairs if j == i or not x.same[i, j]]
        for terms in ([logits[i][j] for j in others], [logits[j][i] for j in others]):
            total = total + torch.stack([term.exp() for term in terms]).sum().log() - logits[i][i]
    return total / (2 * len(images))


def kept_pairs(kept: str, model: CLIP) -> tuple[Tensor, Tensor]:
    """Return pairs without a table to read; four of the texts are equal."""
    batch = make_batch(slice(0, PAIRS))
    return 255 - batch.images, batch.tokens[[0, 1, 2, 3, 0, 0, 0, 7]]


def of_another_model(loss: Loss) -> Loss:
    """Give a loss base features that are not the model's own, which have no gradient."""
    for term in loss.modules():
        if isinstance(term, Preservation):
            generator = torch.Generator().manual_seed(7)
            for name in ("image", "text"):
                setattr(term, name, unit(torch.randn(PAIRS, 16, generator=generator).double()))
    return loss


def preservation_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    """Return the loss of the first step's kept pairs, one pair at a time, at the channels of the features."""
    (term,) = (part for part in loss.modules() if isinstance(part, Preservation))
    assert term.model is not None, "set by prepare"
    (model,) = term.model
    images, tokens, D = term.images, term.tokens, x.text.shape[1]
    rows = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(0))[: term.pairs].tolist()
    ours = [model.encode_image(model.normalize(images[row][None]))[0] for row in rows]
    ours += [model.encode_text(tokens[row][None])[0] for row in rows]
    theirs = [term.image[row] for row in rows] + [term.text[row] for row in rows]
    ours, theirs = ([each[:D] / each[:D].norm() for each in features] for features in (ours, theirs))
    return torch.stack([((a - b) ** 2).sum() for a, b in zip(ours, theirs, strict=True)]).sum() / len(rows)


def margin_loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
    assert isinstance(loss, WeightedMargin)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x.image)):
        own, factor = (x.image[i] * loss.weight) @ x.text[i], 2 if "b" in x.captions[i] else 1
        wrong = [x.text[j] for j in range(len(x.text)) if not x.same[i, j]]
        for text in [*wrong, *(() if x.negative is None else x.negative)]:
            margin = x.scale * ((x.image[i] * loss.weight) @ text - own + loss.margin)
            total = total + factor * (i + 1) * (1 + margin.exp()).log()  # importance
    return total / len(x.image)


def sum_loop(weights: list[float], terms: list[Loop]) -> Loop:
    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        return torch.stack([w * term(x, loss, teacher) for w, term in zip(weights, terms, strict=True)]).sum()

    return loop


def matryoshka_loop(inner: Loop, dims: list[int], weights: list[float]) -> Loop:
    def loop(x: Inputs, loss: Loss, teacher: Teacher) -> Tensor:
        return torch.stack([w * inner(x.cut(d), loss, teacher) for d, w in zip(dims, weights, strict=True)]).sum()

    return loop


class Case(NamedTuple):
    """A loss, its loop, and whether the batch has hard negatives."""

    make: Callable[[str], Loss]
    loop: Loop
    negatives: bool = False


POLICIES = ("negatives", "positives", "ignored")
CASES: dict[str, Case] = {
    **{f"Contrastive {each}": Case(lambda _, d=each: Contrastive(d), contrastive_loop(each)) for each in POLICIES},
    **{f"Sigmoid {each}": Case(lambda _, d=each: Sigmoid(d), sigmoid_loop(each)) for each in POLICIES},
    "Sigmoid, pretraining batch": Case(lambda _: Sigmoid("ignored", 500), sigmoid_loop("ignored", 500)),
    **{
        f"Contrastive {each}, hard negatives": Case(lambda _, d=each: Contrastive(d), contrastive_loop(each), True)
        for each in POLICIES
    },
    "Contrastive, smoothed": Case(
        lambda _: Contrastive(label_smoothing=0.2), contrastive_loop("negatives", smoothing=0.2), True
    ),
    **{f"Weighted {each}": Case(lambda _, d=each: WeightedContrastive(d), weighted_loop(each)) for each in POLICIES},
    "Matryoshka of Sum with other images and texts": Case(
        lambda _: Matryoshka(Sum([Contrastive(), OtherImageContrastive(texts=True)], [1.0, 2.0]), [5, 16]),
        matryoshka_loop(sum_loop([1, 2], [contrastive_loop("negatives"), other_images_loop]), [5, 16], [1, 1]),
    ),
    "WithTitle of Sigmoid": Case(lambda _: WithTitle(Sigmoid(), 0.7), titles_loop(sigmoid_loop("negatives"))),
    "Matryoshka of WithTitle, hard negatives": Case(
        lambda _: Matryoshka(WithTitle(Contrastive("positives"), 0.3), [5, 16]),
        matryoshka_loop(titles_loop(contrastive_loop("positives")), [5, 16], [1, 1]),
        True,
    ),
    "Sum with Distillation": Case(
        lambda teacher: Sum([Contrastive(), Distillation(teacher)], [1.0, 2.0]),
        sum_loop([1, 2], [contrastive_loop("negatives"), distillation_loop]),
    ),
    "Matryoshka of Sum with PlaceContrastive": Case(
        lambda _: Matryoshka(Sum([Contrastive(), PlaceContrastive()], [1.0, 0.5]), [5, 16]),
        matryoshka_loop(sum_loop([1, 0.5], [contrastive_loop("negatives"), place_loop]), [5, 16], [1, 1]),
    ),
    "Sum with Preservation": Case(
        lambda _: Sum([Contrastive(), Preservation("kept", 5)], [1.0, 3.0]),
        sum_loop([1, 3], [contrastive_loop("negatives"), preservation_loop]),
    ),
    "Preservation of fewer pairs than ranks": Case(
        lambda _: Sum([Contrastive(), Preservation("kept", 2)]),
        sum_loop([1, 1], [contrastive_loop("negatives"), preservation_loop]),
    ),
    "Matryoshka of Sum with Preservation": Case(
        lambda _: Matryoshka(Sum([Contrastive(), Preservation("kept", 50)]), [8]),
        matryoshka_loop(sum_loop([1, 1], [contrastive_loop("negatives"), preservation_loop]), [8], [1]),
    ),
    "Matryoshka of Contrastive, hard negatives": Case(
        lambda _: Matryoshka(Contrastive("positives"), [3, 16], [0.5, 2.0]),
        matryoshka_loop(contrastive_loop("positives"), [3, 16], [0.5, 2.0]),
        True,
    ),
    "Matryoshka of Sigmoid": Case(
        lambda _: Matryoshka(Sigmoid("ignored"), [16, 5]), matryoshka_loop(sigmoid_loop("ignored"), [16, 5], [1, 1])
    ),
    "Matryoshka of Sum": Case(
        lambda teacher: Matryoshka(Sum([Distillation(teacher), Sigmoid()]), [8]),
        matryoshka_loop(sum_loop([1, 1], [distillation_loop, sigmoid_loop("negatives")]), [8], [1]),
    ),
    "Matryoshka of Distillation of features": Case(
        lambda teacher: Matryoshka(Distillation(teacher, "features"), [8, 16]),
        matryoshka_loop(feature_loop, [8, 16], [1, 1]),
    ),
    "Alignment": Case(lambda _: Alignment(), alignment_loop),
    "a user's": Case(lambda _: WeightedMargin(), margin_loop),
    "a user's, hard negatives": Case(lambda _: WeightedMargin(0.2), margin_loop, True),
}
# Their parts are in other cases: each loss and each way of duplicates, hard negatives alone, Matryoshka of a sum.
PARTS_ELSEWHERE = {
    *("Contrastive positives, hard negatives", "Contrastive ignored, hard negatives", "Sum with Preservation"),
    *("Weighted positives", "Weighted ignored", "Matryoshka of Contrastive, hard negatives", "Matryoshka of Sigmoid"),
}


def whole_batch(negatives: bool = True) -> CaptionBatch:
    """Return the 8 pairs of all ranks; four of them have a hard negative."""
    batch = make_batch(slice(0, PAIRS))
    if not negatives:
        return batch
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 49, (len(WITH_NEGATIVE), 9), generator=generator)
    tokens[:, -1] = 49  # end of text
    texts = [f"not {row}" if row in WITH_NEGATIVE else "" for row in range(PAIRS)]
    return batch._replace(negatives=texts, negative_tokens=tokens)


def rank_batch(rows: slice, negatives: bool) -> CaptionBatch:
    """Return some of the pairs."""
    if rows.start == rows.stop:
        return CaptionBatch(make_batch(rows).images, torch.zeros(0, 1, dtype=torch.long), [])
    return whole_batch(negatives)._rows(rows)


def all_inputs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, negative: Tensor | None) -> Inputs:
    same = torch.eye(PAIRS, dtype=torch.bool)
    for i, j in DUPLICATES:
        same[i, j] = same[j, i] = True
    return Inputs(image, text, scale, bias, negative, same, list(make_batch(slice(0, PAIRS)).captions))


def save_teacher(folder: Path) -> str:
    """Save a checkpoint of a model with another image size, context length and feature size than the students."""
    config = CLIPConfig(
        embed_dim=24,
        image=VisionTransformerConfig(image_size=48, patch_size=16, width=64, layers=1, heads=1),
        text=TextTransformerConfig(context_length=20, width=64, layers=1, heads=1),
    )
    save(CLIP(config), folder / "teacher.ckpt", {})
    return str(folder / "teacher.ckpt")


class Setup(NamedTuple):
    """What all cases share, in float64: two modules with the same weights, of which DDP wraps one, and a teacher."""

    module: LitCLIP
    dense: LitCLIP
    teacher: Teacher

    @classmethod
    def of(cls, teacher: str) -> "Setup":
        preservation.load_kept = kept_pairs  # in this process of a rank
        found = Teacher(load_model(teacher))
        found.model.double()
        module = make_module(architecture=CONFIG_WITH_BIAS, micro_batch_size=3)
        assert module.model.logit_bias is not None
        module.model.logit_bias.data.fill_(-2)
        dense = copy.deepcopy(module)
        dense.model.normalize = module.model.normalize
        return cls(module, dense, found)

    def loss(self, case: Case) -> Loss:
        """Return the loss, ready to be used."""
        loss = case.make("teacher").double()
        for module in loss.modules():
            if isinstance(module, Distillation):
                module.loaded = self.teacher
        loss.prepare(self.dense.model)
        for each in loss.modules():
            if isinstance(each, Distillation):
                shaken(each.maps)
        return of_another_model(loss).double()

    def give(self, module: LitCLIP, case: Case) -> LitCLIP:
        """Give a module a case's loss, and no gradients."""
        module.loss = self.loss(case)
        module.loss.prepare(module.model)
        of_another_model(module.loss)
        module.zero_grad()
        return module


def error(ours: Tensor | None, expected: Tensor | None) -> float:
    """Return the relative error; a missing gradient is a zero."""
    if expected is None:
        return 0.0 if ours is None else float(ours.norm())
    assert ours is not None
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-12))


def mean_over_ranks(value: Tensor | None) -> Tensor | None:
    total = torch.zeros((), dtype=torch.float64) if value is None else value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def rows_of(counts: tuple[int, ...]) -> distributed.RankCounts:
    """Return how the hard negatives are spread if the pairs are spread like this."""
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    negatives = [sum(start <= i < start + n for i in WITH_NEGATIVE) for start, n in zip(starts, counts, strict=True)]
    return distributed.RankCounts(dist.get_rank(), tuple(negatives))


def given_features() -> tuple[list[Tensor], list[Tensor]]:
    """Return all images', texts' and hard negatives' features, and the scale and the bias."""
    generator = torch.Generator().manual_seed(5)
    whole = [unit(torch.randn(n, 16, generator=generator).double()) for n in (PAIRS, PAIRS, len(WITH_NEGATIVE))]
    return whole, [torch.tensor(x, dtype=torch.float64) for x in (9.0, -2.0)]


def loop_of_features(setup: Setup, case: Case) -> list[Tensor | None]:
    """Return the value of the plain loop and its gradients."""
    whole, numbers = given_features()
    theirs, own = [x.requires_grad_() for x in (*whole, *numbers)], setup.loss(case)
    image, text, negative, *expected_numbers = theirs
    inputs = all_inputs(image, text, *expected_numbers, negative if case.negatives else None)
    expected = case.loop(inputs, own, setup.teacher)
    expected.backward()
    return [expected.detach(), *(x.grad for x in (*theirs, *own.parameters()))]


def of_features(setup: Setup, case: Case, counts: tuple[int, ...]) -> list[Tensor | None]:
    """Return the value and the gradients, given features."""
    ranks, hard = distributed.RankCounts(dist.get_rank(), counts), rows_of(counts)
    whole, numbers = given_features()
    layouts = (ranks, ranks, hard)
    leaves = [x[each.mine].clone().requires_grad_() for x, each in zip(whole, layouts, strict=True)]
    scale, bias = (x.clone().requires_grad_() for x in numbers)
    batch, loss = rank_batch(ranks.mine, case.negatives), setup.loss(case)
    parts = batch.split(2) if len(batch.images) else whole_batch().split(8)[:1]  # in place of a placeholder
    negatives = HardNegatives(leaves[2], hard) if case.negatives else None
    value = evaluate_loss(loss, Pairs(*leaves[:2], scale, bias, ranks, batch, parts, 0, negatives)).loss
    value.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad / ranks.world for x in leaves]
    ours = [mean_over_ranks(value), *(gather_rows(x, each) for x, each in zip(grads, layouts, strict=True))]
    return [*ours, *(mean_over_ranks(x.grad) for x in (scale, bias, *loss.parameters()))]


def of_step(setup: Setup, case: Case, counts: tuple[int, ...]) -> float:
    """Return the largest error of the value and of every parameter's gradient after a DDP step with micro-batches."""
    ranks = distributed.RankCounts(dist.get_rank(), counts)
    ours = setup.give(setup.module, case)
    step = DistributedDataParallel(_Step(ours))  # a name: it sums nothing once it is gone
    value = step(rank_batch(ranks.mine, case.negatives))
    value.backward()
    mean = mean_over_ranks(value)
    if dist.get_rank():
        return 0.0
    dense, batch = setup.give(setup.dense, case), whole_batch(case.negatives)
    model = dense.model
    image, text = encode_pairs(model, batch)
    hard = None if batch.negative_tokens is None else model.encode_text(batch.negative_tokens, normalize=True)
    assert model.logit_bias is not None
    assert dense.loss is not None
    inputs = all_inputs(image, text, model.logit_scale.exp(), model.logit_bias, hard)
    expected = case.loop(inputs, dense.loss, setup.teacher)
    expected.backward()
    errors = [error(mean, expected.detach())]
    for (name, mine), theirs in zip(ours.named_parameters(), dense.parameters(), strict=True):
        assert mine.grad is not None, f"DDP needs a gradient of {name}"
        errors.append(error(mine.grad, theirs.grad))
    return max(errors)


def losses(output: str, teacher: str, *parts: str) -> None:
    """Write the largest relative error of each case as JSON.

    Given ``features``, and of a ``step`` with the model: of ``each`` case, or of those with parts of their ``own``.
    """
    setup, errors = Setup.of(teacher), {}
    tiled.TILE, weighted.LOGITS = (2, 3), 32
    for name, case in CASES.items():
        if "features" in parts:
            found = {counts: of_features(setup, case, counts) for counts in COUNTS[dist.get_world_size()]}
            expected = loop_of_features(setup, case) if dist.get_rank() == 0 else []
            for counts, ours in found.items():
                differences = [error(*both) for both in zip(ours, expected, strict=not dist.get_rank())]
                errors[f"{name}, features, {counts}"] = max(differences, default=0.0)
        if "each step" in parts or ("own step" in parts and name not in PARTS_ELSEWHERE):
            errors[f"{name}, step"] = of_step(setup, case, COUNTS[dist.get_world_size()][0])
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(errors), encoding="utf-8")


class Collectives(TorchDispatchMode):
    """Record the names of the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::").strip("_"))
        return func(*args, **(kwargs or {}))


def collectives(output: str) -> None:
    """Write the collectives of a loss and its backward pass as JSON, by its name and the pairs of each rank."""
    found: dict[str, list[str]] = {}
    for counts in ((4, 4), (5, 3)):
        ranks, hard = distributed.RankCounts(dist.get_rank(), counts), rows_of(counts)
        number = ranks.counts[ranks.rank]
        image, text = (unit(torch.randn(number, 16)).requires_grad_() for _ in range(2))
        scale, bias = torch.tensor(9.0), torch.tensor(-2.0)
        negatives = HardNegatives(unit(torch.randn(hard.counts[hard.rank], 16)).requires_grad_(), hard)
        for each in POLICIES:
            layout = PairLayout(ranks, torch.arange(number)[:, None], each)  # pyright: ignore[reportArgumentType]
            for hard_ones in (None, negatives):
                with Collectives() as seen:
                    sharded_contrastive_loss(image, text, scale, layout, hard_ones).loss.backward()
                found[f"softmax {each}{', hard negatives' * bool(hard_ones)}, {counts}"] = seen.names
            with Collectives() as seen:
                sharded_sigmoid_loss(image, text, scale, bias, layout).loss.backward()
            found[f"sigmoid {each}, {counts}"] = seen.names
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    serve(globals())
