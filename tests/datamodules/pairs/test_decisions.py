"""A table of decisions is read as a person or a program leaves it, or is refused in one line that names the line."""

import csv
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.open_source import open_source
from datamodules.pairs.decisions import ALL_PAIRS, label_of, pair_text, read_decisions
from datamodules.pairs.findings import DataOptions, Finding, write_findings
from datamodules.pairs.kept import kept_pairs
from datamodules.pairs.source import Columns, PairSource
from lit_clip.errors import InputError
from lit_clip.tools.hashing import pair_hash

ROWS = 8


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairSource:
    """Eight rows in the working folder, whose images are not read; and ``t.csv``, which drops rows 1, 3 and 6."""
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_text("image,caption\n" + "".join(f"{row}.png,number {row}\n" for row in range(ROWS)))
    source = open_source("data.csv")
    lines = [Finding.of_pair(row, f"{row}.png", f"number {row}", 1) for row in (1, 3, 6)]
    lines.append(Finding.of_row(4, "4.png"))
    for line, decision in zip(lines, ("drop", "drop", "drop", "keep"), strict=True):
        line.add("copy", decision)
    counts, command = write_findings(Path("t.csv"), lines, source, DataOptions(["data.csv"], Columns(), None))
    assert (counts, command) == (
        {("copy", "drop"): 3, ("copy", "keep"): 1},
        "lit-clip fit --data.train data.csv --data.keep t.csv",
    )
    return source


def rows(source: PairSource, path: str = "t.csv") -> list[int]:
    kept = kept_pairs(source, path)
    return [int(kept.key(index)[:-4]) for index in range(len(kept))]


def lines_of(path: str = "t.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"))))


def save(lines: list[dict[str, Any]], path: str = "t.csv", delimiter: str = ",", encoding: str = "utf-8") -> None:
    with Path(path).open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)


def test_what_spreadsheets_and_programs_write_decides_the_same(source: PairSource) -> None:
    wanted = [0, 2, 4, 5, 7]
    assert rows(source) == wanted
    lines = [lines_of()[number] for number in (2, 0, 3, 1)]
    save([{"note": "mine, not yours", **line} for line in lines], "semicolons.csv", delimiter=";")
    save([line | {"row": f"{line['row']}.0", "decision": line["decision"].upper()} for line in lines], "tabs.tsv", "\t")
    save(lines, "sixteen.csv", encoding="utf-16")
    Path("t.jsonl").write_text("\n".join(json.dumps(line | {"row": int(line["row"])}) for line in lines))
    columns = {name: pa.array([line[name] for line in lines]) for name in lines[0]}
    numbers = pa.array([int(line["row"]) for line in lines])
    hashes = [pair_hash(f"{row}.png", "" if row == 4 else f"number {row}") for row in numbers.to_pylist()]
    variants: dict[str, dict[str, pa.Array]] = {
        "texts": {},
        "numbers": {"row": numbers, "pair": pa.array(hashes)},
        "floats": {"row": numbers.cast(pa.float64()), "copy_of_row": pa.array([None] * 4, pa.float64())},
        "large": {name: column.cast(pa.large_string()) for name, column in columns.items()},
        "categories": {name: columns[name].dictionary_encode() for name in ("decision", "data", "captions", "pair")},
    }
    for name, changes in variants.items():
        pq.write_table(pa.table(columns | changes), f"{name}.parquet")
    for path in ("semicolons.csv", "tabs.tsv", "sixteen.csv", "t.jsonl", *(f"{name}.parquet" for name in variants)):
        assert rows(source, path) == wanted, path
    save([line for line in lines if line["row"] != "3"], "fewer.csv")  # what is not listed is kept
    assert rows(source, "fewer.csv") == [0, 2, 3, 4, 5, 7]


def test_a_folder_of_parquet_files_as_spark_and_ray_write_is_one_table(source: PairSource) -> None:
    lines = pa.Table.from_pylist(lines_of())
    Path("kept").mkdir()
    for part, some in enumerate((lines[3:], lines[:0], lines[:3])):  # out of order, and one that Spark left empty
        pq.write_table(some, f"kept/part-0000{part}.snappy.parquet")
    Path("kept/_SUCCESS").touch()
    assert rows(source, "kept") == [0, 2, 4, 5, 7]
    pq.write_table(lines.drop_columns(["pair"]), "kept/part-00003.snappy.parquet")
    with pytest.raises(InputError, match=r"^kept/part-00003\.snappy\.parquet: not one column 'pair'"):
        rows(source, "kept")
    Path("kept/part-00003.snappy.parquet").rename("kept/._part-00003.snappy.parquet")  # as macOS's own are called
    assert rows(source, "kept") == [0, 2, 4, 5, 7]
    Path("none").mkdir()
    with pytest.raises(InputError, match=r"^none: no \.parquet file in this folder; give a table of"):
        rows(source, "none")


