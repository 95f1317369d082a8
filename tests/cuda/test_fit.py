"""``Trainer.fit`` on a GPU in bfloat16: as in float32 on the CPU, without waits, and with strategies of one rank."""

import socket
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import (
    EMA,
    ActivationCheckpointing,
    Compile,
    EmbeddingProjector,
    LinearProbe,
    NonFiniteSteps,
    PatchDropout,
    Retrieval,
    SimilarityMatrix,
    Throughput,
    TrainingMonitor,
    ZeroShot,
    ZeroShotSegmentation,
    defaults,
)
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.evaluation import probe
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.cuda.devices import CUDA, DEVICES, OTHERS, REAL
from tests.helpers.miniature_masks import write_ade
from tests.helpers.ranks import CONFIG, PAIRS, make_batch
from tests.helpers.small_sets import captions_entry, data_for, entry, make_trainer, numbers, write_suite, write_table
from tests.helpers.small_sets import make_module as make_small_module

STEPS = 4
BROKEN = 2


class Batches(Dataset[CaptionBatch]):
    """One batch with the lengths of its texts, in every step."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> CaptionBatch:
        batch = make_batch(slice(0, PAIRS))
        return batch._replace(lengths=CLIPTokenizer().lengths(batch.tokens).tolist())


class Watched(Callback):
    """Keep the losses, and all weights at the start of each step and at the end."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []

    def _keep(self, module: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._keep(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.weights:
            self._keep(pl_module)

    def numbers(self) -> Tensor:
        return torch.stack(self.losses).cpu()


def fit(device: str, *own: Callback, model: dict[str, Any] | None = None, **options: Any) -> Watched:
    """Train for ``STEPS`` steps in bfloat16, and return what was seen."""
    torch.manual_seed(0)
    # With a smaller eps, AdamW would amplify the rounding of gradients that are zero.
    optimizer, schedule = partial(PaperAdamW, lr=1e-2, eps=1e-2), partial(WarmupCosine, warmup_steps=1)
    module = LitCLIP(CONFIG, optimizer=optimizer, lr_scheduler=schedule, **(model or {}))
    module.model._tokenizer = CLIPTokenizer(16)  # only its padding id is read
    watched = Watched()
    settings = {
        "accelerator": device,
        "precision": "bf16-mixed",
        "devices": 1,
        "max_steps": STEPS,
        "callbacks": defaults(watched, *own),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 100,
        **options,
    }
    Trainer(**settings).fit(module, DataLoader(Batches(), batch_size=None))
    return watched


def assert_trained_alike(ours: Watched, theirs: Watched) -> None:
    """Compare the losses, and how far the weights moved and whereto; on a CPU the differences are 3 %."""
    torch.testing.assert_close(ours.numbers(), theirs.numbers(), rtol=0.06, atol=0)
    moved, expected = (run.weights[-1].cpu() - run.weights[0].cpu() for run in (ours, theirs))
    assert expected.norm() > 0
    assert (moved - expected).norm() <= 0.1 * expected.norm()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"own": [Compile]},
    "micro-batches": {"model": {"micro_batch_size": 5}},
    "EMA": {"own": [partial(EMA, 0.5)]},
}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Watched]:
    """Train the whole batch with some callbacks on the CPU in float32; once for the devices and cases."""
    options = {"precision": "32-true", "default_root_dir": tmp_path_factory.mktemp("exact")}
    return cache(lambda *own: fit("cpu", *(one() for one in own), **options))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]])
@pytest.mark.parametrize("case", CASES)
def test_training_in_bfloat16_follows_that_in_float32(
    case: str, device: str, tmp_path: Path, exact: Callable[..., Watched]
) -> None:
    own, options = CASES[case].get("own", []), {"model": CASES[case].get("model"), "default_root_dir": tmp_path}
    if device != "cuda" and case == "compiled":
        pytest.skip("compiling takes half a minute on a CPU; tests/callbacks/test_compile.py has a slow test")
    expected = exact(*(one for one in own if one is not Compile))
    assert_trained_alike(fit(device, *(one() for one in own), **options), expected)


