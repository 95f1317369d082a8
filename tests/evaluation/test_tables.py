"""The results as CSV and LaTeX."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from lit_clip.evaluation.overview import rows
from lit_clip.evaluation.report.result_columns import result_columns
from lit_clip.evaluation.report.tables import escape, latex, write_tables
from tests.evaluation.test_report import EVIL, a_set, probe, results_of, shots, whole_paper, zero_shot


def other(value: float, **more: Any) -> dict[str, Any]:
    return results_of({"cifar10": a_set("CIFAR10", value), **more}, "RN50:openai")


def csv_lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_one_value_a_line_with_its_interval(tmp_path: Path) -> None:
    few_shot = {**shots(0.5, 0.6), "head": [[1, [0.7, 0.8]]]}
    ours = results_of({"cifar10": a_set("CIFAR10", zero_shot=zero_shot(0.85), few_shot=few_shot)})
    write_tables(ours, tmp_path, {"runs/b": other(0.7)})
    found = {(line["run"], line["task"], line["shots"], line["metric"]): line for line in csv_lines(tmp_path)}
    assert list(found) == [
        ("this run", "zero_shot", "", "top1"),
        ("this run", "zero_shot", "", "top5"),
        ("this run", "few_shot", "1", "top1"),
        ("this run", "few_shot", "2", "top1"),
        ("this run", "few_shot_head", "1", "top1"),
        ("runs/b", "zero_shot", "", "top1"),
        ("runs/b", "zero_shot", "", "top5"),
    ]
    top1 = found["this run", "zero_shot", "", "top1"]
    assert (top1["model"], top1["set"], top1["images"]) == ("ViT-B-32-quickgelu:openai", "cifar10", "1000")
    numbers = [float(top1[name]) for name in ("value", "low", "high", "baseline")]
    assert numbers == pytest.approx([0.85, 0.84, 0.86, 0.1])
    top5 = found["this run", "zero_shot", "", "top5"]
    assert (top5["low"], top5["baseline"]) == ("", "")  # the baseline is the set's own metric's
    assert float(found["this run", "few_shot", "2", "top1"]["value"]) == pytest.approx(0.6)
    assert float(found["this run", "few_shot_head", "1", "top1"]["value"]) == pytest.approx(0.75)
    assert found["runs/b", "zero_shot", "", "top1"]["model"] == "RN50:openai"


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


def test_runs_whose_paths_end_alike_have_a_column_each(tmp_path: Path) -> None:
    end = "/evaluation/of/the/last/checkpoint"
    runs = {f"a{end}": other(0.5), f"b{end}": other(0.6), "x/results.json": other(0.7)}
    ours = results_of({"cifar10": a_set("CIFAR10", 0.8)})
    names = [f"a{end}", f"b{end}", "x"]
    assert check_syntax(latex(ours, runs, {}))[0][2:] == ["this run", *names]
    titles = [column.title for column in result_columns(rows(ours), runs)]
    assert [title for title in titles if title in names] == names


def test_the_latex_table_has_seeds_as_mean_and_deviation_and_a_table_for_each_task() -> None:
    ours = results_of({"cifar10": a_set("CIFAR10", zero_shot=zero_shot(0.8), linear_probe=probe(0.9))})
    runs = {"b: 1": other(0.5), "b: 2": other(0.6), "this: 2": other(0.9), "x": other(0.7)}
    text = latex(ours, runs, {"b": ["b: 1", "b: 2"], "this": ["this: 2"]})
    zero, best = check_syntax(text)[:2]
    assert zero[2:] == ["this run", "x", "b, 2 runs", "this, 2 runs"]
    assert best[2:] == [
        r"80.0 {\scriptsize [79.0, 81.0]}",
        r"70.0 {\scriptsize [69.0, 71.0]}",
        r"55.0 $\pm$ 7.1",
        r"\textbf{85.0} $\pm$ 7.1",
    ]
    assert re.findall(r"\\caption\{(.*)\}", text) == [r"Zero-shot, \%", r"Linear probe, \%"]


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
