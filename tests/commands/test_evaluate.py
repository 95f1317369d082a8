"""``lit-clip evaluate`` equals plain loops and CLIP_benchmark, on any number of ranks and after interruptions."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression

from datamodules import ImageFolderClasses
from lit_clip import load_model, zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.reading import EncoderBatch
from lit_clip.errors import InputError
from lit_clip.evaluation import classification
from lit_clip.evaluation.data import LabelledImages
from lit_clip.evaluation.predictions import read_predictions
from lit_clip.heads import head_from_images, load_head, save_head
from tests.conftest import ROOT, lit_clip_command
from tests.evaluation.test_clip_benchmark import CLASSES, TEMPLATES, write_shards
from tests.helpers import forks
from tests.helpers.encoding import watch_encoding

FOLDER = "datamodules.ImageFolderClasses"


def noise(seed: int, label: int) -> Image.Image:
    """Return a noise image whose colour depends slightly on its class."""
    generator = np.random.default_rng((seed, label))
    pixels = generator.integers(0, 200, (40, 48, 3), dtype=np.uint8)
    pixels[..., label % 3] += np.uint8(20 + 15 * (label // 3))
    return Image.fromarray(pixels)


@cache
def noise_png(seed: int, label: int) -> bytes:
    """Return :func:`noise` as a file; each test has the same hundred."""
    file = io.BytesIO()
    noise(seed, label).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, ``data/train`` and ``data/test`` with six classes, and a suite of that set and a missing one."""
    for split, images in (("train", 12), ("test", 5)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                (folder / f"{number}.png").write_bytes(noise_png(100 * number + len(split), label))
    shutil.copy(tiny_checkpoint, tmp_path / "last.ckpt")
    splits = {"train": {"root": "train"}, "test": {"root": "test"}}
    gone = {"data": {"class_path": FOLDER, "init_args": {"root": "gone"}}, "how_to_get": "ask its authors"}
    write_suite(tmp_path, noise={"data": {"class_path": FOLDER}, "splits": splits, "templates": TEMPLATES}, gone=gone)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_suite(folder: Path, **sets: dict[str, Any]) -> None:
    (folder / "suite.yaml").write_text(yaml.safe_dump({"sets": sets}), encoding="utf-8")


def words(*more: str) -> list[str]:
    base = ["--model", "last.ckpt", "--suite", "suite.yaml", "--data_root", "data", "--output", "out"]
    return ["evaluate", *base, "--num_workers", "0", "--accelerator", "cpu", *more]


def evaluate(*more: str) -> dict[str, Any]:
    run_command(words(*more))
    return json.loads(Path("out/results.json").read_text(encoding="utf-8"))


@torch.no_grad()
def features(split: str, before: bool = False) -> tuple[torch.Tensor, list[int]]:
    model = load_model("last.ckpt")
    rows, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted(Path("data", split, name).glob("*.png")):
            both = model.image_features(model.preprocess(Image.open(path))[None])
            rows.append(both[0][0] if before else both[1][0])
            labels.append(label)
    return torch.stack(rows), labels


@pytest.mark.usefixtures("charts")
def test_results_equal_plain_loops_and_missing_sets_are_listed(root: Path) -> None:
    results = evaluate("--draws", "2")
    found, gone = results["sets"]["noise"], results["sets"]["gone"]
    image_ND, labels = features("test")
    classifier = zero_shot_classifier(load_model("last.ckpt"), CLASSES, TEMPLATES)
    right = (image_ND @ classifier).argmax(dim=1) == torch.tensor(labels)
    assert found["status"] == "done"
    assert found["tasks"]["zero_shot"]["value"] == pytest.approx(float(right.double().mean()), abs=1e-9)
    assert {split: counts["images"] for split, counts in found["splits"].items()} == {"test": 30, "train": 72}
    assert all(counts["skipped"] == [] and counts["absent"] == 0 for counts in found["splits"].values())
    assert found["prompts"]["texts"] == len(CLASSES) * len(TEMPLATES)
    assert sum(count for _, _, count in found["tasks"]["zero_shot"]["confusions"]) == int((~right).sum())
    errors = found["tasks"]["zero_shot"]["errors"]
    assert len(errors) == min(24, int((~right).sum()))
    assert all(Image.open(root / "out" / error["image"]).size == (48, 40) for error in errors)
    assert all(error["prediction"] == error["nearest"][0][0] != error["truth"] for error in errors)

    probe = found["tasks"]["linear_probe"]
    train, test = features("train", before=True), features("test", before=True)
    oracle = LogisticRegression(C=1 / probe["l2"], max_iter=2000, tol=1e-8).fit(train[0].double().numpy(), train[1])
    assert probe["value"] == pytest.approx(oracle.score(test[0].double().numpy(), test[1]), abs=1 / 30 + 1e-9)
    assert [shots for shots, _ in found["tasks"]["few_shot"]["shots"]] == [1, 2, 4, 8]  # 12 training images per class
    assert all(len(values) == 2 for _, values in found["tasks"]["few_shot"]["shots"])
    assert [shots for shots, _ in found["tasks"]["few_shot"]["head"]] == [1, 2, 4, 8]

    assert gone["status"] == "missing"
    assert gone["how_to_get"] == "ask its authors"
    assert "data/gone" in gone["reason"]
    assert results["model"]["name"] == "last.ckpt"
    assert len(results["model"]["weights_sha256"]) == 64
    page = (root / "out/report.html").read_text(encoding="utf-8")
    assert "ask its authors" in page
    assert list((root / "out").rglob("events.out.tfevents*"))


def test_a_head_is_evaluated_on_the_sets_of_its_classes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its accuracy equals that of ``model.with_head``, whatever the order and the case of the classes' names."""
    model = load_model("last.ckpt")
    shuffled = [name.upper() for name in [*CLASSES[3:], *CLASSES[:3]]]
    files = [path for name in CLASSES for path in sorted(Path("data/train", name).glob("*.png"))]
    labels = [shuffled.index(path.parent.name.upper()) for path in files]
    save_head(head_from_images(model, files, labels, shuffled), "head.safetensors")
    results = evaluate("--head", "head.safetensors", "--sets", "noise", "--tasks", "zero_shot", "head")
    tested = [path for name in CLASSES for path in sorted(Path("data/test", name).glob("*.png"))]
    guess = model.with_head(load_head("head.safetensors")).classify(tested).argmax(dim=1)
    right = [shuffled[place] == path.parent.name.upper() for place, path in zip(guess.tolist(), tested, strict=True)]
    found = results["sets"]["noise"]["tasks"]
    assert found["head"]["value"] == pytest.approx(sum(right) / len(right), abs=1e-9)
    assert found["head"]["value"] > found["zero_shot"]["value"]
    assert results["head"]["path"] == "head.safetensors"
    assert "head, top-1" in (root / "out/report.html").read_text(encoding="utf-8")
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["noise", "top-1"]]
    assert row[2:4] == [f"{100 * found[task]['value']:.1f}" for task in ("zero_shot", "head")]
    assert list(read_predictions(root / "out", "noise", "head")["truth"]) == features("test")[1]

    save_head(head_from_images(model, files, labels, [*shuffled[:-1], "zebra"]), "head.safetensors")
    with pytest.raises(InputError, match=f"noise: --head: has no class '?{CLASSES[2]}"):
        evaluate("--head", "head.safetensors", "--sets", "noise", "--tasks", "head")
    with pytest.raises(InputError, match="--tasks head: needs --head, a file of classify --save_head"):
        evaluate("--tasks", "head")