def test_two_tables_of_findings_are_joined_as_text_and_a_pair_that_either_drops_is_dropped(source: PairSource) -> None:
    lines = lines_of()
    other = [{**lines[0], "decision": "keep"}, {**lines[3], "decision": "drop"}]
    save([*lines, *other])
    assert rows(source) == [0, 2, 5, 7]


def test_a_row_is_left_out_with_the_last_of_its_captions(source: PairSource) -> None:
    Path("many.jsonl").write_text('{"image": "a.png", "caption": ["x", "y", "z"]}\n{"image": "b.png", "caption": "w"}')
    many = open_source("many.jsonl")
    lines = [Finding.of_pair(0, "a.png", caption, 3) for caption in "xyz"]
    for number in (1, 2, 3):
        for line in lines[:number]:
            line.decision = "drop"
        write_findings(Path("m.csv"), lines, many, DataOptions(["many.jsonl"], Columns(), None))
        kept = kept_pairs(many, "m.csv")
        assert len(kept) == (2 if number < 3 else 1)
        assert kept.captions(0) == (list("xyz")[number:] or ["w"])
        drawn = Counter(kept.text(0, random.Random(seed)).caption for seed in range(300))
        assert max(drawn.values()) < 180 or len(kept.captions(0)) == 1  # of two, each as often as the other


def test_a_line_that_a_person_adds_drops_a_row(source: PairSource) -> None:
    save([*lines_of(), {"decision": "drop", "captions": "all", "row": "0", "data": f"findings in {ROWS} rows"}])
    assert rows(source) == [2, 4, 5, 7]


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (0, {"decision": "maybe"}, r"row 2: decision is 'maybe'; write keep or drop"),
        (1, {"decision": ""}, r"row 3: decision is ''; write keep or drop"),
        (2, {"row": "99"}, r"row 4: row is 99, and the data have rows 0 to 7"),
        (2, {"row": "-1"}, r"row 4: row is -1, and the data have rows 0 to 7"),
        (2, {"row": "one"}, r"row 4: row is 'one', no whole number or hash"),
        (2, {"row": "9" * 400}, r"row 4: row is '9+\.\.\.9+', no whole number"),
        (2, {"row": ""}, r"row 4: row is empty; write its number again"),
        (0, {"pair": "1.23457E+18"}, r"row 2: pair is '1.23457E\+18', no whole number or hash"),
        (0, {"pair": "p00"}, r"row 2: pair is 'p00', no whole number or hash"),
        (0, {"pair": ""}, r"row 2: pair is empty; write it again, or decide on all captions"),
        (0, {"pair": pair_text(5)}, r"decided on row 1 with another key or caption than 1.png has now"),
        (0, {"row": "2"}, r"decided on row 2 with another key or caption than 2.png has now"),
        (3, {"captions": "some"}, r"row 5: captions is 'some'; write all, or such as 1 of 5"),
        (3, {"captions": "1 of 0"}, r"row 5: captions is '1 of 0'; write all"),
        (3, {"copy_of_row": "8"}, r"row 5: copy_of_row is 8, and the data have rows 0 to 7"),
        (0, {"data": "my data"}, r"row 2: data is 'my data', which no command writes"),
        (2, {"data": "findings in 9 rows"}, r"row 4: data is not 'findings in 8 rows' as in the lines before"),
        (2, {"data": "every pair of 8 rows"}, r"row 4: data is not 'findings in 8 rows' as in the lines before"),
        (3, {"row": "", "pair": ""}, r"row 5: was left out when the data were opened, and cannot be kept"),
    ],
)
def test_nonsense_is_one_line_that_names_it(
    source: PairSource, line: int, changes: dict[str, str], message: str
) -> None:
    lines = lines_of()
    lines[line] |= changes
    save(lines)
    with pytest.raises(InputError, match=rf"^data.keep: t.csv:? {message}|^data.keep: t.csv: {message}"):
        kept_pairs(source, "t.csv", "data.keep")


