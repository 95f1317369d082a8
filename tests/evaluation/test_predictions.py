"""What is kept and written of results: predictions that reproduce their metrics, CSV, LaTeX, and what is read."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.evaluation.predictions import (
    class_columns,
    joined,
    predictions_entry,
    read_predictions,
    retrieval_columns,
    write_predictions,
)
from lit_clip.evaluation.report.tables import escape, latex, write_tables
from lit_clip.evaluation.results import Results, read_results
from lit_clip.evaluation.scores import evaluate_scores, unit_scores
from lit_clip.evaluation.targets import Targets
from lit_clip.retrieval.metrics import PairIndices, Ranks
from tests.evaluation.test_report import EVIL, a_set, results_of, whole_paper, zero_shot

N = 40


def targets(classes: int) -> Targets:
    """Images of classes of different sizes, some of them anchor frames, each with its own candidates."""
    labels = (torch.arange(N) ** 2) % classes
    return Targets(
        labels=labels,
        classes=classes,
        accepted=[{label, (label + 1) % classes} for label in labels.tolist()],
        neighbours=[(row, [row - 1, row + 1]) for row in range(1, N - 1, 3)],
        candidates=[[label, (label + 2) % classes] for label in labels.tolist()],
    )


def scores(classes: int) -> torch.Tensor:
    """Scores of which about half are right, one image's with a NaN."""
    truth = torch.nn.functional.one_hot(targets(classes).labels, classes)
    found = torch.randn(N, classes, generator=torch.Generator().manual_seed(0)) + truth
    found[3, 0] = torch.nan
    return found


@pytest.mark.parametrize("metric", ["top1", "mean_per_class", "mean_top1_top5", "lexicon", "pm"])
@pytest.mark.parametrize("classes", [3, 7])
def test_the_means_of_the_images_scores_are_the_metrics(metric: str, classes: int) -> None:
    metrics = evaluate_scores(metric, scores(classes), targets(classes))
    units = unit_scores(metric, scores(classes), targets(classes))
    assert {name: score.mean() for name, score in units.items()} == pytest.approx(metrics)
    columns = class_columns(metric, list(map(str, range(N))), scores(classes), targets(classes), units, 0)
    assert len(columns["key"]) == len(columns["score"]) == (13 if metric == "pm" else N)
    if metric in ("top1", "mean_per_class", "lexicon"):
        assert ((columns["truth"] == columns["prediction"]) == columns["score"]).all()
    if metric == "top1":
        assert columns["prediction"][3] == -1  # NaN


def test_a_metric_that_is_no_mean_over_images_keeps_predictions_without_scores() -> None:
    units = unit_scores("roc_auc", scores(2), targets(2))
    assert set(units) == {"top1", "mean_per_class"}
    assert "score" not in class_columns("roc_auc", list(map(str, range(N))), scores(2), targets(2), units, 0)


def test_a_caption_is_called_like_its_image_and_repeated_as_often_as_it_occurs() -> None:
    pairs = PairIndices(
        torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0])
    )
    ranks = Ranks(torch.tensor([4, 0]), torch.tensor([1, 2, 3]), *[torch.zeros(2)] * 2)
    columns = retrieval_columns(["a", "b"], pairs, ranks)
    assert columns["key"] == ["a", "b", "a#0", "b#0", "a#1", "a#2"]
    assert columns["rank"].tolist() == [4, 0, 1, 2, 3, 3]
    assert columns["direction"] == ["image_to_text"] * 2 + ["text_to_image"] * 4


def test_files_are_read_as_written_and_only_from_the_runs_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folds = [{"fold": np.array([n, n]), "key": ["ä.png", f"{n}"], "score": np.array([0.5, 1.0])} for n in range(2)]
    name = write_predictions(run, "a set", "zero_shot", joined(folds))
    assert name == "predictions/a set/zero_shot.parquet"
    found = read_predictions(run, "a set", "zero_shot")
    assert found["key"].tolist() == ["ä.png", "0", "ä.png", "1"]
    assert found["fold"].tolist() == [0, 0, 1, 1]
    assert found["score"].tolist() == [0.5, 1.0, 0.5, 1.0]
    with pytest.raises(InputError, match=r"no predictions/a set/retrieval\.parquet"):
        read_predictions(run, "a set", "retrieval")
    write_predictions(tmp_path / "run2", "b", "zero_shot", joined(folds))
    with pytest.raises(InputError, match="no predictions"):
        read_predictions(run, "../../run2/predictions/b", "zero_shot")
    (run / name).write_bytes(b"PAR1 no table")
    with pytest.raises(InputError, match=r"zero_shot\.parquet: not a readable file of predictions"):
        read_predictions(run, "a set", "zero_shot")


def test_names_of_files_that_are_not_utf_8_stay_distinct_keys(tmp_path: Path) -> None:
    keys = [name.decode("utf-8", "surrogateescape") for name in (b"caf\xe9.png", b"caf\xe8.png", b"caf\xc3\xa9.png")]
    folds = [{"key": keys, "score": np.ones(3)}] * 2
    for columns in (folds[0], joined(folds)):
        write_predictions(tmp_path, "a", "zero_shot", columns)
        found = read_predictions(tmp_path, "a", "zero_shot")["key"].tolist()
        assert set(found) == {r"caf\udce9.png", r"caf\udce8.png", "café.png"}


WHOLE: dict[str, Any] = {"value": 0.5, "metrics": {"top1": 0.5}, "confusions": [("cat", "dog", 3)], "errors": []}


