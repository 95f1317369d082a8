import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from callbacks.log_image import Prediction, prediction_grid
from lit_clip.errors import InputError
from lit_clip.evaluation.comparison import PairedDifference
from lit_clip.evaluation.overview import group_means, rows
from lit_clip.evaluation.published import (
    disagreements,
    measured,
    nearest,
    papers_name,
    papers_sets,
    peers,
    published,
)
from lit_clip.evaluation.report.charts import (
    few_shot,
    run_name,
    short_name,
)
from lit_clip.evaluation.report.page import TEMPLATE, few_shot_chart, report_values, set_section, write_report
from lit_clip.evaluation.report.results_table import print_results
from lit_clip.evaluation.report.run_page import write_run_page
from lit_clip.evaluation.report.tables import write_tables, write_tensorboard
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from lit_clip.models.clip import CLIP
from lit_clip.models.registry import papers_models, resolve_architecture
from lit_clip.tools.html import render
from lit_clip.tools.reading import read_yaml

SUITE = Path(__file__).parents[2] / "configs" / "evaluation" / "paper.yaml"
SHOWN = Path(__file__).with_name("shown.txt")
EVIL = "<script>alert('x')</script>&\"$a$ \x07"


def zero_shot(value: float, **more: Any) -> dict[str, Any]:
    return {
        "value": value,
        "metrics": {"top1": value, "top5": min(1.0, value + 0.1)},
        "intervals": {"top1": [value - 0.01, value + 0.01]},
        "baseline": 0.1,
        "images": 1000,
        **more,
    }


def a_set(paper: str = "", value: float = 0.5, **tasks: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "reason": "",
        "how_to_get": "",
        "note": "",
        "metric": "top1",
        "paper": paper,
        "splits": {"test": {"images": 1000, "skipped": []}},
        "prompts": {"classes": 10, "texts": 180, "sha256": "ab" * 32},
        "class_names": ["cat", "dog"],
        "tasks": tasks or {"zero_shot": zero_shot(value)},
    }


def results_of(sets: dict[str, Any], name: str = "ViT-B-32-quickgelu:openai") -> dict[str, Any]:
    return {
        "lit_clip": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "model": {"name": name, "weights_sha256": "cd" * 32, "preprocessing": {"image_size": 224}, "parameters": 1},
        "precision": "32-true",
        "suite": [{"path": "paper.yaml", "sha256": "ef" * 32}],
        "packages": {"torch": "2.8.0", "scipy": None},
        "sets": sets,
    }


def probe(value: float) -> dict[str, Any]:
    return {"value": value, "metrics": {"top1": value}, "l2": 1.0, "search": [[0.1, 0.4], [1.0, 0.5]], "baseline": 0.1}


def shots(*values: float) -> dict[str, Any]:
    return {"value": values[-1], "shots": [[2**place, [v - 0.01, v + 0.01]] for place, v in enumerate(values)]}


