"""Sharded checkpoints in real processes: what they hold, who resumes from them, and a rank that cannot write."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils._pytree import tree_map

from lit_clip import LitCLIP, load_model
from lit_clip.errors import InputError
from lit_clip.tools.sharded_files import INDEX, is_sharded
from lit_clip.tools.weight_files import read_sharded
from lit_clip.training.lightning.checkpoint_io import _fingerprint, checkpoint_step, newest_checkpoint
from lit_clip.training.lightning.fsdp import FSDP, _check_saving
from tests.conftest import ROOT, run_lightning_ranks

SCRIPT = str(ROOT / "tests/helpers/ranks_scale.py")
STEPS = {"trainer": {"max_epochs": 2, "max_steps": 5}}
MIDDLE = "step=4.ckpt"  # within the second epoch


def job(folder: Path, name: str, strategy: str, resume: Path | None = None, saves: bool = False) -> dict[str, Any]:
    """Arguments of a training of five steps, which may save every second one and keep the last of them."""
    saver = {"dirpath": str(folder / name), "filename": "{step}", "every_n_train_steps": 2, "save_last": True}
    saver |= {"save_top_k": 1, "monitor": "step", "mode": "max"}
    values = {"output": str(folder / f"{name}.ckpt"), "strategy": strategy, "saver": saver if saves else None}
    return values | {"resume": resume and str(resume)} | STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs that saved shards and whole files, and of those resumed from both: ``<kind>_<strategy>``."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs = [job(folder, "shards", "sharded", saves=True), job(folder, "whole", "fsdp", saves=True)]
    strategies = {"sharded": ("shards",), "ddp": ("shards", "whole")}
    jobs += [
        job(folder, f"{kind}_{strategy}", strategy, folder / kind / MIDDLE)
        for strategy, kinds in strategies.items()
        for kind in kinds
    ]
    run_lightning_ranks(2, folder, SCRIPT, "train_all", json.dumps(jobs), timeout=200)
    jobs = [job(folder, f"{kind}_auto", "auto", folder / kind / MIDDLE) for kind in ("shards", "whole")]
    run_lightning_ranks(1, folder, SCRIPT, "train_all", json.dumps(jobs), timeout=100)
    return folder


def loaded(path: Path) -> dict[str, Any]:
    return read_sharded(path) if path.is_dir() else torch.load(path, weights_only=True)


def assert_same(ours: Path, theirs: Path) -> None:
    """Compare all that two checkpoints hold, to the last bit; not the folders in which their runs saved."""
    a, b = loaded(ours), loaded(theirs)
    assert list(a) == list(b)
    assert list(a["state_dict"]) == list(b["state_dict"])
    assert {**tree_map(digest, a), "callbacks": {}} == {**tree_map(digest, b), "callbacks": {}}


def digest(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, [*value.shape], sha256(value.numpy().tobytes()).hexdigest()


def test_shards_hold_what_the_whole_file_holds(runs: Path) -> None:
    index = json.loads((runs / "shards" / MIDDLE / INDEX).read_text())
    assert (index["world_size"], index["files"]) == (2, 2)
    assert {"state_dict/visual.proj", "optimizer_states/0/state/0/exp_avg"} < index["tensors"].keys()
    assert_same(runs / "shards" / MIDDLE, runs / "whole" / MIDDLE)


def test_a_run_resumed_from_shards_ends_as_the_one_that_never_stopped(runs: Path) -> None:
    assert_same(runs / "shards_sharded.ckpt", runs / "shards.ckpt")


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_others_resume_from_shards_as_from_the_whole_file(runs: Path, strategy: str) -> None:
    assert_same(runs / f"shards_{strategy}.ckpt", runs / f"whole_{strategy}.ckpt")
    states = [loaded(runs / name)["state_dict"] for name in (f"shards_{strategy}.ckpt", "shards.ckpt")]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_only_the_best_folders_stay_and_the_newest_is_found(runs: Path) -> None:
    assert sorted(os.listdir(runs / "shards")) == ["last.ckpt", MIDDLE]
    assert all(is_sharded(path) for path in (runs / "shards").iterdir())
    assert newest_checkpoint([runs / "shards"]) == runs / "shards/last.ckpt"
    assert checkpoint_step(runs / "shards" / MIDDLE) == 4


def test_a_damaged_folder_is_passed_over_by_name_and_is_no_copy_of_a_whole_one(runs: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "cut"):
        shutil.copytree(runs / "shards" / MIDDLE, tmp_path / f"{name}.ckpt")
    (tmp_path / "cut.ckpt/rank_1.safetensors").unlink()
    with pytest.warns(UserWarning, match="cut.ckpt: incomplete or damaged; .*two.ckpt is the newest complete"):
        assert newest_checkpoint([tmp_path]) == tmp_path / "two.ckpt"
    one, two, cut = (_fingerprint(tmp_path / f"{name}.ckpt") for name in ("one", "two", "cut"))
    assert one == two == ("step 4", one[1])
    assert cut == ("not one whole file", "")
    assert _fingerprint(runs / "shards/last.ckpt")[1] != one[1]


def test_files_of_two_ranks_that_were_exchanged_are_one_line_however_many_ranks_resume(
    runs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(runs / "shards" / MIDDLE, tmp_path / "exchanged.ckpt")
    one, two = folder / "rank_0.safetensors", folder / "rank_1.safetensors"
    one.rename(folder / "other")
    two.rename(one)
    (folder / "other").rename(two)
    for read in (read_sharded, load_model):
        with pytest.raises(InputError, match=rf"^{one}: holds the rows of file '1 of 2'; copy the whole folder"):
            read(folder)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"plugins": [AsyncCheckpointIO()]}, "every rank writes by itself, without AsyncCheckpointIO; leave out one"),
        ({"callbacks": [ModelCheckpoint("memory://a")]}, "cannot be written to memory://a; set ModelCheckpoint's"),
    ],
)
def test_what_cannot_be_written_in_shards_is_refused_before_training(options: dict[str, Any], line: str) -> None:
    run = Trainer(accelerator="cpu", strategy=FSDP(sharded_checkpoints=True), logger=False, **options)
    with pytest.raises(InputError, match=f"^trainer.strategy.sharded_checkpoints: {line}"):
        _check_saving(run)


def test_the_lines_of_the_guide_make_one_file_of_shards(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lines,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/many_gpus.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "last.ckpt").symlink_to(runs / "shards" / MIDDLE)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert_same(tmp_path / "whole.ckpt", runs / "whole" / MIDDLE)


@pytest.mark.parametrize("ranks", range(1, 6))
def test_a_rank_reads_the_rows_that_torch_will_give_it(ranks: int) -> None:
    for rows in range(12):
        whole = torch.arange(rows)
        expected = [part.tolist() for part in whole.chunk(ranks)] if rows else []
        expected += [[]] * (ranks - len(expected))
        for rank in range(2 * ranks):  # the second half on another machine
            strategy: Any = SimpleNamespace(_shards=ranks, global_rank=rank, _gets_weights=rank > 0)
            assert [*FSDP._my_rows(strategy, "optimizer_states/0/state/0/exp_avg", rows)] == expected[rank % ranks]
            assert FSDP._my_rows(strategy, "state_dict/visual.proj", rows) == range(0 if rank else rows)


def test_a_model_opens_from_shards(runs: Path) -> None:
    state = loaded(runs / "whole" / MIDDLE)["state_dict"]
    torch.testing.assert_close(dict(load_model(runs / "shards" / MIDDLE).state_dict()), state, rtol=0, atol=0)
    module = LitCLIP.load_from_checkpoint(runs / "shards" / MIDDLE)
    torch.testing.assert_close(dict(module.model.state_dict()), state, rtol=0, atol=0)


def test_a_rank_without_space_stops_all_ranks_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    output = run_lightning_ranks(2, tmp_path, SCRIPT, "save_twice", str(tmp_path), timeout=60)
    path = tmp_path / "new folder/last.ckpt"
    for rank in (0, 1):
        assert f"rank {rank} raises {path}: the checkpoint cannot be written (rank 1: " in output
    assert output.count("the previous one is kept") == 2
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    checkpoint = read_sharded(path)
    assert checkpoint["global_step"] == 1
    assert checkpoint["seen"] == (0, None)
    assert {name: (len(each), *each.unique().tolist()) for name, each in checkpoint["state_dict"].items()} == {
        "one": (1, 1.0),
        "many": (5, 1.0),
        "a/b~c": (4, 1.0),
    }
    moment = checkpoint["optimizer_states"][0]["state"][7]["exp_avg"]
    assert (moment.dtype, [*moment.shape]) == (torch.bfloat16, [5, 3])


@pytest.mark.slow
def test_copies_on_further_machines_write_nothing(runs: Path) -> None:
    jobs = [job(runs, f"four_{strategy}", strategy) for strategy in ("sharded_hybrid", "hybrid")]
    run_lightning_ranks(4, runs, SCRIPT, "train_all", json.dumps(jobs), timeout=200)
    folder = runs / "four_sharded_hybrid.ckpt"
    assert len(list(folder.glob("rank_*"))) == 2
    assert_same(folder, runs / "four_hybrid.ckpt")
    jobs = [job(runs, f"four_{strategy}", strategy, runs / "shards" / MIDDLE) for strategy in ("sharded", "fsdp")]
    run_lightning_ranks(4, runs, SCRIPT, "train_all", json.dumps(jobs), timeout=200)
    assert_same(runs / "four_sharded.ckpt", runs / "four_fsdp.ckpt")
