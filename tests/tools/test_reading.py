"""Whatever a parser raises for somebody's file becomes one line that names the file; no pipe is waited for."""

import gc
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lit_clip.errors import BadSample, InputError
from lit_clip.models.config import Preprocessing
from lit_clip.tools.reading import LONGEST_REASON, naming, read_json, read_text, read_yaml, reading
from lit_clip.tools.untrusted import convert


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (struct.error("unpack requires 4 bytes"), "unpack requires 4 bytes"),
        (KeyError("weight_map"), "'weight_map' is missing"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "it needs more memory than there is"),
        (AssertionError(), "AssertionError"),
        (OSError(5, "Input/output error", "other"), "Input/output error"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_any_error_of_a_parser_is_one_line_that_names_the_file(tmp_path: Path, raised: Exception, reason: str) -> None:
    path = tmp_path / "a.bin"
    path.touch()
    with pytest.raises(InputError) as error, reading(path, "table", "--data", "write it again"):
        raise raised
    assert str(error.value) == f"--data: {path}: not a readable table ({reason}); write it again"
    assert error.value.__cause__ is raised


def test_what_to_do_about_the_content_is_not_said_of_a_file_that_may_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, reading(tmp_path, "table", hint="write it again"):
        raise PermissionError(13, "Permission denied")
    assert str(error.value) == f"{tmp_path}: not a readable table (Permission denied)"


def test_a_long_quotation_of_the_file_is_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, reading(tmp_path, "table"):
        raise ValueError("x" * 100_000)
    assert len(str(error.value)) < LONGEST_REASON + 100 + len(str(tmp_path))


@pytest.mark.parametrize("ours", [InputError("row 3: no caption"), BadSample("row 3", "no caption")])
def test_our_own_errors_pass_unchanged(tmp_path: Path, ours: InputError) -> None:
    with pytest.raises(InputError) as error, reading(tmp_path, "table"):
        raise ours
    assert error.value is ours


@pytest.mark.parametrize(
    ("message", "shown"), [("no row", "a.csv: no row"), ("a.csv: no row", "a.csv: no row"), ("a.csv2", "a.csv: a.csv2")]
)
def test_an_error_opens_with_the_name_once(message: str, shown: str) -> None:
    with pytest.raises(InputError) as error, naming("a.csv"):
        raise InputError(message)
    assert str(error.value) == shown


def test_ctrl_c_is_no_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "table"):
        raise KeyboardInterrupt


def test_a_pipe_is_refused_in_place_of_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    message = r"pipe\.txt: neither a file nor a folder"
    with pytest.raises(InputError, match=message), reading(tmp_path / "pipe.txt", "text file"):
        (tmp_path / "pipe.txt").read_text()


# Text, YAML and JSON are read as UTF-8; an unreadable file is a one-line error that names it.


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


# Values from files are checked before they are used.


class _Large(dict[str, object]):
    """A mapping that takes long to write out, such as an optimiser's moments."""

    def __repr__(self) -> NoReturn:
        raise AssertionError("written out")


def test_only_a_wrong_entry_is_written_out() -> None:
    convert(_Large(state=_Large()), dict[str, dict[str, object]])
    with pytest.raises(InputError, match=r"^x.*: must be a mapping, not a whole number"):
        convert(_Large(state=3), dict[str, dict[str, object]], "x")


def test_sizes_keep_their_ranges_and_leave_the_interpreter_whole() -> None:
    """A number with a range beside a tuple of fixed length crashed msgspec in the next garbage collection."""
    for turn in range(50):
        assert Preprocessing([32, 48]).image_size == (32, 48)  # pyright: ignore[reportArgumentType]  # as JSON gives it
        for size in (0, [0, 2], [32, 16385], [32], [32, 32, 32], True, "32", None):
            with pytest.raises(InputError, match="preprocessing.image_size"):
                Preprocessing(size)  # pyright: ignore[reportArgumentType]
        if turn % 10 == 0:  # each looks through all that the tests have imported
            gc.collect()