def one_of_everything() -> dict[str, Any]:
    """Probes, heads, retrieval, geolocation, bias, thresholds, classes of pixels, further metrics, skipped images."""
    error = {"key": "a/1.png", "truth": "cat", "prediction": "dog", "probability": 0.9, "image": "images/a/1.jpg"}
    wrong = zero_shot(
        0.85, confusions=[["cat", "dog", 88]], errors=[{**error, "nearest": [["dog", 0.9], ["cat", 0.1]]}]
    )
    sets = {
        "cifar10": a_set("CIFAR10", zero_shot=wrong, linear_probe=probe(0.95), few_shot=shots(0.5, 0.6, 0.7)),
        "mnist": a_set("MNIST", zero_shot=zero_shot(0.4), linear_probe=probe(0.99), few_shot=shots(0.3, 0.5, 0.8)),
        "wds_vtab-cifar10": a_set("", 0.9),  # CLIP_benchmark's name: measured figures are known
        "MNIST": a_set("", 0.6),  # called so, but the user's own
        "imagenet": a_set("ImageNet", 0.63),
        "imagenetv2": a_set("ImageNetV2", 0.56),
        "imagenet_a": a_set("ImageNet-A", 0.31),
        "ours": a_set("", 0.77),
        "flickr": a_set("Flickr30k", retrieval={"value": 0.7, "metrics": {
            "image_to_text_recall@1": 0.8, "image_to_text_recall@5": 0.9, "text_to_image_recall@1": 0.6,
            "image_to_text_median_rank": 3.0},
            "baselines": {"image_to_text_recall@1": 0.02, "text_to_image_recall@1": 0.01}}),
        "im2gps": a_set("IM2GPS", geolocation={"value": 0.3, "metrics": {"within_1km": 0.1, "within_25km": 0.3}}),
        "fairface": a_set("", bias={"images": 3, "accuracy": {"gender": {"by_gender": {
            "Male": {"value": 0.25, "count": 1, "images": 4, "interval": [0.1, 0.6]},
            "Female": {"value": None, "count": 0, "images": 0, "interval": [0.0, 1.0]}}}}}),
        "pets": {**a_set("OxfordPets"), "status": "missing", "reason": "data/pets: not there", "tasks": {},
                 "splits": {}, "how_to_get": "ask the authors"},
        "pcam": {**a_set("PCam"), "status": "failed", "reason": "test.h5: truncated", "tasks": {}},
    }  # fmt: skip
    sets["digits"] = a_set(zero_shot=zero_shot(0.4, given=["ece"], confusion_matrix=[[3, 1], [0, 4]]))
    sets["digits"]["tasks"]["zero_shot"]["metrics"] |= {"ece": 0.0312}
    sets["digits"]["tasks"]["head"] = {**probe(0.5), "metrics": {"top1": 0.5, "ece": 1.5}, "given": ["ece"]}
    sets["digits"] |= {"reason": "a task is left out", "note": "[red]a note[/red]"}
    sets["digits"]["splits"]["test"]["absent"] = 1234
    thresholds = {"fixed": 0.5, "f1_fixed": 0.4, "f1_fitted": 0.6, "f1_held_out": 0.55}
    several = zero_shot(0.4, thresholds={**thresholds, "classes": [["cat", 5, 0.31, 0.4, 0.6, 0.5]]})
    sets["voc"] = {**a_set("VOC2007", zero_shot=several), "metric": "map11"}
    several["metrics"] = {"map11": 0.4}
    pixels = {"value": 0.3, "metrics": {"miou": 0.3, "pixel_accuracy": 0.5}, "baseline": 0.1, "images": 5}
    pixels["iou"] = [["sky", 0.2, 0.4, 1234], ["sea", None, None, 0], ["sun", 0.4, 0.5, 10]]
    sets["masks"] = {**a_set("", segmentation=pixels), "metric": "miou"}
    sets["cifar10"]["splits"]["test"]["skipped"] = [["bad.png", "truncated file"], ["worse.png", "no image"]]
    return results_of(sets)


@pytest.fixture
def full() -> dict[str, Any]:
    return one_of_everything()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_image(tmp_path)


def write_image(tmp_path: Path) -> Path:
    """Write the image that the results refer to into a run's folder."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a" / "1.jpg")
    return tmp_path


class Page(HTMLParser):
    """A page as a browser parses it: text, tags, ids, and every address in it."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report_page(results: dict[str, Any], folder: Path, others: dict[str, Any]) -> str:
    return render(TEMPLATE, **report_values(results, folder, others))


def rendered_section(name: str, entry: dict[str, Any], folder: Path) -> str:
    return render(TEMPLATE.with_name("set_section.html"), section=set_section(name, entry, "ViT-B-32", folder))