def test_a_damaged_result_in_the_cache_is_computed_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.sets["pets"] = {"tasks": {}}
    results.add("pets", "zero_shot", "key", WHOLE)
    assert results.cached("pets", "zero_shot", "key") == json.loads(json.dumps(WHOLE))
    assert results.cached("pets", "zero_shot", "other key") is None
    results.add("pets", "linear_probe", "key", {**WHOLE, "metrics": ["top1"]})
    assert results.cached("pets", "linear_probe", "key") is None
    results.add("pets", "retrieval", "key", WHOLE)  # which leaves the others of the set
    assert results.cached("pets", "zero_shot", "key") == json.loads(json.dumps(WHOLE))


def test_a_result_whose_predictions_are_not_its_own_is_computed_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.sets["pets"] = {"tasks": {}}
    kept = predictions_entry(tmp_path, "pets", "zero_shot", {"key": ["a", "b"]}, ())
    results.add("pets", "zero_shot", "key", {**WHOLE, **kept})
    assert results.cached("pets", "zero_shot", "key") is not None
    write_predictions(tmp_path, "pets", "zero_shot", {"key": ["a", "c"]})
    assert results.cached("pets", "zero_shot", "key") is None
    (tmp_path / kept["predictions"]).unlink()
    assert results.cached("pets", "zero_shot", "key") is None


def test_a_damaged_result_of_another_run_is_one_line_before_the_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"model": {}, "sets": {"pets": {"tasks": {"zero_shot": {"confusions": [3]}}}}}))
    with pytest.raises(InputError, match=r"results.json: .*damaged \(sets.pets.tasks.*confusions"):
        read_results(tmp_path)


def other(value: float, **more: Any) -> dict[str, Any]:
    return results_of({"cifar10": a_set("CIFAR10", value), **more}, "RN50:openai")


def csv_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_no_cell_of_the_csv_is_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    evil = "=cmd|' /C calc'!A0"
    ours = results_of({evil: a_set("CIFAR10", zero_shot=zero_shot(0.85))}, f"+{evil}")
    ours["sets"][evil]["tasks"]["zero_shot"]["metrics"] = {"@metric": -0.25}
    write_tables(ours, tmp_path, {f"-{evil}": other(0.7), f"\t{evil}": other(0.6)})
    lines = csv_lines(tmp_path)
    assert {line["value"] for line in lines if line["run"] == "this run"} >= {"-0.25"}
    texts = [line[name] for line in lines for name in ("run", "model", "set", "task", "metric")]
    assert not [text for text in texts if text.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {f"'{evil}", f"'+{evil}", f"'-{evil}", f"'\t{evil}", "'@metric"} <= set(texts)  # read back whole


def test_the_csv_has_means_of_whole_groups_only(tmp_path: Path) -> None:
    write_tables(results_of(whole_paper()), tmp_path, {"half": results_of(dict(list(whole_paper().items())[:9]))})
    means = [line for line in csv_lines(tmp_path) if line["metric"] == "mean"]
    assert [(line["run"], line["set"], line["task"]) for line in means] == [
        ("this run", "the paper's 27 sets", "zero_shot")
    ]
    assert float(means[0]["value"]) == pytest.approx(0.5)


def check_syntax(text: str) -> list[list[str]]:
    """Parse tables as LaTeX would: environments and braces must balance, and rows fit the columns; return the cells."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    opened: list[str] = []
    columns, cells = 0, []
    for line in lines:
        depth = 0
        for token in re.findall(r"\\.|[{}]", line):
            depth += {"{": 1, "}": -1}.get(token, 0)
            assert depth >= 0, line
        assert depth == 0, line
        assert not re.findall(r"(?<!\\)[#_~^]|(?<!\\)%", line), line
        for command, name in re.findall(r"\\(begin|end)\{(\w+)\}", line):
            if command == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        head = re.search(r"\\begin\{tabular\}\{([lrc]+)\}", line)
        columns = len(head[1]) if head else columns
        if line.endswith(r"\\"):
            assert line[0] not in "[*"  # the row above would take them for its options
            row = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
            assert len(row) == columns
            cells.append([cell.strip() for cell in row])
    assert not opened
    return cells


def test_the_latex_table_has_intervals_and_bold_by_the_papers_rule() -> None:
    """Bold is what the interval of the best, 84.0 to 86.0, reaches."""
    ours = results_of({"cifar10": a_set("CIFAR10", 0.85), "mine": a_set("", 0.5)})
    text = latex(ours, {"b": other(0.845), "c": other(0.83)}, {})
    assert check_syntax(text) == [
        ["set", "metric", "this run", "b", "c"],
        [
            "cifar10",
            "top-1",
            r"\textbf{85.0} {\scriptsize [84.0, 86.0]}",
            r"\textbf{84.5} {\scriptsize [83.5, 85.5]}",
            r"83.0 {\scriptsize [82.0, 84.0]}",
        ],
        ["mine", "top-1", r"50.0 {\scriptsize [49.0, 51.0]}", "--", "--"],
    ]


def test_names_are_escaped() -> None:
    name = f"a_b & 100% #1 ~{{x}}^2 \\ {EVIL}"
    text = latex(results_of({name: a_set("", 0.5)}), {f"r_{EVIL}": results_of({name: a_set("", 0.4)})}, {})
    cells = check_syntax(text)
    assert cells[1][0] == escape(name).strip()
    assert r"a\_b \& 100\% \#1 \textasciitilde{}\{x\}\textasciicircum{}2 \textbackslash{}" in text
    assert "\x07" not in text
    for name in ("[red]", "*star"):
        assert check_syntax(latex(results_of({name: a_set()}), {}, {}))[1][0] == escape(name)
    assert check_syntax(latex(results_of({}), {}, {})) == []