def test_tables_without_lines_columns_or_text_are_one_line(source: PairSource) -> None:
    lines, text = lines_of(), Path("t.csv").read_text(encoding="utf-8-sig")
    for name in ("row", "pair", "decision", "data", "captions"):
        save([{key: value for key, value in line.items() if key != name} for line in lines])
        with pytest.raises(InputError, match=rf"^t.csv: (not one|no) column '{name}'"):
            kept_pairs(source, "t.csv")
    Path("t.csv").write_text(text.replace("decision,finding", "decision,decision"))
    with pytest.raises(InputError, match="^t.csv: not one column 'decision'"):
        kept_pairs(source, "t.csv")
    for name, content in (("none.jsonl", ""), ("none.csv", "row,pair,decision,data")):
        Path(name).write_text(content)
        with pytest.raises(InputError, match=f"^{name}: has no lines"):
            kept_pairs(source, name)
    Path("t.csv").write_text(text.splitlines()[0])  # nothing was found
    assert rows(source) == list(range(ROWS))
    save([lines[0] | {"finding": "größer"}], encoding="cp1252")
    with pytest.raises(InputError, match="^t.csv row 2: not UTF-8 text"):
        kept_pairs(source, "t.csv")
    save([{**lines[0], "row": row, "pair": "", "captions": "all"} for row in range(ROWS)])
    with pytest.raises(InputError, match="^t.csv: keeps no pair; change some decisions to keep"):
        kept_pairs(source, "t.csv")
    for columns in (
        *({"row": pa.array([[1]])}, {"pair": pa.array([2**64 - 1], pa.uint64())}, {"row": pa.array([1.5])}),
        *({"decision": pa.array([1])}, {"captions": pa.array([-1])}),
    ):
        table = pa.table({**{name: [value] for name, value in lines[0].items()}, **columns})
        pq.write_table(table, "t.parquet")
        wrong = r"not a readable table of decisions|row is '1.5'|decision is 1; write keep|captions is -1; write all"
        with pytest.raises(InputError, match=rf"^t.parquet(:| row 0:) ({wrong})"):
            kept_pairs(source, "t.parquet")


def test_a_table_that_claims_endless_data_takes_no_memory(source: PairSource) -> None:
    size = 10**15 - 1
    save([line | {"data": f"findings in {size} rows"} for line in lines_of()])
    with pytest.raises(InputError, match=rf"t.csv: is of {size} rows, and the data have 8 rows"):
        kept_pairs(source, "t.csv")


def test_pairs_of_a_table_of_scores_that_a_person_removes_are_not_trained_on(source: PairSource) -> None:
    pairs = [pair_hash(f"{row}.png", f"number {row}") for row in range(ROWS)]
    data, decision = [label_of(source, ALL_PAIRS)] * ROWS, ["keep"] * ROWS
    table = pa.table({"row": range(ROWS), "pair": pairs, "decision": decision, "data": data})
    pq.write_table(table.take(pa.array([7, 5, 6])), "t.parquet")
    assert rows(source, "t.parquet") == [5, 6, 7]
    pq.write_table(table.set_column(1, "pair", pa.array([*pairs[:7], None])), "t.parquet")
    with pytest.raises(InputError, match="t.parquet row 7: has no score, so it cannot be kept; score the data again"):
        rows(source, "t.parquet")


def test_of_two_lines_on_one_pair_of_a_table_of_scores_one_that_drops_it_decides(source: PairSource) -> None:
    pairs = [pair_hash(f"{row}.png", f"number {row}") for row in range(ROWS)]
    lines = [(0, "keep"), (0, "drop"), (1, "drop"), (1, "keep"), (2, "keep"), (3, "keep"), (3, "keep"), (4, "drop")]
    columns = {"row": [row for row, _ in lines], "pair": [pairs[row] for row, _ in lines]}
    columns |= {"decision": [decision for _, decision in lines], "data": [label_of(source, ALL_PAIRS)] * len(lines)}
    pq.write_table(pa.table(columns), "t.parquet")
    assert rows(source, "t.parquet") == [2, 3]
    pq.write_table(pa.table({name: values[:4] for name, values in columns.items()}), "t.parquet")
    with pytest.raises(InputError, match="keeps no pair"):
        rows(source, "t.parquet")


def test_a_folder_in_which_a_second_table_was_written_is_refused(source: PairSource) -> None:
    columns = {"row": [*range(ROWS)], "pair": [*range(ROWS)], "data": [label_of(source, ALL_PAIRS)] * ROWS}
    Path("scores").mkdir()
    for file, kept in (("a", 5), ("b", 3)):
        decisions = ["keep"] * kept + ["drop"] * (ROWS - kept)
        pq.write_table(pa.table({**columns, "decision": decisions}), f"scores/{file}.parquet")
    with pytest.raises(InputError, match=r"^scores: keeps and drops a pair of row 4; its files are of several tables"):
        read_decisions(Path("scores"))