def everything_shown(folder: Path) -> str:
    """Return the terminal's text, the CSV, LaTeX and the page's text of all results, compared with other runs."""
    results, write = one_of_everything(), write_image(folder)
    others = {"runs/b/results.json": results_of({"cifar10": a_set("CIFAR10", 0.123), "mnist": a_set("MNIST", 0.41)})}
    others |= {f"seed: {n}": results_of({"cifar10": a_set("CIFAR10", 0.8 + n / 100)}, "RN50:openai") for n in (1, 2)}
    groups = {"seed": ["seed: 1", "seed: 2"]}
    gap = PairedDifference("runs/b/results.json", "cifar10", "zero_shot", "top1", 1000, 0.727, (0.7, 0.75), 1e-9)
    left_out = PairedDifference("runs/b/results.json", "mnist", "linear_probe", "top1", reason="other images")
    write_report(results, write, others, groups, [gap, left_out])
    write_tables(results, write, others, groups)
    text = (write / "report.html").read_text(encoding="utf-8")
    page = Page(re.sub(r"<svg.*?</svg>", "<svg></svg>", text, flags=re.DOTALL))  # another matplotlib has other ticks
    assert (page.open, page.tags.count("svg")) == ([], 1)
    pictures = [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",", 1)[1]))) as image:
        assert (len(pictures), image.size) == (1, (160, 36))
    parts = {
        "terminal": printed(results),
        "csv": (write / "results.csv").read_text(encoding="utf-8").replace("\r\n", "\n"),
        "latex": (write / "results.tex").read_text(encoding="utf-8"),
        "page": "\n".join(line for text in page.texts if (line := " ".join(text.split()))),
    }
    lines = [f"== {name}\n{text}" for name, text in parts.items()]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


@pytest.mark.usefixtures("charts")
def test_the_terminal_the_files_and_the_page_show_all_results(tmp_path: Path) -> None:
    """Equal to ``shown.txt``; ``python -m tests.evaluation.test_report`` writes it anew, to be read as a diff."""
    assert everything_shown(tmp_path) == SHOWN.read_text(encoding="utf-8")


def test_what_the_snapshot_shows_are_the_papers_figures_and_the_runs_own() -> None:
    """Read off the paper's tables 10 and 11, open_clip's measurements and the results by hand."""
    text = SHOWN.read_text(encoding="utf-8")
    cifar = next(line for line in text.splitlines() if line.startswith(" cifar10")).split()
    assert cifar == ["cifar10", "top-1", "85.0", "91.3", "89.8", "95.0", "95.1?", "70.0", "10.0", "1,000", "2"]
    for line in (
        "not on disk: pets",
        "pcam: failed: test.h5: truncated",
        "91.3 (table 11)",
        "89.8 (open_clip)",
        "81.5 ± 0.7",
    ):  # the last: of 81 and 82
        assert line in text.splitlines(), line
    assert r"cifar10 & top-1 & \textbf{85.0} {\scriptsize [84.0, 86.0]}" in text
    assert "this run,ViT-B-32-quickgelu:openai,cifar10,zero_shot,,top1,0.85,0.84,0.86,0.1,1000" in text


def test_damaged_and_empty_results_are_shown_with_gaps(tmp_path: Path) -> None:
    nan = {"value": float("nan"), "metrics": {"top1": float("nan")}}
    damages: list[dict[str, Any]] = [
        {"tasks": None},
        {"splits": None, "prompts": None, "class_names": None},
        {"tasks": {"zero_shot": nan}},
        {"tasks": {"zero_shot": {"value": None}, "few_shot": {"value": None, "shots": []}, "linear_probe": {}}},
        {"tasks": {"few_shot": {"shots": [[1, []], [2, [None]]]}, "retrieval": {}, "geolocation": {}, "bias": {}}},
        {"tasks": {"zero_shot": {"errors": [{}], "confusions": []}}},
        {"status": "failed", "reason": None, "note": None},
    ]
    sets = {f"set {place}": a_set("CIFAR10") | damage for place, damage in enumerate(damages)}
    damaged = results_of({**sets, "[red]mnist[/red]": a_set("MNIST", 0.4)})
    for results in (damaged, {}, {"sets": {}}, {"sets": {"a": a_set()}, "model": None, "packages": None}):
        page = Page(report_page(results, tmp_path, {"other": results_of({"set 0": {}, "x": a_set()})}))
        shown = printed(results)
        assert all(name.split()[0] in page.text and name.split()[0] in shown for name in results.get("sets", {}))
        write_tensorboard(results, tmp_path)
    assert "[red]mnist[/red]" in printed(damaged)


