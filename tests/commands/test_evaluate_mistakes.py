"""User mistakes in the suites and options of ``lit-clip evaluate``, and damaged files."""

import errno
import html
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolderClasses
from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.errors import InputError
from lit_clip.evaluation import store
from lit_clip.evaluation.data import MissingData, PartOf
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import read_suite
from lit_clip.tools.hashing import hex_digest, sha256_of_file
from tests.commands.test_evaluate import FOLDER, counted_images, evaluate, noise, root, words, write_suite
from tests.conftest import lit_clip_command
from tests.evaluation.test_clip_benchmark import CLASSES, write_shards

__all__ = ["root"]  # a fixture
ZERO_SHOT = ("--tasks", "zero_shot")
DATA = f"{{data: {{class_path: {FOLDER}, init_args: {{root: test}}}}}}"
OPEN = f"sets: {{a: {{data: {{class_path: {FOLDER}}}, "  # to be closed by "}}"


def test_a_missing_suite_is_an_error_that_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "paper.yaml").touch()
    with pytest.raises(InputError, match=r"papr.yaml: there is no such file; did you mean .*paper.yaml\?"):
        read_suite(tmp_path / "papr.yaml")


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (f"sets: {{2024: {DATA}}}", "must be a string, not 2024; put it in quotes"),
        (f"sets: {{yes: {DATA}}}", "must be a string, not True; put it in quotes"),
        (f"sets:\n  a: {DATA}\n  a: {DATA}", "'a' is there twice"),
        (f"sets: {{'': {DATA}}}", "1 to 100 bytes"),
        (f"sets: {{'..': {DATA}}}", "without a leading dot"),
        (f"sets: {{../x: {DATA}}}", "remove the slash"),
        (f"sets: {{{'x' * 300}: {DATA}}}", "1 to 100 bytes"),
        (f'sets: {{"a\\nb": {DATA}}}', "or line breaks"),
        (f'sets: {{"a\\0b": {DATA}}}', "cannot be part of file names"),
        (f"sets: {{a: {{data: {{class_path: {FOLDER}, init_args: [test]}}}}}}", "init_args must be a mapping"),
        (f"sets: {{a: {{data: {{class_path: {FOLDER}, root: test}}}}}}", "unknown key root"),
        ("sets: {a: {data: {class_path: 5}}}", "class_path must be the name of a class"),
        (f"{OPEN}splits: {{train: {{}}, test: {{}}}}}}}}", "the probe would train on test images"),
        (f"{OPEN}splits: {{test: {{root: a}}}}, folds: [{{root: b}}]}}}}", "folds: root is set by splits too"),
        (f"{OPEN}splits: {{test: {{class_path: {FOLDER}}}}}}}}}", "splits: test has a class_path; write it under data"),
        (f"{OPEN}splits: {{test: {{}}, train: {{class_path: x, a: y}}}}}}}}", "splits: train: unknown key a; only"),
        (f"{OPEN}class_names: [yes, maybe]}}}}", "True is not a string; put it"),
    ],
)
def test_an_invalid_suite_is_an_error_that_names_the_file(tmp_path: Path, suite: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text(suite)
    with pytest.raises(InputError, match=message) as error:
        read_suite(tmp_path / "suite.yaml")
    assert "suite.yaml" in str(error.value)


def test_numbers_as_class_names_are_strings_and_empty_arguments_are_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        f"sets: {{a: {{data: {{class_path: {FOLDER}, init_args: }}, class_names: [0, 1.5, [2, two]]}}}}"
    )
    entry = read_suite(tmp_path / "suite.yaml")["a"]
    assert entry.class_names == ["0", "1.5", ["2", "two"]]
    assert entry.data["init_args"] == {}


def test_splits_with_different_classes_are_an_error(root: Path) -> None:
    Path("data/train", CLASSES[0]).rename(
        f"data/train/{CLASSES[-1]}_too"
    )  # still six classes, but the other five move up
    with pytest.raises(InputError, match="test and train have 6 and 6 classes, and 'ant' is 'bee' there"):
        run_command(words())


