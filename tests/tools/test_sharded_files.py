"""Sharded checkpoints' folders: read as whole checkpoints, wholly or by rows, and checked before anything is used."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.tools.weight_files import read_mapped, read_sharded

MANY = 2**22
WEIGHT = torch.arange(15.0).view(5, 3)
MOMENT = torch.arange(4, dtype=torch.bfloat16)


class Runs:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def save_rank(folder: Path, number: int, tensors: dict[str, torch.Tensor], checkpoint: str = "one") -> None:
    """Write a rank's file, here by hand, with its place and the digest of each tensor."""
    digests = {name: sha256(each.view(torch.uint8).numpy().tobytes()).hexdigest() for name, each in tensors.items()}
    facts = {"checkpoint": checkpoint, "file": f"{number} of 2", **digests}
    save_file(tensors, folder / f"rank_{number}.safetensors", facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two files, written here by hand: five rows as three and two, and four as four and none."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    states = [{"state": {7: {"step": torch.tensor(2.0), "exp_avg": None}}}]
    rest = {"global_step": 2, "state_dict": {"a/b": None, "scale": torch.tensor(1.5)}, "optimizer_states": states}
    torch.save(rest, folder / "rest.pt")
    moment = "optimizer_states/0/state/7/exp_avg"
    save_rank(folder, 0, {"state_dict/a~1b": WEIGHT[:3], moment: MOMENT})
    save_rank(folder, 1, {"state_dict/a~1b": WEIGHT[3:].clone()})
    index = {
        "version": 1,
        "world_size": 2,
        "files": 2,
        "checkpoint": "one",
        "rest": sha256((folder / "rest.pt").read_bytes()).hexdigest(),
        "tensors": {
            "state_dict/a~1b": {"shape": [5, 3], "dtype": "float32", "rows": [3, 2]},
            moment: {"shape": [4], "dtype": "bfloat16", "rows": [4, 0]},
        },
    }
    (folder / "sharded_checkpoint.json").write_text(json.dumps(index))
    return folder


def test_a_folder_is_read_as_the_dictionary_of_a_file(folder: Path) -> None:
    checkpoint = read_sharded(folder)
    assert list(checkpoint) == ["global_step", "state_dict", "optimizer_states"]
    assert list(checkpoint["state_dict"]) == ["a/b", "scale"]
    assert checkpoint["global_step"] == 2
    moment = checkpoint["optimizer_states"][0]["state"][7]["exp_avg"]
    for tensor, expected in ((checkpoint["state_dict"]["a/b"], WEIGHT), (moment, MOMENT)):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [range(0), range(1, 4), range(3, 5), range(5)])
def test_only_the_wanted_rows_are_read(folder: Path, rows: range) -> None:
    weight = read_sharded(folder, lambda name, count: rows if name.startswith("state_dict") else range(0))
    expected = torch.zeros(5, 3)
    expected[list(rows)] = WEIGHT[list(rows)]
    torch.testing.assert_close(weight["state_dict"]["a/b"], expected, rtol=0, atol=0)


def changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Return what changes the index of a folder."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / "sharded_checkpoint.json").read_text())
        change(index)
        (folder / "sharded_checkpoint.json").write_text(json.dumps(index))

    return damage


def tensor(**values: Any) -> Callable[[Path], Any]:
    """Return what changes the description of a tensor in the index."""
    return changed(lambda index: index["tensors"]["state_dict/a~1b"].update(values))


def renamed(name: str) -> Callable[[Path], Any]:
    """Return what changes the path of a tensor in the index and in the files."""

    def damage(folder: Path) -> None:
        changed(lambda index: index["tensors"].update({name: index["tensors"].pop("state_dict/a~1b")}))(folder)

    return damage


def rest(**values: Any) -> Callable[[Path], Any]:
    """Return what changes the rest, and what the index says of it."""

    def damage(folder: Path) -> None:
        path = folder / "rest.pt"
        torch.save({**torch.load(path), **values}, path)
        changed(lambda index: index.update(rest=sha256(path.read_bytes()).hexdigest()))(folder)

    return damage