@pytest.mark.parametrize(
    ("name", "task", "model", "metric", "percents", "verified", "table"),
    [
        ("ImageNet", "zero_shot", "ViT-L-14-336", None, 76.2, True, 11),
        ("Food101", "zero_shot", "RN50", None, 81.1, True, 11),
        ("Country211", "zero_shot", "ViT-B-32", None, 17.8, False, 11),
        ("RenderedSST2", "zero_shot", "RN50x64", "top1", 70.7, False, 11),
        ("OxfordPets", "linear_probe", "ViT-L-14-336", "mean_per_class", 95.1, True, 10),
        ("ImageNet", "linear_probe", "ViT-B-16", None, 80.2, False, 10),
        ("HatefulMemes", "linear_probe", "ViT-L-14-336", "roc_auc", 77.3, True, 10),
        ("COCO", "retrieval", "ViT-L-14-336", "text_to_image_recall@10", 72.2, True, 13),
        ("Flickr30k", "retrieval", "ViT-L-14-336", None, 88.0, True, 13),
        ("aYahoo", "zero_shot", "ViT-L-14-336", None, 98.4, True, 1),
        ("SVHN full number", "zero_shot", "ViT-L-14-336", None, 51.0, True, 14),
        ("RareAct", "zero_shot", "ViT-L-14-336", "mwsap", 44.8, True, 15),
        ("ImageNet-R", "linear_probe", "ViT-L-14-336", None, 84.2, True, 16),
        ("IM2GPS", "geolocation", "ViT-L-14-336", "within_750km", 62.0, True, 17),
        ("CelebA 1000", "zero_shot", "RN50x16", None, 37.4, True, 8),
    ],
)
def test_published_figures_match_the_paper(
    name: str, task: str, model: str, metric: str | None, percents: float, verified: bool, table: int
) -> None:
    figures = published(name, task, model)
    figure = next(iter(figures.values())) if metric is None else figures[metric]
    assert figure.value == pytest.approx(percents / 100)
    assert figure.verified is verified
    assert figure.source == f"Radford et al. 2021, table {table}"


@pytest.fixture(scope="module")
def suite() -> dict[str, SuiteEntry]:
    return read_suite(SUITE)


def test_every_model_has_figures_for_the_papers_27_sets(
    suite: dict[str, SuiteEntry],
) -> None:
    names = {entry.paper for entry in suite.values()}
    for model in papers_models():
        for task, table in (("zero_shot", 11), ("linear_probe", 10)):
            found = [next(iter(published(name, task, model).values()), None) for name in names]
            assert sum(figure is not None and figure.source.endswith(f"table {table}") for figure in found) == 27
    probes = {name: next(iter(published(name, "linear_probe", "ViT-L-14-336").values()), None) for name in names}
    kept = {name: probe.value for name, probe in probes.items() if probe and probe.source.endswith("table 10")}
    assert 100 * sum(kept.values()) / 27 == pytest.approx(85.056, abs=5e-4)  # mean given with a transcription


def test_every_set_named_as_in_the_paper_has_a_figure_for_its_metric(
    suite: dict[str, SuiteEntry],
) -> None:
    task_of = {"recall@1": "retrieval", "within_km": "geolocation"}
    for name, entry in suite.items():
        if entry.paper:
            model = "ViT-L-14" if entry.paper.startswith("CelebA") else "ViT-L-14-336"
            figures_of = published(entry.paper, task_of.get(entry.metric, "zero_shot"), model)
            metrics = {"recall@1": "text_to_image_recall@1", "within_km": "within_25km"}
            assert metrics.get(entry.metric, entry.metric) in figures_of, name


def test_pm_means_peers_and_open_clips_measurements_are_found() -> None:
    assert published("ImageNet-Vid (robust)", "zero_shot", "ViT-L-14-336")["pm"].value == pytest.approx(
        (0.953 + 0.892) / 2
    )
    assert peers("IM2GPS", "geolocation")["PlaNet"]["within_1km"].value == pytest.approx(0.084)
    assert measured("mine", "COCO", "retrieval", "RN50")["text_to_image_recall@5"].value == pytest.approx(0.5291)
    assert published("COCO", "retrieval", "RN50") == {}
    assert published("no such set", "zero_shot", "RN50") == {}
    assert published("", "zero_shot", "RN50") == {}
    assert any("88.3 in table 11, 88.4 in table 14" in line for line in disagreements())


