"""Text, YAML and JSON are read as UTF-8; an unreadable file is a one-line error that names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_clip.errors import InputError
from lit_clip.tools.text_files import read_json, read_text, read_yaml


def test_text_yaml_and_json_are_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for encoding in ("utf-8", "utf-8-sig"):  # editors of Windows put a mark in front
        path.write_text('{"a": [1, "é"]}', encoding=encoding)
        assert read_text(path) == '{"a": [1, "é"]}'
        assert read_yaml(path) == read_json(str(path)) == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_text, b"\xff", "file: not a readable UTF-8 text file"),
        (read_yaml, b"\xff", "file: not a readable YAML file"),
        (read_yaml, b"a: [", "file: not a readable YAML file"),
        (read_yaml, b"a: 1\nb: {c: 1, c: 2}", "'c' is there twice"),
        (read_yaml, b"{a: " * 5000, "nested too deeply"),
        (read_json, b"{", "file: not a readable JSON file"),
        (read_json, b"[" * 100_000, "file: not a readable JSON file"),
    ],
)
def test_an_unreadable_file_is_a_one_line_error_that_names_it(
    tmp_path: Path, read: Callable[..., Any], content: bytes, message: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "file", "--option")
    assert str(error.value).startswith(f"--option: {tmp_path}/file: ")
    assert "\n" not in str(error.value)


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(
        f"a: &a {{x: [{', '.join(map(str, range(200)))}], y: &y [1, 2]}}\nb: [*a, *y, *a]\nc:\n  <<: *a\n  z: 3\n"
    )
    values = read_yaml(tmp_path / "file")
    assert values["b"] == [values["a"], [1, 2], values["a"]]
    assert values["c"] == {**values["a"], "z": 3}


def test_a_missing_file_is_an_error_that_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").touch()
    with pytest.raises(InputError, match=r"^suites: .*siute.yaml: there is no such file; did you mean .*suite.yaml\?$"):
        read_yaml(tmp_path / "siute.yaml", "suites")
    with pytest.raises(InputError, match="not a readable JSON file"):
        read_json(tmp_path)
    (tmp_path / "suite.yaml").unlink()
    (tmp_path / "suite.yaml").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"suite.yaml: there is no such file$"):
        read_yaml(tmp_path / "suite.yaml")
