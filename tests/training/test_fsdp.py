"""FSDP in real processes: the numbers of DDP, in shards, with checkpoints that either can go on from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks import EMA, ZeroShot
from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.training.fsdp import FSDP
from tests.conftest import ROOT, run_lightning_ranks

SCRIPT = str(ROOT / "tests/helpers/ranks_scale.py")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"trainer": {"gradient_clip_val": 0.05, "precision": "bf16-mixed"}},
    "recomputed": {"checkpointed": True, "freeze": {"image": "all"}},
    "micro_batches": {"micro_batch_size": 2, "checkpointed": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of eight pairs' training: ``<case>_<strategy>.ckpt``."""
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
    alone = {"output": str(folder / "plain_auto.ckpt"), "strategy": "auto"}
    run_lightning_ranks(1, folder, SCRIPT, "train_all", json.dumps([alone]))
    return folder


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_training(ours: Path, theirs: Path, tolerance: float) -> None:
    """Weights, and the optimiser's moments and groups."""
    a, b = loaded(ours), loaded(theirs)
    assert a["global_step"] == b["global_step"]
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=tolerance)
    a, b = (checkpoint["optimizer_states"][0] for checkpoint in (a, b))
    keys = ("name", "params", "weight_decay", "lr", "initial_lr", "betas")
    for group, other in zip(a["param_groups"], b["param_groups"], strict=True):
        assert [group[key] for key in keys] == [other[key] for key in keys]
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        # Squares of gradients are above 1 here: float32 has 1.2e-7 of such a number, a mean over processes rounds some.
        torch.testing.assert_close(state, b["state"][number], rtol=tolerance, atol=tolerance)


def test_two_shards_train_as_one_process_does(runs: Path) -> None:
    """Weight decay too, which a shard's shape does not tell."""
    assert_same_training(runs / "plain_fsdp.ckpt", runs / "plain_auto.ckpt", 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_ddp_does(runs: Path, case: str) -> None:
    assert_same_training(runs / f"{case}_fsdp.ckpt", runs / f"{case}_ddp.ckpt", 1e-6)


def test_each_goes_on_from_the_others_checkpoint(runs: Path) -> None:
    assert loaded(runs / "resumed_ddp.ckpt")["global_step"] == 6
    assert_same_training(runs / "resumed_fsdp.ckpt", runs / "resumed_ddp.ckpt", 1e-6)


def test_a_checkpoint_of_shards_is_a_model_like_any_other(runs: Path) -> None:
    state = loaded(runs / "plain_fsdp.ckpt")["state_dict"]
    torch.testing.assert_close(dict(load_model(runs / "plain_fsdp.ckpt").state_dict()), dict(state))


def test_torchs_fsdp_takes_no_scalars() -> None:
    """Why the temperature is left out of the shards and averaged apart; this fails when torch comes to take it."""
    from torch.distributed.fsdp import _init_utils

    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="scalar"):
        _init_utils._verify_managed_params(module, [module.scale])


@pytest.mark.slow
def test_four_shards_train_as_one_process_does(runs: Path) -> None:
    job = {"output": str(runs / "four.ckpt"), "strategy": "fsdp"}
    run_lightning_ranks(4, runs, SCRIPT, "train_all", json.dumps([job]))
    assert_same_training(runs / "four.ckpt", runs / "plain_auto.ckpt", 1e-5)


@pytest.mark.parametrize("callback", [EMA(), ZeroShot({})], ids=["EMA", "ZeroShot"])
def test_callbacks_that_need_whole_weights_are_refused_by_name(callback: Any) -> None:
    with pytest.raises(InputError, match=type(callback).__name__):
        FSDP()._check(SimpleNamespace(callbacks=[callback]))