@pytest.mark.parametrize("name", papers_models())
def test_a_paper_model_is_nearest_to_itself_by_name_and_by_size(name: str) -> None:
    size = 1e6 * read_yaml(SUITE.parents[2] / "lit_clip/evaluation/published.yaml")["parameters"][name]
    model = {"architecture": resolve_architecture(name).to_dict(), "parameters": size}
    assert nearest({"name": f"{name}-quickgelu:openai"}) == (name, "the same name")
    assert nearest({"name": papers_name(name)}) == (name, "the same name")
    assert nearest({"name": "runs/last.ckpt", **model}).name == name


@pytest.mark.parametrize(
    ("architecture", "parameters", "expected", "rule"),
    [
        (resolve_architecture("ViT-tiny-16-64").to_dict(), 1_000_000, "ViT-B-16", "the ViT with the nearest number"),
        ({"image": {"patch_size": 32}}, 5_000_000, "ViT-B-32", "the ViT with the nearest number"),
        ({"image": {"patch_size": 8}}, 5_000_000, "ViT-B-16", "the ViT with the nearest number"),
        (resolve_architecture("ViT-H-14").to_dict(), 986_000_000, "ViT-L-14-336", "the ViT with the nearest number"),
        ({"image": {"layers": [3, 4, 22, 3]}}, 125_000_000, "RN101", "the ResNet with the nearest number"),
        ({"image": {"layers": [2, 2, 2, 2]}}, 150_000_000, "RN50x4", "the ResNet with the nearest number"),
        ({"image": {"timm": "vit_large"}}, 430_000_000, "ViT-L-14-336", "the nearest number"),
        ({"image": {"sizes": "of a later version"}}, 600_000_000, "RN50x64", "the nearest number"),
        ("no such model", None, "ViT-B-32", "the model's size is unknown"),
        (None, None, "ViT-B-32", "the model's size is unknown"),
    ],
)
def test_another_model_is_compared_with_the_one_nearest_in_size(
    architecture: Any, parameters: int | None, expected: str, rule: str
) -> None:
    found = nearest({"name": "x", "architecture": architecture, "parameters": parameters})
    assert found.name == expected
    assert found.rule.startswith(rule)


def test_parameter_counts_match_the_models() -> None:
    counts = read_yaml(SUITE.parents[2] / "lit_clip/evaluation/published.yaml")["parameters"]
    for name in ("RN50", "ViT-B-32", "ViT-B-16"):
        with torch.device("meta"):
            model = CLIP(resolve_architecture(name))
        assert counts[name] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.005)


def whole_paper(zero_shot_value: float = 0.5) -> dict[str, Any]:
    """The paper's 27 sets, each by the paper's metric, beside one that is not among them."""
    sets = {"imagenetv2": a_set("ImageNetV2", 0.99)}
    for name, metric in papers_sets().items():
        task = {"value": zero_shot_value, "metrics": {metric: zero_shot_value}}
        sets[name.lower()] = {**a_set(name, zero_shot=task), "metric": metric}
    return sets


def test_the_mean_is_over_the_papers_27_sets_or_not_shown(full: dict[str, Any], folder: Path) -> None:
    sets = whole_paper()
    (mean,) = group_means(rows(results_of(sets)), "zero_shot")
    assert mean.sets == 27
    assert mean.ours == pytest.approx(0.5)
    theirs = [next(iter(published(name, "zero_shot", "ViT-B-32").values())) for name in papers_sets()]
    assert mean.papers == pytest.approx(sum(figure.value for figure in theirs if figure) / 27)
    assert "mean of the paper's 27 sets 50.0" in Page(report_page(results_of(sets), folder, {})).text
    assert [line.split()[0] for line in printed(results_of(sets)).splitlines() if " 50.0 " in line][-1] == "mean"

    sets["mnist"]["status"], sets["mnist"]["tasks"] = "failed", {}
    sets["voc2007"]["metric"] = "mwap"  # not the paper's
    (mean,) = group_means(rows(results_of(sets)), "zero_shot")
    assert (mean.ours, mean.papers, mean.missing) == (None, None, ["VOC2007", "MNIST"])
    line = "zero-shot, the paper's 27 sets: no mean, 25 of 27; missing: VOC2007, MNIST"
    for text in (Page(report_page(results_of(sets), folder, {})).text, printed(results_of(sets))):
        assert line in text
        assert "mean of the" not in text

    assert [mean.missing for mean in group_means(rows(full), "linear_probe")][0][:2] == ["Food101", "CIFAR100"]
    assert group_means(rows(results_of({"ours": a_set()})), "zero_shot") == []


