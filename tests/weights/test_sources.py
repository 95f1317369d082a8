"""Damaged, malicious and foreign sources are refused in one line, and no code in a file is ever run."""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from lit_clip import load_model
from lit_clip.errors import InputError
from lit_clip.tools.weight_files import read_tensors
from tests.weights.test_load import CONFIG, MODEL_CFG, openai_model, random_model, refusal, save_archive


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def evil_archive(path: Path, marker: Path) -> None:
    """Write a fake TorchScript archive with code in its ``data.pkl``."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(marker)))
        archive.writestr("archive/version", "3")


def evil_torch_zip(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {"logit_scale": torch.tensor(1.0)}, "epoch": Evil(marker)}, path)


def evil_legacy(path: Path, marker: Path) -> None:
    torch.save({"epoch": Evil(marker)}, path, _use_new_zipfile_serialization=False)


def evil_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(marker)))


@pytest.mark.parametrize("make", [evil_archive, evil_torch_zip, evil_legacy, evil_pickle])
@pytest.mark.parametrize("name", ["model.pt", "model.bin", "last.ckpt"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, make: Callable[[Path, Path], None], name: str) -> None:
    marker = tmp_path / "executed"
    make(tmp_path / name, marker)
    assert "nothing in it was run" in refusal(tmp_path / name)
    assert not marker.exists()


def test_the_evil_pickle_would_create_the_marker(tmp_path: Path) -> None:
    evil_pickle(tmp_path / "model.pt", tmp_path / "executed")
    pickle.loads((tmp_path / "model.pt").read_bytes())  # noqa: S301  # written above
    assert (tmp_path / "executed").exists()


def weight_file(folder: Path, kind: str) -> Path:
    path = folder / {"archive": "a.pt", "zip": "z.pt", "legacy": "l.pt", "safetensors": "s.safetensors"}[kind]
    if kind == "archive":
        return save_archive(openai_model(CONFIG), path)
    state = random_model().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["archive", "zip", "legacy", "safetensors"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_file_truncated_anywhere_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = weight_file(tmp_path, kind)
    content = path.read_bytes()
    for length in (0, 1, 4, 100, 1000, len(content) // 2, len(content) - 1000, len(content) - 1):
        path.write_bytes(content[:length])
        assert "incomplete" in refusal(path, architecture=CONFIG), length


@pytest.mark.parametrize(
    "kind",
    ["archive", pytest.param("zip", marks=pytest.mark.slow), pytest.param("legacy", marks=pytest.mark.slow)]
    + ["safetensors"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_damaged_bytes_give_an_input_error_or_other_weights(tmp_path: Path, kind: str) -> None:
    """Changes random bytes of the headers, which are at both ends of a file."""
    path = weight_file(tmp_path, kind)
    content, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            place = chance.randrange(min(len(content), 3000))
            damaged[place if chance.random() < 0.3 else -1 - place] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(path, architecture=CONFIG)
        except InputError:
            refused += 1
    assert refused > 0


@pytest.fixture
def bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create files and folders in the working directory, none of them a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty.pt", "empty.safetensors"):
        Path(name).touch()
    Path("text.pt").write_text("these are no weights\n" * 50, encoding="utf-8")
    torch.save([torch.zeros(2)], "list.pt")
    torch.save({}, "nothing.pt")
    torch.save({"epoch": 3, "loss": 0.5}, "numbers.pt")
    os.mkfifo("pipe.pt")
    Path("empty_folder").mkdir()
    Path("weightless").mkdir()
    Path("weightless/open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG}), encoding="utf-8")
    for name, content in {
        "broken": "{not json",
        "list": "[1, 2]",
        "inner": '{"model_cfg": [1]}',
        "half": '{"model_cfg": {"embed_dim": 8}}',
    }.items():
        Path(name).mkdir()
        Path(name, "open_clip_config.json").write_text(content, encoding="utf-8")
        Path(name, "open_clip_model.safetensors").touch()


@pytest.mark.usefixtures("bad_sources")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no model: its name is empty"),
        ("absent.pt", "no such checkpoint file"),
        (r"C:\models\q.ckpt", r"C:\models\q.ckpt: no such checkpoint file"),
        ("pipe.pt", "pipe.pt: neither a file nor a folder"),
        ("empty.pt", "it may be incomplete"),
        ("empty.safetensors", "it may be incomplete"),
        ("text.pt", "it may be incomplete"),
        ("list.pt", "a list, not weights by name"),
        ("nothing.pt", "does not hold tensors by name: it is empty"),
        ("numbers.pt", "does not hold tensors by name: 'epoch' is of type int"),
        ("empty_folder", "has neither open_clip_config.json nor config.json; found: nothing"),
        ("broken", "open_clip_config.json: not a readable JSON file"),
        ("list", "open_clip_config.json: not a JSON object"),
        ("inner", "open_clip_config.json: not a readable open_clip configuration"),
        ("half", "open_clip_config.json: not an open_clip configuration"),
        ("weightless", "no weights beside open_clip_config.json"),
        ("ViT-B-32:openia", "not in open_clip's registry; did you mean ViT-B-32:openai?"),
        ("ViT-B-32:nope", "not in open_clip's registry; tags: openai, "),
        ("ViT-B-33:openai", "not in open_clip's registry; lit-clip models --pretrained lists all"),
        ("some-model", "no such file or folder, and neither org/name on the hub nor model:tag"),
        ("ViT-B-32", "no such file or folder, and neither org/name on the hub nor model:tag"),
    ],
)
def test_a_source_that_is_no_model_is_refused_in_one_line(source: str, message: str) -> None:
    assert message in refusal(source)


def test_a_runs_folder_is_refused_with_its_checkpoints_path(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert f"a run's folder; give its checkpoint, {last}" in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_file_that_may_not_be_opened_is_not_called_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).touch()
    for function in (Path, "open"), (torch, "load"):  # root may open every file
        monkeypatch.setattr(*function, refused)
    assert refusal(tmp_path / name) == f"{tmp_path / name}: not a readable weight file (Permission denied)"


def test_time_to_read_a_file_does_not_grow_with_the_square_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"{number}": torch.full((2,), number) for number in range(500)}
    save_file(state, tmp_path / "many.safetensors")
    opened, plain = [], safetensors.safe_open

    def counted(*arguments: Any) -> Any:
        opened.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    found = read_tensors(tmp_path / "many.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert len(opened) <= 9  # each reads the list of all tensors


def test_a_checkpoint_of_another_lightning_module_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "other.ckpt")
    assert "not a lit-clip checkpoint" in refusal(tmp_path / "other.ckpt")
