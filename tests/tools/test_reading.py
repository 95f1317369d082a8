"""Whatever a parser raises for somebody's file becomes one line that names the file; no pipe is waited for."""

import os
import struct
from pathlib import Path

import pytest

from lit_clip.errors import BadSample, InputError
from lit_clip.tools.reading import LONGEST_REASON, naming, reading


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


def test_a_missing_file_is_named_with_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").touch()
    message = r"caption\.csv: there is no such file; did you mean .*captions\.csv\?"
    with pytest.raises(InputError, match=message), reading(tmp_path / "caption.csv", "table"):
        (tmp_path / "caption.csv").read_text()


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
