"""FSDP in real processes: trains as DDP does, and each resumes from the other's checkpoints."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm import optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from callbacks import EMA, ZeroShot
from lit_clip import load_model
from lit_clip.commands.wise_ft import save
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import text_sha256
from lit_clip.training.lightning.fsdp import _check, whole_weights
from lit_clip.training.optimizers import EXCEPT_GAINS_AND_BIASES, Optimization, PaperAdamW, is_elementwise
from lit_clip.training.schedules import WarmupCosine
from tests.conftest import ROOT, TINY_YAML, run_lightning_ranks
from tests.helpers.ranks_scale import TINY
from tests.helpers.small_sets import write_table

SCRIPT = str(ROOT / "tests/helpers/ranks_scale.py")
TAKEN = r"rank (\d) takes (\d+) and (\d+) KiB"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"trainer": {"gradient_clip_val": 0.05, "precision": "bf16-mixed"}},
    "recomputed": {"checkpointed": True, "freeze": {"image": "all"}, "own_loss": True},
    "micro_batches": {"micro_batch_size": 2, "checkpointed": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a checkpoint of every case, trained on eight pairs: ``<case>_<strategy>.ckpt``."""
    folder = tmp_path_factory.mktemp("fsdp")
    strategies = ("ddp", "fsdp")
    jobs = [
        {"output": str(folder / f"{case}_{strategy}.ckpt"), "strategy": strategy, **options}
        for case, options in CASES.items()
        for strategy in strategies
    ]
    jobs += [
        {
            "output": str(folder / f"resumed_{strategy}.ckpt"),
            "strategy": strategy,
            "resume": str(folder / f"plain_{other}.ckpt"),
            "trainer": {"max_epochs": 2},
        }
        for strategy, other in zip(strategies, reversed(strategies), strict=True)
    ]
    run_lightning_ranks(2, folder, SCRIPT, "train_all", json.dumps(jobs), timeout=200)
    single = {"output": str(folder / "plain_auto.ckpt"), "strategy": "auto"}
    run_lightning_ranks(1, folder, SCRIPT, "train_all", json.dumps([single]))
    return folder


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_training(ours: Path, theirs: Path, tolerance: float) -> None:
    """Compare two checkpoints' weights, optimiser moments and parameter groups."""
    a, b = loaded(ours), loaded(theirs)
    assert a["global_step"] == b["global_step"]
    # To the last bit of a weight: on some processors it differs, as the norm of shards is summed in another order.
    for weights in ("state_dict", "loss"):
        torch.testing.assert_close(a.get(weights), b.get(weights), rtol=torch.finfo().eps, atol=tolerance)
    a, b = (checkpoint["optimizer_states"][0] for checkpoint in (a, b))
    keys = ("name", "params", "weight_decay", "lr", "initial_lr", "betas")
    for group, other in zip(a["param_groups"], b["param_groups"], strict=True):
        assert [group[key] for key in keys] == [other[key] for key in keys]
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        # Gradients exceed 1 here, where float32 resolves 1.2e-7 and the mean over processes rounds; squares double
        # that, and the optimiser takes their roots.
        torch.testing.assert_close(rooted(state), rooted(b["state"][number]), rtol=tolerance, atol=tolerance)


def rooted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.sqrt() if name == "exp_avg_sq" else value for name, value in state.items()}


def test_two_shards_train_as_one_process_does(runs: Path) -> None:
    """Including weight decay: the shape of a shard does not tell weights from biases."""
    assert_same_training(runs / "plain_fsdp.ckpt", runs / "plain_auto.ckpt", 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_ddp_does(runs: Path, case: str) -> None:
    assert_same_training(runs / f"{case}_fsdp.ckpt", runs / f"{case}_ddp.ckpt", 1e-8)


def test_fsdp_and_ddp_resume_from_each_others_checkpoint(runs: Path) -> None:
    assert loaded(runs / "resumed_ddp.ckpt")["global_step"] == 6
    assert_same_training(runs / "resumed_fsdp.ckpt", runs / "resumed_ddp.ckpt", 1e-6)


def test_load_model_opens_an_fsdp_checkpoint(runs: Path) -> None:
    state = loaded(runs / "plain_fsdp.ckpt")["state_dict"]
    torch.testing.assert_close(dict(load_model(runs / "plain_fsdp.ckpt").state_dict()), dict(state))


WATCHED = """
import os
from lit_clip import LitCLIP

class Watched(LitCLIP):
    def on_fit_start(self):
        super().on_fit_start()
        with open(f"norm_{os.environ['RANK']}", "w") as file:
            file.write(self.created)

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.created = str(float(self.model.visual.proj.norm()))
"""


@pytest.mark.parametrize(
    ("options", "drawing"), [([], 1), pytest.param(["--validate_first", "true"], 2, marks=pytest.mark.slow)]
)
def test_the_first_rank_alone_draws_the_weights_and_the_others_go_on_as_if_they_had(
    options: list[str], drawing: int, tmp_path: Path, caption_table: Path
) -> None:
    """Patches are dropped at random; a validation before training needs weights on every rank."""
    data = {"train": str(caption_table), "val": str(caption_table), "batch_size": 8, "num_workers": 0}
    trainer = {"accelerator": "cpu", "devices": 2, "max_steps": 2, "logger": False, "limit_val_batches": 1}
    words = ["fit", "--config", "run.yaml", "--model", "watched.Watched", "--model.architecture", TINY_YAML, *options]
    words += ["--model.lr_scheduler.warmup_steps", "0"]
    states = []
    for strategy in ("ddp", {"class_path": "lit_clip.training.lightning.fsdp.FSDP"}):
        folder = tmp_path / ("ddp" if strategy == "ddp" else "fsdp")
        folder.mkdir()
        (folder / "watched.py").write_text(WATCHED)
        trainer |= {"strategy": strategy, "callbacks": [{"class_path": "callbacks.PatchDropout"}]}
        settings = {"data": {"class_path": "datamodules.Captions", "init_args": data}, "trainer": trainer}
        (folder / "run.yaml").write_text(json.dumps(settings))
        run_lightning_ranks(2, folder, "lit-clip", *words)
        norms = [float((folder / f"norm_{rank}").read_text()) for rank in (0, 1)]
        assert norms[0] > 0
        assert norms[1] == (norms[0] if strategy == "ddp" or drawing == 2 else 0)
        (path,) = folder.rglob("*.ckpt")
        states.append(dict(load_model(path).state_dict()))
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)


