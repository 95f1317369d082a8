"""The results as CSV and LaTeX."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from lit_clip.evaluation.overview import rows
from lit_clip.evaluation.report.result_columns import result_columns
from lit_clip.evaluation.report.tables import escape, latex, write_tables
from tests.evaluation.test_report import EVIL, a_set, results_of, whole_paper, zero_shot


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


def test_runs_whose_paths_end_alike_have_a_column_each(tmp_path: Path) -> None:
    end = "/evaluation/of/the/last/checkpoint"
    runs = {f"a{end}": other(0.5), f"b{end}": other(0.6), "x/results.json": other(0.7)}
    ours = results_of({"cifar10": a_set("CIFAR10", 0.8)})
    names = [f"a{end}", f"b{end}", "x"]
    assert check_syntax(latex(ours, runs, {}))[0][2:] == ["this run", *names]
    titles = [column.title for column in result_columns(rows(ours), runs)]
    assert [title for title in titles if title in names] == names


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