def test_images_are_searched_by_images_and_runs_are_compared_by_it(root: Path) -> None:
    write_suite(
        root, noise={"data": {"class_path": FOLDER}, "splits": {"test": {"root": "test"}}, "tasks": ["image_retrieval"]}
    )
    found = evaluate()["sets"]["noise"]["tasks"]["image_retrieval"]
    image_ND, labels = features("test")
    image_ND = torch.nn.functional.normalize(image_ND, dim=1)
    cosine = image_ND @ image_ND.T
    nearest = cosine.fill_diagonal_(-2).argmax(dim=1)
    right = (torch.tensor(labels)[nearest] == torch.tensor(labels)).double().mean()
    assert found["metrics"]["image_to_image_recall@1"] == pytest.approx(float(right))
    assert (found["value"], found["queries"]) == (found["metrics"]["map@10"], 30)
    kept = read_predictions(Path("out"), "noise", "image_retrieval")
    assert kept["score"].mean() == pytest.approx(found["value"], abs=1e-6)
    assert [str(key) for key in kept["nearest"]] == [str(kept["key"][row]) for row in nearest.tolist()]
    shutil.copytree("out", "before")
    (compared,) = evaluate("--compare", "before")["comparisons"]
    assert (compared["metric"], compared["difference"], compared["images"]) == ("map@10", 0, 30)
    assert "image retrieval, mAP@10" in Path("out/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_probe_of_one_set_is_tested_on_others_and_trained_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets with some of the classes, in other orders, equal the argmax among these classes of one probe."""
    trained = {"train": {"class_path": FOLDER, "init_args": {"root": "train"}}, "test": {}}
    some = {"few": CLASSES[1::2], "two": [CLASSES[5], CLASSES[0]]}
    for name, classes in some.items():
        for each in classes:
            shutil.copytree(f"data/test/{each}", f"data/{name}/{each}")
    sets = {name: {"data": {"class_path": FOLDER, "init_args": {"root": name}}, "splits": trained} for name in some}
    whole = {"data": {"class_path": FOLDER}, "splits": {"train": {"root": "train"}, "test": {"root": "test"}}}
    write_suite(root, whole=whole, **sets)
    fits: Counter[str] = Counter()
    plain = classification.train_probe
    monkeypatch.setattr(classification, "train_probe", lambda *a, **k: fits.update(probe=1) or plain(*a, **k))
    results = evaluate("--draws", "1", "--shots", "3", "5")["sets"]
    assert fits["probe"] == 1  # whole, few and two are trained on the same images
    l2 = results["whole"]["tasks"]["linear_probe"]["l2"]
    train, test = features("train", before=True), features("test", before=True)
    oracle = LogisticRegression(C=1 / l2, max_iter=2000, tol=1e-8).fit(train[0].double().numpy(), train[1])
    scores = oracle.decision_function(test[0].double().numpy())
    for name, classes in some.items():
        labels = sorted(CLASSES.index(each) for each in classes)
        rows = np.isin(test[1], labels)
        expected = (np.array(labels)[scores[rows][:, labels].argmax(axis=1)] == np.array(test[1])[rows]).mean()
        found = results[name]["tasks"]["linear_probe"]
        assert found["value"] == pytest.approx(expected, abs=1 / rows.sum() + 1e-9)
        assert found["l2"] == l2
        assert [shots for shots, _ in results[name]["tasks"]["few_shot"]["shots"]] == [3, 5]
        assert results[name]["splits"]["train"]["images"] == 72


def test_two_processes_give_the_same_results(root: Path) -> None:
    options = ("--draws", "1", "--shots", "2", "--metrics", "auroc=torchmetrics.classification.MulticlassAUROC")
    one = evaluate(*options)["sets"]
    shutil.rmtree("out")
    result = lit_clip_command(root, *words(*options, "--devices", "2"))
    assert result.returncode == 0, result.stderr
    two = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]
    for found in (one, two):
        found["noise"]["tasks"]["linear_probe"].pop("seconds")
    assert one == two
    assert all("auroc" in one["noise"]["tasks"][task]["metrics"] for task in ("zero_shot", "linear_probe"))