def test_ranks_but_the_first_never_hold_a_whole_model(tmp_path: Path) -> None:
    """Of 150 MiB: the second rank takes its half and one of twelve blocks, and what a process group needs."""
    output = run_lightning_ranks(2, tmp_path, SCRIPT, "start", "512")
    taken = {rank: [int(each) / 1024 for each in numbers] for rank, *numbers in re.findall(TAKEN, output)}
    (drawn, whole), (empty, most) = taken["0"], taken["1"]
    assert drawn > 130
    assert empty < 40
    assert most < whole - 50


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "hybrid"])
def test_four_ranks_train_as_one_process_does(runs: Path, strategy: str) -> None:
    """In four shards, or in two copies of two shards each."""
    job = {"output": str(runs / "four.ckpt"), "strategy": strategy}
    run_lightning_ranks(4, runs, SCRIPT, "train_all", json.dumps([job]))
    assert_same_training(runs / "four.ckpt", runs / "plain_auto.ckpt", 1e-5)


@pytest.mark.slow
def test_a_lora_of_all_layers_trains_as_ddp_does(tmp_path: Path) -> None:
    """Of attention's fused weight, too, to which peft adds for the duration of a forward pass."""
    script, table = str(ROOT / "tests/helpers/ranks_scale.py"), str(write_table(tmp_path, 4))
    save(CLIP(TINY), tmp_path / "start.ckpt", {})
    for strategy in ("fsdp", "ddp"):
        run_lightning_ranks(2, tmp_path, script, "shard", strategy, table, strategy, "2", "start.ckpt")
    assert_same_training(tmp_path / "fsdp.ckpt", tmp_path / "ddp.ckpt", 1e-8)


def fit(callbacks: Any = (), optimizer: Any = PaperAdamW, scaler: Any = None) -> Any:
    """Return the parts of a trainer that FSDP looks at before it shards."""
    optimization = Optimization(optimizer, WarmupCosine, EXCEPT_GAINS_AND_BIASES)
    module, precision = SimpleNamespace(optimization=optimization), SimpleNamespace(scaler=scaler)
    return SimpleNamespace(callbacks=callbacks, lightning_module=module, precision_plugin=precision)


def test_an_average_of_weights_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="^trainer.strategy: FSDP has no whole weights for EMA to average; use ddp$"):
        _check(fit([ZeroShot({}), EMA()]))


def test_weights_that_are_gathered_for_callbacks_stay_whole_for_a_state_dict(tmp_path: Path) -> None:
    model = CLIP(TINY)
    expected, text = {name: value.clone() for name, value in model.state_dict().items()}, text_sha256(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ignored = {each for each in model.parameters() if each.ndim == 0}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=ignored)
        with whole_weights(model):
            torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
            assert text_sha256(model) == text
            assert not any(isinstance(each, DTensor) for each in model.parameters())
        assert all(isinstance(each, DTensor) or each in ignored for each in model.parameters())
        assert any(isinstance(each, DTensor) for each in model.state_dict().values())
    finally:
        dist.destroy_process_group()


def test_gradients_scaled_for_float16_are_refused() -> None:
    with pytest.raises(InputError, match="^trainer.precision: 16-mixed scales gradients, .*; use bf16-mixed, or"):
        _check(fit(scaler=torch.amp.GradScaler("cpu")))


TORCHS_MUON = [torch.optim.Muon] if hasattr(torch.optim, "Muon") else []  # since torch 2.9; refuses vectors


@pytest.mark.parametrize("optimizer", [optim.Muon, optim.Lamb, *TORCHS_MUON])
def test_optimisers_of_whole_matrices_are_refused_by_name(optimizer: Any) -> None:
    with pytest.raises(InputError, match=f"{optimizer.__name__} needs whole matrices; use ddp"):
        _check(fit(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", [PaperAdamW, torch.optim.SGD, torch.optim.RMSprop, optim.Lion])
def test_optimisers_of_single_numbers_are_not_refused(optimizer: Any) -> None:
    assert is_elementwise(optimizer)
    _check(fit(optimizer=optimizer))


def test_shards_validate_and_test_when_ranks_have_different_numbers_of_batches(tmp_path: Path) -> None:
    script, table = str(ROOT / "tests/helpers/ranks_scale.py"), str(write_table(tmp_path, 3))
    for strategy in ("fsdp", "ddp"):  # two batches of one pair, and one
        run_lightning_ranks(2, tmp_path, script, "shard", strategy, table, strategy, "1")
    sharded, plain = (torch.load(tmp_path / f"{strategy}.metrics") for strategy in ("fsdp", "ddp"))
    assert sharded == pytest.approx(plain, abs=1e-6)