class PartFolders(ImageFolderClasses):
    """Folds in ``root``: the images of a split lie in a folder of its name and the fold's."""

    def __init__(self, root: str, split: str, fold: str) -> None:
        if not Path(root, split + fold).is_dir():
            raise MissingData(f"{root}/{split}{fold}: no such folder")
        super().__init__(str(Path(root, split + fold)))


def folded(root: Path, **more: Any) -> None:
    """A set of two folds with the images of ``data/train`` and ``data/test``, whose second fold may be changed."""
    for split in ("train", "test"):
        for fold in "ab":
            shutil.copytree(f"data/{split}", f"data/parts/{split}{fold}")
    data = {"class_path": f"{__name__}.PartFolders", "init_args": {"root": "parts"}}
    splits = {"train": {"split": "train"}, "test": {"split": "test"}, **more}
    write_suite(root, parts={"data": data, "splits": splits, "folds": [{"fold": "a"}, {"fold": "b"}]})


def test_a_training_split_that_lacks_a_fold_leaves_zero_shot(root: Path) -> None:
    folded(root)
    shutil.rmtree("data/parts/trainb")
    found = evaluate()["sets"]["parts"]
    assert (found["status"], list(found["tasks"]), list(found["splits"])) == ("done", ["zero_shot"], ["test"])
    assert "tasks that need training images are left out: data/parts/trainb" in found["reason"]


def test_a_missing_validation_split_does_not_change_the_protocol(root: Path) -> None:
    folded(root, val={"split": "val"})
    found = evaluate()["sets"]["parts"]
    assert (found["status"], list(found["tasks"])) == ("done", ["zero_shot"])
    assert "are left out: data/parts/vala" in found["reason"]


@pytest.mark.slow
def test_few_shot_results_are_of_numbers_of_shots_that_every_fold_has(root: Path) -> None:
    folded(root)
    for path in Path("data/parts/trainb").glob("*/*.png"):
        if int(path.stem) >= 4:
            path.unlink()
    results = evaluate("--tasks", "few_shot", "--draws", "1")["sets"]["parts"]
    found = results["tasks"]["few_shot"]
    assert "few_shot: no result of 4, 8, 16 shots: class 'ant' has 3 examples to draw from" in results["reason"]
    assert results["reason"] in html.unescape(Path("out/report.html").read_text())
    assert [(shots, len(values)) for shots, values in found["shots"]] == [(1, 2), (2, 2)]
    assert found["left_out"].keys() == {"4", "8", "16"}
    assert found["l2"].keys() == {"1", "2"}


def test_a_mistake_in_another_sets_training_split_leaves_zero_shot(root: Path) -> None:
    shutil.copytree("data/train", "data/fewer")
    shutil.rmtree(f"data/fewer/{CLASSES[0]}")
    train = {"class_path": FOLDER, "init_args": {"root": "fewer"}}
    write_suite(root, noise={"data": {"class_path": FOLDER}, "splits": {"test": {"root": "test"}, "train": train}})
    with pytest.raises(InputError, match="noise: splits: train has no class 'ant', which test has .1 of 6 classes"):
        run_command(words())
    found = json.loads(Path("out/results.json").read_text())["sets"]["noise"]
    assert (found["status"], list(found["tasks"])) == ("failed", ["zero_shot"])


def test_an_impossible_task_does_not_stop_the_others(root: Path) -> None:
    suite = {"data": {"class_path": FOLDER}, "splits": {"train": {"root": "train"}, "test": {"root": "test"}}}
    write_suite(root, noise=suite | {"tasks": ["geolocation", "bias", "zero_shot"]})
    with pytest.raises(InputError, match="no coordinates of its images.*has no groups"):
        run_command(words())
    found = json.loads(Path("out/results.json").read_text())["sets"]["noise"]
    assert (found["status"], list(found["tasks"])) == ("failed", ["zero_shot"])


def test_probes_on_images_without_a_class_are_an_error(root: Path) -> None:
    captions = [[f"image {number}"] for number in range(20)]
    write_shards(root / "data/captioned", [noise(number, 0) for number in range(20)], None, captions)
    shutil.copytree("data/captioned/test", "data/captioned/train")
    reader = {"class_path": "datamodules.evaluation.WebDatasetCaptions", "init_args": {"root": "captioned"}}
    splits = {"train": {"split": "train"}, "test": {"split": "test"}}
    write_suite(root, captioned={"data": reader, "splits": splits, "tasks": ["linear_probe", "few_shot"]})
    with pytest.raises(InputError, match="linear probe: .* without a class; few_shot: .* without a class"):
        run_command(words())