def cut(name: str) -> Callable[[Path], Any]:
    """Return what cuts the end of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 4)


def of_another(folder: Path) -> None:
    save_rank(folder, 1, {"state_dict/a~1b": WEIGHT[3:].clone()}, "two")


def exchanged(folder: Path) -> None:
    """Exchange the files of two ranks whose tensors have even rows, so that all shapes are those of the index."""
    for number, rows in enumerate((WEIGHT[:2], WEIGHT[2:4])):
        save_rank(folder, number, {"state_dict/a~1b": rows.clone()})
    (folder / FIRST).rename(folder / "other")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "other").rename(folder / SECOND)
    changed(lambda index: index["tensors"].pop("optimizer_states/0/state/7/exp_avg"))(folder)
    tensor(shape=[4, 3], rows=[2, 2])(folder)


def flipped(folder: Path) -> None:
    """Change a bit of a value."""
    content = bytearray((folder / SECOND).read_bytes())
    content[-1] ^= 1
    (folder / SECOND).write_bytes(content)


INDEX, FIRST, SECOND = "sharded_checkpoint.json", "rank_0.safetensors", "rank_1.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no second file": (lambda folder: (folder / SECOND).unlink(), f"{SECOND}: missing, or no file; copy the whole"),
    "no rest": (lambda folder: (folder / "rest.pt").unlink(), "rest.pt: missing, or no file; copy the whole folder"),
    "a pipe": (lambda folder: ((folder / FIRST).unlink(), os.mkfifo(folder / FIRST)), f"{FIRST}: missing, or no"),
    "an incomplete file": (cut(SECOND), f"{SECOND}: not a readable part of a sharded checkpoint"),
    "an incomplete rest": (cut("rest.pt"), "rest.pt: damaged, or of another checkpoint; copy the whole folder"),
    "a file of another checkpoint": (of_another, f"{SECOND}: of another checkpoint than {INDEX}; copy"),
    "exchanged files": (exchanged, f"{FIRST}: holds the rows of file '1 of 2'; copy the whole folder"),
    "a changed value": (flipped, f"{SECOND}: 'state_dict/a~1b': other values than were saved; copy the whole folder"),
    "no text": (lambda folder: (folder / INDEX).write_bytes(b"\xff{"), f"{INDEX}: not a readable part"),
    "nested": (lambda folder: (folder / INDEX).write_text("[" * 10**6), f"{INDEX}: must be a mapping"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX}: must be a mapping"),
    "huge": (lambda folder: os.truncate(folder / INDEX, 2**28), f"{INDEX}: larger than 134217728 bytes"),
    "later": (changed(lambda index: index.update(version=2)), f"{INDEX}: written by a later version of lit-clip"),
    "no number": (changed(lambda index: index.update(files="2")), f"{INDEX}: .*files.* must be a whole number"),
    "few files": (changed(lambda index: index.update(files=1)), f"{INDEX}: .*a~1b': has rows of 2 files"),
    "many files": (changed(lambda index: index.update(files=10**9)), f"{INDEX}: .* must be at most 65536"),
    "a gap": (tensor(rows=[2, 2]), rf"{INDEX}: \[2, 2\] are not the rows of \[5, 3\]"),
    "below 0": (tensor(rows=[-1, 6]), f"{INDEX}: .* must be at least 0"),
    "other rows": (tensor(rows=[2, 3]), rf"{FIRST}: .*float32 \[3, 3\], and by {INDEX} float32 \[2, 3\]"),
    "other columns": (tensor(shape=[5, 4]), rf"{FIRST}: .*\[3, 3\], and by {INDEX} float32 \[3, 4\]"),
    "another type": (tensor(dtype="float64"), rf"{FIRST}: .*float32 \[3, 3\], and by {INDEX} float64"),
    "no type": (tensor(dtype="load"), f"{INDEX}: 'load' is no type"),
    "more than memory": (tensor(shape=[2**50, 2**10], rows=[2**50, 0]), f"{INDEX}: not a readable part"),
    "a name elsewhere": (renamed("../../rank_0"), f"{INDEX}: not a readable part"),
    "a name of a value": (renamed("global_step"), f"{INDEX}: 'global_step': has a value in rest.pt, too"),
    "a tensor unknown": (
        changed(lambda index: index["tensors"].pop("state_dict/a~1b")),
        rf"{FIRST}: has not the tensors of {INDEX} \(\['state_dict/a~1b'\]\)",
    ),
    "an option unknown": (changed(lambda index: index.update(path="/etc")), f"{INDEX}: has no setting path"),
    "a program": (
        rest(callbacks=Runs()),
        "rest.pt: not a checkpoint of tensors and plain values.*nothing in it was run",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_folder_is_one_line(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, expected = DAMAGES[name]
    damage(folder)
    for read in (read_sharded, *([] if name == "a changed value" else [read_mapped]), load_model):  # which reads none
        with pytest.raises(InputError, match=f"^{folder}/{expected}") as raised:
            read(folder)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_an_index_is_no_checkpoint(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match=f"last.ckpt: is a folder without {INDEX}; name a file"):
        read_mapped(folder)
    run = folder.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("last", "best"):
        (run / "checkpoints" / f"{name}.ckpt").touch()
    for path in (run, run / "checkpoints"):
        with pytest.raises(InputError, match=f"^{path}: is a folder; name a file in it, such as .*/last.ckpt$"):
            read_mapped(path)


def test_looking_at_a_checkpoint_takes_no_memory_for_its_tensors(folder: Path) -> None:
    many = torch.ones(MANY, 4)  # 64 MiB
    for number, part in enumerate((many, WEIGHT[:0])):
        shutil.rmtree(folder / f"rank_{number}.safetensors", ignore_errors=True)
        save_rank(folder, number, {"state_dict/a~1b": part} if len(part) else {})
    changed(lambda index: index["tensors"].pop("optimizer_states/0/state/7/exp_avg"))(folder)
    tensor(shape=[MANY, 4], rows=[MANY, 0])(folder)
    del many, part

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    checkpoint = read_mapped(folder)
    assert checkpoint["state_dict"]["a/b"].shape == (MANY, 4)
    assert resident() - before < 2**24
