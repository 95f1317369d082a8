"""The equalities of the CPU tests on a GPU, in the precisions used for training, and a step with each loss."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_clip.distributed import RankCounts
from lit_clip.losses.contrastive import Duplicates, contrastive_loss, sigmoid_loss, unit
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss, sharded_sigmoid_loss
from lit_clip.module import LitCLIP
from lit_clip.training import preservation
from lit_clip.training.teacher import Distillation
from tests.cuda.devices import CUDA, OTHERS
from tests.helpers import pretended
from tests.helpers.ranks import CONFIG, PAIRS, make_batch
from tests.helpers.ranks_losses import CASES, PARTS_ELSEWHERE, Case, Setup, kept_pairs, save_teacher, whole_batch
from tests.helpers.waits import place


@CUDA
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignored"])
def test_the_tiled_loss_on_the_gpu_equals_the_definition_on_the_cpu(kind: str, duplicates: Duplicates) -> None:
    """Without TF32: gradients are within 1e-4 of float64's, relative to their norm."""
    generator = torch.Generator().manual_seed(0)
    pairs, ids = 700, torch.arange(700)[:, None] // 2
    raw = [torch.randn(pairs, 64, generator=generator) for _ in range(2)]

    def gradients(device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (*raw, torch.tensor(3.0), torch.tensor(-5.0))]
        image, text, scale, bias = unit(inputs[0]), unit(inputs[1]), inputs[2].exp(), inputs[3]
        plan = PairLayout(RankCounts(0, (pairs,)), ids.to(device), duplicates, tile=(128, 256))
        same = (ids[:, None] == ids[None]).any(dim=-1)
        if kind == "softmax":
            dense = device == "cpu" and contrastive_loss(image, text, image, text, scale, 0, same, duplicates)
            loss = dense if device == "cpu" else sharded_contrastive_loss(image, text, scale, plan).loss
        else:
            dense = device == "cpu" and sigmoid_loss(image, text, scale, bias, 0, same, duplicates)
            loss = dense if device == "cpu" else sharded_sigmoid_loss(image, text, scale, bias, plan).loss
        assert isinstance(loss, Tensor)
        loss.backward()
        return [loss.detach().cpu(), *(x.grad.cpu() for x in inputs if x.grad is not None)]

    for ours, exact in zip(gradients("cuda", torch.float32), gradients("cpu", torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= 1e-4 * exact.norm()


@CUDA
@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_micro_batches_on_the_gpu_give_the_gradient_of_the_whole_batch(
    precision: torch.dtype | None, tolerance: float
) -> None:
    """Half precision rounds both; the tolerance is the whole batch's own error against float32."""

    def gradients(size: int | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = LitCLIP(CONFIG, micro_batch_size=size).cuda()
        logged: Any = module
        logged.log = lambda *_, **__: None  # there is no trainer
        batch = make_batch(slice(0, PAIRS))
        batch = batch._replace(images=batch.images.cuda(), tokens=batch.tokens.cuda())
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = module.training_step(batch, 0)
        loss.backward()
        return {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}

    exact, micro_batched = gradients(None, None), gradients(3, precision)
    for name, expected in exact.items():
        if not name.endswith("in_proj_bias"):  # a third of it is zero up to rounding
            assert (micro_batched[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preservation, "load_kept", kept_pairs)
        setup = Setup.of(save_teacher(tmp_path_factory.mktemp("teacher")))
        setup.module.hparams["micro_batch_size"] = PAIRS // 2  # each operator of the pretended device takes long
        yield setup


EACH_CASE = [
    pytest.param(case, marks=[pytest.mark.slow] * (case in PARTS_ELSEWHERE or "Matryoshka of Sum with" in case))
    for case in CASES
]


def step(module: LitCLIP, device: str, negatives: bool) -> dict[str, Tensor]:
    """Return the loss of a step and its gradients."""
    loss = module.to(device).training_step(whole_batch(negatives).to(device), 0)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}


def module_of(setup: Setup, case: Case) -> LitCLIP:
    """Return a module of its own, as one is moved to another device."""
    module = copy.deepcopy(setup.dense)
    module.model.normalize = setup.dense.model.normalize
    return setup.give(module, case)


@pytest.mark.parametrize("device", OTHERS)
@pytest.mark.parametrize("case", EACH_CASE)
def test_a_step_with_each_loss_is_the_one_on_the_cpu_and_waits_for_nothing(
    case: str, device: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64; waits are counted on the pretended device."""
    exact = step(module_of(setup, CASES[case]), "cpu", CASES[case].negatives)
    module, waits = module_of(setup, CASES[case]).to(device), []
    setup.teacher.model.to(device)  # otherwise the first step moves it
    monkeypatch.setattr(pretended, "watchers", [lambda what: waits.append((what, place()))])
    ours = step(module, device, CASES[case].negatives)
    monkeypatch.setattr(pretended, "watchers", [])
    assert [wait for wait in waits if wait[1]] == []
    distils = any(isinstance(part, Distillation) for part in module.loss.modules())
    tolerance = (
        0.01 if distils else 1e-6
    )  # bytes of an image that a teacher gets smaller or larger are rounded elsewhere
    for name, expected in exact.items():
        assert (ours[name].cpu() - expected).norm() <= tolerance * expected.norm() + 1e-9, name