def test_changed_labels_are_evaluated_again(root: Path) -> None:
    def write(shift: int) -> None:
        rows = [f"test/{name}/{n}.png,{CLASSES[(i + shift) % 6]}" for i, name in enumerate(CLASSES) for n in range(5)]
        Path("data/labels.csv").write_text("\n".join(["image,label", *rows]))

    reader = {"class_path": "datamodules.evaluation.LabelledTable", "init_args": {"path": "labels.csv"}}
    write_suite(root, table={"data": reader})
    write(0)
    first = evaluate(*ZERO_SHOT)["sets"]["table"]["tasks"]["zero_shot"]
    write(1)
    second = evaluate(*ZERO_SHOT)["sets"]["table"]["tasks"]["zero_shot"]
    truth = {error["key"]: error["truth"] for error in first["errors"]}
    assert all(
        error["truth"] == CLASSES[(CLASSES.index(error["key"].split("/")[1]) + 1) % 6] for error in second["errors"]
    )
    assert any(truth.get(error["key"], error["truth"]) != error["truth"] for error in second["errors"])


def test_sets_that_differ_only_in_file_contents_do_not_share_features(root: Path) -> None:
    """Archives with uncompressed images can have equal names, sizes and times."""
    for number, name in enumerate(("one", "other")):
        for label, class_name in enumerate(CLASSES):
            path = root / "data" / name / class_name / "0.bmp"
            path.parent.mkdir(parents=True)
            noise(number, label).save(path)
            os.utime(path, (1, 1))
    sets = {name: {"data": {"class_path": FOLDER, "init_args": {"root": name}}} for name in ("one", "other")}
    write_suite(root, **sets)
    found = evaluate(*ZERO_SHOT)["sets"]
    probabilities = [{e["key"]: e["probability"] for e in found[name]["tasks"]["zero_shot"]["errors"]} for name in sets]
    shared = probabilities[0].keys() & probabilities[1].keys()
    assert shared
    assert all(probabilities[0][key] != probabilities[1][key] for key in shared)


def cached() -> Path:
    return next(path for path in Path("out/cache").iterdir() if path.is_dir() and path.name != "texts")


def change_content(**changes: Any) -> None:
    path = cached() / "content.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forge(change: Callable[[np.ndarray], Any], skipped: list[Any] | None = None) -> None:
    """Replace what is stored, under a digest that fits."""
    file, skipped = cached() / "values.npy", skipped or []
    np.save(file, np.asarray(change(np.load(file))))
    change_content(digest=hex_digest([sha256_of_file(file), json.dumps(skipped)]), skipped=skipped)


DAMAGES: list[Callable[[], Any]] = [
    lambda: os.truncate(cached() / "values.npy", 500),
    lambda: np.save(cached() / "values.npy", np.zeros((30, 5), np.float32)),
    lambda: [(cached() / "values.npy").unlink(), os.mkfifo(cached() / "values.npy")],
    lambda: np.save(cached() / "values.npy", np.load(cached() / "values.npy")[::-1]),
    lambda: change_content(skipped=[[0, "a.png", "broken"]]),
    lambda: (cached() / "content.json").write_text('{"skipped": [[Infinity, "a.png", "broken"]]}'),
    lambda: (cached() / "content.json").write_text("{}"),
    lambda: forge(lambda values: values[:, 0]),
    lambda: forge(lambda values: values[0, 0]),
    lambda: forge(lambda values: values.astype(np.float64)),
    lambda: forge(lambda values: values.astype("U8")),
    lambda: forge(lambda values: values[:7]),
    lambda: forge(lambda values: values.repeat(2, axis=0)),
    lambda: forge(lambda values: values[:, :3]),
    lambda: forge(lambda values: values[:29], [["1", "a.png", "broken"]]),
    lambda: forge(lambda values: values, [[True, "a.png", "broken"]]),
    lambda: forge(lambda values: values[:29], [[1, 5, None]]),
    lambda: [path.write_text("null") for path in Path("out/sets").iterdir()],
    lambda: [path.write_text("[" * 100_000) for path in Path("out/sets").iterdir()],
]