@pytest.mark.parametrize(
    ("name", "task", "metric", "percents"),
    [  # of ViT-L-14 by laion2b_s32b_b82k in open_clip's docs
        ("wds_imagenet1k", "zero_shot", "top1", 75.25),
        ("wds_vtab-pets", "zero_shot", "mean_per_class", 93.09),
        ("CIFAR10", "zero_shot", "top1", 96.62),
        ("datacomp_cifar10", "zero_shot", "top1", 96.62),
        ("wds_voc2007", "zero_shot", "top1", 80.53),
        ("datacomp_geode", "zero_shot", "worst_group_top1", 89.19),
        ("wds_flickr30k", "retrieval", "text_to_image_recall@10", 95.94),
    ],
)
def test_measured_figures_are_found_by_each_name_of_a_set(name: str, task: str, metric: str, percents: float) -> None:
    weights, paper = "ViT-L-14:laion2b_s32b_b82k", name if name == "CIFAR10" else ""
    figures = measured(name, paper, task, weights)
    assert figures[metric].value == pytest.approx(percents / 100)
    assert "map11" not in figures
    assert measured("x", "VOC2007", "zero_shot", weights) == {}  # other images
    assert measured("CIFAR10", "", "zero_shot", weights) == {}  # may be anything that is called so


def printed(results: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=130)
    print_results(results, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("width", "values"),
    [
        (60, "50.0 90.0 10.0"),
        (80, "50.0 91.3 90.0 95.1? 50.0 10.0 1,000"),
        (100, "50.0 91.3 89.8 90.0 95.1? 40.0 50.0 10.0 1,000"),
    ],
)
def test_the_terminals_table_leaves_out_what_does_not_fit(width: int, values: str) -> None:
    sets = whole_paper()
    for entry in sets.values():
        entry["tasks"] |= {"linear_probe": probe(0.9), "few_shot": shots(0.4, 0.5)}
    sets["food101"]["tasks"]["few_shot"] = shots(0.4)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_results(results_of(sets), console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    cifar = next(line for line in lines if line.lstrip().startswith("cifar10 "))
    assert cifar.split() == ["cifar10", "top-1", *values.split()]
    assert len(cifar.rstrip()) <= width


@pytest.mark.usefixtures("charts")
def test_drawing_restores_matplotlibs_settings_and_is_reproducible(full: dict[str, Any]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first, second = (few_shot_chart(full, {}) for _ in range(2))
    assert dict(matplotlib.rcParams) == before
    assert first == second
    assert first.startswith("<svg")
    assert ">mean over sets, %</text>" in first  # text, in the reader's fonts
    names = [short_name(name, 10) for name in ("tab\there", "\x00", "runs/first/zero-shot")]
    assert names == ["tab here", "?", "…zero-shot"]
    assert (run_name("runs/b16/results.json"), run_name("results.json")) == ("runs/b16", "results.json")


@pytest.mark.usefixtures("charts")
def test_few_shot_curves_are_means_over_the_sets_of_all_runs(full: dict[str, Any]) -> None:
    assert few_shot_chart(results_of({"imagenet": a_set("ImageNet")}), {}) == ""
    curve = few_shot({"this run": full})
    assert curve is not None
    thick = [line for line in curve.axes[0].lines if line.get_linewidth() > 2]
    assert np.asarray(thick[0].get_ydata()) == pytest.approx([40.0, 55.0, 75.0])
    star = next(line for line in curve.axes[0].lines if line.get_marker() == "*")
    assert np.asarray(star.get_ydata()) == pytest.approx([62.5])
    other = results_of({"mnist": a_set("MNIST", few_shot=shots(0.1, 0.2, 0.3)), "x": a_set("", few_shot=shots(0.9))})
    curve = few_shot({"this run": full, "other": other, "none": results_of({})})
    assert curve is not None
    thick = [np.asarray(line.get_ydata()) for line in curve.axes[0].lines if line.get_linewidth() > 2]
    assert thick == [pytest.approx([30.0, 50.0, 80.0]), pytest.approx([10.0, 20.0, 30.0])]  # mnist alone is in both


@pytest.mark.usefixtures("charts")
def test_the_page_loads_nothing_from_outside(full: dict[str, Any], folder: Path) -> None:
    text = report_page(full, folder, {"other": full})
    page = Page(text)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "link", "object", "embed", "base", "form"} & set(page.tags)
    assert all(found.startswith("#") for found in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text))
    assert "@import" not in text
    assert "default-src 'none'" in text


