"""The command in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from lit_clip.cli.main import main
from tests.conftest import without_packaged_defaults


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedProcess[str]]:
    """Like ``cli``, in this process, for commands that end before training: a fork takes several times as long."""

    def run_main(*command: str, environment: dict[str, str] | None = None) -> CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        for name, value in ({"COLUMNS": "200"} | (environment or {})).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["lit-clip", *(without_packaged_defaults(command) if command else [])])
        before, code = {*sys.modules}, 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        for name in {*sys.modules} - before:  # another test's folder may have a module of the same name
            if tmp_path in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]
        output = capsys.readouterr()
        return CompletedProcess(command, code, output.out, output.err)

    return run_main
