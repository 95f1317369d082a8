"""The command in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from lit_clip.cli.main import main
from tests.conftest import without_packaged_defaults


def forget_modules_of(folder: Path) -> None:
    """Remove the modules that were imported from a folder or those within it."""
    files = {name: str(getattr(module, "__file__", None)) for name, module in sys.modules.items()}
    for name in [name for name, file in files.items() if file.startswith(f"{folder}/")]:  # paths take 0.2 s
        del sys.modules[name]


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
        code = 0
        forget_modules_of(tmp_path.parent)  # another test's folder may have one of the same name
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        forget_modules_of(tmp_path)
        output = capsys.readouterr()
        return CompletedProcess(command, code, output.out, output.err)

    return run_main
