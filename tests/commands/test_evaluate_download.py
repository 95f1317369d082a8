"""``lit-clip evaluate --download``, and the files that results.json says the numbers come from."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from tests.commands.test_evaluate import words
from tests.conftest import lit_clip_command
from tests.helpers.coloured_sets import WDS_LABELS, WDS_NAMES, WDS_TEMPLATES, paint_shade, wds_sample, write_wds
from tests.helpers.fork_ranks import command_of_ranks
from tests.helpers.hub import Hub, Repository, command_with_hub, running_hub

WEB, SETS = "datamodules.evaluation.WebDataset", ("mine", "wds_there", "wds_gone", "asked")


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one set; a checkpoint, and a suite of a folder that is there, that set, and one that the hub lacks."""
    samples = [wds_sample(number, cls=str(label).encode()) for number, label in enumerate(WDS_LABELS)]
    write_wds(tmp_path / "published", samples, WDS_NAMES, WDS_TEMPLATES)
    for name in ("cat", "dog"):
        for number in range(12):
            paint_shade(tmp_path / f"data/mine/{name}/{number}.png", 10 * number)
    shutil.copy(tiny_checkpoint, tmp_path / "last.ckpt")
    data = {name: {"class_path": WEB, "init_args": {"root": name}} for name in ("wds_there", "wds_gone", "asked")}
    suite: dict[str, Any] = {
        "mine": {"data": {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "mine"}}},
        "wds_there": {"data": data["wds_there"], "download": [{"hub": "a/there"}]},
        "wds_gone": {"data": data["wds_gone"], "download": [{"hub": "a/gone"}]},
        "asked": {"data": data["asked"], "how_to_get": "ask its authors"},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": suite}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with running_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories["a/there"] = Repository()
        server.repositories["a/there"].push_folder(tmp_path / "published")
        yield server


def read_sets() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]


def test_nothing_is_downloaded_without_the_option(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(words())
    assert "2 of the missing sets can be downloaded with --download" in capsys.readouterr().err
    found = read_sets()
    assert [found[name]["status"] for name in SETS] == ["done", "missing", "missing", "missing"]
    assert found["wds_there"]["how_to_get"] == "hf download --repo-type dataset a/there --local-dir {root}"
    assert hub.requests == []


def test_missing_sets_are_downloaded_and_evaluated_and_failures_end_the_run(hub: Hub) -> None:
    with pytest.raises(InputError, match="wds_gone: a/gone: cannot be downloaded from the hub"):
        run_command(words("--download"))
    found = read_sets()
    assert [found[name]["status"] for name in SETS] == ["done", "done", "failed", "missing"]
    assert found["asked"]["how_to_get"] == "ask its authors"
    assert found["wds_there"]["splits"]["test"]["images"] == len(WDS_LABELS)
    hub.requests.clear()
    run_command(words("--download", "--sets", "mine", "wds_there"))
    assert hub.requests == []


def test_splits_that_the_chosen_tasks_do_not_use_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree("published/test", "published/train")
    hub.repositories["a/there"].push_folder(tmp_path / "published")
    suite = yaml.safe_load(Path("suite.yaml").read_text(encoding="utf-8"))
    suite["sets"]["wds_there"]["splits"] = {"train": {"split": "train"}, "test": {"split": "test"}}
    Path("suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    run_command(words("--download", "--sets", "wds_there", "--tasks", "zero_shot"))
    assert [path.name for path in Path("data/wds_there").iterdir() if path.is_dir()] == ["test"]


def test_only_the_first_of_two_processes_downloads(hub: Hub, tmp_path: Path) -> None:
    options = words("--download", "--sets", "mine", "wds_there", "--devices", "2")
    program = partial(command_of_ranks, 2, partial(command_with_hub, hub.url))
    result = lit_clip_command(tmp_path, *options, function=program)
    assert result.returncode == 0, result.stderr
    assert {name: entry["status"] for name, entry in read_sets().items()} == {"mine": "done", "wds_there": "done"}
    fetched = [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
    assert len(fetched) == len(set(fetched)) == len(list((tmp_path / "data/wds_there").rglob("*.t*")))


def test_results_name_the_files_that_each_split_was_read_from(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree("published", "data/wds_there")
    run_command(words())
    files = {name: entry["splits"]["test"]["files"] for name, entry in read_sets().items() if entry["splits"]}
    assert files["mine"]["annotations"] == []
    assert files["mine"]["images"]["files"] == 24
    listed = files["wds_there"]
    assert [file["path"] for file in listed["images"]] == ["wds_there/test/0.tar", "wds_there/test/1.tar"]
    assert "wds_there/classnames.txt" in [file["path"] for file in listed["annotations"]]
    for file in [*listed["images"], *listed["annotations"]]:
        assert file["bytes"] == (tmp_path / "data" / file["path"]).stat().st_size
    before = files["mine"]["images"]["names_hash"]
    paint_shade(tmp_path / "data/mine/cat/99.png", 1)
    run_command(words())
    after = read_sets()["mine"]["splits"]["test"]["files"]["images"]
    assert after["files"] == 25
    assert after["names_hash"] != before