def evil(value: Any) -> Any:
    """Replace every text value in a structure of results."""
    if isinstance(value, dict):
        return {key: evil(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [evil(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.usefixtures("charts")
def test_all_text_from_the_data_is_escaped(full: dict[str, Any], folder: Path) -> None:
    changed = evil(full)
    for kept, entry in zip(full["sets"].values(), changed["sets"].values(), strict=True):
        entry["status"] = kept["status"]
        entry["splits"] = {EVIL: {"images": 1, "skipped": [[EVIL, EVIL]]}, "test": {"images": 1, "skipped": []}}
    changed["sets"] = {f"{EVIL}{place}": entry for place, entry in enumerate(changed["sets"].values())}
    changed["sets"][f"{EVIL}10"]["tasks"]["bias"][EVIL] = {EVIL: EVIL}
    changed["model"]["architecture"] = {EVIL: {EVIL: EVIL}}
    changed["packages"][EVIL] = EVIL
    text = report_page(changed, folder, {EVIL: changed})
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "<script" not in text
    assert "alert('x')" in page.text
    assert page.text.count("<script>") > 30


def test_images_outside_the_run_are_not_read_and_broken_ones_leave_a_gap(full: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (run / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (run / "loop.jpg").symlink_to("loop.jpg")
    entry = full["sets"]["cifar10"]
    absent = ("../secret.png", str(tmp_path / "secret.png"), "not/there.jpg", "", None, "nul\0", 7)
    for name in (*absent, "broken.jpg", "loop.jpg"):
        entry["tasks"]["zero_shot"]["errors"][0]["image"] = name
        found = rendered_section("cifar10", entry, run)
        assert "most confidently wrong" in found
        assert "data:image" not in found


@pytest.mark.slow
def test_tensorboard_has_the_scalars_of_the_last_evaluation(full: dict[str, Any], folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for results in (results_of({"cifar10": a_set("CIFAR10", 0.1)}), full):
        write_tensorboard(results, folder)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("zero_shot/cifar10/top1")] == pytest.approx([0.85])
    curve = [(event.step, event.value) for event in events.Scalars("few_shot/mnist/top1")]
    assert curve == [(1, pytest.approx(0.3)), (2, pytest.approx(0.5)), (4, pytest.approx(0.8))]


def test_an_error_names_the_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.html"):
        write_report(results_of({}), tmp_path / "nowhere", {})


def test_contact_sheets_truncate_long_names() -> None:
    image = Image.new("RGB", (8, 8))
    wide = prediction_grid([Prediction(image, "W" * 200, [("i" * 500, 1.0), ("", 0.0)])])
    assert wide.size == prediction_grid([Prediction(image, "a", [("b", 1.0), ("c", 0.0)])]).size
    right_edge = np.asarray(wide)[:, -10:]
    assert (right_edge == 255).all()  # the margin stays empty


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        SHOWN.write_text(everything_shown(Path(name)), encoding="utf-8")


def test_a_runs_page_has_no_heading_without_images(tmp_path: Path) -> None:
    shown = {"key": "1.png", "own": "a tiger", "answers": [], "image": ""}
    write_run_page(tmp_path / "report.html", [], "untrained", "", {}, [shown | {"kind": "worst"}])
    headings = re.findall("<h2>(.*?)</h2>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert headings == ["before and after", "curves", "worst"]