class BreakGradient(Callback):
    """Make the gradients of one step NaN."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == BROKEN:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_not_finite_changes_no_weight(device: str, tmp_path: Path) -> None:
    watched = fit(device, BreakGradient(), NonFiniteSteps("skip"), default_root_dir=tmp_path)
    weights = [each.cpu() for each in watched.weights]  # Lightning has moved the last ones there
    same = [torch.equal(one, other) for one, other in pairwise(weights)]
    assert same == [step == BROKEN for step in range(STEPS)]
    assert watched.weights[-1].isfinite().all()


class RefuseWaits(Callback):
    """Make waiting for the device an error in and between the steps after the first."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.parametrize("case", CASES)
def test_steps_that_are_not_logged_do_not_wait_for_the_device(case: str, tmp_path: Path) -> None:
    own, options = CASES[case].get("own", []), {"model": CASES[case].get("model"), "default_root_dir": tmp_path}
    assert len(fit("cuda", *(one() for one in own), RefuseWaits(), **options).losses) == STEPS


@pytest.fixture
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A free port for a process group, which is destroyed at the end."""
    monkeypatch.setattr(distributed, "_host_group", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("device", REAL)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_trains_as_one_device(strategy: str, device: str, tmp_path: Path) -> None:
    """Over NCCL on a GPU, over gloo on a CPU."""
    options = {"precision": "32-true", "default_root_dir": tmp_path}
    one = fit(device, **options)
    other = fit(device, strategy=FSDP() if strategy == "fsdp" else "ddp", **options)
    assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
    torch.testing.assert_close(other.numbers(), one.numbers(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", OTHERS)
def test_callbacks_run_on_the_device(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a validation, a checkpoint and a resumed step; their values are tested on the CPU."""
    monkeypatch.setattr(probe, "L2_GRID", (1e-2, 1.0, 1e2))  # the search takes the same path with 3 of 97 penalties
    monkeypatch.setattr(probe, "FIRST_SPAN", 2)
    write_suite(
        tmp_path,
        shades=entry(splits={"train": {"split": "train", "size": 14}, "test": {"size": 7}}),
        captions=captions_entry(str(write_table(tmp_path, 8))),
    )
    write_ade(tmp_path / "ade")
    masks = {"images": "images/validation", "masks": "annotations/validation", "classes": "ade20k", "first": 1}
    data = {"class_path": "datamodules.evaluation.MaskedFiles", "init_args": {"root": "ade", "ignored": [0], **masks}}
    places = {"ade": {"data": data, "metric": "miou", "templates": ["a {} patch."]}}
    (tmp_path / "places.yaml").write_text(yaml.safe_dump({"sets": places}), encoding="utf-8")
    suite, root = str(tmp_path / "suite.yaml"), str(tmp_path)

    def run(steps: int, **options: Any) -> dict[str, float]:
        of_suite = [kind(suite, root) for kind in (LinearProbe, Retrieval)]
        others = [TrainingMonitor(), Throughput(), SimilarityMatrix(), EmbeddingProjector(), ActivationCheckpointing()]
        segmentation = ZeroShotSegmentation(str(tmp_path / "places.yaml"), root)
        used = defaults(
            EMA(0.5), PatchDropout(0.5), *others, *of_suite, segmentation, ZeroShot(suite=suite, data_root=root)
        )
        settings = {"accelerator": device, "logger": TensorBoardLogger(tmp_path), "log_every_n_steps": 1}
        trainer, module = make_trainer(tmp_path, used, max_steps=steps, **settings), make_small_module()
        trainer.fit(module, data_for(module, tmp_path / "captions.csv"), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return numbers(trainer, "")

    found = run(2)
    run(3, ckpt_path=tmp_path / "last.ckpt")
    assert {name.partition("/")[0] for name in found} >= {"train", "val", "zero_shot", "linear_probe", "segmentation"}