def counted_images(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the number of ``images`` encoded from now on."""
    calls: Counter[str] = Counter()

    def count(task: EncodingTask, batch: EncoderBatch) -> None:
        calls["images"] += len(batch.rows)

    watch_encoding(monkeypatch, count)
    return calls


def test_cached_features_and_results_are_not_computed_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_images(monkeypatch)
    first = evaluate("--tasks", "zero_shot")
    assert calls["images"] == 30
    again = evaluate("--tasks", "zero_shot", "linear_probe")
    assert calls["images"] == 30 + 72  # the added task encodes only the training images
    assert again["sets"]["noise"]["tasks"]["zero_shot"] == first["sets"]["noise"]["tasks"]["zero_shot"]
    noise(7, 3).save("data/test/dog/0.png")
    evaluate("--tasks", "zero_shot", "linear_probe")
    assert calls["images"] == 30 + 72 + 30  # an image has changed


def test_another_precision_shares_no_features_and_is_in_the_results(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted_images(monkeypatch)
    found, cache = {}, root / "out/cache"
    for precision in ("32-true", "bf16-mixed"):
        before = {*cache.rglob("*")}
        results = evaluate("--tasks", "zero_shot", "--precision", precision)
        assert results["precision"] == precision
        new = {*cache.rglob("*")} - before
        (images,) = (np.load(path) for path in new if path.name == "values.npy")
        (texts,) = (np.load(path)["classifier"].T for path in new if path.parent.name == "texts")
        found[precision] = (images[:, -texts.shape[1] :], texts)  # after the projection
    assert calls["images"] == 30 + 30
    for exact, half in zip(*found.values(), strict=True):
        distances = 1 - (exact.astype(np.float64) * half).sum(axis=1)
        assert half.dtype == np.float32
        assert 1e-6 < distances.max() < 1e-2
    evaluate("--tasks", "zero_shot")
    assert calls["images"] == 30 + 30


class Slow(LabelledImages):
    """Images that are slow to read as long as there is a file ``slow``; every read is logged."""

    def __init__(self, root: str) -> None:
        self.log, self.slow, self.class_names = Path(root) / "read.log", Path(root) / "slow", CLASSES

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        if self.slow.exists():
            time.sleep(0.05)
        return noise(index, index % 6), index % 6

    def labels(self) -> list[int]:
        return [index % 6 for index in range(60)]

    def stamp(self) -> str:
        return "the same"


def read(root: Path) -> list[int]:
    """Return the numbers of the slow images that were read."""
    log = root / "data/read.log"
    return [int(word) for word in log.read_text().split()] if log.exists() else []


@contextmanager
def evaluating(root: Path, until: int, *more: str, function: Callable[[], None] = forks.command) -> Iterator[Any]:
    """Evaluate slow images in a process, yielded when some have been read; from the end on they are not slow."""
    write_suite(root, slow={"data": {"class_path": "tests.commands.test_evaluate.Slow", "init_args": {"root": "."}}})
    (root / "data/slow").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = forks.Program(function, ["lit-clip", *words("--batch_size", "4", *more)], root, environment)
    with forks.running(program, root / "stdout", root / "stderr") as process:
        limit = time.monotonic() + 60
        while len(read(root)) < until and process.is_alive() and time.monotonic() < limit:
            time.sleep(0.02)
        yield process
    (root / "data/slow").unlink()


def resume(root: Path) -> None:
    result = lit_clip_command(root, *words("--batch_size", "4"))
    assert result.returncode == 0, result.stderr
    assert set(read(root)) == set(range(60))


def test_an_interrupted_evaluation_resumes_where_it_stopped(root: Path) -> None:
    with evaluating(root, 24) as process:
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130, (root / "stderr").read_text()
    before = len(read(root))
    assert 24 <= before < 60
    resume(root)
    errors = len(json.loads((root / "out/results.json").read_text())["sets"]["slow"]["tasks"]["zero_shot"]["errors"])
    again = len(read(root)) - 60 - errors  # misclassified images are opened once more for the report
    assert 0 <= again <= 4  # at most the batch that was being read


def test_a_broken_image_fails_its_set_or_is_skipped_and_listed(root: Path) -> None:
    Path("data/test/cat/2.png").write_bytes(b"no image")
    suite = yaml.safe_load(Path("suite.yaml").read_text())["sets"]
    suite["train_only"] = {"data": {"class_path": FOLDER, "init_args": {"root": "train"}}}
    write_suite(root, **suite)
    with pytest.raises(InputError, match=r"noise: .*cat/2\.png.*fix or remove it, or set --on_error skip"):
        run_command(words("--tasks", "zero_shot"))
    results = json.loads(Path("out/results.json").read_text())["sets"]
    assert results["noise"]["status"] == "failed"
    assert results["train_only"]["tasks"]["zero_shot"]["images"] == 72  # other sets are still evaluated
    one_by_one = ("--batch_size", "1")  # a batch without any readable image
    skipped = evaluate("--tasks", "zero_shot", "--on_error", "skip", *one_by_one)["sets"]["noise"]
    assert skipped["tasks"]["zero_shot"]["images"] == 29
    assert [key for key, _ in skipped["splits"]["test"]["skipped"]] == ["cat/2.png"]
    assert "cat/2.png" in Path("out/report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="noise"):  # features cached with skip do not satisfy error
        run_command(words("--tasks", "zero_shot"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["one", "two"]}, "2"),
        ({"templates": ["no place for a name"]}, "no place for a name"),
        ({"data": {"class_path": "datamodules.NoSuchClass"}}, "NoSuchClass"),
        ({"metric": "roc_auc"}, "roc_auc"),
        ({"tasks": ["bias"]}, "groups"),
        ({"tasks": ["retrieval"]}, "captions"),
    ],
)
def test_a_wrong_suite_entry_fails_its_set_with_one_line(root: Path, change: dict[str, Any], message: str) -> None:
    suite = yaml.safe_load(Path("suite.yaml").read_text())["sets"]
    write_suite(root, noise=suite["noise"] | {"splits": {"test": {"root": "test"}}} | change)
    with pytest.raises(InputError, match=message) as error:
        run_command(words())
    assert "\n" not in str(error.value)
    assert json.loads(Path("out/results.json").read_text())["sets"]["noise"]["status"] == "failed"


def test_a_suite_without_any_data_writes_the_report_and_is_an_error(root: Path) -> None:
    with pytest.raises(InputError, match="none of 2 sets is there .elsewhere/gone: not there"):
        run_command([*words(), "--data_root", "elsewhere"])
    assert "ask its authors" in Path("out/report.html").read_text(encoding="utf-8")


def test_invalid_options_are_an_error_before_anything_is_computed(root: Path) -> None:
    for option, message in (
        (["--sets", "nosie"], "nosie"),
        (["--tasks", "zeroshot"], "zeroshot"),
        (["--compare", "nowhere"], "nowhere: there is no such file"),
        (["--draws", "0"], "draws"),
        (["--precision", "16-mixed"], "--precision 16-mixed: needs a GPU; on a CPU use 32-true"),
        (["--suite", "other.yaml"], "other.yaml"),
    ):
        with pytest.raises(InputError, match=message):
            run_command(words(*option))
    assert not Path("out").exists()


def check_kept_ranks(result: dict[str, Any]) -> None:
    """The recalls of the ranks in the file of predictions are the metrics; always one image is the baseline."""
    metrics, baselines = result["metrics"], result["baselines"]
    kept = read_predictions(Path("out"), "captioned", "retrieval")
    assert list(kept["key"][-3:]) == ["1/028#0", "1/029#0", "1/029#1"]
    for direction in ("image_to_text", "text_to_image"):
        ranks = kept["rank"][kept["direction"] == direction]
        for k in (1, 5, 10):
            assert (ranks < k).mean() == pytest.approx(metrics[f"{direction}_recall@{k}"])
    assert baselines.keys() == {name for name in metrics if "recall" in name}
    captions = Counter(key.partition("#")[0] for key in kept["key"][kept["direction"] == "text_to_image"])
    assert baselines["text_to_image_recall@1"] == pytest.approx(max(captions.values()) / captions.total())


def test_accuracy_and_recall_equal_clip_benchmarks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to rounding, on sets in CLIP_benchmark's own format."""
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from torch.utils.data import DataLoader

    from lit_clip import image_transform

    number: Any = lambda x: float(x.item() if hasattr(x, "item") else x)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)  # for numpy 2.4
    images = [noise(i, i % 6) for i in range(30)]
    model = load_model("last.ckpt")
    with torch.no_grad():  # about half of the labels are the model's predictions
        classifier = zero_shot_classifier(model, CLASSES, TEMPLATES)
        predictions = [int((model.encode_image(model.preprocess(p)[None]) @ classifier).argmax()) for p in images]
    labels = [prediction if i % 2 else (prediction + i) % len(CLASSES) for i, prediction in enumerate(predictions)]
    captions = [[f"image {i} of {i * i % 7}", f"{CLASSES[i % 6]} number {i}"][: 1 + i % 2] for i in range(30)]
    captions[7].append(captions[20][0])  # a caption of two images is right for its own alone
    write_shards(root / "data/labelled", images, labels, [])
    write_shards(root / "data/captioned", images, None, captions)
    reader = "datamodules.evaluation.WebDataset"
    captioned = {"class_path": f"{reader}Captions", "init_args": {"root": "captioned"}}
    labelled = {"data": {"class_path": reader, "init_args": {"root": "labelled"}}}
    write_suite(root, labelled=labelled, captioned={"data": captioned, "metric": "recall@1"})
    ours = evaluate()["sets"]
    transform, tokenizer = image_transform(model.preprocessing), model.tokenizer
    data = build_dataset("wds/labelled", str(root / "data/labelled"), transform, task="zeroshot_classification")
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    loader: Callable[..., Any] = lambda data: DataLoader(data.batched(8), batch_size=None)  # noqa: E731
    theirs = zeroshot_classification.evaluate(model, loader(data), tokenizer, CLASSES, templates, "cpu", amp=False)
    zero_shot = ours["labelled"]["tasks"]["zero_shot"]["metrics"]
    assert 0.4 < theirs["acc1"] < 0.9
    assert zero_shot["top1"] == pytest.approx(theirs["acc1"], abs=1e-9)
    assert zero_shot["top5"] == pytest.approx(theirs["acc5"], abs=1e-9)
    assert zero_shot["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-9)

    check_kept_ranks(ours["captioned"]["tasks"]["retrieval"])
    data = build_dataset("wds/captioned", str(root / "data/captioned"), transform, task="zeroshot_retrieval")
    theirs = zeroshot_retrieval.evaluate(model, loader(data), tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        metrics = ours["captioned"]["tasks"]["retrieval"]["metrics"]
        assert f"merged_text_to_image_recall@{k}" in metrics
        assert metrics[f"text_to_image_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-7)
        assert metrics[f"image_to_text_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-7)


class Darker(ImageFolderClasses):
    """Other images of the same files."""

    def image(self, index: int) -> Image.Image:
        return super().image(index).point(lambda value: value // 2)


def test_images_of_two_sets_are_encoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and results are those of sets that are evaluated apart; what shows other images is encoded itself."""
    paths = sorted(Path("data/test").rglob("*.png"))[3:]
    lines = [f"{path.relative_to('data')},{path.parent.name} {path.stem}" for path in reversed(paths)]
    Path("data/pairs.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    folders = {"data": {"class_path": FOLDER, "init_args": {"root": "test"}}}
    reader = "datamodules.evaluation.CaptionedPairs"
    pairs = {"data": {"class_path": reader, "init_args": {"path": "pairs.csv"}}, "metric": "recall@1"}
    darker = {"data": {"class_path": f"{__name__}.Darker", "init_args": {"root": "test"}}}
    write_suite(root, folders=folders, pairs=pairs, darker=darker)
    encoded: list[int] = []
    watch_encoding(monkeypatch, lambda task, batch: encoded.append(len(batch.rows)))
    together = evaluate()["sets"]
    assert sum(encoded) == 30 + 30
    for name in ("pairs", "darker"):
        run_command([*words("--sets", name), "--output", f"apart_{name}"])
    assert sum(encoded) == 30 + 30 + 27 + 30
    apart = {
        name: json.loads(Path(f"apart_{name}/results.json").read_text())["sets"][name] for name in ("pairs", "darker")
    }
    for name, task in (("pairs", "retrieval"), ("darker", "zero_shot")):
        assert apart[name]["tasks"][task]["metrics"] == pytest.approx(together[name]["tasks"][task]["metrics"])
    images, captions = (sorted(Path(folder).rglob("values.npy")) for folder in ("out/cache", "apart_pairs/cache"))
    (alone,) = captions
    (shared,) = [path for path in images if path.parent.name == alone.parent.name]
    np.testing.assert_allclose(np.load(shared), np.load(alone), atol=1e-6)
    next(path for path in paths).write_bytes(noise_png(7, 1))  # which is another image now
    evaluate("--sets", "folders", "pairs")
    assert sum(encoded) == 30 + 30 + 27 + 30 + 30 + 0


def test_recalls_are_shown_merged_where_captions_repeat(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal and the report show what a loop over distinct captions gives, and say that they are merged."""
    paths = sorted(Path("data/test").rglob("[0-3].png"))  # four of each of six classes, whose names are the captions
    lines = [f"{path.relative_to('data')},{path.parent.name}" for path in paths]
    Path("data/repeated.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    own = [f"{path.relative_to('data')},{path.parent.name} {path.stem}" for path in paths]
    Path("data/distinct.csv").write_text("\n".join(["image,caption", *own]), encoding="utf-8")
    reader = "datamodules.evaluation.CaptionedPairs"
    sets = {
        name: {"data": {"class_path": reader, "init_args": {"path": f"{name}.csv"}}, "metric": "recall@1"}
        for name in ("repeated", "distinct")
    }
    write_suite(root, **{name: {**each, "templates": ["{}"]} for name, each in sets.items()})
    evaluate()
    told = capsys.readouterr()
    model = load_model("last.ckpt")
    with torch.no_grad():
        image_ID = torch.cat([model.encode_image(model.preprocess(Image.open(path))[None]) for path in paths])
        text_TD = model.encode_text(model.tokenizer(CLASSES))
    cosine = torch.nn.functional.normalize(image_ID, dim=1) @ torch.nn.functional.normalize(text_TD, dim=1).T
    truth = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    page = Path("out/report.html").read_text(encoding="utf-8")
    for k in (1, 5, 10):
        by_image = (cosine.argsort(dim=1, descending=True)[:, :k] == truth[:, None]).any(dim=1).double().mean()
        nearest = truth[cosine.T.argsort(dim=1, descending=True)[:, :k]]
        by_text = (nearest == torch.arange(len(CLASSES))[:, None]).any(dim=1).double().mean()
        for way, value in ("image to text", by_image), ("text to image", by_text):
            assert f"merged {way} R@{k} {100 * value:.1f} %" in told.err
            assert re.search(rf"repeated +merged {way} R@{k} +{100 * value:.1f} ", told.out)
            assert f"merged {way} R@{k}" in page
            assert f"merged {way} R@{k}" not in next(line for line in told.err.splitlines() if "distinct" in line)
            assert re.search(rf"distinct +{way} R@{k} ", told.out)
    assert "captions repeat, and equal ones count as one" in told.out
    assert "captions repeat, and equal ones count as one" in page