def test_damaged_cache_files_are_replaced(root: Path) -> None:
    first = evaluate(*ZERO_SHOT)["sets"]
    for number, damage in enumerate(DAMAGES):
        damage()
        if Path("out/sets/noise.json").read_text().startswith("{"):  # otherwise the cached features would not be read
            shutil.rmtree("out/sets")
        assert evaluate(*ZERO_SHOT)["sets"] == first, number


def test_a_full_disk_is_an_error_and_the_images_are_not_encoded_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", full)  # before pages are written to, which would be a bus error
        with pytest.raises(InputError, match=r"out/cache/\w+: cannot be written \(No space left on device\)"):
            evaluate(*ZERO_SHOT)
    calls = counted_images(monkeypatch)
    assert evaluate(*ZERO_SHOT)["sets"]["noise"]["status"] == "done"
    assert calls["images"] == 0


def test_an_image_of_the_report_that_cannot_be_written_is_named_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: Image.Image, path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"out/images/noise/\d+\.jpg: cannot be written \(No space left on device\)"):
        evaluate(*ZERO_SHOT)
    assert not list(Path("out/images/noise").iterdir())


def test_two_runs_can_share_a_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = load_model("last.ckpt"), store.encode
    images = ImageFolderClasses("data/test")
    ours, theirs = (
        FeatureStore(model, root / "cache", EncodingSettings(num_workers=0, accelerator="cpu")) for _ in range(2)
    )

    def overtaken(*arguments: Any, **options: Any) -> Any:
        bad = plain(*arguments, **options)
        monkeypatch.setattr(store, "encode", plain)
        theirs.features(images, "theirs")
        return bad

    monkeypatch.setattr(store, "encode", overtaken)
    assert len(ours.features(images, "ours").after) == 30
    assert [path.name for path in (root / "cache").iterdir()] == [ours.path(images).name]


class Nothing(ImageFolderClasses, PartOf):
    def __init__(self) -> None:
        super().__init__("data/test")
        self.whole, self.rows = ImageFolderClasses("data/test"), []

    def __len__(self) -> int:
        return 0


def test_an_empty_part_of_a_set_is_refused_before_the_set_is_encoded(root: Path) -> None:
    settings = EncodingSettings(num_workers=0, accelerator="cpu")
    with pytest.raises(InputError, match="part: the set is empty"):
        FeatureStore(load_model("last.ckpt"), root / "cache", settings).features(Nothing(), "part")
    assert not (root / "cache").exists()


def test_a_rank_that_cannot_write_stops_the_others(root: Path) -> None:
    evaluate(*ZERO_SHOT)
    kept = cached()
    shutil.rmtree(kept)
    kept.with_name(f".{kept.name}.parts").write_text("no folder")
    result = lit_clip_command(root, *words(*ZERO_SHOT, "--devices", "2"), timeout=60)
    assert result.returncode == 2
    assert "cannot be written (File exists)" in result.stderr


def test_sets_without_the_requested_task_are_skipped_without_failing(root: Path) -> None:
    suite = {"class_path": FOLDER, "init_args": {"root": "test"}}
    write_suite(root, noise={"data": suite}, of_another_kind={"data": suite, "tasks": ["retrieval"]})
    assert list(evaluate(*ZERO_SHOT)["sets"]) == ["noise"]
    with pytest.raises(InputError, match="--tasks bias: not a task of any of the sets noise, of_another_kind"):
        run_command(words("--tasks", "bias"))


def test_non_finite_features_are_reported(root: Path) -> None:
    saved = torch.load("last.ckpt", weights_only=True)
    saved["state_dict"]["visual.proj"].fill_(3e38)  # finite; the features are not
    torch.save(saved, "last.ckpt")
    found = evaluate(*ZERO_SHOT)["sets"]["noise"]
    assert found["tasks"]["zero_shot"]["value"] == 0
    assert found["reason"].startswith("the features of 30 images are not finite")
    assert "are not finite" in Path("out/report.html").read_text(encoding="utf-8")
