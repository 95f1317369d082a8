"""Commands that a run prints can be pasted into a shell, whatever its folder is called."""

import shlex
from pathlib import Path

import pytest

from lit_clip.training.summary import print_next_steps, resume_command


@pytest.mark.parametrize("name", ["a run", "$(touch ran)", "it's", "[red]x", "a;b"])
def test_printed_commands_name_the_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    config, checkpoint = folder / "fit_config.yaml", folder / "last.ckpt"
    config.touch()
    print_next_steps(checkpoint, folder, [])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validate again: "))
    for command in (line.removeprefix("validate again: "), resume_command(checkpoint, folder)):
        assert shlex.split(command)[2:] == ["--config", str(config), "--ckpt_path", str(checkpoint)]
