"""``lit-clip evaluate`` keeps probabilities, takes torchmetrics' metrics, and writes the whole confusion matrix."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError

from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.evaluation import classification, predictions
from lit_clip.evaluation.scores import METRICS, Metric, unit_scores
from lit_clip.evaluation.targets import Targets, ranks_of_labels
from tests.helpers.small_sets import NAMES, ManyShades, Shades, cosines, entry, make_module, write_suite

TORCHMETRICS = "torchmetrics.classification."
AUROC = f"auroc={TORCHMETRICS}MulticlassAUROC"
OWN = """
import torch
from torchmetrics import Metric

class Confidence(Metric):
    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("images", torch.zeros(()), "sum")

    def update(self, preds, target):
        self.total += preds.amax(dim=1).pow(self.power).sum()
        self.images += len(target)

    def compute(self):
        return self.total / self.images
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = make_module().model.eval()
    monkeypatch.setattr("lit_clip.commands.evaluate.load_model", lambda name: model)
    write_suite(tmp_path, shades=entry(), many=entry("ManyShades", metric="map11", splits={"test": {"size": 33}}))
    (tmp_path / "own_confidence.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own_confidence", raising=False)  # another test's
    return tmp_path


def evaluate(*more: str) -> dict[str, Any]:
    base = ["--model", "last.ckpt", "--suite", "suite.yaml", "--output", "out", "--num_workers", "0"]
    run_command(["evaluate", *base, "--accelerator", "cpu", *more])
    return json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]


def likely(images: Shades) -> torch.Tensor:
    module = make_module()
    return (module.model.logit_scale.exp().item() * cosines(module, images).double()).softmax(dim=1)


def test_probabilities_of_every_image_allow_any_metric_afterwards(root: Path) -> None:
    ece = f"ece={{class_path: {TORCHMETRICS}MulticlassCalibrationError, init_args: {{n_bins: 10}}}}"
    found = evaluate("--sets", "shades", "--tasks", "zero_shot", "linear_probe", "--metrics", AUROC, ece)["shades"]
    images = Shades("")
    labels, expected = np.array(images.labels()), likely(images)
    columns = pq.read_table(root / "out/predictions/shades/zero_shot.parquet")
    kept = np.stack(columns["probabilities"].to_numpy())
    assert kept.dtype == np.float32
    assert kept == pytest.approx(expected.numpy(), abs=1e-6)
    assert columns["probability"].to_numpy() == pytest.approx(expected.amax(dim=1).numpy(), abs=1e-6)
    assert columns["truth_probability"].to_numpy() == pytest.approx(expected.numpy()[range(40), labels], abs=1e-6)
    assert [NAMES[place] for place in columns["truth"].to_pylist()] == [found["class_names"][label] for label in labels]

    for task in ("zero_shot", "linear_probe"):
        table = pq.read_table(root / f"out/predictions/shades/{task}.parquet")
        probability, truth = np.stack(table["probabilities"].to_numpy()), table["truth"].to_numpy()
        metrics = found["tasks"][task]["metrics"]
        double = probability.astype(np.float64)
        auroc = roc_auc_score(truth, double / double.sum(axis=1, keepdims=True), multi_class="ovr")
        assert metrics["auroc"] == pytest.approx(auroc, abs=1e-6)
        oracle = MulticlassCalibrationError(num_classes=7, n_bins=10)(*map(torch.tensor, (probability, truth)))
        assert metrics["ece"] == pytest.approx(float(oracle), abs=1e-6)
        rows = list(csv.reader((root / f"out/predictions/shades/{task}_confusions.csv").open()))
        assert rows[0] == ["truth", *NAMES]
        matrix = np.array([row[1:] for row in rows[1:]], dtype=int)
        assert np.array_equal(matrix, confusion_matrix(truth, table["prediction"].to_numpy(), labels=range(7)))
        assert found["tasks"][task]["confusion_matrix"] == matrix.tolist()
    page = (root / "out/report.html").read_text(encoding="utf-8")
    assert 'class="matrix"' in page
    assert f"{found['tasks']['zero_shot']['metrics']['auroc']:.4g}" in page
    text = (root / "out/results.csv").read_text().splitlines()
    lines = {(line["task"], line["metric"]): line["value"] for line in csv.DictReader(text)}
    assert float(lines["zero_shot", "auroc"]) == found["tasks"]["zero_shot"]["metrics"]["auroc"]


