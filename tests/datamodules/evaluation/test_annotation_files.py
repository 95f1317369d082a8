"""MATLAB files are read by a process of its own, which a damaged one may crash."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from datamodules.evaluation.annotation_files import MAT_PROGRAM, read_mat
from lit_clip.errors import InputError
from lit_clip.tools.workers import loader


def put_scipy(folder: Path, code: str) -> str:
    """Write a package of SciPy's name, and return the folder to search for it."""
    (folder / "packages/scipy").mkdir(parents=True)
    (folder / "packages/scipy/__init__.py").touch()
    (folder / "packages/scipy/io.py").write_text(code, encoding="utf-8")
    return str(folder / "packages")


class _Errors:
    """The error for each file."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> str:
        with pytest.raises(InputError) as caught:
            read_mat(self.paths[row], "trnid")
        return str(caught.value)


def test_file_that_crashes_the_reader_is_one_line_in_a_data_worker_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SciPy itself follows a number of the file to any place of the memory, and crashes or not."""
    monkeypatch.syspath_prepend(put_scipy(tmp_path, "import ctypes\nctypes.string_at(0)\n"))
    path = tmp_path / "setid.mat"
    path.touch()
    errors: Any = _Errors(path, path)
    for found in (errors[0], *loader(errors, num_workers=1)):
        assert found == f"{path}: not a readable MATLAB file (SciPy's reader was ended by SIGSEGV); get it again"


def test_arrays_are_those_of_the_file_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"-\xff \xc3\xa9.mat")
    structs = np.array([("a.png", [1, 2]), ("b.png", 3)], dtype=[("name", object), ("numbers", object)])
    savemat(os.fspath(path), {"numbers": np.arange(6).reshape(1, 2, 3), "one": 7, "structs": structs}, appendmat=False)
    numbers, one, read = read_mat(path, "numbers", "one", "structs")
    assert numbers.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert one.tolist() == [7]
    assert read["name"].tolist() == ["a.png", "b.png"]
    assert [np.atleast_1d(each).tolist() for each in read["numbers"]] == [[1, 2], [3]]
    with pytest.raises(InputError, match="no variable 'two'"):
        read_mat(path, "two")


def test_reader_leaves_signals_to_its_parent_and_ends_with_it(tmp_path: Path) -> None:
    slow = put_scipy(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    asked = {"path": "x.mat", "names": ["x"], "searched": [slow, *sys.path]}
    code = (
        "import json, os, subprocess, sys\n"
        "asked = json.dumps({**json.loads(sys.argv[2]), 'parent': os.getpid()})\n"
        "subprocess.run([sys.executable, '-I', sys.argv[1], asked])\n"
    )
    command = [sys.executable, "-c", code, str(MAT_PROGRAM), json.dumps(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        reader = os.pidfd_open(int(parent.stdout.readline()))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.pidfd_send_signal(reader, number)
        assert not _has_ended(reader, seconds=0.5)
        parent.kill()
        assert _has_ended(reader, seconds=20)
    os.close(reader)


def _has_ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])