def test_a_metric_is_one_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is told of it: a suite may name it, and all forms of the results show it, with its interval."""

    def top3(scores: torch.Tensor, targets: Targets) -> dict[str, np.ndarray]:
        likeliest = scores.topk(3, dim=1).indices
        return {"top3": (likeliest == targets.labels[:, None]).any(dim=1).double().numpy()}

    record = Metric("top-3", lambda *given: float(top3(*given)["top3"].mean()), baseline=lambda _: 0.25, units=top3)
    monkeypatch.setitem(METRICS, "top3", record)
    write_suite(root, shades=entry(metric="top3"))
    evaluate("--tasks", "zero_shot", "linear_probe")
    images = Shades("")
    expected = top_k_accuracy_score(images.labels(), cosines(make_module(), images).numpy(), k=3, labels=range(7))
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if " top-3 " in line]
    assert (row[0], row[2], row[-2:]) == ("shades", f"{100 * expected:.1f}", ["25.0", "40"])
    with open("out/results.csv", newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == "top3"]
    assert [line["task"] for line in lines] == ["zero_shot", "linear_probe"]
    low, value, high, baseline = (float(lines[0][name]) for name in ("low", "value", "high", "baseline"))
    assert (value, baseline) == (pytest.approx(expected), 0.25)
    assert low < value < high
    assert rf"shades & top-3 & {100 * expected:.1f} {{\scriptsize [" in Path("out/results.tex").read_text()
    assert f'<td>zero-shot, top-3</td><td class="n">{100 * expected:.1f}</td>' in Path("out/report.html").read_text()
    write_suite(root, shades=entry(metric="top4"))
    with pytest.raises(InputError, match="shades: metric: there is no top4; must be one of .*top3"):
        evaluate()


def test_a_mean_over_classes_is_compared_with_another_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "top3_per_class"

    def top3(scores: torch.Tensor, targets: Targets) -> dict[str, np.ndarray]:
        return {name: (ranks_of_labels(scores, targets.labels) < 3).double().numpy()}

    record = Metric("top-3 per class", lambda *of: unit_scores(name, *of)[name].mean(), units=top3, per_class=True)
    monkeypatch.setitem(METRICS, name, record)
    write_suite(root, shades=entry(metric=name))
    here = evaluate("--tasks", "zero_shot")["shades"]["tasks"]["zero_shot"]["metrics"]
    labels, right = np.array(Shades("").labels()), top3(cosines(make_module(), Shades("")), labelled())[name]
    of_classes = [right[labels == label].mean() for label in np.unique(labels)]
    assert here[name] == pytest.approx(np.mean(of_classes)) != pytest.approx(right.mean())
    shutil.copytree("out", "before")
    evaluate("--tasks", "zero_shot", "--compare", "before")
    (compared,) = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["comparisons"]
    assert (compared["metric"], compared["difference"], compared["reason"]) == (name, 0.0, "")


def labelled() -> Targets:
    return Targets(torch.tensor(Shades("").labels()), classes=7)


def test_of_a_large_set_the_likeliest_classes_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "WHOLE", 40 * 7 - 1)
    monkeypatch.setattr(predictions, "TOP", 3)
    monkeypatch.setattr(predictions, "PART", 50)  # some images at a time
    found = evaluate("--sets", "shades", "--tasks", "zero_shot", "--metrics", AUROC)["shades"]["tasks"]["zero_shot"]
    table = pq.read_table(root / "out/predictions/shades/zero_shot.parquet")
    assert "probabilities" not in table.column_names
    best = likely(Shades("")).topk(3, dim=1)
    assert np.stack(table["top_probabilities"].to_numpy()) == pytest.approx(best.values.numpy(), abs=1e-6)
    assert np.array_equal(np.stack(table["top_classes"].to_numpy()), best.indices.numpy())
    labels = np.array(Shades("").labels())
    assert table["truth_probability"].to_numpy() == pytest.approx(
        likely(Shades("")).numpy()[range(40), labels], abs=1e-6
    )
    assert found["metrics"]["auroc"] == pytest.approx(  # of all probabilities
        roc_auc_score(labels, likely(Shades("")).numpy(), multi_class="ovr"), abs=1e-6
    )


def test_own_metrics_and_files_and_what_a_set_does_not_allow(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "own={class_path: own_confidence.Confidence, init_args: {power: 2}}"
    each = f"each={{class_path: {TORCHMETRICS}MulticlassAUROC, init_args: {{average: none}}}}"
    sets = evaluate("--tasks", "zero_shot", "--metrics", own, each)
    squares = {
        "shades": likely(Shades("")).amax(dim=1).square().mean().item(),
        "many": likely(ManyShades("", size=33)).amax(dim=1).square().mean().item(),
    }
    values = {name: found["tasks"]["zero_shot"]["metrics"]["own"] for name, found in sets.items()}
    assert values == pytest.approx(squares, abs=1e-6)
    rows = list(csv.reader((root / "out/predictions/shades/zero_shot_each.csv").open()))
    labels = np.array(Shades("").labels())
    expected = [roc_auc_score(labels == c, likely(Shades(""))[:, c]) for c in range(7)]
    assert [row[0] for row in rows] == NAMES
    assert [float(row[1]) for row in rows] == pytest.approx(expected, abs=1e-6)
    assert "each" not in sets["many"]["tasks"]["zero_shot"]["metrics"]
    assert sets["many"]["status"] == "done"
    assert "metrics: each: " in sets["many"]["reason"]  # images with several classes have no single label
    assert "many: metrics: each: " in capsys.readouterr().err


def test_results_are_computed_again_for_other_metrics_or_without_a_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    plain = classification.class_scores
    monkeypatch.setattr(classification, "class_scores", lambda task, *rest: calls.append(task) or plain(task, *rest))
    words = ("--sets", "shades", "--tasks", "zero_shot", "--metrics", "own=own_confidence.Confidence")
    first = evaluate(*words)
    del calls[:]
    assert evaluate(*words) == first
    assert not calls
    evaluate(*words[:-1], AUROC)
    assert calls
    evaluate(*words)
    del calls[:]
    (root / "out/predictions/shades/zero_shot_confusions.csv").unlink()
    assert evaluate(*words) == first
    assert calls
    assert (root / "out/predictions/shades/zero_shot_confusions.csv").is_file()
    (root / "own_confidence.py").write_text(OWN.replace("self.total / self.images", "2 * self.total / self.images"))
    del calls[:]
    evaluate(*words)
    assert calls  # an edited metric is another one


def test_thresholds_of_several_classes_an_image_are_reported_with_what_they_cost(root: Path) -> None:
    found = evaluate("--sets", "many", "--tasks", "zero_shot")["many"]["tasks"]["zero_shot"]["thresholds"]
    table = pq.read_table(root / "out/predictions/many/zero_shot.parquet")
    relevance = np.array(ManyShades("", size=33).truth.relevance)
    probability = np.stack(table["probabilities"].to_numpy())
    assert probability == pytest.approx(likely(ManyShades("", size=33)).numpy(), abs=1e-6)
    for name, threshold, images, fixed, fitted, held_out in found["classes"]:
        c = NAMES.index(name)
        assert images == relevance[:, c].sum()
        assert fixed == pytest.approx(f1_score(relevance[:, c], probability[:, c] >= 0.5, zero_division=0))
        assert fitted == pytest.approx(f1_score(relevance[:, c], probability[:, c] >= np.float32(threshold)))
        assert 0 <= held_out <= 1
    assert found["f1_held_out"] == pytest.approx(np.mean([line[5] for line in found["classes"]]))
    assert "on held-out images with a threshold fitted for each class" in (root / "out/report.html").read_text()
